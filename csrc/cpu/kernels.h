// What one instruction set offers. kernels-inl.h implements this table once a target; matmul.cc
// calls it.
//
// Words the kernels share (k, n, kk, t, h, q, u, g, i, b: the index grammar of layout.h):
//   block   64 k x 32 n, 128 words.
//   lanes   the 16 words of a block with the same (kk, t). They share all their k; lane 2g + i
//   holds
//           the columns n = 2 * lane + b, so bit positions b = 0 are the even columns.
//   p       a block's k in the order in which the kernels meet them: ((kk, t), h, u, q). Sums over
//   k
//           always run in this order, whatever the number of rows or threads, so a row of y does
//           not depend on the rows beside it.
//   tile    up to max_rows (or max_table_rows) rows of x that share every decoded weight.
//   staged  a tile of x in float32, [k_blocks][64 p][rows of the tile], zero beyond K.
//   tables  for each pair of k (p = 2j, 2j + 1) the 16 sums x0 * (c0 - 1) + x1 * (c1 - 1).
//
// Plain data only: the targets are compiled with different flags, and an inline function that
// several of them emit could be the AVX-512 one in a program that runs without AVX-512.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace jax_trirun::cpu {

struct KernelArgs {
  int64_t m, n, k;
  int64_t k_blocks, n_blocks;
  int64_t groups, group_size;
  const void* x;
  const uint32_t* words;
  const void* scales;
  const void* zeros;  // null: every zero is 1
  void* y;
  DType x_type, scale_type, zero_type, y_type;
};

// Rows [row, row + rows) of y and the blocks [n_block, n_block + n_blocks) of its columns.
struct Region {
  int64_t row;
  int64_t rows;
  int64_t n_block;
  int64_t n_blocks;
};

// A region's sums lie on the stack of its task.
inline constexpr int kMaxRowBlocks = 192;    // rows * n_blocks: 24 KB of sums
inline constexpr int kMaxRegionBlocks = 16;  // n_blocks: two pages of words a row

struct Kernels {
  const char* name;
  int max_rows;        // of a tile in run
  int max_table_rows;  // of a tile in run_tables; 0: this target has no such path

  // Blocks [k_block, k_block + k_blocks) of one tile: x rows [row, row + rows) into `staged`, the
  // tile's first element.
  void (*stage)(const KernelArgs& args, int64_t row, int rows, int64_t k_block, int64_t k_blocks,
                float* staged);
  // `staged`: the region's tiles one after the other; tile_rows: how the region's rows are cut, a
  // tile at a time (tiles of the same height, except that the last may be lower).
  void (*run)(const KernelArgs& args, const Region& region, int tile_rows, const float* staged);
  // One tile, no zeros.
  void (*run_tables)(const KernelArgs& args, const Region& region, const float* staged);
};

// CMakeLists.txt builds the AVX ones for x86-64 and NEON for AArch64.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// The one in use (see set_isa).
const Kernels& current_kernels();

}  // namespace jax_trirun::cpu
