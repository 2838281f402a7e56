// Which kernels take a product, in how many launches, and how people are told. Plain C++: no GPU, no CUDA.
#pragma once

#include <string>

#include "gemm_plan.h"
#include "plan.h"
#include "portable_gemm_plan.h"

namespace jax_trirun::cuda {

// What the choice depends on, beside the device.
struct Product {
  Problem problem;
  bool all_of_x_type;  // scales and results, too
  bool zeros;
  bool portable;  // only instructions that sm_80 has

  Product with_rows(int64_t m) const {
    Product some = *this;
    some.problem.m = m;
    return some;
  }
};

// wgmma is an instruction of sm_90a alone.
inline bool has_gemm(bool portable, int compute_capability) {
  return !portable && compute_capability / 10 == 9;
}

// The one place that divides products between the kernels for few tokens (decode.cuh) and those for many: of Hopper
// (gemm.cuh) and of every GPU (portable_gemm.cuh).
enum class Kernels { kDecode, kGemm, kPortableGemm };
inline Kernels kernels_for(const Product& product, int compute_capability, int sms) {
  if (has_gemm(product.portable, compute_capability))
    return is_for_gemm(product.problem, product.zeros, sms) ? Kernels::kGemm : Kernels::kDecode;
  return is_for_portable_gemm(product.problem, product.zeros) ? Kernels::kPortableGemm : Kernels::kDecode;
}

// Rows of x in the first of two launches, or all of them.
inline int64_t rows_at_first(const Product& product, Kernels kernels, int sms) {
  if (kernels == Kernels::kDecode) return product.problem.m;
  const auto rows = kernels == Kernels::kGemm ? first_rows : portable_first_rows;
  return rows(product.problem, product.all_of_x_type, product.zeros, sms);
}

// The kernel that a product takes, its tiles and its split of K, for people to read.
inline std::string describe(const Product& product, int compute_capability, int sms) {
  const Problem& p = product.problem;
  const Kernels kernels = kernels_for(product, compute_capability, sms);
  if (const int64_t first = rows_at_first(product, kernels, sms); first < p.m) {
    return describe(product.with_rows(first), compute_capability, sms) + "; then, for the last " +
           std::to_string(p.m - first) + " rows, " +
           describe(product.with_rows(p.m - first), compute_capability, sms);
  }
  const auto of_tiles = [](const GemmPlan& plan, bool on_weights, int tokens, int features) {
    return std::string("scales on the ") + (on_weights ? "weights" : "sums of groups") + ", " +
           std::to_string(plan.tiles()) + " tiles of " + std::to_string(tokens) + " tokens x " +
           std::to_string(features) + " features, " +
           (plan.ranks > 1 ? "a cluster of " + std::to_string(plan.ranks) + " for each"
                           : std::to_string(plan.cut_tiles()) + " of them cut along K") +
           ", words read " + std::to_string(plan.m_tiles) + " times";
  };
  if (kernels == Kernels::kPortableGemm) {
    const auto [kernel, plan] = choose_portable_gemm(p, product.all_of_x_type, product.zeros, sms);
    const PortableGemmShape shape = shape_of(kernel);
    return "portable mma.sync, " + of_tiles(plan, shape.on_weights, shape.tokens, shape.features());
  }
  if (kernels == Kernels::kGemm) {
    const auto [kernel, plan] = choose_gemm(p, product.all_of_x_type, product.zeros, sms);
    const GemmShape shape = shape_of(kernel);
    return "wgmma, " + of_tiles(plan, shape.on_weights, shape.tokens, shape.features()) +
           (shape.pairs ? ", by pairs of thread blocks" : "");
  }
  const bool portable = product.portable || compute_capability < 90;
  const DecodeKernel kernel = choose_decode_kernel(p, sms, portable);
  const bool slices = kernel == DecodeKernel::kSlices1 || kernel == DecodeKernel::kSlices2;
  const int tokens = shape_of(kernel).tokens;
  return std::string(portable ? "portable mma.sync" : "mma.sync") +
         (slices ? ", activations as int8 digits" : ", 16-bit floats") + ", up to " +
         std::to_string(tokens) + " tokens at a time, words read " + std::to_string(ceil_div(p.m, tokens)) +
         " times";
}

}  // namespace jax_trirun::cuda
