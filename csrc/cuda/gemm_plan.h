// How a matmul of many tokens is launched on Hopper: which kernel, and how its tiles are shared out.
//
// Every choice that bench/results/ has numbers for is made here and nowhere else. Plain C++: no GPU, no
// CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "plan.h"

namespace jax_trirun::cuda {

// The kernels of gemm.cuh that are compiled. Medium and narrow ones have tiles of fewer features, for small layers.
enum class GemmKernel {
  kSums16,  // scales on the sums of each group, tiles of 16 tokens
  kSums16Medium,
  kSums16Narrow,
  kSums32,  // 32 tokens
  kSums32Medium,
  kSums32Narrow,
  kSums48,  // 48 tokens
  kSums48Narrow,
  kSums64,  // 64 tokens
  kSums64Narrow,
  kZeros48,    // the same with zeros, whose registers leave room for 48 tokens
  kWeights80,  // scales on the weights, 80 tokens
  kWeights80Narrow,
  kWeights96,  // 96 tokens, and so on
  kWeights96Narrow,
  kWeights112,
  kWeights112Narrow,
  kWeights128,
  kWeights128Narrow,
  kWeights128Pairs,  // of thread blocks that bring x for each other
  kWeights144,
  kWeights144Narrow,
  kWeights160Narrow,
  kWeights176Narrow,
};

inline constexpr GemmKernel kGemmKernels[] = {
    GemmKernel::kSums16,           GemmKernel::kSums16Medium,     GemmKernel::kSums16Narrow,
    GemmKernel::kSums32,           GemmKernel::kSums32Medium,     GemmKernel::kSums32Narrow,
    GemmKernel::kSums48,           GemmKernel::kSums48Narrow,     GemmKernel::kSums64,
    GemmKernel::kSums64Narrow,     GemmKernel::kZeros48,          GemmKernel::kWeights80,
    GemmKernel::kWeights80Narrow,  GemmKernel::kWeights96,        GemmKernel::kWeights96Narrow,
    GemmKernel::kWeights112,       GemmKernel::kWeights112Narrow, GemmKernel::kWeights128,
    GemmKernel::kWeights128Narrow, GemmKernel::kWeights128Pairs,  GemmKernel::kWeights144,
    GemmKernel::kWeights144Narrow, GemmKernel::kWeights160Narrow, GemmKernel::kWeights176Narrow};

// Blocks of a cluster send their sums to each other where a tile has no more bytes of them. More go faster through the L2
// cache: 256 tokens of 4096 x 4096 take 16.5 us that way and 18.4 the other, 16 tokens 7.9 and 7.3.
inline constexpr int64_t kMostBytesSent = 32 << 10;

struct GemmShape {
  int tokens, warpgroups;
  int warp_tiles;  // of 16 features for each warp: 2, or 1 for narrow tiles
  int stages;
  int unit_clocks;          // that a unit of K takes, measured on an H200
  bool on_weights = false;  // scales, else on the sums of groups
  bool pairs = false;       // a tile is two thread blocks', side by side in N
  int features() const { return warpgroups * 4 * 16 * warp_tiles * (pairs ? 2 : 1); }
  int64_t tile_bytes() const { return int64_t{4} * tokens * features(); }  // of its float32 sums
  bool sends_sums() const { return tile_bytes() <= kMostBytesSent; }
};

constexpr GemmShape shape_of(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSums16: return {16, 3, 2, 8, 1170};
    case GemmKernel::kSums16Medium: return {16, 2, 2, 10, 830};
    case GemmKernel::kSums16Narrow: return {16, 2, 1, 12, 540};
    case GemmKernel::kSums32: return {32, 3, 2, 8, 1450};
    case GemmKernel::kSums32Medium: return {32, 2, 2, 9, 1020};
    case GemmKernel::kSums32Narrow: return {32, 2, 1, 10, 590};
    case GemmKernel::kSums48: return {48, 2, 2, 8, 1260};
    case GemmKernel::kSums48Narrow: return {48, 2, 1, 8, 700};
    case GemmKernel::kSums64: return {64, 2, 2, 8, 1490};
    case GemmKernel::kSums64Narrow: return {64, 2, 1, 8, 845};
    case GemmKernel::kZeros48: return {48, 2, 2, 7, 2000};
    case GemmKernel::kWeights80: return {80, 2, 2, 6, 1700, true};
    case GemmKernel::kWeights80Narrow: return {80, 2, 1, 8, 1030, true};
    case GemmKernel::kWeights96: return {96, 2, 2, 6, 1880, true};
    case GemmKernel::kWeights96Narrow: return {96, 2, 1, 7, 1120, true};
    case GemmKernel::kWeights112: return {112, 2, 2, 5, 2060, true};
    case GemmKernel::kWeights112Narrow: return {112, 2, 1, 6, 1205, true};
    case GemmKernel::kWeights128: return {128, 2, 2, 5, 2240, true};
    case GemmKernel::kWeights128Narrow: return {128, 2, 1, 6, 1290, true};
    case GemmKernel::kWeights128Pairs: return {128, 2, 2, 5, 2190, true, true};
    case GemmKernel::kWeights144: return {144, 2, 2, 4, 2540, true};
    case GemmKernel::kWeights144Narrow: return {144, 2, 1, 5, 1360, true};
    case GemmKernel::kWeights160Narrow: return {160, 2, 1, 4, 1490, true};
    case GemmKernel::kWeights176Narrow: return {176, 2, 1, 4, 1660, true};
  }
  return {};
}

// A unit of K is two blocks of the packed array, so that no group is cut.
inline constexpr int kGemmUnitBlocks = 2;

// Of tiles with more units only whole ones are made: 132 * kMostUnitsCut^2 is below 2^32, so that a multiplication
// finds the tile of a unit.
inline constexpr int kMostUnitsCut = 5000;

// As many thread blocks as there are multiprocessors on the largest sm_90 GPU: scratch must be enough on all.
inline constexpr int kMaxGemmGrid = 132;

// Two parts a thread block at most: the end of a tile, then the start of another.
inline constexpr int kMaxGemmParts = 2 * kMaxGemmGrid;

// Tiles and units of K are counted in int.
inline constexpr int64_t kMaxGemmTokens = 1 << 20;

struct GemmPlan {
  int grid;  // thread blocks or pairs of them, or with clusters: of one cluster's size for each tile
  int m_tiles, n_tiles, units;
  int whole_tiles;  // made by one thread block each; the others are cut along K into grid shares
  int band;         // tiles of M that are walked before the next tile of N
  int ranks;        // thread blocks of a cluster that has a tile to itself, each a run of K; 1: no clusters
  int rank_units;   // of K in such a run
  int64_t clocks;   // estimated

  int tiles() const { return m_tiles * n_tiles; }
  int cut_tiles() const { return ranks > 1 ? 0 : tiles() - whole_tiles; }
};

// Every thread block makes whole tiles, round by round. Those of the last, incomplete round are cut if that
// gains more than writing and adding up the parts costs. Or each tile has a cluster.
inline GemmPlan plan_gemm(const Problem& problem, const GemmShape& shape, int sms) {
  // Clocks, fitted to what bench/cuda_gemm_explore.cu measures on an H200 (all kernels, ten shapes of layers, 9 to 4096
  // tokens: the kernel that is chosen takes 0.6 % longer than the best on average): to begin and end, beside the first
  // and the last unit; to add up the parts in a second kernel (through the L2 cache, at some 1,800 bytes a clock), or in
  // a cluster (a thread block at some 10 bytes a clock).
  const int64_t start = 4500 + 2 * shape.unit_clocks;
  constexpr int64_t kOfParts = 2500;
  GemmPlan plan = {};
  plan.m_tiles = static_cast<int>(ceil_div(problem.m, shape.tokens));
  plan.n_tiles = static_cast<int>(ceil_div(problem.n, shape.features()));
  plan.units = static_cast<int>(ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks));
  // x of a band and the words of a few tiles of N stay in the L2 cache together.
  plan.band = 16;
  const int tiles = plan.tiles();
  const int slots = shape.pairs ? clusters_at_once(2, sms) : std::min(sms, kMaxGemmGrid);
  const int64_t tile_clocks = int64_t{plan.units} * shape.unit_clocks;

  plan.ranks = 1;
  plan.grid = std::min(tiles, slots);
  plan.whole_tiles = tiles;
  plan.clocks = start + ceil_div(tiles, slots) * tile_clocks;
  if (plan.units > kMostUnitsCut || shape.pairs) return plan;

  const int left = tiles % slots;
  const int64_t share = ceil_div(int64_t{left} * plan.units, slots) * shape.unit_clocks;
  const int64_t cut_clocks =
      start + tiles / slots * tile_clocks + share + kOfParts + (left + slots) * shape.tile_bytes() / 1800;
  if (left > 0 && cut_clocks * 21 < plan.clocks * 20) {  // parts take power, too: it should gain 5 %
    plan.grid = static_cast<int>(std::min<int64_t>(slots, int64_t{tiles} * plan.units));
    plan.whole_tiles = tiles - left;
    plan.clocks = cut_clocks;
  }

  for (int ranks = 2; ranks <= kMaxRanks; ++ranks) {
    const int rank_units = static_cast<int>(ceil_div(plan.units, ranks));
    if (!all_have_work(plan.units, ranks) || int64_t{tiles} * ranks > kMaxGemmParts) continue;
    const int64_t rounds = ceil_div(tiles, clusters_at_once(ranks, sms));
    const int64_t of_others = shape.tile_bytes() * (ranks - 1) / ranks;
    const int64_t of_sums =
        shape.sends_sums() ? 150 + 290 * (ranks - 2) + of_others / 9 : 1550 + of_others / 12;
    const int64_t clocks = rounds * (start + rank_units * shape.unit_clocks + of_sums);
    if (clocks >= plan.clocks) continue;
    plan.grid = plan.ranks = ranks;
    plan.rank_units = rank_units;
    plan.whole_tiles = 0;
    plan.clocks = clocks;
  }
  return plan;
}

template <typename Kernel>
struct GemmChoice {
  Kernel kernel;
  GemmPlan plan;
};

// The kernel that makes a product in the fewest clocks, of those that may take it; plan_of(kernel) says how.
template <typename Kernel, int kCount, typename PlanOf>
GemmChoice<Kernel> cheapest(const Kernel (&kernels)[kCount], const Problem& problem, bool all_of_x_type,
                            bool zeros, const PlanOf& plan_of) {
  GemmChoice<Kernel> best = {};
  for (Kernel kernel : kernels) {
    if (!may_take(kernel, problem.m, all_of_x_type, zeros)) continue;
    const GemmPlan plan = plan_of(kernel);
    if (best.plan.grid == 0 || plan.clocks < best.plan.clocks) best = {kernel, plan};
  }
  return best;
}

// From here on pairs of thread blocks are faster, as the card's power binds, and they read x from the L2 cache half as
// often: 4096 rows take 1 to 3 % less, 16384 rows 2 to 3 %. With 512 and 1024 rows they are as fast or up to 2 % slower.
inline constexpr int64_t kLeastPairsTokens = 2048;

// Whether a kernel may take a product. Scales on the weights are for scales and results of x's type: a scale times a
// code is exact in that type (up to half its largest value), but then all of K is summed by the tensor cores, which
// round towards zero. float32 results are worth the sums group by group.
inline bool may_take(GemmKernel kernel, int64_t m, bool all_of_x_type, bool zeros) {
  if (zeros || kernel == GemmKernel::kZeros48) return zeros && kernel == GemmKernel::kZeros48;
  const GemmShape shape = shape_of(kernel);
  if (m > 64 && all_of_x_type) return shape.on_weights && (!shape.pairs || m >= kLeastPairsTokens);
  return !shape.on_weights && shape.tokens == (m <= 16 ? 16 : m <= 32 ? 32 : m <= 48 ? 48 : 64);
}

inline GemmChoice<GemmKernel> choose_gemm(const Problem& problem, bool all_of_x_type, bool zeros, int sms) {
  return cheapest(kGemmKernels, problem, all_of_x_type, zeros,
                  [&](GemmKernel kernel) { return plan_gemm(problem, shape_of(kernel), sms); });
}

// Whether the kernels of gemm.cuh are faster than those of decode.cuh. From 9 to 16 tokens they are for large layers:
// 8192 x 57344 takes 54 us and 73, 28672 x 8192 30 and 40, 4096 x 4096 7.3 and 6.5.
inline bool is_for_gemm(const Problem& problem, bool zeros, int sms) {
  if (problem.m <= 8 || (zeros && problem.m <= kMaxDecodeTokens)) return false;
  return problem.m > kMaxDecodeTokens ||
         choose_gemm(problem, /*all_of_x_type=*/false, zeros, sms).plan.clocks <
             decode_clocks(problem, sms);
}

// Rows of x in the first of two launches, or all `m` of them, whichever takes the fewest clocks: `in_one` all of them
// together, clocks(rows) so many of them, and the second launch `launch` more.
template <typename Clocks>
int64_t cheapest_first_rows(int64_t m, int64_t in_one, int64_t launch, const Clocks& clocks) {
  int64_t best = m, best_clocks = in_one;
  for (int64_t tile : {128, 96, 64}) {
    const int64_t rest = m % tile;
    if (rest == 0 || rest == m || rest > 64) continue;
    const int64_t in_two = clocks(m - rest) + clocks(rest) + launch;
    if (in_two < best_clocks) best = m - rest, best_clocks = in_two;
  }
  return best;
}

// Rows of x in the first of two launches, or all of them: rows that fill no tile may cost less by themselves. 257 rows
// of 8192 x 57344 take 382 us as two tiles of 144; 256 rows take 335, and one takes 32.
inline int64_t first_rows(const Problem& problem, bool all_of_x_type, bool zeros, int sms) {
  if (zeros || problem.m <= 64) return problem.m;
  const auto clocks = [&](int64_t rows) {
    Problem some = problem;
    some.m = rows;
    const int64_t of_gemm = choose_gemm(some, all_of_x_type, zeros, sms).plan.clocks;
    if (rows > 64)
      return of_gemm * 53 / 50;  // whole tiles draw more power, and take longer than their clocks say
    return rows <= 16 ? std::min(of_gemm, decode_clocks(some, sms)) : of_gemm;
  };
  constexpr int64_t kLaunch = 1500;  // another one
  return cheapest_first_rows(problem.m, clocks(problem.m), kLaunch, clocks);
}

// Bytes of the parts of tiles that several thread blocks share.
inline int64_t gemm_part_bytes(const Problem& problem, GemmKernel kernel) {
  const GemmShape shape = shape_of(kernel);
  if (shape.pairs) return 0;
  const int64_t units = ceil_div(problem.k_blocks<2>(), kGemmUnitBlocks);
  const int64_t tiles = ceil_div(problem.m, shape.tokens) * ceil_div(problem.n, shape.features());
  return std::min<int64_t>(kMaxGemmParts, 2 * tiles * units) * shape.tile_bytes();
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

// Enough for whichever kernel the types and the device ask for: parts, then sums of x.
inline int64_t gemm_scratch_bytes(const Problem& problem) {
  if (problem.m <= 8) return 0;
  int64_t parts = 0;
  for (GemmKernel kernel : kGemmKernels) {
    bool may = false;
    for (int types = 0; types < 4; ++types)
      may |= may_take(kernel, problem.m, types % 2 == 1, types / 2 == 1);
    if (may) parts = std::max(parts, gemm_part_bytes(problem, kernel));
  }
  return parts + gemm_x_sums(problem) * 4;
}

}  // namespace jax_trirun::cuda
