// Packed words -> the dense weight, for products that have no kernel of their own: plain pointers in, plain
// pointers out, no XLA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "../problem.h"

namespace jax_trirun::cuda {

struct DequantizeArgs {
  Problem problem;                  // its M counts for nothing
  const uint32_t* words = nullptr;  // [K / kBlockK, N / kBlockN, 128], 2-bit codes, 16-byte aligned
  const void* scales = nullptr;     // [groups, N], 16-byte aligned
  DType scale_type = DType::kF16;
  const void* zeros = nullptr;  // [groups, N] of scale_type, or null: every zero is Layout<2>::kZeroPoint
  void* w = nullptr;            // [K, N], 16-byte aligned
  DType w_type = DType::kF16;
};

// Enqueues w = scales * (codes - zeros) on `stream`, computed in float32 and rounded once: no allocation, no
// synchronisation. Any device since sm_80. Returns an empty string, or what went wrong.
std::string dequantize_weight(const DequantizeArgs& args, cudaStream_t stream);

}  // namespace jax_trirun::cuda
