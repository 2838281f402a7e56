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

}  // namespace jax_trirun::cuda
