#include <cstdint>

#include "simd_avx512.h"
// The vectors first: the kernels are written in them.
#include "kernels-inl.h"

namespace jax_trirun::cpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return &kernels;
}

}  // namespace jax_trirun::cpu
