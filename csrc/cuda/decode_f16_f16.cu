#include "decode_launch.cuh"

namespace jax_trirun::cuda {

std::string launch_decode_f16_f16(const DecodeLaunch& launch, const DecodeArgs& args) {
  return launch_decode_of<__half, __half>(launch, args);
}

}  // namespace jax_trirun::cuda
