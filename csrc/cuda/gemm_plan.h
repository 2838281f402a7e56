// How a matmul of many tokens is launched on Hopper: which kernel, and how its tiles are shared out.
//
// Every choice that bench/results/ has numbers for is made here and nowhere else. Plain C++: no GPU, no
// CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace jax_trirun::cuda {

// The kernels of gemm.cuh that are compiled.
enum class GemmKernel {
  kSums32,        // scales on the sums of each group, tiles of 32 tokens
  kSums32Narrow,  // the same, with fewer features: for small layers
  kSums64,        // the same with 64 tokens
  kZeros48,       // the same with zeros, whose registers leave room for 48 tokens
  kWeights128     // scales on the weights, 128 tokens
};

struct GemmShape {
  int tokens, warpgroups, stages;
  int features() const { return warpgroups * 128; }
};

constexpr GemmShape shape_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSums32: return {32, 3, 10};
    case GemmKernel::kSums32Narrow: return {32, 2, 14};
    case GemmKernel::kSums64: return {64, 2, 11};
    case GemmKernel::kZeros48: return {48, 2, 10};
    case GemmKernel::kWeights128: return {128, 2, 8};
  }
  return {};
}

// A unit of K is two blocks of the packed array, so that no group is cut.
inline constexpr int kGemmUnitBlocks = 2;

// As many thread blocks as there are multiprocessors on the largest sm_90 GPU: scratch must be enough on all.
inline constexpr int kMaxGemmGrid = 132;

// From so many tokens on, the decode kernels are slower.
inline constexpr int kMinGemmTokens = 17;

// Tiles and units of K are counted in int.
inline constexpr int64_t kMaxGemmTokens = 1 << 20;

// Packed words of a layer (8 MB) that give no thread block much to do.
inline constexpr int64_t kSmallLayerWords = 2 << 20;

// Whether scales are of x's type and y is too, and whether there are zeros, decide with M. A scale times a code
// is exact in the scale's type (up to half its largest value), but then all of K is summed by the tensor
// cores, which round towards zero: float32 results are worth the sums group by group.
inline GemmKernel choose_gemm_kernel(const Problem& problem, bool all_of_x_type, bool zeros) {
  if (zeros) return GemmKernel::kZeros48;
  // 4096 x 4096 takes 10.9 us with narrow tiles and 13.1 with wide ones; 28672 x 8192 takes 45.8 and 43.3.
  if (problem.m <= 32)
    return problem.words<2>() < kSmallLayerWords ? GemmKernel::kSums32Narrow : GemmKernel::kSums32;
  return problem.m <= 64 || !all_of_x_type ? GemmKernel::kSums64 : GemmKernel::kWeights128;
}

struct GemmPlan {
  int grid;
  int m_tiles, n_tiles, units;
  int whole_tiles;  // made by one thread block each; the others are cut along K into grid shares
  int band;         // tiles of M that are walked before the next tile of N

  int cut_tiles() const { return m_tiles * n_tiles - whole_tiles; }
};

// Every thread block makes whole tiles, round by round. Those of the last, incomplete round are cut if that
// gains more than writing and adding up the parts costs.
inline GemmPlan plan_gemm(const Problem& problem, const GemmShape& shape, int sms) {
  GemmPlan plan = {};
  plan.m_tiles = static_cast<int>(ceil_div(problem.m, shape.tokens));
  plan.n_tiles = static_cast<int>(ceil_div(problem.n, shape.features()));
  plan.units = static_cast<int>(ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks));
  // x of a band and the words of a few tiles of N stay in the L2 cache together.
  plan.band = 16;
  const int tiles = plan.m_tiles * plan.n_tiles;
  const int slots = std::min(sms, kMaxGemmGrid);
  const int left = tiles % slots;
  // In units of K: what the last round takes, and what cutting it would take. A unit of 128 tokens is about
  // 1.3 us, the parts cost 10 to 20 us.
  const int overhead = shape.tokens > 64 ? 10 : 6;
  const int cut = static_cast<int>(ceil_div(static_cast<int64_t>(left) * plan.units, slots));
  if (left == 0 || cut + overhead >= plan.units) {
    plan.grid = std::min(tiles, slots);
    plan.whole_tiles = tiles;
  } else {
    plan.grid = std::min(slots, tiles * plan.units);
    plan.whole_tiles = tiles - left;
  }
  return plan;
}

// Bytes of the parts of cut tiles: at most two a thread block.
inline int64_t gemm_part_bytes(const Problem& problem, GemmKernel kernel) {
  const GemmShape shape = shape_of(kernel);
  const int64_t units = ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks);
  const int64_t tiles = ceil_div(problem.m, shape.tokens) * ceil_div(problem.n, shape.features());
  return 2 * std::min<int64_t>(kMaxGemmGrid, tiles * units) * shape.tokens * shape.features() * 4;
}

// The group size as the kernels take it: one group is met as groups of 128 with the same scale, or of 64 when
// K has an odd number of blocks.
inline int gemm_group_size(const Problem& problem) {
  if (problem.groups > 1) return static_cast<int>(problem.group_size());
  return problem.k_blocks<2>() % 2 == 0 ? 128 : 64;
}

// With zeros, the sums of x over each group, as the kernels take it: floats from one to the next.
inline int64_t gemm_x_sums_stride(const Problem& problem) {
  const int tokens = shape_of(GemmKernel::kZeros48).tokens;
  return ceil_div(problem.m, tokens) * tokens;
}

inline int64_t gemm_x_sums(const Problem& problem) {
  return ceil_div(problem.k, gemm_group_size(problem)) * gemm_x_sums_stride(problem);
}

// Enough for whichever kernel the types ask for: parts, then sums of x.
inline int64_t gemm_scratch_bytes(const Problem& problem) {
  if (problem.m < kMinGemmTokens) return 0;
  int64_t parts = 0;
  for (GemmKernel kernel : {GemmKernel::kSums32, GemmKernel::kSums32Narrow, GemmKernel::kSums64,
                            GemmKernel::kZeros48, GemmKernel::kWeights128}) {
    if (shape_of(kernel).tokens == 32 && problem.m > 32) continue;
    if (kernel == GemmKernel::kWeights128 && problem.m <= 64) continue;
    parts = std::max(parts, gemm_part_bytes(problem, kernel));
  }
  return parts + gemm_x_sums(problem) * 4;
}

}  // namespace jax_trirun::cuda
