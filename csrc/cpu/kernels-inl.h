// The kernels, written once. Every target_*.cc includes this file after its own simd_*.h and
// compiles it with its own flags. Everything here has internal linkage (see kernels.h for why).
//
// Two ways to multiply:
//
//  - Tables (run_tables). Two neighbouring codes of a word, k and k + 16 of one column, are four
//    bits: they select one of the 16 sums x[k] * (c0 - 1) + x[k + 16] * (c1 - 1). With those sums
//    in one register, a permute and an add handle two weights a lane, exactly as a multiplication
//    would. The idea is that of LUT-GEMM (arXiv:2206.09557) and T-MAC (arXiv:2407.00088); the
//    tables are float32 here, so no activation is ever rounded.
//  - Levels (run). A code becomes its level, c - 1 or c - zero, as a float: one shift and one
//    permute (or a conversion), then fused multiply-adds. From three rows on, the levels of a block
//    are first written to a panel in L1, which all rows share.
//
// Both multiply by levels that are exact: taking the zero out of the sum, as sum(x * c) - sum(x),
// would leave rounding noise where all weights are zero. Both sum one group (or 64 k) into
// registers, apply the scale, add up 1024 k, and then the 1024s: the short chains keep the error
// near that of one float32 rounding for any K.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jax_trirun::cpu {
namespace {

using Codes = Layout<2>;

constexpr int kBlockK = Codes::kBlockK;
constexpr int kBlockN = Codes::kBlockN;
constexpr int kWordsPerBlock = Codes::kWordsPerBlock;
constexpr int kColumns = kBlockN / 2;  // even or odd columns of a block: the lanes of kernels.h
constexpr int kVectors = kColumns / kLanes;
constexpr int kPairs = kBlockK / 2;  // tables of a block
constexpr int kEntries = 16;         // of a table
constexpr int kStepK = 8;            // p of one (kk, t)
constexpr int kSteps = kBlockK / kStepK;
constexpr int kSegmentBlocks = 16;  // 1024 k are summed before they join the total
constexpr int kCacheLineWords = 16;

// The word of (kk, t) at g = i = 0, and the lowest bit of a code inside it.
constexpr int word_of(int step) { return 4 * (step % 4) + 2 * (step / 4); }
constexpr int shift_of(int h, int b, int u, int q) { return 2 * (8 * h + 4 * u + 2 * b + q); }

struct Order {
  int k[kBlockK] = {};  // of each p
};
constexpr Order make_order() {
  Order order;
  for (int p = 0; p < kBlockK; ++p) {
    const int shift = shift_of(p / 4 % 2, 0, p / 2 % 2, p % 2);
    order.k[p] = Codes::code_at(word_of(p / kStepK), shift).k;
  }
  return order;
}
constexpr Order kOrder = make_order();

// What the kernels assume of the layout, asked of the layout.
constexpr bool layout_is_as_assumed() {
  for (int p = 0; p < kBlockK; ++p) {
    for (int n = 0; n < kBlockN; ++n) {
      const int g = n / 4, i = n / 2 % 2, b = n % 2;
      const WordPosition at = Codes::locate(kOrder.k[p], n);
      if (at.word != 16 * g + word_of(p / kStepK) + i) return false;
      if (at.shift != shift_of(p / 4 % 2, b, p / 2 % 2, p % 2)) return false;
    }
    if (kOrder.k[p] / 32 != p / 32) return false;  // groups of 32 are halves in both orders
  }
  return true;
}
static_assert(layout_is_as_assumed(), "the kernels' bit positions are those of layout.h");

inline F32 load_as_float(const unsigned char* p, DType type) {
  switch (type) {
    case DType::kF32: return load(reinterpret_cast<const float*>(p));
    case DType::kF16: return load_f16(reinterpret_cast<const uint16_t*>(p));
    case DType::kBF16: return load_bf16(reinterpret_cast<const uint16_t*>(p));
  }
  return zero();
}

// min(count, wanted) elements of an array as `wanted` floats (at most 64), zero behind the last.
// Reads no element behind the last.
inline void to_floats(const void* array, DType type, int64_t offset, int64_t count, int wanted,
                      float* out) {
  const int64_t size = type == DType::kF32 ? 4 : 2;
  const unsigned char* in = static_cast<const unsigned char*>(array) + offset * size;
  alignas(64) unsigned char padded[kBlockK * 4];
  if (count < wanted) {
    std::memset(padded, 0, sizeof(padded));
    if (count > 0) std::memcpy(padded, in, count * size);
    in = padded;
  }
  for (int i = 0; i < wanted; i += kLanes) store(out + i, load_as_float(in + i * size, type));
}

// A group's scales or zeros of one block of columns: 16 of the even columns, 16 of the odd ones.
inline void load_columns(const void* array, DType type, const KernelArgs& args, int64_t group,
                         int64_t n_block, float* out) {
  const int64_t n = n_block * kBlockN;
  const int64_t size = type == DType::kF32 ? 4 : 2;
  const int64_t offset = group * args.n + n;
  alignas(64) float buffer[kBlockN];
  const unsigned char* in = static_cast<const unsigned char*>(array) + offset * size;
  if (args.n - n < kBlockN) {
    to_floats(array, type, offset, args.n - n, kBlockN, buffer);
    in = reinterpret_cast<const unsigned char*>(buffer);
    type = DType::kF32;
  }
  const int64_t step = kLanes * (type == DType::kF32 ? 4 : 2);
  for (int i = 0; i < kVectors; ++i) {
    F32 even, odd;
    if (type == DType::kBF16) {
      load_bf16_pairs(reinterpret_cast<const uint16_t*>(in + 2 * i * step), &even, &odd);
    } else {
      deinterleave(load_as_float(in + 2 * i * step, type), load_as_float(in + (2 * i + 1) * step, type),
                   &even, &odd);
    }
    store(out + i * kLanes, even);
    store(out + kColumns + i * kLanes, odd);
  }
}

// Sums of one block of columns, even columns first, to a row of y.
inline void write_columns(const KernelArgs& args, int64_t row, int64_t n_block, const float* sums) {
  alignas(64) float buffer[kBlockN];
  for (int i = 0; i < kVectors; ++i) {
    F32 low, high;
    interleave(load(sums + i * kLanes), load(sums + kColumns + i * kLanes), &low, &high);
    float* const at = buffer + 2 * i * kLanes;
    if (args.y_type == DType::kF32) {
      store(at, low);
      store(at + kLanes, high);
    } else {
      uint16_t halves[2 * kLanes];
      if (args.y_type == DType::kF16) {
        store_f16(halves, low);
        store_f16(halves + kLanes, high);
      } else {
        store_bf16(halves, low);
        store_bf16(halves + kLanes, high);
      }
      std::memcpy(reinterpret_cast<unsigned char*>(buffer) + 4 * i * kLanes, halves, sizeof(halves));
    }
  }
  const int64_t n = n_block * kBlockN;
  const int64_t count = args.n - n < kBlockN ? args.n - n : kBlockN;
  const int64_t size = args.y_type == DType::kF32 ? 4 : 2;
  std::memcpy(static_cast<unsigned char*>(args.y) + (row * args.n + n) * size, buffer, count * size);
}

void stage(const KernelArgs& args, int64_t row, int rows, int64_t k_block, int64_t k_blocks,
           float* staged) {
  alignas(64) float natural[kBlockK];
  for (int64_t block = k_block; block < k_block + k_blocks; ++block) {
    float* const out = staged + block * kBlockK * rows;
    for (int r = 0; r < rows; ++r) {
      const int64_t k = block * kBlockK;
      to_floats(args.x, args.x_type, (row + r) * args.k + k, args.k - k, kBlockK, natural);
      for (int p = 0; p < kBlockK; ++p) out[p * rows + r] = natural[kOrder.k[p]];
    }
  }
}

// One step's codes as levels: calls use(p, b, i, level) for each p of the step, columns b and
// vector i.
template <bool kZeros, int p, class Use>
inline void decode_position(const U32* words, const F32* zeros, Use&& use) {
  constexpr int h = p / 4, u = p / 2 % 2, q = p % 2;
  for (int i = 0; i < kVectors; ++i) {
    const U32 even = shift_right<shift_of(h, 0, u, q)>(words[i]);
    const U32 odd = shift_right<shift_of(h, 1, u, q)>(words[i]);
    if constexpr (kZeros) {
      use(p, i, sub(code_values(even), zeros[i]));
      use(p, kVectors + i, sub(code_values(odd), zeros[kVectors + i]));
    } else {
      use(p, i, code_levels(even));
      use(p, kVectors + i, code_levels(odd));
    }
  }
}

template <bool kZeros, class Use>
inline void decode_step(const uint32_t* lanes, const F32* zeros, Use&& use) {
  U32 words[kVectors];
  for (int i = 0; i < kVectors; ++i) words[i] = load_words(lanes + i * kLanes);
  decode_position<kZeros, 0>(words, zeros, use);
  decode_position<kZeros, 1>(words, zeros, use);
  decode_position<kZeros, 2>(words, zeros, use);
  decode_position<kZeros, 3>(words, zeros, use);
  decode_position<kZeros, 4>(words, zeros, use);
  decode_position<kZeros, 5>(words, zeros, use);
  decode_position<kZeros, 6>(words, zeros, use);
  decode_position<kZeros, 7>(words, zeros, use);
}

// What a group has in one block: all its k, or half when groups are 32 long.
struct Piece {
  int begin, end;  // p
  int64_t group;
};

// One block, and the two that come after it: below it, and next in the walk.
struct Block {
  int64_t k_block;
  int64_t n_block;
  const uint32_t* lanes;  // transposed
  const uint32_t* below;  // words, to be asked for
  const uint32_t* next;   // words, to be transposed into next_lanes
  uint32_t* next_lanes;

  // Kernels call this for the steps they do, and so transpose the next block while they multiply: the two
  // keep different units of a processor busy.
  //
  // The words below are far away: too far for the hardware to guess. Each step asks for one cache line of
  // them, because memory takes a limited number of requests at a time. They come into L2 and not into L1:
  // on Zen 4, requests for L1 wait for one of its few miss buffers, and one row took a fifth longer.
  void before_step(int step) const {
    static_assert(kWordsPerBlock / kCacheLineWords == kSteps, "a block has a line a step");
    constexpr int kRead = 0, kIntoL2 = 2;
    __builtin_prefetch(below + step * kCacheLineWords, kRead, kIntoL2);
    if (step % (kSteps / 2) == 0) transpose_half(next, next_lanes, step / (kSteps / 2));
  }
};

inline void load_scales(const KernelArgs& args, const Block& block, const Piece& piece, float* scales) {
  load_columns(args.scales, args.scale_type, args, piece.group, block.n_block, scales);
}

inline void load_zeros(const KernelArgs& args, const Block& block, const Piece& piece, F32* zeros) {
  alignas(64) float buffer[kBlockN];
  load_columns(args.zeros, args.zero_type, args, piece.group, block.n_block, buffer);
  for (int i = 0; i < 2 * kVectors; ++i) zeros[i] = load(buffer + i * kLanes);
}

inline void add_scaled(F32 scale, F32 value, float* sum) { store(sum, fma(scale, value, load(sum))); }

// Few rows: every level goes straight from its word into the sums.
template <int rows, bool kZeros>
inline void add_fused(const KernelArgs& args, const Block& block, const Piece& piece, const float* x,
                      float* sums) {
  F32 zeros[2 * kVectors];
  if constexpr (kZeros) load_zeros(args, block, piece, zeros);
  F32 acc[rows][2 * kVectors];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < 2 * kVectors; ++i) acc[r][i] = zero();
  }
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    block.before_step(step);
    const float* const x_step = x + step * kStepK * rows;
    decode_step<kZeros>(block.lanes + step * kColumns, zeros, [&](int p, int i, F32 level) {
      for (int r = 0; r < rows; ++r) {
        acc[r][i] = fma(level, splat(x_step[p * rows + r]), acc[r][i]);
      }
    });
  }
  alignas(64) float scales[kBlockN];
  load_scales(args, block, piece, scales);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < 2 * kVectors; ++i) {
      add_scaled(load(scales + i * kLanes), acc[r][i], sums + r * kBlockN + i * kLanes);
    }
  }
}

// Many rows: the levels of a piece, [p][32], even columns first.
template <bool kZeros>
inline void decode_panel(const KernelArgs& args, const Block& block, const Piece& piece, float* panel) {
  F32 zeros[2 * kVectors];
  if constexpr (kZeros) load_zeros(args, block, piece, zeros);
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    block.before_step(step);
    float* const out = panel + step * kStepK * kBlockN;
    decode_step<kZeros>(block.lanes + step * kColumns, zeros,
                        [&](int p, int i, F32 level) { store(out + p * kBlockN + i * kLanes, level); });
  }
}

template <int rows>
void add_panel(const float* panel, const float* x, const Piece& piece, const float* scales, float* sums) {
  constexpr int kWidth = kMicroVectors * kLanes;
  static_assert(kBlockN % kWidth == 0, "the micro-kernel's columns divide the block's");
  for (int n = 0; n < kBlockN; n += kWidth) {
    F32 acc[rows][kMicroVectors];
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < kMicroVectors; ++i) acc[r][i] = zero();
    }
    for (int p = piece.begin; p < piece.end; ++p) {
      F32 levels[kMicroVectors];
      for (int i = 0; i < kMicroVectors; ++i) levels[i] = load(panel + p * kBlockN + n + i * kLanes);
      for (int r = 0; r < rows; ++r) {
        const F32 value = splat(x[p * rows + r]);
        for (int i = 0; i < kMicroVectors; ++i) acc[r][i] = fma(levels[i], value, acc[r][i]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < kMicroVectors; ++i) {
        const int at = n + i * kLanes;
        add_scaled(load(scales + at), acc[r][i], sums + r * kBlockN + at);
      }
    }
  }
}

// The pieces of one row of blocks; returns how many there are.
inline int pieces_of(const KernelArgs& args, int64_t k_block, Piece* pieces) {
  const int64_t k = k_block * kBlockK;
  const bool halves = args.groups > 1 && args.group_size < kBlockK;
  const int64_t group = args.groups > 1 ? k / args.group_size : 0;
  pieces[0] = {0, halves ? kBlockK / 2 : kBlockK, group};
  pieces[1] = {kBlockK / 2, kBlockK, group + 1};
  return halves && group + 1 < args.groups ? 2 : 1;
}

// Walks a region: k outermost, so that the columns of the region share x, and neighbouring blocks
// of words are read one after the other.
//   begin_row(k_block)             before the blocks of a row;
//   add_piece(block, piece, sums)  adds a piece of a block to sums [rows][32], and calls
//                                  block.before_step for every step of the piece.
template <class BeginRow, class AddPiece>
inline void walk(const KernelArgs& args, const Region& region, BeginRow&& begin_row, AddPiece&& add_piece) {
  alignas(64) float totals[kMaxRowBlocks * kBlockN];
  alignas(64) float sums[kMaxRowBlocks * kBlockN];
  alignas(64) uint32_t lanes[2][kWordsPerBlock];  // of this block and of the next
  const int64_t row_floats = region.rows * kBlockN;
  const int64_t floats = region.n_blocks * row_floats;
  std::memset(totals, 0, floats * sizeof(float));

  int now = 0;
  const auto add_row = [&](int64_t k_block) {
    const int64_t row_words = args.n_blocks * kWordsPerBlock;
    const uint32_t* const row = args.words + k_block * row_words + region.n_block * kWordsPerBlock;
    const uint32_t* const row_below = k_block + 1 < args.k_blocks ? row + row_words : row;
    Piece pieces[2];
    const int count = pieces_of(args, k_block, pieces);
    begin_row(k_block);
    for (int64_t c = 0; c < region.n_blocks; ++c) {
      const uint32_t* const next = c + 1 < region.n_blocks ? row + (c + 1) * kWordsPerBlock : row_below;
      const Block block = {k_block, region.n_block + c, lanes[now], row_below + c * kWordsPerBlock,
                           next,    lanes[1 - now]};
      for (int i = 0; i < count; ++i) add_piece(block, pieces[i], sums + c * row_floats);
      for (int step = pieces[count - 1].end / kStepK; step < kSteps; ++step) block.before_step(step);
      now = 1 - now;
    }
  };

  for (int half = 0; half < 2; ++half) {
    transpose_half(args.words + region.n_block * kWordsPerBlock, lanes[now], half);
  }
  for (int64_t first = 0; first < args.k_blocks; first += kSegmentBlocks) {
    const int64_t rest = args.k_blocks - first;
    const int64_t last = first + (rest < kSegmentBlocks ? rest : kSegmentBlocks);
    std::memset(sums, 0, floats * sizeof(float));
    for (int64_t k_block = first; k_block < last; ++k_block) add_row(k_block);
    for (int64_t i = 0; i < floats; i += kLanes) {
      store(totals + i, add(load(totals + i), load(sums + i)));
    }
  }
  for (int64_t c = 0; c < region.n_blocks; ++c) {
    for (int64_t r = 0; r < region.rows; ++r) {
      write_columns(args, region.row + r, region.n_block + c, totals + c * row_floats + r * kBlockN);
    }
  }
}

inline void nothing(int64_t) {}

template <int rows, bool kZeros>
void run_fused(const KernelArgs& args, const Region& region, const float* staged) {
  walk(args, region, nothing, [&](const Block& block, const Piece& piece, float* sums) {
    add_fused<rows, kZeros>(args, block, piece, staged + block.k_block * kBlockK * rows, sums);
  });
}

using AddPanel = void (*)(const float* panel, const float* x, const Piece& piece, const float* scales,
                          float* sums);

template <int rows>
AddPanel add_panel_of(int actual) {
  if constexpr (rows == 0) {
    return nullptr;
  } else {
    return actual == rows ? &add_panel<rows> : add_panel_of<rows - 1>(actual);
  }
}

template <bool kZeros>
void run_panel(const KernelArgs& args, const Region& region, int tile_rows, const float* staged) {
  alignas(64) float panel[kBlockK * kBlockN];
  alignas(64) float scales[kBlockN];
  const int64_t last_rows = region.rows % tile_rows;
  const AddPanel add_tile = add_panel_of<kMaxRows>(tile_rows);
  const AddPanel add_last = add_panel_of<kMaxRows>(static_cast<int>(last_rows));
  walk(args, region, nothing, [&](const Block& block, const Piece& piece, float* sums) {
    decode_panel<kZeros>(args, block, piece, panel);
    load_scales(args, block, piece, scales);
    int64_t row = 0;
    for (; row + tile_rows <= region.rows; row += tile_rows) {
      const float* const x = staged + (row * args.k_blocks + block.k_block * tile_rows) * kBlockK;
      add_tile(panel, x, piece, scales, sums + row * kBlockN);
    }
    if (last_rows > 0) {
      const float* const x = staged + (row * args.k_blocks + block.k_block * last_rows) * kBlockK;
      add_last(panel, x, piece, scales, sums + row * kBlockN);
    }
  });
}

template <int rows, bool kZeros>
void run_rows(const KernelArgs& args, const Region& region, int tile_rows, const float* staged) {
  if constexpr (rows == 0) {
    run_panel<kZeros>(args, region, tile_rows, staged);
  } else if (region.rows == rows) {
    run_fused<rows, kZeros>(args, region, staged);
  } else {
    run_rows<rows - 1, kZeros>(args, region, tile_rows, staged);
  }
}

void run(const KernelArgs& args, const Region& region, int tile_rows, const float* staged) {
  if (args.zeros != nullptr) {
    run_rows<kMaxFusedRows, true>(args, region, tile_rows, staged);
  } else {
    run_rows<kMaxFusedRows, false>(args, region, tile_rows, staged);
  }
}

#if JAX_TRIRUN_HAS_TABLES

// The tables of one block of k: [32 pairs][rows][16] from staged [64 p][rows]. Every region makes its own:
// that is some 2 % of its instructions, and they never leave L1.
template <int rows>
void make_tables(const float* staged, float* tables) {
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int r = 0; r < rows; ++r) {
      const F32 low = splat(staged[(2 * pair) * rows + r]);
      const F32 high = splat(staged[(2 * pair + 1) * rows + r]);
      store(tables + (pair * rows + r) * kEntries, fma(low, low_levels(), mul(high, high_levels())));
    }
  }
}

// A step: four tables for the even columns, the same four for the odd ones.
//
// The four values of a column are added to each other before they join the sum, so that the next step need
// not wait for four additions. Half of the additions are written as a multiply-add by one: the same value
// from other units. Zen 4 has two units for shifts and additions, two for permutes and two for multiply-adds,
// of four in all; shifts and all additions would be too many for theirs.
template <int rows>
inline void add_step(const uint32_t* lanes, const float* tables, F32 one, F32 (*acc)[2]) {
  const U32 words = opaque(load_words(lanes));  // else each shift loads them again
  const U32 at[2][4] = {
      {words, shift_right<shift_of(0, 0, 1, 0)>(words), shift_right<shift_of(1, 0, 0, 0)>(words),
       shift_right<shift_of(1, 0, 1, 0)>(words)},
      {shift_right<shift_of(0, 1, 0, 0)>(words), shift_right<shift_of(0, 1, 1, 0)>(words),
       shift_right<shift_of(1, 1, 0, 0)>(words), shift_right<shift_of(1, 1, 1, 0)>(words)}};
  for (int r = 0; r < rows; ++r) {
    F32 sums[2][2];  // [b][h]: of two values each, in an order that needs few registers
    for (int h = 0; h < 2; ++h) {
      const F32 first = opaque(load(tables + (2 * h * rows + r) * kEntries));
      const F32 second = opaque(load(tables + ((2 * h + 1) * rows + r) * kEntries));
      for (int b = 0; b < 2; ++b) {
        const F32 value = look_up(at[b][2 * h], first);
        const F32 other = look_up(at[b][2 * h + 1], second);
        sums[b][h] = h == 0 ? add(value, other) : fma(value, one, other);
      }
    }
    for (int b = 0; b < 2; ++b) acc[r][b] = fma(add(sums[b][0], sums[b][1]), one, acc[r][b]);
  }
}

template <int rows>
inline void add_looked_up(const KernelArgs& args, const Block& block, const Piece& piece,
                          const float* tables, float* sums) {
  static_assert(kVectors == 1, "the lanes of a block are one vector");
  const F32 one = opaque(splat(1.f));
  F32 acc[rows][2];
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = zero();
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    block.before_step(step);
    add_step<rows>(block.lanes + step * kColumns, tables + step * (kStepK / 2) * rows * kEntries, one, acc);
  }
  alignas(64) float scales[kBlockN];
  load_scales(args, block, piece, scales);
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < 2; ++b) {
      add_scaled(load(scales + b * kColumns), acc[r][b], sums + r * kBlockN + b * kColumns);
    }
  }
}

template <int rows>
void run_table_rows(const KernelArgs& args, const Region& region, const float* staged) {
  if constexpr (rows > 0) {
    if (region.rows != rows) return run_table_rows<rows - 1>(args, region, staged);
    alignas(64) float tables[kPairs * rows * kEntries];
    walk(
        args, region,
        [&](int64_t k_block) { make_tables<rows>(staged + k_block * kBlockK * rows, tables); },
        [&](const Block& block, const Piece& piece, float* sums) {
          add_looked_up<rows>(args, block, piece, tables, sums);
        });
  }
}

void run_tables(const KernelArgs& args, const Region& region, const float* staged) {
  run_table_rows<kMaxTableRows>(args, region, staged);
}

constexpr Kernels make_kernels(const char* name) {
  return {name, kMaxRows, kMaxTableRows, stage, run, run_tables};
}

#else

constexpr Kernels make_kernels(const char* name) { return {name, kMaxRows, 0, stage, run, nullptr}; }

#endif

}  // namespace
}  // namespace jax_trirun::cpu
