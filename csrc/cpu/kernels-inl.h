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
constexpr int kSegmentBlocks = 16;   // 1024 k are summed before they join the total
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

// What a group has in one row of blocks: all their k, or half when groups are 32 long.
struct Piece {
  int begin, end;       // p
  const float* scales;  // [32] for each block, even columns first
  const float* zeros;   // the same, or null
};

// A region's blocks of one k_block.
struct Row {
  int64_t k_block;
  const uint32_t* lanes;  // [n_blocks][128], transposed
  const uint32_t* next;   // [n_blocks][128], the words below
};

// The words of the next row of blocks are far away: too far for the hardware to guess. Each step of a
// block asks for one cache line of them, because memory takes a limited number of requests at a time.
// They come into L2 and not into L1: on Zen 4, requests for L1 wait for one of its few miss buffers, and
// one row took a fifth longer.
inline void prefetch_line(const uint32_t* next, int step) {
  static_assert(kWordsPerBlock / kCacheLineWords == kBlockK / kStepK, "a block has a line a step");
  constexpr int kRead = 0, kIntoL2 = 2;
  __builtin_prefetch(next + step * kCacheLineWords, kRead, kIntoL2);
}

inline void load_zeros(const Piece& piece, int64_t c, F32* zeros) {
  for (int i = 0; i < 2 * kVectors; ++i) {
    zeros[i] = load(piece.zeros + c * kBlockN + i * kLanes);
  }
}

inline void add_scaled(F32 scale, F32 value, float* sum) { store(sum, fma(scale, value, load(sum))); }

// Few rows: every level goes straight from its word into the sums.
template <int rows, bool kZeros>
void add_fused(const Row& row, int64_t c, const float* x, const Piece& piece, float* sums) {
  const uint32_t* const lanes = row.lanes + c * kWordsPerBlock;
  const float* const scales = piece.scales + c * kBlockN;
  F32 zeros[2 * kVectors];
  if constexpr (kZeros) load_zeros(piece, c, zeros);
  F32 acc[rows][2 * kVectors];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < 2 * kVectors; ++i) acc[r][i] = zero();
  }
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    prefetch_line(row.next + c * kWordsPerBlock, step);
    const float* const x_step = x + step * kStepK * rows;
    decode_step<kZeros>(lanes + step * kColumns, zeros, [&](int p, int i, F32 level) {
      for (int r = 0; r < rows; ++r) {
        acc[r][i] = fma(level, splat(x_step[p * rows + r]), acc[r][i]);
      }
    });
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < 2 * kVectors; ++i) {
      add_scaled(load(scales + i * kLanes), acc[r][i], sums + r * kBlockN + i * kLanes);
    }
  }
}

// Many rows: the levels of a piece, [p][32], even columns first.
template <bool kZeros>
void decode_panel(const Row& row, int64_t c, const Piece& piece, float* panel) {
  const uint32_t* const lanes = row.lanes + c * kWordsPerBlock;
  F32 zeros[2 * kVectors];
  if constexpr (kZeros) load_zeros(piece, c, zeros);
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    prefetch_line(row.next + c * kWordsPerBlock, step);
    float* const out = panel + step * kStepK * kBlockN;
    decode_step<kZeros>(lanes + step * kColumns, zeros,
                        [&](int p, int i, F32 level) { store(out + p * kBlockN + i * kLanes, level); });
  }
}

template <int rows>
void add_panel(const float* panel, const float* x, const Piece& piece, int64_t c, float* sums) {
  const float* const scales = piece.scales + c * kBlockN;
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

// The pieces of one block of k, without their scales; returns how many there are.
inline int pieces_of(const KernelArgs& args, int64_t k_block, Piece* pieces, int64_t* groups) {
  const int64_t k = k_block * kBlockK;
  const bool halves = args.groups > 1 && args.group_size < kBlockK;
  pieces[0] = {0, halves ? kBlockK / 2 : kBlockK, nullptr, nullptr};
  pieces[1] = {kBlockK / 2, kBlockK, nullptr, nullptr};
  groups[0] = args.groups > 1 ? k / args.group_size : 0;
  groups[1] = groups[0] + 1;
  return halves && groups[1] < args.groups ? 2 : 1;
}

// Walks a region: k outermost, so that the columns of the region share x, and neighbouring blocks
// of words are read one after the other. add_row(row, piece, sums) adds one piece of a row of
// blocks to sums [n_blocks][rows][32].
template <class AddRow>
inline void walk(const KernelArgs& args, const Region& region, AddRow&& add_row) {
  alignas(64) float totals[kMaxRowBlocks * kBlockN];
  alignas(64) float sums[kMaxRowBlocks * kBlockN];
  alignas(64) uint32_t lanes[kMaxRegionBlocks * kWordsPerBlock];
  alignas(64) float scales[kMaxRegionBlocks * kBlockN];
  alignas(64) float zeros[kMaxRegionBlocks * kBlockN];
  const int64_t row_floats = region.rows * kBlockN;
  const int64_t floats = region.n_blocks * row_floats;
  std::memset(totals, 0, floats * sizeof(float));

  const auto words_of = [&](int64_t k_block) {
    return args.words + (k_block * args.n_blocks + region.n_block) * kWordsPerBlock;
  };
  const auto load_row = [&](const void* array, DType type, int64_t group, float* out) {
    for (int64_t c = 0; c < region.n_blocks; ++c) {
      load_columns(array, type, args, group, region.n_block + c, out + c * kBlockN);
    }
  };
  const auto add_k_block = [&](int64_t k_block) {
    for (int64_t c = 0; c < region.n_blocks; ++c) {
      transpose_block(words_of(k_block) + c * kWordsPerBlock, lanes + c * kWordsPerBlock);
    }
    const Row row = {k_block, lanes, words_of(k_block + 1 < args.k_blocks ? k_block + 1 : k_block)};
    Piece pieces[2];
    int64_t groups[2];
    const int count = pieces_of(args, k_block, pieces, groups);
    for (int i = 0; i < count; ++i) {
      Piece& piece = pieces[i];
      load_row(args.scales, args.scale_type, groups[i], scales);
      piece.scales = scales;
      if (args.zeros != nullptr) {
        load_row(args.zeros, args.zero_type, groups[i], zeros);
        piece.zeros = zeros;
      }
      add_row(row, piece, sums);
    }
  };

  for (int64_t first = 0; first < args.k_blocks; first += kSegmentBlocks) {
    const int64_t rest = args.k_blocks - first;
    const int64_t last = first + (rest < kSegmentBlocks ? rest : kSegmentBlocks);
    std::memset(sums, 0, floats * sizeof(float));
    for (int64_t k_block = first; k_block < last; ++k_block) add_k_block(k_block);
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

template <int rows, bool kZeros>
void run_fused(const KernelArgs& args, const Region& region, const float* staged) {
  walk(args, region, [&](const Row& row, const Piece& piece, float* sums) {
    for (int64_t c = 0; c < region.n_blocks; ++c) {
      add_fused<rows, kZeros>(row, c, staged + row.k_block * kBlockK * rows, piece,
                              sums + c * rows * kBlockN);
    }
  });
}

using AddPanel = void (*)(const float* panel, const float* x, const Piece& piece, int64_t c, float* sums);

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
  const int64_t last_rows = region.rows % tile_rows;
  const AddPanel add_tile = add_panel_of<kMaxRows>(tile_rows);
  const AddPanel add_last = add_panel_of<kMaxRows>(static_cast<int>(last_rows));
  const auto add_tiles = [&](int64_t k_block, const Piece& piece, int64_t c, float* sums) {
    int64_t row = 0;
    for (; row + tile_rows <= region.rows; row += tile_rows) {
      const float* const x = staged + (row * args.k_blocks + k_block * tile_rows) * kBlockK;
      add_tile(panel, x, piece, c, sums + row * kBlockN);
    }
    if (last_rows > 0) {
      const float* const x = staged + (row * args.k_blocks + k_block * last_rows) * kBlockK;
      add_last(panel, x, piece, c, sums + row * kBlockN);
    }
  };
  walk(args, region, [&](const Row& row, const Piece& piece, float* sums) {
    for (int64_t c = 0; c < region.n_blocks; ++c) {
      decode_panel<kZeros>(row, c, piece, panel);
      add_tiles(row.k_block, piece, c, sums + c * region.rows * kBlockN);
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

void make_tables(const float* staged, int rows, int64_t k_block, int64_t k_blocks, float* tables) {
  const int64_t end = (k_block + k_blocks) * kPairs;
  for (int64_t pair = k_block * kPairs; pair < end; ++pair) {
    for (int r = 0; r < rows; ++r) {
      const F32 low = splat(staged[(2 * pair) * rows + r]);
      const F32 high = splat(staged[(2 * pair + 1) * rows + r]);
      const F32 sums = fma(low, low_levels(), mul(high, high_levels()));
      store(tables + (pair * rows + r) * kEntries, sums);
    }
  }
}

// One byte of every word: two neighbouring codes of an even column, and two of an odd one.
//
// Every second addition is written as a multiply-add by one: the same value from other units. On Zen
// 4, permutes and shifts share units with additions, and the mixture runs a third faster.
template <int byte, int rows, int blocks>
inline void add_byte(const U32* words, const float* tables, F32 one, F32 (*acc)[rows][2]) {
  constexpr int h = byte / 2, u = byte % 2;
  U32 even[blocks], odd[blocks];
  for (int c = 0; c < blocks; ++c) {
    even[c] = shift_right<shift_of(h, 0, u, 0)>(words[c]);
    odd[c] = shift_right<shift_of(h, 1, u, 0)>(words[c]);
  }
  for (int r = 0; r < rows; ++r) {
    const F32 table = load(tables + (byte * rows + r) * kEntries);
    for (int c = 0; c < blocks; ++c) {
      acc[c][r][0] = fma(look_up(even[c], table), one, acc[c][r][0]);
      acc[c][r][1] = add(acc[c][r][1], look_up(odd[c], table));
    }
  }
}

// `blocks` neighbouring blocks of columns share each table and give more independent sums.
template <int rows, int blocks>
void add_looked_up(const Row& row, int64_t column, const float* tables, const Piece& piece, float* sums) {
  const uint32_t* const lanes = row.lanes + column * kWordsPerBlock;
  const uint32_t* const next = row.next + column * kWordsPerBlock;
  static_assert(kVectors == 1, "the lanes of a block are one vector");
  const F32 one = opaque(splat(1.f));
  F32 acc[blocks][rows][2];
  for (int c = 0; c < blocks; ++c) {
    for (int r = 0; r < rows; ++r) acc[c][r][0] = acc[c][r][1] = zero();
  }
  for (int step = piece.begin / kStepK; step < piece.end / kStepK; ++step) {
    U32 words[blocks];
    for (int c = 0; c < blocks; ++c) {
      words[c] = load_words(lanes + c * kWordsPerBlock + step * kColumns);
      prefetch_line(next + c * kWordsPerBlock, step);
    }
    const float* const step_tables = tables + step * (kStepK / 2) * rows * kEntries;
    add_byte<0, rows, blocks>(words, step_tables, one, acc);
    add_byte<1, rows, blocks>(words, step_tables, one, acc);
    add_byte<2, rows, blocks>(words, step_tables, one, acc);
    add_byte<3, rows, blocks>(words, step_tables, one, acc);
  }
  for (int c = 0; c < blocks; ++c) {
    const float* const scales = piece.scales + (column + c) * kBlockN;
    for (int r = 0; r < rows; ++r) {
      for (int b = 0; b < 2; ++b) {
        add_scaled(load(scales + b * kColumns), acc[c][r][b],
                   sums + (c * rows + r) * kBlockN + b * kColumns);
      }
    }
  }
}

template <int rows>
void run_table_rows(const KernelArgs& args, const Region& region, const float* tables) {
  if constexpr (rows > 0) {
    if (region.rows != rows) return run_table_rows<rows - 1>(args, region, tables);
    constexpr int blocks = kMaxTableRows / rows > 4 ? 4 : kMaxTableRows / rows;
    walk(args, region, [&](const Row& row, const Piece& piece, float* sums) {
      const float* const row_tables = tables + row.k_block * kPairs * rows * kEntries;
      int64_t c = 0;
      for (; c + blocks <= region.n_blocks; c += blocks) {
        add_looked_up<rows, blocks>(row, c, row_tables, piece, sums + c * rows * kBlockN);
      }
      for (; c < region.n_blocks; ++c) {
        add_looked_up<rows, 1>(row, c, row_tables, piece, sums + c * rows * kBlockN);
      }
    });
  }
}

void run_tables(const KernelArgs& args, const Region& region, const float* tables) {
  run_table_rows<kMaxTableRows>(args, region, tables);
}

constexpr Kernels make_kernels(const char* name) {
  return {name, kMaxRows, kMaxTableRows, stage, make_tables, run, run_tables};
}

#else

constexpr Kernels make_kernels(const char* name) {
  return {name, kMaxRows, 0, stage, nullptr, run, nullptr};
}

#endif

}  // namespace
}  // namespace jax_trirun::cpu
