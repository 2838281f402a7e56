#include "portable_gemm_launch.cuh"

namespace jax_trirun::cuda {

std::string launch_portable_gemm_f16(const MatmulArgs& args, int sms, cudaStream_t stream) {
  return launch_portable_gemm_of<__half>(args, sms, stream);
}

}  // namespace jax_trirun::cuda
