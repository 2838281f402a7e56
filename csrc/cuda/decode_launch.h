// What matmul.cu asks of the decode_*.cu files: one function for each pair of types, so that they
// compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "plan.h"

namespace jax_trirun::cuda {

struct DecodeArgs;

struct DecodeLaunch {
  Problem problem;
  DecodeKernel kernel;
  int sms;
  int shared_memory;  // bytes a thread block may have
  void* scratch;
  cudaStream_t stream;
};

// The answer when no split of K brings a block's share of x into shared memory.
inline constexpr char kDoesNotFit[] = "does not fit";

inline std::string describe(const char* what, cudaError_t error) {
  return std::string("matmul: ") + what + " failed: " + cudaGetErrorString(error);
}

std::string launch_decode_f16_f16(const DecodeLaunch& launch, const DecodeArgs& args);
std::string launch_decode_f16_f32(const DecodeLaunch& launch, const DecodeArgs& args);
std::string launch_decode_bf16_bf16(const DecodeLaunch& launch, const DecodeArgs& args);
std::string launch_decode_bf16_f32(const DecodeLaunch& launch, const DecodeArgs& args);

}  // namespace jax_trirun::cuda
