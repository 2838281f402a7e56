#include <cstdint>

#include "simd_avx2.h"
// The vectors first: the kernels are written in them.
#include "kernels-inl.h"

namespace jax_trirun::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return &kernels;
}

}  // namespace jax_trirun::cpu
