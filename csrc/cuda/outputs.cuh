// Float32 sums -> y, four or two neighbouring features of a token at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_trirun::cuda {

template <typename T>
__device__ __forceinline__ void store_outputs(void* y, int64_t index, const float4& v, bool as_f32) {
  if (as_f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + index) = v;
  } else {
    T packed[4] = {static_cast<T>(v.x), static_cast<T>(v.y), static_cast<T>(v.z), static_cast<T>(v.w)};
    *reinterpret_cast<uint2*>(static_cast<T*>(y) + index) = *reinterpret_cast<uint2*>(packed);
  }
}

// Two of them.
template <typename T>
__device__ __forceinline__ void store_outputs(void* y, int64_t index, const float2& v, bool as_f32) {
  if (as_f32) {
    *reinterpret_cast<float2*>(static_cast<float*>(y) + index) = v;
  } else {
    T packed[2] = {static_cast<T>(v.x), static_cast<T>(v.y)};
    *reinterpret_cast<uint32_t*>(static_cast<T*>(y) + index) = *reinterpret_cast<uint32_t*>(packed);
  }
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The sum of a tile's parts, which thread blocks `first` to `last` made (gemm_walk.h), in their order: of the elements
// at `from` in each, parts being `part_size` apart.
__device__ __forceinline__ float4 sum_of_parts(const float4* from, int64_t part_size, int first, int last) {
  constexpr int kAtOnce = 8;  // on their way
  float4 sum = {};
  for (int block = first; block <= last; block += kAtOnce) {
    float4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      // The start of a tile is a block's second part.
      const int part = 2 * (block + i) + (block + i == first);
      if (block + i <= last) v[i] = __ldcg(from + part * part_size);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (block + i <= last) sum = block + i == first ? v[i] : sum + v[i];
    }
  }
  return sum;
}

}  // namespace jax_trirun::cuda
