// What the decode kernel does with the words of one unit (128 of K): two ways to multiply, with the
// same interface.
//
//   FloatMath   the codes become float16 or bfloat16 pairs and meet the activations as they are
//               (mma.m16n8k16). Any number of tokens; about 200 instructions a unit of a warp.
//   SliceMath   the activations are cut into four int8 digits, the codes stay the bytes they are
//               (mma.m16n8k32). A pair of codes costs no conversion, so a unit is about 110
//               instructions, but a token takes four of the eight columns of an mma: for one to four
//               tokens.
//
// The digits lose nothing: 512 neighbouring values of a token are scaled by one power of two so that the largest
// fills 30 bits and rounded there; from then on a group's sum is integer arithmetic, exact. A float16 value
// down to 2^-19 of the largest is in its digits entirely; what is left of smaller ones (and Inf, and NaN) is
// added at the end in float32. (Slicing a float into integer digits for exact matrix products is Ozaki's
// scheme, doi:10.1007/s11075-011-9478-1.)
#pragma once

#include <type_traits>

#include "../problem.h"
#include "dequantize.cuh"
#include "hopper.cuh"
#include "ptx.cuh"

namespace jax_trirun::cuda {

inline constexpr int kUnitK = 128;  // of K a warp takes from its ring at a time
inline constexpr float kLargestFloat = 3.4028235e38f;
inline constexpr int kMmaColumns = 8;  // tokens, or digits of tokens, in one mma

// Splits a zero point: the codes take a 16-bit part that keeps c - z exact, `rest` is what the float32
// sums add for the remainder. In: rest = z. A zero far outside the codes goes to the sums whole: there
// |c - z| is as large as |z| and nothing cancels.
template <typename T>
__device__ __forceinline__ void split_zero(float& rest, uint32_t& shift, int zero_point) {
  constexpr float kGrid = __is_same(T, __half) ? 256.f : 32.f;  // steps in 1 that c - z can carry
  const float moved = fabsf(rest) < 4.f ? rintf((zero_point - rest) * kGrid) / kGrid : 0.f;
  rest = (zero_point - rest) - moved;
  const T half_word = static_cast<T>(moved);
  const uint16_t half_bits = *reinterpret_cast<const uint16_t*>(&half_word);
  shift = static_cast<uint32_t>(half_bits) << 16 | half_bits;
}

// The larger magnitudes of two pairs, half by half; NaN if there is one.
template <typename T>
__device__ __forceinline__ uint32_t max_magnitude(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<__is_same(T, __half), __half2, __nv_bfloat162>;
  const Pair most =
      __hmax2_nan(__habs2(*reinterpret_cast<const Pair*>(&a)), __habs2(*reinterpret_cast<const Pair*>(&b)));
  return *reinterpret_cast<const uint32_t*>(&most);
}

// Whether 30 bits from the largest value's first one on hold all 16 values entirely, as far as their exponents say; the
// same for all of the warp. `exponent` is that of the largest one, as in the bits of a float.
template <typename T>
__device__ __forceinline__ bool all_are_held(const uint32_t (&pairs)[8], uint32_t exponent) {
  constexpr int kMantissa = internal::Float16Format<T>::kMantissa;
  if constexpr (__is_same(T, __half)) {
    return exponent < 127 + 6;  // float16 ends at 2^-24
  } else {
    // With 2^15 more a magnitude less one is negative, but for zero, which does not count.
    uint32_t least = 0x7fff7fffu;
#pragma unroll
    for (uint32_t pair : pairs) least = __vmins2(least, ((pair & 0x7fff7fffu) | 0x80008000u) - 0x00010001u);
    const uint32_t least_exponent = (min(least << 1 >> 17, least << 17 >> 17) + 1) >> kMantissa;
    return __all_sync(0xffffffffu, least_exponent + (29 - kMantissa) >= exponent);
  }
}

// Two or four neighbouring scales of type S, from shared memory, as floats.
template <typename S, int kCount>
__device__ __forceinline__ void load_scales(float (&out)[kCount], uint32_t from) {
  static_assert(kCount == 2 || kCount == 4);
  constexpr int kWords = kCount * static_cast<int>(sizeof(S)) / 4;
  uint32_t raw[kWords];
  if constexpr (kWords == 4) {
    const uint4 v = load_shared_16(from);
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = load_shared_8(from);
    raw[0] = v.x, raw[1] = v.y;
  } else {
    raw[0] = load_shared_4(from);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = static_cast<float>(reinterpret_cast<const S*>(raw)[i]);
}

// The part of x a block keeps: `rows` tokens from `first_token` on, `units` units of K from
// `first_unit` on, of which `stored_units` have room.
struct XSlice {
  const void* x;
  int k;  // of the whole matrix
  int first_token, rows;
  int first_unit, units, stored_units;
};

// Where a row that does not exist reads: a unit's worth of zeros, met again in every unit.
template <int kRowBytes>
__device__ __forceinline__ void write_zeros(char* to) {
  if (threadIdx.x < kRowBytes / 16) reinterpret_cast<uint4*>(to)[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

// The shared address at which ldmatrix finds row `lane % 8` of a tile of `kMmaColumns` rows.
__device__ __forceinline__ uint32_t matrix_row(uint32_t base, uint32_t zeros, int row, int rows, int stride,
                                               int offset) {
  return (row < rows ? base + row * stride + offset : zeros) + threadIdx.x % 32 / 8 * 16;
}

template <int bits, typename T, typename S, int kTiles_, int kGroupSize, bool kHasZeros>
struct FloatMath {
  using L = Layout<bits>;
  static constexpr int kColumnTiles = kTiles_;
  static constexpr int kTokens = kColumnTiles * kMmaColumns;
  static constexpr int kGroups = kUnitK / kGroupSize;
  static constexpr int kZeroBytes = kUnitK * 2;
  static constexpr int kHalfK = L::kBlockK / L::kHalves;  // of K in a column of the lane's words
  static constexpr int kBlocks = kUnitK / L::kBlockK;

  static constexpr bool kStagesByCopy = true;
  struct FirstValues {};  // nothing: copies are asynchronous anyway
  static __device__ void load_first(FirstValues&, const XSlice&) {}

  // 16 more bytes than a multiple of 128, so that ldmatrix's eight rows miss each other.
  static __host__ __device__ int stride(int units) { return units * kUnitK * 2 + 16; }
  static __host__ __device__ int sums_offset(int rows, int units) {
    return (rows * stride(units) + kZeroBytes + 127) / 128 * 128;
  }
  static __host__ __device__ int bytes(int rows, int units) {
    return sums_offset(rows, units) + (kHasZeros ? kTokens * units * kGroups * 4 : 0);
  }

  // x goes to shared memory as it is. Asynchronous: the caller commits, waits and synchronises.
  static __device__ bool stage(char* shared, const XSlice& slice, const FirstValues&) {
    const int chunks = slice.units * (kUnitK / 8);
    const int row_bytes = stride(slice.stored_units);
    for (int row = 0; row < slice.rows; ++row) {
      const T* from =
          static_cast<const T*>(slice.x) + static_cast<int64_t>(slice.first_token + row) * slice.k;
      for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
        const int k = slice.first_unit * kUnitK + c * 8;
        const bool real = k < slice.k;
        copy_or_zero_async(shared_address(shared) + row * row_bytes + c * 16, from + (real ? k : 0), real);
      }
    }
    write_zeros<kZeroBytes>(shared + slice.rows * row_bytes);
    return false;  // nothing is left out
  }

  // The same by the copy engine, for one warp. Runs of K of all rows arrive at a barrier each, so that nobody waits
  // for more than its own first run; the barriers at `barriers` are initialised here. All blocks want the same
  // x: each begins somewhere else, `turn`, so that they do not queue for the same part of L2.
  static constexpr int kPiece = 2048;  // bytes of a row
  static constexpr int kPieceUnits = kPiece / (kUnitK * static_cast<int>(sizeof(T)));
  static constexpr int kBarriers = 8;
  // 2^shift pieces of a row belong to a barrier.
  static __device__ __forceinline__ int run_shift(const XSlice& slice) {
    int shift = 0;
    while (slice.units > kPieceUnits * kBarriers << shift) ++shift;
    return shift;
  }
  static __device__ void stage_bulk(char* shared, const XSlice& slice, uint32_t barriers, int turn) {
    const int lane = threadIdx.x % 32;
    const int bytes = real_bytes(slice);
    const int shift = run_shift(slice);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kBarriers; ++i) barrier_init(barriers + i * 8, 1);
      barrier_init_fence();
      const int run = kPiece << shift;
#pragma unroll
      for (int i = 0; i < kBarriers; ++i)
        barrier_arrive_expecting(barriers + i * 8, slice.rows * max(0, min(run, bytes - i * run)));
    }
    __syncwarp();
    const int pieces = (bytes + kPiece - 1) / kPiece;
    if (pieces == 0) return;
    // The lanes share the rows out first, then their pieces.
    constexpr int kLanesPerRow = 32 / kTokens;
    const int row = lane % kTokens;
    if (row >= slice.rows) return;
    const char* from = reinterpret_cast<const char*>(
        static_cast<const T*>(slice.x) +
        (static_cast<int64_t>(slice.first_token + row) * slice.k + slice.first_unit * kUnitK));
    const uint32_t to = shared_address(shared) + row * stride(slice.stored_units);
    int piece = (turn + lane / kTokens) % pieces;
    for (int i = lane / kTokens; i < pieces; i += kLanesPerRow) {
      copy_bulk(to + piece * kPiece, from + piece * kPiece, min(kPiece, bytes - piece * kPiece),
                barriers + (piece >> shift) * 8);
      piece += kLanesPerRow;
      while (piece >= pieces) piece -= pieces;
    }
  }
  // What no copy brings: zeros past K and for rows that do not exist.
  static __device__ void stage_rest(char* shared, const XSlice& slice) {
    const int row_bytes = stride(slice.stored_units);
    const int bytes = real_bytes(slice);
    for (int at = bytes + threadIdx.x * 16; at < slice.units * kUnitK * 2; at += blockDim.x * 16) {
      for (int row = 0; row < slice.rows; ++row)
        *reinterpret_cast<uint4*>(shared + row * row_bytes + at) = make_uint4(0, 0, 0, 0);
    }
    write_zeros<kZeroBytes>(shared + slice.rows * row_bytes);
  }
  static __device__ int real_bytes(const XSlice& slice) {  // of a row
    return max(0, min(slice.k - slice.first_unit * kUnitK, slice.units * kUnitK)) *
           static_cast<int>(sizeof(T));
  }

  // With zeros, sum(x) of every group, once x is there.
  static __device__ void stage_sums(char* shared, const XSlice& slice) {
    if constexpr (kHasZeros) {
      float* sums = reinterpret_cast<float*>(shared + sums_offset(slice.rows, slice.stored_units));
      const int groups = slice.units * kGroups;
      for (int i = threadIdx.x; i < groups * kTokens; i += blockDim.x) {
        const int token = i / groups;
        float sum = 0.f;
        if (token < slice.rows) {
          const T* from = reinterpret_cast<const T*>(shared + token * stride(slice.stored_units)) +
                          i % groups * kGroupSize;
          for (int k = 0; k < kGroupSize; ++k) sum += static_cast<float>(from[k]);
        }
        sums[token * slice.stored_units * kGroups + i % groups] = sum;
      }
      __syncthreads();
    }
  }

  static constexpr bool kLeavesOut = false;  // every value of x meets the words as it is

  const char* shared;
  const XSlice slice;
  const int lane;
  uint32_t x_row[kColumnTiles];
  uint32_t x_step[kColumnTiles];  // to the next unit
  float total[L::kTiles][kColumnTiles][4];
  float group_sum[L::kTiles][kColumnTiles][4];

  __device__ FloatMath(const char* shared, const XSlice& slice)
      : shared(shared), slice(slice), lane(threadIdx.x % 32) {
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m)
      x_step[m] = opaque(m * kMmaColumns + lane % 8 < slice.rows ? kUnitK * 2 : 0);
  }

  __device__ __forceinline__ void begin(int unit) {
    const int row_bytes = stride(slice.stored_units);
    const uint32_t base = shared_address(shared);
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      x_row[m] = matrix_row(base, base + slice.rows * row_bytes, m * kMmaColumns + lane % 8, slice.rows,
                            row_bytes, unit * kUnitK * 2);
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) total[i][m][c] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void multiply_half(const uint32_t (&word)[L::kTiles], int k, bool first,
                                                const uint32_t (&shift)[4]) {
    uint32_t b[kColumnTiles][4];
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) load_matrix_x4(b[m], x_row[m] + k * 2);
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
      uint32_t a[L::kStepsPerWord][4];
      dequantize_word<T, bits>(a, word[i]);
      if constexpr (kHasZeros) {
#pragma unroll
        for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a[q][r] = internal::add2<T>(a[q][r], shift[2 * i + r % 2]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m) {
          if (first && q == 0) {
            const float none[4] = {0.f, 0.f, 0.f, 0.f};
            mma_m16n8k16<T>(group_sum[i][m], a[q], b[m][2 * q], b[m][2 * q + 1], none);
          } else {
            mma_m16n8k16<T>(group_sum[i][m], a[q], b[m][2 * q], b[m][2 * q + 1], group_sum[i][m]);
          }
        }
      }
    }
  }

  // total += scale * (group_sum + rest * sum of x). `rest` is what the zero point leaves after its
  // 16-bit part went into the codes.
  __device__ __forceinline__ void add_group(const float (&scale)[4], const float (&rest)[4], int group) {
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      float sums[2] = {0.f, 0.f};
      if constexpr (kHasZeros) {
        const int stored = slice.stored_units * kGroups;
        const float* x_sums =
            reinterpret_cast<const float*>(shared + sums_offset(slice.rows, slice.stored_units)) + group;
        sums[0] = x_sums[(m * kMmaColumns + lane % 4 * 2) * stored];
        sums[1] = x_sums[(m * kMmaColumns + lane % 4 * 2 + 1) * stored];
      }
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float sum = group_sum[i][m][c];
          if constexpr (kHasZeros) sum = fmaf(rest[2 * i + c / 2], sums[c % 2], sum);
          total[i][m][c] = fmaf(scale[2 * i + c / 2], sum, total[i][m][c]);
        }
      }
    }
  }

  // One unit: the lane's words at `words` (shared), the scales of its features at `scales`, zeros
  // kGroups rows further.
  __device__ __forceinline__ void multiply(uint32_t words, uint32_t scales, int scale_row_bytes, int unit) {
    float scale[4];
    float rest[4] = {0.f, 0.f, 0.f, 0.f};
    uint32_t shift[4] = {0, 0, 0, 0};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint4 v = load_shared_16(words + block * (L::kWordsPerBlock * 4));
      const uint32_t halves[L::kHalves][L::kTiles] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
      for (int half = 0; half < L::kHalves; ++half) {
        const int k = block * L::kBlockK + half * kHalfK;
        const int group = k / kGroupSize;
        if (k % kGroupSize == 0) {
          load_scales<S>(scale, scales + group * scale_row_bytes);
          if constexpr (kHasZeros) {
            load_scales<S>(rest, scales + (kGroups + group) * scale_row_bytes);
#pragma unroll
            for (int i = 0; i < 4; ++i) split_zero<T>(rest[i], shift[i], L::kZeroPoint);
          }
        }
        multiply_half(halves[half], k, k % kGroupSize == 0, shift);
        // A group past K would multiply a scale that is not there, perhaps Inf, with zero.
        const bool real = kGroups == 1 || (slice.first_unit + unit) * kUnitK + k < slice.k;
        if ((k + kHalfK) % kGroupSize == 0 && real) add_group(scale, rest, unit * kGroups + group);
      }
    }
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) x_row[m] += x_step[m];
  }

  // write(token, sums of features 4g .. 4g + 3) for every token this lane answers for.
  template <typename Write>
  __device__ __forceinline__ void finish(const Write& write) {
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = m * kMmaColumns + lane % 4 * 2 + c;
        const float4 sums =
            make_float4(total[0][m][c], total[0][m][2 + c], total[1][m][c], total[1][m][2 + c]);
        if (token < slice.rows) write(token, sums);
      }
    }
  }
};

template <int bits, typename T, typename S, int kTiles_, int kGroupSize, bool kHasZeros>
struct SliceMath {
  static_assert(bits == 2, "a word of 2-bit codes is one int8 tile");
  using L = Layout<bits>;
  static constexpr int kDigits = 4;
  static constexpr int kColumnTiles = kTiles_;
  static constexpr int kTokensPerTile = kMmaColumns / kDigits;
  static constexpr int kTokens = kColumnTiles * kTokensPerTile;
  static constexpr int kGroups = kUnitK / kGroupSize;
  static constexpr int kZeroBytes = kUnitK;
  static constexpr int kBlocks = kUnitK / L::kBlockK;
  static constexpr int kHalfK = L::kBlockK / L::kHalves;

  static constexpr bool kStagesByCopy = false;
  static constexpr int kBarriers = 0;

  static constexpr int kUnitsAtOnce = 4;  // that a warp cuts
  static constexpr int kLanesPerUnit = 32 / kUnitsAtOnce;
  static constexpr int kValuesPerLane = kUnitK / kLanesPerUnit;

  // What a task leaves out: how many values, and of the first few where they are and what is left of them.
  static constexpr int kLeftKept = 7;
  struct LeftOut {
    int count;
    int k[kLeftKept];
    float rest[kLeftKept];
  };

  // The codes stay where they are in the word's bytes, but for one shift by 2: the odd features of a
  // lane (b = 1, layout.h) come out 16 times too large, which their sums give back.
  static constexpr int kOddFactor = 16;
  static constexpr int kStartsPerGroup = kColumnTiles * kMmaColumns / 2;  // int4s: one a t and tile

  // Shared memory: the digits, one row a (token, digit); what the sums of a group start from, minus the
  // sum of its values, for the two columns and the two features of a lane's accumulator (all of it in the
  // first of two columns, which are added anyway); for every token and unit its power of two; for every token and
  // task (see below) what it leaves out.
  static __host__ __device__ int stride(int units) { return units * kUnitK + 16; }
  static __host__ __device__ int sums_offset(int rows, int units) {
    return (rows * kDigits * stride(units) + kZeroBytes + 127) / 128 * 128;
  }
  static __host__ __device__ int powers_offset(int rows, int units) {
    return sums_offset(rows, units) + units * kGroups * kStartsPerGroup * 16;
  }
  static __host__ __device__ int left_offset(int rows, int units) {
    return powers_offset(rows, units) + kTokens * units * 4;
  }
  static __host__ __device__ int tasks_of(int units) { return (units + kUnitsAtOnce - 1) / kUnitsAtOnce; }
  static __host__ __device__ int bytes(int rows, int units) {
    return (left_offset(rows, units) + kTokens * tasks_of(units) * static_cast<int>(sizeof(LeftOut)) +
            127) /
           128 * 128;
  }

  // A token's power of two for a unit, and what it leaves out of a task; those of the next ones follow.
  static __device__ __forceinline__ float* power_of(char* shared, const XSlice& slice, int token,
                                                    int unit) {
    return reinterpret_cast<float*>(shared + powers_offset(slice.rows, slice.stored_units)) +
           (token * slice.stored_units + unit);
  }
  static __device__ __forceinline__ LeftOut* left_of(char* shared, const XSlice& slice, int token,
                                                     int task) {
    return reinterpret_cast<LeftOut*>(shared + left_offset(slice.rows, slice.stored_units)) +
           (token * tasks_of(slice.stored_units) + task);
  }

  // Values that the digits do not hold entirely, because they are Inf or NaN, or more than 2^30 times smaller
  // than the largest of their 512 and not round: the kernel adds what is left of them at the end, one by
  // one. Few among normally distributed values, but of products of such, as in a gated unit, one in some 60,000.
  static constexpr bool kLeavesOut = true;
  static __device__ __forceinline__ float rest_of(float v, float up, float down) {
    return fabsf(v) <= kLargestFloat ? v - rintf(v * up) * down : v;
  }

  // add(k, v): v is left of the value at k, counted from the slice's first.
  template <typename Add>
  static __device__ __forceinline__ void for_each_left_out(char* shared, const XSlice& slice, int token,
                                                           const Add& add) {
    const LeftOut* left = left_of(shared, slice, token, 0);
    const float* powers = power_of(shared, slice, token, 0);
    const int begin = slice.first_unit * kUnitK;
    const int end = min(slice.k - begin, slice.units * kUnitK);
    const T* x =
        static_cast<const T*>(slice.x) + static_cast<int64_t>(slice.first_token + token) * slice.k + begin;
    for (int task = 0; task < tasks_of(slice.units); ++task) {
      const int count = left[task].count;
      if (count <= kLeftKept) {
#pragma unroll 2
        for (int i = 0; i < count; ++i) add(left[task].k[i], left[task].rest[i]);
      } else {
        const float down = powers[task * kUnitsAtOnce];
        const float up = 1.f / down;
        const int first = task * kUnitsAtOnce * kUnitK;
#pragma unroll 1
        for (int k = first; k < min(first + kUnitsAtOnce * kUnitK, end); ++k) {
          const float rest = rest_of(static_cast<float>(x[k]), up, down);
          if (rest != 0.f) add(k, rest);
        }
      }
    }
  }

  // Cutting: a task is four units of a token for a warp, 16 neighbouring values for a lane. The values of the first few
  // tasks are asked for before the words are: behind those they would wait for some 2,500 clocks each.
  static constexpr int kAhead = kTokens > 2 ? 4 : 2;
  struct Values {
    uint4 half[2];
  };
  struct FirstValues {
    Values task[kAhead];
  };

  // Which token, and which of its units, a warp cuts.
  struct Task {
    int token, unit;
    __device__ __forceinline__ void advance(const XSlice& slice) {
      unit += blockDim.x / 32 * kUnitsAtOnce;
      if (unit >= slice.units) unit = threadIdx.x / 32 * kUnitsAtOnce, ++token;
    }
    __device__ __forceinline__ bool is_real(const XSlice& slice) const { return token < slice.rows; }
  };
  static __device__ __forceinline__ Task first_task(const XSlice& slice) {
    const int unit = threadIdx.x / 32 * kUnitsAtOnce;
    return {unit < slice.units ? 0 : slice.rows, unit};
  }
  static __device__ __forceinline__ Values load(const XSlice& slice, const Task& task) {
    const int k = task.unit * kUnitK + threadIdx.x % 32 * kValuesPerLane;
    const int begin = slice.first_unit * kUnitK;
    const int end = min(slice.k - begin, slice.units * kUnitK);
    const T* const slice_x =
        static_cast<const T*>(slice.x) + (static_cast<int64_t>(slice.first_token) * slice.k + begin);
    const uint4* const from = reinterpret_cast<const uint4*>(slice_x + (task.token * slice.k + k));
    Values values = {};
    if (task.is_real(slice)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (k + i * 8 < end) values.half[i] = __ldg(from + i);
      }
    }
    return values;
  }
  static __device__ __forceinline__ void load_first(FirstValues& first, const XSlice& slice) {
    Task task = first_task(slice);
    // Few warps have more than one, and every instruction delays the words.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      first.task[i] = {};
      if (i == 0 || task.is_real(slice)) first.task[i] = load(slice, task);
      task.advance(slice);
    }
  }

  // Returns whether this thread's warp met a value that is not entirely in the digits.
  static __device__ bool stage(char* shared, const XSlice& slice, const FirstValues& first) {
    write_zeros<kZeroBytes>(shared + slice.rows * kDigits * stride(slice.stored_units));
    bool leaves_out = false;
    FirstValues values = first;  // of this task and those after it
    Task task = first_task(slice);
    Task ahead = task;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead.advance(slice);
    // Mostly all values are here already, and a short loop is there sooner than a long one.
#pragma unroll 1
    while (task.is_real(slice)) {
      leaves_out |= cut(shared, slice, task, values.task[0]);
#pragma unroll
      for (int i = 1; i < kAhead; ++i) values.task[i - 1] = values.task[i];
      values.task[kAhead - 1] = load(slice, ahead);
      task.advance(slice);
      ahead.advance(slice);
    }
    return leaves_out;
  }

  // The largest magnitude of a warp's values, as the bits of a T.
  static __device__ __forceinline__ uint32_t largest_of(const uint32_t (&pairs)[8]) {
    uint32_t most = max_magnitude<T>(pairs[0], pairs[1]);
#pragma unroll
    for (int i = 2; i < 8; ++i) most = max_magnitude<T>(most, pairs[i]);
    return __reduce_max_sync(0xffffffffu, max(most >> 16, most & 0xffffu));
  }

  static __device__ __forceinline__ bool cut(char* shared, const XSlice& slice, const Task& task,
                                             const Values& values) {
    const int lane = threadIdx.x % 32;
    const uint4(&h)[2] = values.half;
    uint32_t pairs[8] = {h[0].x, h[0].y, h[0].z, h[0].w, h[1].x, h[1].y, h[1].z, h[1].w};
    uint32_t largest = largest_of(pairs);
    constexpr int kMantissa = internal::Float16Format<T>::kMantissa;
    constexpr uint32_t kInfinity = 0x7fffu >> kMantissa << kMantissa;
    const bool all_finite = largest < kInfinity;
    if (!all_finite) {  // the digits of Inf and NaN are zero
#pragma unroll
      for (uint32_t& pair : pairs) {
        if ((pair & 0x7fffu) >= kInfinity) pair &= 0xffff0000u;
        if ((pair >> 16 & 0x7fffu) >= kInfinity) pair &= 0xffffu;
      }
      largest = largest_of(pairs);
    }
    // A power of two that brings the largest below 2^30; it and its inverse are normal numbers.
    const T largest_value = *reinterpret_cast<const T*>(&largest);
    const uint32_t exponent = max(__float_as_uint(static_cast<float>(largest_value)) >> 23, 30u);
    const float up = __uint_as_float((283 - exponent) << 23);
    const float down = __uint_as_float((exponent - 29) << 23);
    // Balanced digits: adding 128 to each of the lower three makes bytes of them.
    const auto fixed_of = [&](int i, int j) {
      const T v = reinterpret_cast<const T*>(&pairs[i])[j];
      return __float2int_rn(static_cast<float>(v) * up);
    };
    // Byte j of word t of a digit's row is k = 2t + {0, 8, 1, 9}[j], as in a packed word (layout.h).
    uint32_t digit[kDigits][4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t fixed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        fixed[j] = static_cast<uint32_t>(fixed_of(t + j % 2 * 4, j / 2)) + 0x00808080u;
      const uint32_t low01 = __byte_perm(fixed[0], fixed[1], 0x5140);   // digits 0, 0', 1, 1'
      const uint32_t high01 = __byte_perm(fixed[0], fixed[1], 0x7362);  // digits 2, 2', 3, 3'
      const uint32_t low23 = __byte_perm(fixed[2], fixed[3], 0x5140);
      const uint32_t high23 = __byte_perm(fixed[2], fixed[3], 0x7362);
      digit[0][t] = __byte_perm(low01, low23, 0x5410) ^ 0x80808080u;
      digit[1][t] = __byte_perm(low01, low23, 0x7632) ^ 0x80808080u;
      digit[2][t] = __byte_perm(high01, high23, 0x5410) ^ 0x80808080u;
      digit[3][t] = __byte_perm(high01, high23, 0x7632);
    }
    LeftOut* const left = left_of(shared, slice, task.token, task.unit / kUnitsAtOnce);
    int count = 0;
    if (!all_finite || !all_are_held<T>(pairs, exponent)) {
#pragma unroll
      for (int i = 0; i < kValuesPerLane; ++i) {
        const float rest =
            rest_of(static_cast<float>(reinterpret_cast<const T*>(values.half)[i]), up, down);
        const uint32_t lanes = __ballot_sync(0xffffffffu, rest != 0.f);
        const int at = count + __popc(lanes & ((1u << lane) - 1));
        if (rest != 0.f && at < kLeftKept) {
          left->k[at] = task.unit * kUnitK + lane * kValuesPerLane + i;
          left->rest[at] = rest;
        }
        count += __popc(lanes);
      }
    }
    if (lane == 0) left->count = count;
    int sum[2] = {0, 0};  // of the number that the lower two digits make, and of that of the higher two
#pragma unroll
    for (int d = kDigits - 1; d >= 0; --d) {
      if (d % 2 == 0) sum[d / 2] *= 256;
#pragma unroll
      for (int t = 0; t < 4; ++t)
        sum[d / 2] = __dp4a(static_cast<int>(digit[d][t]), 0x01010101, sum[d / 2]);
    }
    // Over the lanes of a group: of two neighbours one adds up the lower, one the higher.
    constexpr int kLanesPerGroup = kGroupSize / kValuesPerLane;
    const bool is_high = lane % 2 != 0;
    int sum_of_group =
        (is_high ? sum[1] : sum[0]) + __shfl_xor_sync(0xffffffffu, is_high ? sum[0] : sum[1], 1);
#pragma unroll
    for (int step = 2; step < kLanesPerGroup; step *= 2)
      sum_of_group += __shfl_xor_sync(0xffffffffu, sum_of_group, step);
    if (task.unit + lane / kLanesPerUnit < slice.units) {
      const int row_bytes = stride(slice.stored_units);
      char* const to =
          shared + task.token * kDigits * row_bytes + task.unit * kUnitK + lane * kValuesPerLane;
#pragma unroll
      for (int d = 0; d < kDigits; ++d)
        *reinterpret_cast<uint4*>(to + d * row_bytes) =
            make_uint4(digit[d][0], digit[d][1], digit[d][2], digit[d][3]);
      if (lane % kLanesPerGroup < 2) {
        int4* const start = reinterpret_cast<int4*>(shared + sums_offset(slice.rows, slice.stored_units)) +
                            (task.unit * kGroups + lane / kLanesPerGroup) * kStartsPerGroup +
                            task.token * kDigits / 2;
        start[is_high] = make_int4(-sum_of_group, 0, -sum_of_group * kOddFactor, 0);
      }
      if (lane % kLanesPerUnit == 0) {
        *power_of(shared, slice, task.token, task.unit + lane / kLanesPerUnit) = down;
      }
    }
    return count != 0;
  }
  static __device__ void stage_sums(char*, const XSlice&) {}

  const char* shared;
  const XSlice slice;
  const int lane;
  uint32_t digit_row[kColumnTiles];
  uint32_t power_at;  // of this lane's token in tile 0
  uint32_t start_at;  // of this lane's two columns in tile 0
  float total[L::kTiles][kColumnTiles][2];
  int group_sum[L::kTiles][kColumnTiles][4];

  __device__ SliceMath(const char* shared, const XSlice& slice)
      : shared(shared), slice(slice), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void begin(int unit) {
    const int row_bytes = stride(slice.stored_units);
    const uint32_t base = shared_address(shared);
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      digit_row[m] = matrix_row(base, base + slice.rows * kDigits * row_bytes, m * kMmaColumns + lane % 8,
                                slice.rows * kDigits, row_bytes, unit * kUnitK);
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) total[i][m][0] = total[i][m][1] = 0.f;
    }
    power_at = base + powers_offset(slice.rows, slice.stored_units) +
               (lane % 4 / 2 * slice.stored_units + unit) * 4;
    start_at = base + sums_offset(slice.rows, slice.stored_units) +
               (unit * kGroups * kStartsPerGroup + lane % 4) * 16;
  }

  __device__ __forceinline__ void multiply(uint32_t words, uint32_t scales, int scale_row_bytes, int unit) {
    const float digit_value = lane % 2 ? 65536.f : 1.f;  // of the lower of the lane's two digits
    uint32_t b[kColumnTiles][4];
    int start[kColumnTiles][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint4 v = load_shared_16(words + block * (L::kWordsPerBlock * 4));
      const uint32_t halves[L::kHalves][L::kTiles] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
      for (int m = 0; m < kColumnTiles; ++m) load_matrix_x4(b[m], digit_row[m] + block * L::kBlockK);
#pragma unroll
      for (int half = 0; half < L::kHalves; ++half) {
        const int k = block * L::kBlockK + half * kHalfK;
        const int group = k / kGroupSize;
        const bool first = k % kGroupSize == 0;
        if (first) {
#pragma unroll
          for (int m = 0; m < kColumnTiles; ++m) {
            const uint4 v =
                load_shared_16(start_at + (group * kStartsPerGroup + m * (kMmaColumns / 2)) * 16);
            start[m][0] = v.x, start[m][1] = v.y, start[m][2] = v.z, start[m][3] = v.w;
          }
        }
#pragma unroll
        for (int i = 0; i < L::kTiles; ++i) {
          const uint32_t word = halves[half][i];
          const uint32_t a[4] = {word & 0x03030303u, word & 0x30303030u, word >> 2 & 0x03030303u,
                                 word >> 2 & 0x30303030u};
#pragma unroll
          for (int m = 0; m < kColumnTiles; ++m) {
            if (first) {
              mma_m16n8k32(group_sum[i][m], a, b[m][2 * half], b[m][2 * half + 1], start[m]);
            } else {
              mma_m16n8k32(group_sum[i][m], a, b[m][2 * half], b[m][2 * half + 1], group_sum[i][m]);
            }
          }
        }
        const bool real = kGroups == 1 || (slice.first_unit + unit) * kUnitK + k < slice.k;
        if ((k + kHalfK) % kGroupSize == 0 && real)
          add_group(scales, scale_row_bytes, group, digit_value, start);
      }
    }
    power_at += 4;
    start_at += kGroups * kStartsPerGroup * 16;
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      if (m * kMmaColumns + lane % 8 < slice.rows * kDigits) digit_row[m] += kUnitK;
    }
  }

  // A sum of 128 products of a code below 4 and a digit fits 17 bits, so two neighbouring digits fit the
  // 24 bits of a float together.
  __device__ __forceinline__ void add_group(uint32_t scales, int scale_row_bytes, int group,
                                            float digit_value, const int (&start)[kColumnTiles][4]) {
    float scale[4];
    load_scales<S>(scale, scales + group * scale_row_bytes);
    float zero[4];
    if constexpr (kHasZeros) load_scales<S>(zero, scales + (kGroups + group) * scale_row_bytes);
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      const uint32_t power = load_shared_4(power_at + m * kTokensPerTile * slice.stored_units * 4);
      const float value = __uint_as_float(power) * digit_value;
      const float values[2] = {value, value * (1.f / kOddFactor)};
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float sum = static_cast<float>(group_sum[i][m][2 * b] + 256 * group_sum[i][m][2 * b + 1]);
          if constexpr (kHasZeros) {
            const float minus_sum_of_x = static_cast<float>(start[m][2 * b] + 256 * start[m][2 * b + 1]);
            sum = fmaf(zero[2 * i + b] - L::kZeroPoint, minus_sum_of_x, sum);
          }
          total[i][m][b] = fmaf(sum * values[b], scale[2 * i + b], total[i][m][b]);
        }
      }
    }
  }

  template <typename Write>
  __device__ __forceinline__ void finish(const Write& write) {
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m) {
      float sum[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] = total[j / 2][m][j % 2];
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 1);
      }
      const int token = m * kTokensPerTile + lane % 4 / 2;
      if (lane % 2 == 0 && token < slice.rows) write(token, make_float4(sum[0], sum[1], sum[2], sum[3]));
    }
  }
};

}  // namespace jax_trirun::cuda
