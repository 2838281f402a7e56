// The kernel behind dequantize_weight.h. It moves 1/4 byte a weight in and 2 or 4 bytes out, so what counts is
// that memory sees nothing but whole sectors.
//
// The codes of one lane of a block are 16 rows of W by 4 neighbouring columns, and the lanes' patterns are moved
// copies of each other (asserted below). A thread takes as many lanes, next to each other in N, as make 16
// bytes of a row: one for float32, two for the 16-bit types. Its columns never change, so it reads its scales as one
// vector, and each of its 16 rows is one 16-byte store. Eight threads along N fill 128 bytes of a row, and the
// four that lie below each other in K take the rows between; no shared memory is needed to turn anything round.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../problem.h"

namespace jax_trirun::cuda {

struct DequantizeKernelArgs {
  const uint4* words;  // [k_blocks, n_blocks, Layout<2>::kLanes], each lane's four words
  const void* scales;
  const void* zeros;  // or null
  void* w;
  int64_t k, n, k_blocks, n_blocks;
  uint32_t group_parts;  // kSmallestGroup rows each, in a group
};

// The codes of one lane of a 2-bit block, as the layout has them.
struct LaneCodes {
  using L = Layout<2>;
  static constexpr int kColumns = 4;
  static constexpr int kRows = L::kWordsPerLane * L::kCodesPerWord / kColumns;
  static constexpr int kLanesAlongN = L::kBlockN / kColumns;
  static constexpr int kLanesAlongK = L::kLanes / kLanesAlongN;

  int row[kRows];  // the rows of lane 0, ascending

  static JAX_TRIRUN_HOST_DEVICE constexpr LaneCodes make() {
    LaneCodes codes = {};
    int found = 0;
    for (int k = 0; k < L::kBlockK; ++k) {
      if (L::locate(k, 0).word < L::kWordsPerLane) codes.row[found++] = k;
    }
    return codes;
  }
  // The first row and column of a lane.
  static JAX_TRIRUN_HOST_DEVICE constexpr CodePosition origin(int lane) {
    return L::code_at(lane * L::kWordsPerLane, 0);
  }
};

namespace internal {
// Lanes lie along K first, then along N, and each has the codes of lane 0, moved.
constexpr bool lanes_are_moved_copies() {
  using L = LaneCodes::L;
  for (int lane = 0; lane < L::kLanes; ++lane) {
    const CodePosition at = LaneCodes::origin(lane);
    if (at.n != lane / LaneCodes::kLanesAlongK * LaneCodes::kColumns) return false;
    if (at.k != LaneCodes::origin(lane % LaneCodes::kLanesAlongK).k) return false;
    for (int row = 0; row < LaneCodes::kRows; ++row) {
      for (int column = 0; column < LaneCodes::kColumns; ++column) {
        const int k = LaneCodes::make().row[row];
        const WordPosition first = L::locate(k, column);
        const WordPosition here = L::locate(at.k + k, at.n + column);
        if (first.word >= L::kWordsPerLane) return false;
        if (here.word != lane * L::kWordsPerLane + first.word || here.shift != first.shift) return false;
      }
    }
  }
  return true;
}
}  // namespace internal
static_assert(internal::lanes_are_moved_copies());

constexpr int kDequantizeThreads = 128;

// How many columns of W a thread has, and a thread block.
template <typename T>
constexpr int kThreadColumns = 16 / sizeof(T);
template <typename T>
constexpr int kBlockColumns = kDequantizeThreads / LaneCodes::kLanesAlongK * kThreadColumns<T>;

// Scales or zeros of neighbouring columns, of which `columns` are inside the matrix: all of them where rows are
// whole vectors.
template <bool kWhole, typename S, int kCount>
__device__ __forceinline__ void load_columns(float (&to)[kCount], const S* from, int columns) {
  if constexpr (kWhole) {
    constexpr int kBytes = kCount * sizeof(S);
    struct alignas(kBytes < 16 ? kBytes : 16) Vector {
      S v[kCount];
    };
    const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(vector.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < columns ? static_cast<float>(from[i]) : 0.0f;
  }
}

// Two values of a 16-bit type, as one register.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// One store of 16 bytes, whatever the compiler thinks of it: a plain one it takes apart into four.
__device__ __forceinline__ void store_global_16(void* to, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

template <bool kWhole, typename T, int kCount>
__device__ __forceinline__ void store_columns(T* to, const float (&from)[kCount], int columns) {
  if constexpr (kWhole) {
    if constexpr (sizeof(T) == 4) {
      store_global_16(to, {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                           __float_as_uint(from[3])});
    } else {
      store_global_16(to, {pair_of<T>(from[0], from[1]), pair_of<T>(from[2], from[3]),
                           pair_of<T>(from[4], from[5]), pair_of<T>(from[6], from[7])});
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < columns) to[i] = static_cast<T>(from[i]);
    }
  }
}

// code - zero for the code at `shift` of a word, rounded once. Under the exponent of 2^23 the code's bits are the
// float 2^23 + code * 2^shift as they lie there: no conversion, of which a multiprocessor makes sixteen a clock.
__device__ __forceinline__ float code_minus(float zero, uint32_t word, int shift) {
  constexpr uint32_t kTwoTo23 = 0x4B000000;
  if (shift >= 16) word >>= 16, shift -= 16;  // one shift for all of these
  const uint32_t raised = word & Layout<2>::kCodeMask << shift | kTwoTo23;
  return fmaf(__uint_as_float(raised) - __uint_as_float(kTwoTo23), 1.0f / (1 << shift), -zero);
}

// kWhole: N is a multiple of 8, so that no vector crosses the end of a row of W, scales or zeros.
// Thread blocks lie along N first, so that those that run together write neighbouring addresses.
template <typename T, typename S, bool kWhole>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_weight_kernel(const DequantizeKernelArgs args) {
  using L = Layout<2>;
  constexpr int kColumns = kThreadColumns<T>;
  constexpr int kLanes = kColumns / LaneCodes::kColumns;
  constexpr int kParts =
      L::kBlockK / kSmallestGroup;  // of a block's rows, each in one group: of the same scales
  constexpr int kPartRows = LaneCodes::kRows / kParts;
  constexpr LaneCodes kLane = LaneCodes::make();
  static_assert(kLane.row[kPartRows - 1] < kSmallestGroup && kLane.row[kPartRows] >= kSmallestGroup);

  const int64_t n =
      int64_t{blockIdx.x} * kBlockColumns<T> + threadIdx.x / LaneCodes::kLanesAlongK * kColumns;
  if (n >= args.n) return;
  const int columns = static_cast<int>(args.n - n < kColumns ? args.n - n : kColumns);
  const int along_k = threadIdx.x % LaneCodes::kLanesAlongK;
  const int first_lane =
      static_cast<int>(n % L::kBlockN) / LaneCodes::kColumns * LaneCodes::kLanesAlongK + along_k;
  const int first_row = LaneCodes::origin(along_k).k;

  float zero[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) zero[i] = L::kZeroPoint;

  for (int64_t k_block = blockIdx.y; k_block < args.k_blocks; k_block += gridDim.y) {
    const uint4* from = args.words + (k_block * args.n_blocks + n / L::kBlockN) * L::kLanes + first_lane;
    uint32_t words[kLanes][L::kWordsPerLane];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const uint4 loaded = __ldg(from + i * LaneCodes::kLanesAlongK);
      words[i][0] = loaded.x, words[i][1] = loaded.y, words[i][2] = loaded.z, words[i][3] = loaded.w;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int64_t k_part = k_block * L::kBlockK + part * kSmallestGroup;
      if (k_part >= args.k) break;
      const uint32_t group = static_cast<uint32_t>(k_part / kSmallestGroup) / args.group_parts;
      float scale[kColumns];
      load_columns<kWhole>(scale, static_cast<const S*>(args.scales) + group * args.n + n, columns);
      if (args.zeros != nullptr) {
        load_columns<kWhole>(zero, static_cast<const S*>(args.zeros) + group * args.n + n, columns);
      }
#pragma unroll
      for (int i = part * kPartRows; i < (part + 1) * kPartRows; ++i) {
        const int64_t k = k_block * L::kBlockK + kLane.row[i] + first_row;
        float value[kColumns];
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const WordPosition at = L::locate(kLane.row[i], column % LaneCodes::kColumns);
          const uint32_t word = words[column / LaneCodes::kColumns][at.word];
          value[column] = code_minus(zero[column], word, at.shift) * scale[column];
        }
        if (k < args.k) store_columns<kWhole>(static_cast<T*>(args.w) + k * args.n + n, value, columns);
      }
    }
  }
}

}  // namespace jax_trirun::cuda
