// What matmul.cu asks of the portable_gemm_*.cu files: one function for each type of x, so that they compile side by
// side.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "matmul.h"

namespace jax_trirun::cuda {

// Enqueues y = x @ W on a device with `sms` multiprocessors. Returns an empty string, or what went wrong.
std::string launch_portable_gemm_f16(const MatmulArgs& args, int sms, cudaStream_t stream);
std::string launch_portable_gemm_bf16(const MatmulArgs& args, int sms, cudaStream_t stream);

}  // namespace jax_trirun::cuda
