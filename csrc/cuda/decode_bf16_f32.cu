#include "decode_launch.cuh"

namespace jax_trirun::cuda {

std::string launch_decode_bf16_f32(const DecodeLaunch& launch, const DecodeArgs& args) {
  return launch_decode_of<__nv_bfloat16, float>(launch, args);
}

}  // namespace jax_trirun::cuda
