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
// The digits lose nothing: a token's 128 values are scaled by one power of two so that the largest fills
// 30 bits and rounded there; from then on a group's sum is integer arithmetic, exact. A float16 value
// down to 2^-19 of the largest is in its digits entirely; what is left of smaller ones (and Inf, and NaN) is
// added at the end in float32. (Slicing a float into integer digits for exact matrix products is Ozaki's
// scheme, doi:10.1007/s11075-011-9478-1.)
#pragma once

#include "../problem.h"
#include "dequantize.cuh"
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

// Four neighbouring scales of type S, from shared memory, as floats.
template <typename S>
__device__ __forceinline__ void load_scales(float (&out)[4], uint32_t from) {
  if constexpr (sizeof(S) == 4) {
    const uint4 v = load_shared_16(from);
    out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
    out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
  } else {
    const uint2 raw = load_shared_8(from);
    const S* v = reinterpret_cast<const S*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(v[i]);
  }
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

  // 16 more bytes than a multiple of 128, so that ldmatrix's eight rows miss each other.
  static __host__ __device__ int stride(int units) { return units * kUnitK * 2 + 16; }
  static __host__ __device__ int sums_offset(int rows, int units) {
    return (rows * stride(units) + kZeroBytes + 127) / 128 * 128;
  }
  static __host__ __device__ int bytes(int rows, int units) {
    return sums_offset(rows, units) + (kHasZeros ? kTokens * units * kGroups * 4 : 0);
  }

  // x goes to shared memory as it is. Asynchronous: the caller commits, waits and synchronises.
  static __device__ void stage(char* shared, const XSlice& slice) {
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
  float total[L::kTiles][kColumnTiles][4];
  float group_sum[L::kTiles][kColumnTiles][4];

  __device__ FloatMath(const char* shared, const XSlice& slice)
      : shared(shared), slice(slice), lane(threadIdx.x % 32) {}

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
            constexpr uint32_t kOne = internal::encode_pair<T>(1, 0);
            a[q][r] = internal::fma2<T>(a[q][r], kOne, shift[2 * i + r % 2]);
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
    for (int m = 0; m < kColumnTiles; ++m) {
      if (m * kMmaColumns + lane % 8 < slice.rows) x_row[m] += kUnitK * 2;
    }
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

  // The codes stay where they are in the word's bytes, but for one shift by 2: the odd features of a
  // lane (b = 1, layout.h) come out 16 times too large, which their sums give back.
  static constexpr int kOddFactor = 16;
  static constexpr int kStartsPerGroup = kColumnTiles * kMmaColumns / 2;  // int4s: one a t and tile

  // Shared memory: the digits, one row a (token, digit); what the sums of a group start from, minus the
  // sum of its digits, for the two columns and the two features of a lane's accumulator; for every
  // token and unit its power of two; a flag a token: not all of it is finite.
  static __host__ __device__ int stride(int units) { return units * kUnitK + 16; }
  static __host__ __device__ int sums_offset(int rows, int units) {
    return (rows * kDigits * stride(units) + kZeroBytes + 127) / 128 * 128;
  }
  static __host__ __device__ int powers_offset(int rows, int units) {
    return sums_offset(rows, units) + units * kGroups * kStartsPerGroup * 16;
  }
  static __host__ __device__ int bytes(int rows, int units) {
    return (powers_offset(rows, units) + kTokens * units * 4 + 127) / 128 * 128;
  }

  // Values that the digits do not hold entirely, because they are Inf or NaN, or more than 2^30 times smaller
  // than the largest of their unit and not round: the kernel adds what is left of them at the end, one by
  // one. The sign of a unit's power of two says that it has some.
  static constexpr bool kLeavesOut = true;
  static __device__ __forceinline__ float left_out(float v, float up, float down) {
    return fabsf(v) <= kLargestFloat ? v - rintf(v * up) * down : v;
  }
  static __device__ const float* powers_of(const char* shared, const XSlice& slice, int token) {
    return reinterpret_cast<const float*>(shared + powers_offset(slice.rows, slice.stored_units)) +
           token * slice.stored_units;
  }

  // Returns whether this thread met a value that is not entirely in the digits.
  static __device__ bool stage(char* shared, const XSlice& slice) {
    const int lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    const int row_bytes = stride(slice.stored_units);
    bool leaves_out = false;
    write_zeros<kZeroBytes>(shared + slice.rows * kDigits * row_bytes);
    // A warp takes four units of a token at a time; eight lanes share a unit, 16 of K each.
    const int fours = (slice.units + 3) / 4;
    for (int task = threadIdx.x / 32; task < slice.rows * fours; task += warps) {
      const int token = task / fours;
      const int unit = task % fours * 4 + lane / 8;
      const T* from =
          static_cast<const T*>(slice.x) + static_cast<int64_t>(slice.first_token + token) * slice.k;
      const int k = (slice.first_unit + unit) * kUnitK + lane % 8 * 16;
      float v[16];
      load_8(v, from + k, unit < slice.units && k < slice.k);
      load_8(v + 8, from + k + 8, unit < slice.units && k + 8 < slice.k);
      leaves_out |= stage_chunk(shared, slice, token, unit, v);
    }
    return leaves_out;
  }
  static __device__ void stage_sums(char*, const XSlice&) {}

  static __device__ __forceinline__ void load_8(float* to, const T* from, bool real) {
    constexpr int kLoads = 8 * sizeof(T) / 16;
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      raw[i] = real ? reinterpret_cast<const uint4*>(from)[i] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(reinterpret_cast<const T*>(raw)[i]);
  }

  // 16 of K of one token; the eight lanes of a unit come here together.
  static __device__ __forceinline__ bool stage_chunk(char* shared, const XSlice& slice, int token, int unit,
                                                     float (&v)[16]) {
    const int lane = threadIdx.x % 32;
    const int row_bytes = stride(slice.stored_units);
    float* powers = reinterpret_cast<float*>(shared + powers_offset(slice.rows, slice.stored_units));
    int* starts = reinterpret_cast<int*>(shared + sums_offset(slice.rows, slice.stored_units));
    float largest = 0.f;
    bool leaves_out = false;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (!(fabsf(v[j]) <= kLargestFloat)) v[j] = 0.f, leaves_out = true;
      largest = fmaxf(largest, fabsf(v[j]));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // 2^power brings the largest below 2^30. Both it and its inverse stay normal numbers.
    const int power = max(-126, min(126, 29 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127)));
    const float up = __uint_as_float(static_cast<uint32_t>(power + 127) << 23);
    const float down = __uint_as_float(static_cast<uint32_t>(127 - power) << 23);
    // Byte j of word t of a digit's row is k = 2t + {0, 8, 1, 9}[j], as in a packed word (layout.h).
    uint32_t digit[kDigits][4];
    int sum[kDigits] = {0, 0, 0, 0};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t fixed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Balanced digits: adding 128 to each of the lower three makes bytes of them.
        const float scaled = v[2 * t + j / 2 + 8 * (j % 2)] * up;
        const int whole = __float2int_rn(scaled);
        leaves_out |= __int2float_rn(whole) != scaled;
        fixed[j] = (static_cast<uint32_t>(whole) + 0x00808080u) ^ 0x00808080u;
      }
      const uint32_t low01 = __byte_perm(fixed[0], fixed[1], 0x5140);   // digits 0, 0', 1, 1'
      const uint32_t high01 = __byte_perm(fixed[0], fixed[1], 0x7362);  // digits 2, 2', 3, 3'
      const uint32_t low23 = __byte_perm(fixed[2], fixed[3], 0x5140);
      const uint32_t high23 = __byte_perm(fixed[2], fixed[3], 0x7362);
      digit[0][t] = __byte_perm(low01, low23, 0x5410);
      digit[1][t] = __byte_perm(low01, low23, 0x7632);
      digit[2][t] = __byte_perm(high01, high23, 0x5410);
      digit[3][t] = __byte_perm(high01, high23, 0x7632);
#pragma unroll
      for (int d = 0; d < kDigits; ++d) sum[d] = __dp4a(static_cast<int>(digit[d][t]), 0x01010101, sum[d]);
    }
    constexpr int kLanesPerGroup = kGroupSize / 16;
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
#pragma unroll
      for (int step = 1; step < kLanesPerGroup; step *= 2)
        sum[d] += __shfl_xor_sync(0xffffffffu, sum[d], step);
    }
    const bool unit_leaves_out = __ballot_sync(0xffffffffu, leaves_out) >> (lane / 8 * 8) & 0xffu;
    if (unit >= slice.units) return false;
    if (lane % 8 == 0) powers[token * slice.stored_units + unit] = unit_leaves_out ? -down : down;
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      char* const to = shared + (token * kDigits + d) * row_bytes + unit * kUnitK + lane % 8 * 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(digit[d][0], digit[d][1], digit[d][2], digit[d][3]);
    }
    if (lane % kLanesPerGroup == 0) {
      const int group = unit * kGroups + lane % 8 / kLanesPerGroup;
#pragma unroll
      for (int d = 0; d < kDigits; ++d) {
        int* const start = starts + (group * kStartsPerGroup + (token * kDigits + d) / 2) * 4 + d % 2;
        start[0] = -sum[d];
        start[2] = -sum[d] * kOddFactor;
      }
    }
    return leaves_out;
  }

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
      const float value = fabsf(__uint_as_float(power)) * digit_value;
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
