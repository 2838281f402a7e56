#include <cstdint>

#include "simd_neon.h"
// The vectors first: the kernels are written in them.
#include "kernels-inl.h"

namespace jax_trirun::cpu {

const Kernels* neon_kernels() {
  static constexpr Kernels kernels = make_kernels("neon");
  return &kernels;
}

}  // namespace jax_trirun::cpu
