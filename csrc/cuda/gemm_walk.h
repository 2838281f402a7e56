// Which tiles, and which parts of tiles, a thread block of the kernel for many tokens makes: a GemmPlan as the kernel
// walks through it. Plain C++ for host and device: tests/walk_gemm_plans.cc walks without a GPU.
#pragma once

#include "gemm_plan.h"

namespace jax_trirun::cuda {

// The units that a thread block takes of the tiles that are cut: [begin(i), begin(i + 1)), of the same number or one
// more.
struct Shares {
  int base, extra;
  JAX_TRIRUN_HOST_DEVICE int begin(int block) const {
    return block * base + (block < extra ? block : extra);
  }
  // The block that has this unit.
  JAX_TRIRUN_HOST_DEVICE int owner(int unit) const {
    const int longer = extra * (base + 1);
    return unit < longer ? unit / (base + 1) : extra + (unit - longer) / base;
  }
};

struct GemmWalk {
  int k_blocks;  // of the packed array
  int m_tiles, n_tiles;
  int band;             // tiles of M that are walked before the next tile of N
  int whole_tiles;      // the first tiles: each is made by one thread block
  int units;            // of K in a tile: what the others are cut into
  uint32_t unit_magic;  // unit / units is the high word of unit * unit_magic; 0 if units is 1
  Shares shares;        // of the units of the tiles that are cut
  int ranks;            // thread blocks of a cluster that share a tile, see GemmPlan; 1: no cluster
  int rank_units;       // of K for each of them
};

inline GemmWalk walk_of(const GemmPlan& plan, int k_blocks) {
  GemmWalk walk = {};
  walk.k_blocks = k_blocks;
  walk.m_tiles = plan.m_tiles, walk.n_tiles = plan.n_tiles;
  walk.band = plan.band, walk.whole_tiles = plan.whole_tiles, walk.units = plan.units;
  walk.unit_magic = static_cast<uint32_t>(((uint64_t{1} << 32) + plan.units - 1) / plan.units);
  const int cut = plan.cut_tiles() * plan.units;
  walk.shares = {cut / plan.grid, cut % plan.grid};
  walk.ranks = plan.ranks, walk.rank_units = plan.rank_units;
  return walk;
}

struct TilePosition {
  int m_tile, n_tile;
};

// Tiles go through bands of M, and through the tiles of N inside a band: blocks that run at the same time
// share words and share x.
JAX_TRIRUN_HOST_DEVICE inline TilePosition tile_position(const GemmWalk& walk, int tile) {
  if (walk.m_tiles == 1) return {0, tile};
  const int in_band = walk.band * walk.n_tiles;
  const int first = tile / in_band * walk.band;
  const int width = walk.band < walk.m_tiles - first ? walk.band : walk.m_tiles - first;
  const int rest = tile % in_band;
  return {first + rest % width, rest / width};
}

// What a thread block makes at a time: the tile's sum over [first_block, last_block) of K.
struct Segment {
  int m_tile, n_tile;
  int first_block, last_block;
  int part;  // which part of a tile these sums are, or -1: they are y
};

// Calls visit(segment) for all of a thread block's: the block-th of `grid`, or of a cluster's that has the cluster-th
// tile. (Two loops: as one, their divisions kept ptxas from seeing that all threads of a warp walk alike, and wgmma
// waited for its descriptors.)
template <typename Visit>
JAX_TRIRUN_HOST_DEVICE inline void for_each_segment(const GemmWalk& walk, int block, int cluster, int grid,
                                                    Visit visit) {
  for (int tile = block; tile < walk.whole_tiles; tile += grid) {
    const TilePosition at = tile_position(walk, tile);
    visit(Segment{at.m_tile, at.n_tile, 0, walk.k_blocks, -1});
  }
  const auto lesser = [](int a, int b) { return a < b ? a : b; };
  int unit, end;
  if (walk.ranks > 1) {  // a cluster has one tile, every thread block of it a run of units
    const int tile = cluster * walk.units;
    unit = tile + block * walk.rank_units;
    end = tile + lesser(walk.units, (block + 1) * walk.rank_units);
  } else {
    unit = walk.shares.begin(block);
    end = walk.shares.begin(block + 1);
  }
  while (unit < end) {
    const int tile =
        walk.unit_magic == 0
            ? unit
            : static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(unit)) * walk.unit_magic >> 32);
    const TilePosition at = tile_position(walk, walk.whole_tiles + tile);
    const int first = unit - tile * walk.units;
    const int last = lesser(walk.units, first + end - unit);
    const bool whole = first == 0 && last == walk.units;
    // At most two parts a block: the end of a tile, then the start of another.
    const int part = walk.ranks > 1 ? cluster * walk.ranks + block : whole ? -1 : 2 * block + (first == 0);
    visit(Segment{at.m_tile, at.n_tile, first * kGemmUnitBlocks,
                  lesser(last * kGemmUnitBlocks, walk.k_blocks), part});
    unit += last - first;
  }
}

}  // namespace jax_trirun::cuda
