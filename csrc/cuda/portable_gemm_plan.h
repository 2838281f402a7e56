// How a matmul of many tokens is launched on GPUs without wgmma: which kernel of portable_gemm.cuh, and how its tiles
// are shared out.
//
// Every choice that bench/results/ has numbers for is made here and nowhere else. Plain C++: no GPU, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm_plan.h"

namespace jax_trirun::cuda {

enum class PortableGemmKernel {
  kSums16,   // scales on the sums of each group, tiles of 16 tokens
  kSums32,   // 32 tokens
  kSums64,   // 64 tokens
  kZeros32,  // the same with zeros
  kZeros64,
  kWeights128,        // scales on the weights, 128 tokens
  kWeights128Narrow,  // tiles of fewer features, for small layers
};

inline constexpr PortableGemmKernel kPortableGemmKernels[] = {
    PortableGemmKernel::kSums16,          PortableGemmKernel::kSums32,  PortableGemmKernel::kSums64,
    PortableGemmKernel::kZeros32,         PortableGemmKernel::kZeros64, PortableGemmKernel::kWeights128,
    PortableGemmKernel::kWeights128Narrow};

struct PortableGemmShape {
  int tokens;        // of a tile
  int warp_tokens;   // of them a warp's
  int warp_blocks;   // n-blocks of a warp
  int warps;         // of a thread block
  int stage_blocks;  // blocks of K in a stage of its ring
  int stages;
  int blocks_per_sm;  // thread blocks that run side by side on GPUs with the shared memory for it
  int unit_clocks;    // that a unit of K takes with all of them, measured on an H200
  bool on_weights;

  constexpr int features() const { return warps * warp_tokens / tokens * warp_blocks * Layout<2>::kBlockN; }
  constexpr int64_t tile_bytes() const { return int64_t{4} * tokens * features(); }  // of its float32 sums
};

constexpr PortableGemmShape shape_of(PortableGemmKernel kernel) {
  switch (kernel) {
    case PortableGemmKernel::kSums16: return {16, 16, 1, 4, 2, 4, 4, 2150, false};
    case PortableGemmKernel::kSums32: return {32, 32, 1, 4, 2, 4, 3, 2400, false};
    case PortableGemmKernel::kSums64: return {64, 64, 1, 4, 2, 3, 2, 2800, false};
    case PortableGemmKernel::kZeros32: return {32, 32, 1, 4, 2, 4, 2, 2200, false};
    case PortableGemmKernel::kZeros64: return {64, 64, 1, 4, 2, 3, 2, 3600, false};
    case PortableGemmKernel::kWeights128: return {128, 128, 1, 8, 2, 2, 1, 4450, true};
    case PortableGemmKernel::kWeights128Narrow: return {128, 128, 1, 4, 2, 2, 2, 4750, true};
  }
  return {};
}

// Whether the kernels of portable_gemm.cuh are faster than those of decode.cuh: 16 rows of 8192 x 57344 take 65 us and
// 111, of 4096 x 4096 8.0 and 9.8, and 8 rows of 28672 x 8192 35.4 and 38.5.
inline bool is_for_portable_gemm(const Problem& problem, bool zeros) {
  constexpr int64_t kLongK = 24576;
  if (zeros) return problem.m > 16;
  return problem.m > (problem.k >= kLongK ? 4 : 8);
}

// Whether a kernel may take a product. Scales go to the weights where may_take in gemm_plan.h lets them.
inline bool may_take(PortableGemmKernel kernel, int64_t m, bool all_of_x_type, bool zeros) {
  using Kernel = PortableGemmKernel;
  if (zeros) return kernel == (m <= 32 ? Kernel::kZeros32 : Kernel::kZeros64);
  if (m > 64 && all_of_x_type) return shape_of(kernel).on_weights;
  return kernel == (m <= 16 ? Kernel::kSums16 : m <= 32 ? Kernel::kSums32 : Kernel::kSums64);
}

// Scratch must be enough on every GPU, so at most so many multiprocessors (of an RTX 5090; an H200 has 132) share the
// tiles that are cut.
inline constexpr int kMaxPortableSms = 170;

// Of tiles with more units only whole ones are made: a multiplication finds the tile of a unit.
inline constexpr int kMostPortableUnitsCut = 2500;
static_assert(int64_t{4} * kMaxPortableSms * kMostPortableUnitsCut * kMostPortableUnitsCut <=
                  int64_t{0xffffffff},
              "see GemmWalk::unit_magic");

// Whole tiles in rounds of the grid, and those of the last, incomplete round cut along K if that gains more than
// writing and adding up the parts costs: gemm_walk.h walks through it.
inline GemmPlan plan_portable_gemm(const Problem& problem, const PortableGemmShape& shape, int sms) {
  // Clocks of an H200: to begin, and to add up the parts in a second kernel.
  constexpr int64_t kStart = 3500, kOfParts = 4500, kPartBytesPerClock = 1600;
  GemmPlan plan = {};
  plan.m_tiles = static_cast<int>(ceil_div(problem.m, shape.tokens));
  plan.n_tiles = static_cast<int>(ceil_div(problem.n, shape.features()));
  plan.units = static_cast<int>(std::max<int64_t>(1, ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks)));
  plan.band = 16;
  plan.ranks = 1;
  const int tiles = plan.tiles();
  for (int per_sm = 1; per_sm <= shape.blocks_per_sm; ++per_sm) {
    // Fewer thread blocks side by side are faster each, but hide less of each other's waiting.
    const int64_t unit_clocks = int64_t{shape.unit_clocks} *
                                (20 * per_sm + 7 * (shape.blocks_per_sm - per_sm)) /
                                (20 * shape.blocks_per_sm);
    const auto take = [&](int grid, int whole_tiles, int64_t clocks) {
      if (plan.grid != 0 && clocks >= plan.clocks) return;
      plan.grid = grid, plan.whole_tiles = whole_tiles, plan.clocks = clocks;
    };
    const int slots = sms * per_sm, cut_slots = std::min(sms, kMaxPortableSms) * per_sm;
    take(std::min(tiles, slots), tiles, kStart + ceil_div(tiles, slots) * plan.units * unit_clocks);
    const int left = tiles % cut_slots;
    if (left == 0 || plan.units > kMostPortableUnitsCut) continue;
    const int64_t units = int64_t{left} * plan.units;
    const int grid = tiles > left ? cut_slots : static_cast<int>(std::min<int64_t>(cut_slots, units));
    const int64_t share = int64_t{tiles / cut_slots} * plan.units + ceil_div(units, grid);
    take(grid, tiles - left,
         kStart + share * unit_clocks + kOfParts + (left + grid) * shape.tile_bytes() / kPartBytesPerClock);
  }
  return plan;
}

inline GemmChoice<PortableGemmKernel> choose_portable_gemm(const Problem& problem, bool all_of_x_type,
                                                           bool zeros, int sms) {
  return cheapest(kPortableGemmKernels, problem, all_of_x_type, zeros, [&](PortableGemmKernel kernel) {
    return plan_portable_gemm(problem, shape_of(kernel), sms);
  });
}

// What decode.cuh's portable kernels take: 1.2 to 2.4 times as long as the words take to arrive, at 2,100 bytes a clock.
inline int64_t portable_decode_clocks(const Problem& problem) {
  return 3000 + problem.words<2>() * 4 * (120 + 7 * problem.m) / 210000;
}

// Rows of x in the first of two launches, or all of them, as first_rows in gemm_plan.h.
inline int64_t portable_first_rows(const Problem& problem, bool all_of_x_type, bool zeros, int sms) {
  if (problem.m <= 64) return problem.m;
  const auto clocks = [&](int64_t rows) {
    Problem some = problem;
    some.m = rows;
    if (!is_for_portable_gemm(some, zeros)) return portable_decode_clocks(some);
    return choose_portable_gemm(some, all_of_x_type, zeros, sms).plan.clocks;
  };
  return cheapest_first_rows(problem.m, clocks(problem.m), 0, clocks);
}

// Bytes of the parts of tiles that several thread blocks share: two for each at most, the end of a tile and the start
// of another.
inline int64_t portable_part_bytes(const Problem& problem, PortableGemmKernel kernel) {
  const PortableGemmShape shape = shape_of(kernel);
  const int64_t units = ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks);
  const int64_t tiles = ceil_div(problem.m, shape.tokens) * ceil_div(problem.n, shape.features());
  return std::min<int64_t>(2 * kMaxPortableSms * shape.blocks_per_sm, 2 * tiles * units) *
         shape.tile_bytes();
}

// The group size as the kernels take it: one group is met as groups of 128 with the same scale.
inline int portable_group_size(const Problem& problem) {
  return problem.groups > 1 ? static_cast<int>(problem.group_size()) : 128;
}

// With zeros, the sums of x over each group: floats from one to the next, and how many in all.
inline int64_t portable_x_sums_stride(const Problem& problem) { return ceil_div(problem.m, 64) * 64; }
inline int64_t portable_x_sums(const Problem& problem) {
  return ceil_div(problem.k, portable_group_size(problem)) * portable_x_sums_stride(problem);
}

// Enough for whatever types and zeros there are: parts, then sums of x.
inline int64_t portable_gemm_scratch_bytes(const Problem& problem) {
  if (!is_for_portable_gemm(problem, /*zeros=*/false)) return 0;
  int64_t most = 0;
  for (PortableGemmKernel kernel : kPortableGemmKernels) {
    for (int types = 0; types < 4; ++types) {
      if (may_take(kernel, problem.m, types % 2 == 1, types / 2 == 1))
        most = std::max(most, portable_part_bytes(problem, kernel));
    }
  }
  return most + portable_x_sums(problem) * 4;
}

}  // namespace jax_trirun::cuda
