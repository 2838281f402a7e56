#include <cstdint>

#include "simd_portable.h"
// The vectors first: the kernels are written in them.
#include "kernels-inl.h"

namespace jax_trirun::cpu {

const Kernels* portable_kernels() {
  static constexpr Kernels kernels = make_kernels("portable");
  return &kernels;
}

}  // namespace jax_trirun::cpu
