// The sizes of one matmul y[M, N] = x[M, K] @ W[K, N] and what must hold between them.
// No CUDA, no XLA: both back ends and the tests share it.
#pragma once

#include <cstdint>
#include <string>

#include "layout.h"

namespace jax_trirun {

enum class DType { kF32, kF16, kBF16 };

inline int64_t size_of(DType type) { return type == DType::kF32 ? 4 : 2; }

inline const char* name_of(DType type) {
  switch (type) {
    case DType::kF32: return "float32";
    case DType::kF16: return "float16";
    case DType::kBF16: return "bfloat16";
  }
  return "unknown";
}

JAX_TRIRUN_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of W that share a scale, at least.
inline constexpr int kSmallestGroup = 32;

struct Problem {
  int64_t m = 0;       // rows of x: tokens
  int64_t n = 0;       // columns of W: output features
  int64_t k = 0;       // rows of W: input features
  int64_t groups = 0;  // rows of the scales; the group size is k / groups

  int64_t group_size() const { return groups == 0 ? 0 : k / groups; }

  template <int bits>
  int64_t k_blocks() const {
    return ceil_div(k, Layout<bits>::kBlockK);
  }
  template <int bits>
  int64_t n_blocks() const {
    return ceil_div(n, Layout<bits>::kBlockN);
  }
  template <int bits>
  int64_t words() const {
    return k_blocks<bits>() * n_blocks<bits>() * Layout<bits>::kWordsPerBlock;
  }

  // An empty string, or one sentence: what was wanted and what came.
  std::string error() const {
    if (m < 0) return "matmul: M must not be negative, got " + std::to_string(m);
    return weight_error("matmul");
  }

  // The same of what W[K, N] alone decides; `where` begins the sentence.
  std::string weight_error(const std::string& where) const {
    const std::string sizes =
        "K=" + std::to_string(k) + ", N=" + std::to_string(n) + ", groups=" + std::to_string(groups);
    const std::string begin = where + ": ";
    if (n < 0 || k < 0 || groups < 0) return begin + "sizes must not be negative, got " + sizes;
    if (k == 0) return groups <= 1 ? "" : begin + "K=0 has at most one group, got " + sizes;
    if (groups == 0) return begin + "scales must have at least one row, got " + sizes;
    if (k % groups != 0) return begin + "the number of groups must divide K, got " + sizes;
    if (groups > 1 && group_size() != 32 && group_size() != 64 && group_size() != 128) {
      return begin + "group_size must be 32, 64, 128 or all of K, got " + std::to_string(group_size()) +
             " (" + sizes + ")";
    }
    return "";
  }
};

}  // namespace jax_trirun
