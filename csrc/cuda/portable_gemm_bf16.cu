#include "portable_gemm_launch.cuh"

namespace jax_trirun::cuda {

std::string launch_portable_gemm_bf16(const MatmulArgs& args, int sms, cudaStream_t stream) {
  return launch_portable_gemm_of<__nv_bfloat16>(args, sms, stream);
}

}  // namespace jax_trirun::cuda
