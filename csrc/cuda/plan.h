// How a decode matmul is launched: which kernel, how K is split, how much work runs side by side.
//
// Every choice that bench/results/ has numbers for is made here and nowhere else. Plain C++: no GPU,
// no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace jax_trirun::cuda {

// The kernels of decode.cuh that are compiled: arithmetic, mma column tiles, warps, ring stages.
enum class DecodeKernel {
  kSlices1,  // int8 digits, up to 2 tokens
  kSlices2,  // up to 4
  kFloat1,   // 16-bit floats, up to 8 tokens
  kFloat2,   // up to 16
  kFloat1Portable,
  kFloat2Portable,
};

inline constexpr int kMostBlocksPerWarp = 2;

struct DecodeShape {
  int tokens, warps, stages;
  bool cluster;  // needs sm_90
  int smallest_group = kSmallestGroup;
  int blocks_per_warp = 1;  // n-blocks of a line (decode.cuh) for each warp, at most
};

constexpr DecodeShape shape_of(DecodeKernel kernel) {
  switch (kernel) {
    case DecodeKernel::kSlices1: return {2, 16, 6, true};
    case DecodeKernel::kSlices2: return {4, 16, 4, true, 128, kMostBlocksPerWarp};
    case DecodeKernel::kFloat1: return {8, 16, 3, true};
    case DecodeKernel::kFloat2: return {16, 12, 3, true};
    case DecodeKernel::kFloat1Portable: return {8, 8, 3, false};
    case DecodeKernel::kFloat2Portable: return {16, 4, 3, false};
  }
  return {};
}

// More are for the kernels for many tokens.
inline constexpr int64_t kMaxDecodeTokens = 16;

// The shared memory a thread block may have on every GPU since sm_80 (sm_86 and sm_89 have the least).
inline constexpr int kSmallestSharedMemory = 99 * 1024;

struct DecodePlan {
  int ranks = 0;  // thread blocks that share an n-block; 0: no launch fits
  int units_per_rank = 0;
  int blocks_per_warp = 1;  // as in DecodeShape
  int64_t clocks = 0;       // estimated, of kernels with clusters
};

// Clusters of so many thread blocks that run at the same time, as cudaOccupancyMaxActiveClusters counts them on an
// H200 (132 multiprocessors in GPCs of 16 and 18, of which a cluster cannot cross the border). Only a guess where the
// multiprocessors are not 132: results do not depend on it.
inline constexpr int kMaxRanks = 8;  // the largest cluster that every sm_90 GPU runs
inline int clusters_at_once(int ranks, int sms) {
  constexpr int kOfH200[kMaxRanks] = {132, 66, 39, 30, 22, 17, 15, 15};
  return std::max(1, kOfH200[ranks - 1] * sms / 132);
}

// What the clocks that a launch with clusters takes on an H200 are the sum of, fitted to 24 shapes of layers
// (bench/results/cuda_decode_*.csv): the fastest kernel and split are chosen, or some that are 0.6 % slower on average.
struct DecodeCosts {
  int start;    // and end
  int cluster;  // to add up the sums of a cluster
  int unit;     // of 128 x 32 weights, on a quarter of a multiprocessor
  int x;        // 128 values of a token that a thread block brings (and cuts into digits)
  int line;     // to begin again with the next n-blocks
  int item;     // sums of a token and an n-block
};
constexpr DecodeCosts costs_of(DecodeKernel kernel) {
  switch (kernel) {
    case DecodeKernel::kSlices1: return {5540, 850, 220, 19, 1760, 23};
    case DecodeKernel::kSlices2: return {6110, 1070, 253, 28, 2820, 44};
    case DecodeKernel::kFloat1: return {5220, 480, 352, 10, 1920, 24};
    case DecodeKernel::kFloat2: return {5100, 50, 468, 9, 390, 29};
    default: return {};
  }
}

// N-blocks of the cluster that has most, of a launch that splits K into `ranks`.
inline int64_t most_n_blocks(const Problem& problem, int ranks, int sms) {
  const int64_t n_blocks = problem.n_blocks<2>();
  return ceil_div(n_blocks, std::min<int64_t>(n_blocks, clusters_at_once(ranks, sms)));
}

// Clocks of a launch that splits K into `ranks`.
inline int64_t clocks_of_split(const Problem& problem, DecodeKernel kernel, int ranks, int sms,
                               int blocks_per_warp) {
  const DecodeCosts costs = costs_of(kernel);
  const DecodeShape shape = shape_of(kernel);
  const int64_t tokens = std::min<int64_t>(problem.m, shape.tokens);
  const int64_t units = ceil_div(ceil_div(problem.k, 128), ranks);
  const int64_t most = most_n_blocks(problem, ranks, sms);
  const int64_t lines = ceil_div(most, shape.warps * blocks_per_warp), at_once = ceil_div(most, lines);
  int64_t of_warp = 0;  // units
  for (int64_t left = most; left > 0; left -= at_once)
    of_warp += ceil_div(std::min(left, at_once) * units, shape.warps);
  return costs.start + (ranks > 1 ? costs.cluster : 0) + of_warp * (shape.warps / 4) * costs.unit +
         tokens * units * costs.x + (lines - 1) * costs.line + tokens * most * costs.item;
}

// Whether each of `ranks` thread blocks has some of the units.
inline bool all_have_work(int units, int ranks) {
  return ranks == 1 || ceil_div(units, ranks) * (ranks - 1) < units;
}

// A split of K whose slice of x fits `shared_memory`, as `bytes_of(units, ranks, blocks_per_warp)` counts it: the fastest
// one into a cluster (a power of two), or the smallest one where each part of K is written by itself.
template <typename BytesOf>
DecodePlan plan_decode(const Problem& problem, DecodeKernel kernel, int sms, int shared_memory,
                       const BytesOf& bytes_of) {
  const int units = static_cast<int>(std::max<int64_t>(1, ceil_div(problem.k, 128)));
  const DecodeShape shape = shape_of(kernel);
  const bool cluster = shape.cluster;
  DecodePlan best;
  for (int ranks = 1; ranks <= (cluster ? kMaxRanks : units); ranks = cluster ? ranks * 2 : ranks + 1) {
    const int units_per_rank = static_cast<int>(ceil_div(units, ranks));
    if (!all_have_work(units, ranks) || bytes_of(units_per_rank, ranks, 1) > shared_memory) continue;
    if (!cluster) return {ranks, units_per_rank};
    const bool long_lines = most_n_blocks(problem, ranks, sms) > shape.warps &&
                            bytes_of(units_per_rank, ranks, shape.blocks_per_warp) <= shared_memory;
    const int blocks_per_warp = long_lines ? shape.blocks_per_warp : 1;
    const int64_t clocks = clocks_of_split(problem, kernel, ranks, sms, blocks_per_warp);
    if (best.ranks == 0 || clocks < best.clocks) best = {ranks, units_per_rank, blocks_per_warp, clocks};
  }
  return best;
}

// Clocks of a kernel and the split that is chosen where shared memory is no limit.
inline int64_t clocks_of(const Problem& problem, DecodeKernel kernel, int sms) {
  return plan_decode(problem, kernel, sms, 0, [](int, int, int) { return 0; }).clocks;
}

// The kernel for M tokens of an N x K problem on a GPU with `sms` multiprocessors: digits, where they are cut fast
// enough, else floats.
inline DecodeKernel choose_decode_kernel(const Problem& problem, int sms, bool portable) {
  if (portable) return problem.m <= 8 ? DecodeKernel::kFloat1Portable : DecodeKernel::kFloat2Portable;
  if (problem.m > 8) return DecodeKernel::kFloat2;
  const DecodeKernel slices = problem.m <= 2 ? DecodeKernel::kSlices1 : DecodeKernel::kSlices2;
  // Putting each group's sum together from its digits' takes long: with groups of 32 and four tokens, 8192 x 57344 takes
  // 65 us this way and 53 the other; with groups of 64 as long, and smaller layers 2 to 40 % longer.
  const bool may_cut =
      problem.m <= 4 && (problem.groups == 1 || problem.group_size() >= shape_of(slices).smallest_group);
  if (may_cut && clocks_of(problem, slices, sms) < clocks_of(problem, DecodeKernel::kFloat1, sms))
    return slices;
  return DecodeKernel::kFloat1;
}

// Clocks of the kernel that is chosen on a GPU with clusters.
inline int64_t decode_clocks(const Problem& problem, int sms) {
  return clocks_of(problem, choose_decode_kernel(problem, sms, /*portable=*/false), sms);
}

}  // namespace jax_trirun::cuda
