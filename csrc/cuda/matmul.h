// The CUDA back end's entry points: plain pointers in, plain pointers out, no XLA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "../problem.h"

namespace jax_trirun::cuda {

struct MatmulArgs {
  Problem problem;
  const void* x = nullptr;  // [M, K], row-major, 16-byte aligned
  DType x_type = DType::kF16;
  const uint32_t* words = nullptr;  // [K / kBlockK, N / kBlockN, 128], 2-bit codes, 16-byte aligned
  const void* scales = nullptr;     // [groups, N], 16-byte aligned
  DType scale_type = DType::kF16;
  const void* zeros = nullptr;  // [groups, N] of scale_type, or null: every zero is Layout<2>::kZeroPoint
  void* y = nullptr;            // [M, N]
  DType y_type = DType::kF16;
  bool portable = false;    // only instructions that sm_80 has
  void* scratch = nullptr;  // scratch_bytes() of them, uninitialised

  bool all_of_x_type() const { return scale_type == x_type && y_type == x_type; }
};

// Empty if a kernel covers these sizes and types on a device with this compute capability (90 for 9.0);
// else one sentence: what was wanted and what came.
std::string why_unsupported(const MatmulArgs& args, int compute_capability);

// Bytes of scratch that matmul needs for these sizes; the same on every device.
int64_t scratch_bytes(const Problem& problem, DType x_type, bool portable);

// The kernel that `matmul` takes on a device with this compute capability and so many multiprocessors, its
// tiles and its split of K, for people to read. Only for what is supported.
std::string describe_kernel(const MatmulArgs& args, int compute_capability, int sms);

// Enqueues y = x @ (scales * (codes - zeros)) on `stream`: no allocation, no synchronisation, the same
// bits every time. Returns an empty string, or what went wrong.
std::string matmul(const MatmulArgs& args, cudaStream_t stream);

}  // namespace jax_trirun::cuda
