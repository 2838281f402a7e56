// Walks through launches of the CUDA kernels for many tokens as their thread blocks do, without a GPU: every block of K
// of every tile is met once, and the parts of a tile are the ones that are added up. Prints how many it has walked
// through; test_gemm_plans.py compiles and runs it.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "../csrc/cuda/gemm_walk.h"
#include "../csrc/cuda/portable_gemm_plan.h"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

#define EXPECT(condition)                                                                                  \
  do {                                                                                                     \
    if (!(condition)) {                                                                                    \
      std::printf("%s:%d: %s does not hold for M=%d K=%d N=%d, kernel %d, %d multiprocessors\n", __FILE__, \
                  __LINE__, #condition, static_cast<int>(problem.m), static_cast<int>(problem.k),          \
                  static_cast<int>(problem.n), static_cast<int>(kernel), sms);                             \
      std::exit(1);                                                                                        \
    }                                                                                                      \
  } while (0)

struct Counts {
  int whole = 0, cut = 0, clusters = 0;
};

// What is common to the kernels of gemm_plan.h and portable_gemm_plan.h.
GemmPlan plan_of(const Problem& problem, GemmKernel kernel, int sms) {
  return plan_gemm(problem, shape_of(kernel), sms);
}
GemmPlan plan_of(const Problem& problem, PortableGemmKernel kernel, int sms) {
  return plan_portable_gemm(problem, shape_of(kernel), sms);
}
int64_t part_bytes(const Problem& problem, GemmKernel kernel) { return gemm_part_bytes(problem, kernel); }
int64_t part_bytes(const Problem& problem, PortableGemmKernel kernel) {
  return portable_part_bytes(problem, kernel);
}
int blocks_per_sm(const GemmShape&) { return 1; }
int blocks_per_sm(const PortableGemmShape& shape) { return shape.blocks_per_sm; }

template <typename Kernel>
void walk_through(const Problem& problem, Kernel kernel, int sms, Counts& counts) {
  const auto shape = shape_of(kernel);
  const GemmPlan plan = plan_of(problem, kernel, sms);
  const int k_blocks = static_cast<int>(problem.k_blocks<2>());
  const GemmWalk walk = walk_of(plan, k_blocks);
  EXPECT(plan.m_tiles * shape.tokens >= problem.m && plan.n_tiles * shape.features() >= problem.n);
  EXPECT(plan.ranks >= 1 && plan.ranks <= kMaxRanks && plan.grid >= 1);
  const bool in_clusters = plan.ranks > 1;
  EXPECT(in_clusters ? plan.grid == plan.ranks : plan.grid <= sms * blocks_per_sm(shape));
  ++(in_clusters ? counts.clusters : plan.cut_tiles() > 0 ? counts.cut : counts.whole);

  std::map<std::pair<int, int>, std::vector<int>> met;       // blocks of K of a tile
  std::map<std::pair<int, int>, std::vector<int>> parts_of;  // in the order of the thread blocks
  std::set<int> parts;
  for (int cluster = 0; cluster < (in_clusters ? plan.tiles() : 1); ++cluster) {
    for (int block = 0; block < plan.grid; ++block) {
      int visits = 0;
      for_each_segment(walk, block, cluster, plan.grid, [&](const Segment& segment) {
        ++visits;
        EXPECT(segment.m_tile >= 0 && segment.m_tile < plan.m_tiles);
        EXPECT(segment.n_tile >= 0 && segment.n_tile < plan.n_tiles);
        EXPECT(segment.first_block % kGemmUnitBlocks == 0 && segment.first_block < segment.last_block);
        EXPECT(segment.last_block % kGemmUnitBlocks == 0 || segment.last_block == k_blocks);
        EXPECT(segment.last_block <= k_blocks);
        const std::pair<int, int> tile = {segment.m_tile, segment.n_tile};
        for (int k = segment.first_block; k < segment.last_block; ++k) met[tile].push_back(k);
        if (segment.part >= 0) {
          EXPECT(parts.insert(segment.part).second);
          EXPECT((segment.part + 1) * shape.tile_bytes() <= part_bytes(problem, kernel));
          parts_of[tile].push_back(segment.part);
        } else {
          EXPECT(segment.first_block == 0 && segment.last_block == k_blocks);
        }
      });
      EXPECT(visits > 0 || !in_clusters);  // a cluster's sums are of all of its thread blocks
    }
  }
  EXPECT(static_cast<int>(met.size()) == plan.tiles());
  for (const auto& [tile, blocks] : met) {
    EXPECT(static_cast<int>(blocks.size()) == k_blocks);
    for (int k = 0; k < k_blocks; ++k) EXPECT(blocks[k] == k);
  }
  // As add_gemm_parts, and the blocks of a cluster, find them.
  for (int i = 0; i < plan.cut_tiles(); ++i) {
    const TilePosition at = tile_position(walk, plan.whole_tiles + i);
    const int begin = i * plan.units, end = begin + plan.units;
    const int first = walk.shares.owner(begin), last = walk.shares.owner(end - 1);
    std::vector<int> wanted;
    for (int block = first; first < last && block <= last; ++block)
      wanted.push_back(2 * block + (walk.shares.begin(block) <= begin));
    EXPECT(parts_of[std::make_pair(at.m_tile, at.n_tile)] == wanted);
  }
  for (int i = 0; in_clusters && i < plan.tiles(); ++i) {
    const TilePosition at = tile_position(walk, i);
    std::vector<int> wanted;
    for (int rank = 0; rank < plan.ranks; ++rank) wanted.push_back(i * plan.ranks + rank);
    EXPECT(parts_of[std::make_pair(at.m_tile, at.n_tile)] == wanted);
  }
}

// Calls visit(problem, all_of_x_type, zeros) for small and large products.
template <typename Visit>
void for_each_product(Visit visit) {
  for (int k : {8, 64, 72, 192, 1000, 2048, 4096, 14336}) {
    for (int n : {8, 200, 4096, 6144, 28672}) {
      for (int m : {9, 17, 33, 65, 129, 300, 1024, 2100}) {
        Problem problem;
        problem.m = m, problem.k = k, problem.n = n, problem.groups = 1;
        for (int types = 0; types < 4; ++types) visit(problem, types % 2 == 1, types / 2 == 1);
      }
    }
  }
}

// Walks through every launch that the kernels of a family may make of the products, on GPUs with so many
// multiprocessors. Returns how many products take two.
template <typename Kernels, typename Choose, typename FirstRows, typename Fits>
int walk_through_all(const Kernels& kernels, const std::vector<int>& sms_of_gpus, Choose choose,
                     FirstRows first_rows_of, Fits fits_scratch, Counts& counts) {
  int in_two = 0;
  for (int sms : sms_of_gpus) {
    for_each_product([&](const Problem& problem, bool all_of_x_type, bool zeros) {
      const auto kernel = choose(problem, all_of_x_type, zeros, sms).kernel;
      EXPECT(may_take(kernel, problem.m, all_of_x_type, zeros));
      const int64_t first = first_rows_of(problem, all_of_x_type, zeros, sms);
      EXPECT(first > 0 && first <= problem.m && (first == problem.m || problem.m - first <= 64));
      in_two += first < problem.m;
      for (const auto kernel : kernels) {
        if (!may_take(kernel, problem.m, all_of_x_type, zeros)) continue;
        walk_through(problem, kernel, sms, counts);
        EXPECT(fits_scratch(problem, kernel, zeros));
      }
    });
  }
  return in_two;
}

int main() {
  Counts hopper, portable;
  int in_two = walk_through_all(
      kGemmKernels, {132, 114, 78, 13}, choose_gemm, first_rows,
      [](const Problem& problem, GemmKernel kernel, bool) {
        return problem.m <= 8 ||
               gemm_part_bytes(problem, kernel) <= gemm_scratch_bytes(problem);
      },
      hopper);
  in_two += walk_through_all(
      kPortableGemmKernels, {200, 28}, choose_portable_gemm, portable_first_rows,
      [](const Problem& problem, PortableGemmKernel kernel, bool) {
        return portable_part_bytes(problem, kernel) <= portable_gemm_scratch_bytes(problem);
      },
      portable);
  std::printf(
      "Hopper: %d launches of whole tiles, %d with some cut, %d with clusters; every GPU: %d of whole "
      "tiles, %d with "
      "some cut; %d products in two launches\n",
      hopper.whole, hopper.cut, hopper.clusters, portable.whole, portable.cut, in_two);
  return hopper.whole && hopper.cut && hopper.clusters && portable.whole && portable.cut && in_two ? 0 : 1;
}
