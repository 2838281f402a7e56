// The decode kernel: y[M, N] = x[M, K] @ W for a few tokens, at the speed the packed words arrive.
//
// A cluster of blocks takes a run of the matrix's blocks of 32 output features (n-blocks), and each of
// its thread blocks a slice of K of all of them. Inside a thread block the work of up to as many n-blocks
// as it has warps is one line of units (128 of K of one n-block), cut into equal pieces, a warp each:
//
//      n-block 0            n-block 1            n-block 2
//    |--------------------|--------------------|--------------------|
//     warp 0       | warp 1       | warp 2       | warp 3        ..
//
// So all warps finish together, whatever N and K are, and a warp meets at most two n-blocks: it leaves a
// partial sum for each, and the block adds the pieces up once at the end.
//
// x stays in shared memory: a block brings its K slice once and meets it again in every n-block. Words
// and scales come through a ring that belongs to one warp alone (cp.async, no block-wide barrier), so
// warps drift apart. The packed words are the A operand (rows are output features, columns k), tokens
// are B's columns.
//
// Without clusters (before sm_90) the thread blocks that share an n-block write one part of the result
// each, in float32, and add_parts adds them up.
//
// Sums: a group's products in float32 by the tensor cores, at most 128 of K before they are scaled
// and added in float32; then over the warps of a block and the blocks of a cluster, always in the same
// order, so the same inputs give the same bits.
#pragma once

#include "../problem.h"
#include "decode_math.cuh"
#include "ptx.cuh"

namespace jax_trirun::cuda {

struct DecodeArgs {
  const void* x;
  const uint4* words;
  const void* scales;
  const void* zeros;
  void* y;
  int m, n, k;
  int k_blocks, n_blocks;  // blocks of the packed array
  int group_stride;        // elements from one row of scales to the next: N, or 0 with a single group
  bool y_is_f32;
  int ranks;             // thread blocks that share an n-block, each with a slice of K
  int units_per_rank;    // units of kUnitK in a slice
  int n_blocks_at_once;  // at most as many as a thread block has warps
};

// Shared memory of one block, in this order: x as Math wants it, rings, partial sums.
template <typename Math, int bits, int kWarps, int kStages, bool kHasZeros, int kScaleBytes>
struct DecodeSmem {
  static constexpr int kBlocksPerUnit = kUnitK / Layout<bits>::kBlockK;
  static constexpr int kBlockBytes = Layout<bits>::kWordsPerBlock * 4;
  static constexpr int kWordBytes = kBlocksPerUnit * kBlockBytes;
  static constexpr int kScaleRowBytes = Layout<bits>::kBlockN * kScaleBytes;
  static constexpr int kStageBytes = kWordBytes + Math::kGroups * kScaleRowBytes * (kHasZeros ? 2 : 1);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  // 36 floats a token: lanes of different t write different banks.
  static constexpr int kPartialStride = Layout<bits>::kBlockN + 4;
  static constexpr int kPartialFloats = Math::kTokens * kPartialStride;
  static constexpr int kPartialsPerWarp = 2;

  static __host__ __device__ int total_bytes(int rows, int units_per_rank) {
    return Math::bytes(rows, units_per_rank) + kRingBytes + kWarps * kPartialsPerWarp * kPartialFloats * 4;
  }
};

template <typename T>
__device__ __forceinline__ void store_outputs(void* y, int64_t index, const float4& v, bool as_f32) {
  if (as_f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + index) = v;
  } else {
    T packed[4] = {static_cast<T>(v.x), static_cast<T>(v.y), static_cast<T>(v.z), static_cast<T>(v.w)};
    *reinterpret_cast<uint2*>(static_cast<T*>(y) + index) = *reinterpret_cast<uint2*>(packed);
  }
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// What the values of a token that its digits do not hold (Math::left_out) add to four features, from the
// words in memory. Slow and rare.
template <typename Math, int bits, typename T, typename S, int kGroupSize, bool kHasZeros>
__device__ __forceinline__ float4 sum_of_left_out(const DecodeArgs& args, const XSlice& slice,
                                                  const char* x_shared, int token, int n) {
  using L = Layout<bits>;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  const T* x = static_cast<const T*>(args.x) + static_cast<int64_t>(slice.first_token + token) * args.k;
  const float* powers = Math::powers_of(x_shared, slice, token);
  for (int unit = 0; unit < slice.units; ++unit) {
    if (powers[unit] > 0.f) continue;
    const float down = -powers[unit];
    const float up = 1.f / down;
    const int begin = (slice.first_unit + unit) * kUnitK;
    for (int k = begin; k < min(args.k, begin + kUnitK); ++k) {
      const float v = Math::left_out(static_cast<float>(x[k]), up, down);
      if (v == 0.f) continue;
      for (int j = 0; j < 4; ++j) {
        const int feature = n + j;
        if (feature >= args.n) continue;
        const WordPosition at = L::locate(k % L::kBlockK, feature % L::kBlockN);
        const int64_t block = static_cast<int64_t>(k / L::kBlockK) * args.n_blocks + feature / L::kBlockN;
        const uint32_t word =
            reinterpret_cast<const uint32_t*>(args.words)[block * L::kWordsPerBlock + at.word];
        const float code = static_cast<float>(word >> at.shift & L::kCodeMask);
        const int64_t scale_at = static_cast<int64_t>(k / kGroupSize) * args.group_stride + feature;
        float zero = L::kZeroPoint;
        if constexpr (kHasZeros) zero = static_cast<float>(static_cast<const S*>(args.zeros)[scale_at]);
        sum[j] += v * (static_cast<float>(static_cast<const S*>(args.scales)[scale_at]) * (code - zero));
      }
    }
  }
  return make_float4(sum[0], sum[1], sum[2], sum[3]);
}

template <typename Math, int bits, typename T, typename S, int kGroupSize, bool kHasZeros, int kWarps,
          int kStages, bool kCluster, int kBlocksPerSm>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm) decode_kernel(const DecodeArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster) __trap();  // never launched there; the rest vanishes
  if constexpr (kCluster) return;
#endif
  using L = Layout<bits>;
  using Smem = DecodeSmem<Math, bits, kWarps, kStages, kHasZeros, sizeof(S)>;
  constexpr int kGroups = Math::kGroups;
  extern __shared__ __align__(128) char smem[];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int ranks = args.ranks;  // a cluster, or without clusters a part of the result each
  const int rank = blockIdx.x % ranks;
  const int cluster = blockIdx.x / ranks;
  const int clusters = gridDim.x / ranks;

  const int units = static_cast<int>(ceil_div(args.k, kUnitK));
  const int rank_units = args.units_per_rank;
  const int rank_begin = rank * rank_units;
  const int rank_real_units = max(0, min(rank_units, units - rank_begin));  // the last rank may have fewer
  const int first_block = static_cast<int>(static_cast<int64_t>(args.n_blocks) * cluster / clusters);
  const int end_block = static_cast<int>(static_cast<int64_t>(args.n_blocks) * (cluster + 1) / clusters);
  const int first_token = blockIdx.y * Math::kTokens;
  const XSlice slice = {args.x,     args.k,          first_token, min(args.m - first_token, Math::kTokens),
                        rank_begin, rank_real_units, rank_units};

  char* const x_shared = smem;
  char* const ring_shared = x_shared + Math::bytes(slice.rows, rank_units);
  float* const partial_shared = reinterpret_cast<float*>(ring_shared + Smem::kRingBytes);
  const uint32_t ring = shared_address(ring_shared) + warp * kStages * Smem::kStageBytes;

  // The line of units of the n-blocks from `block` on that are worked on together, and where a warp's
  // piece of it begins; one past the last warp it is the line's end.
  auto blocks_from = [&](int block) { return min(args.n_blocks_at_once, end_block - block); };
  auto piece_begin = [&](int line, int warp) { return line * warp / kWarps; };
  auto owner = [&](int line, int position) { return ((position + 1) * kWarps - 1) / line; };

  // ---- the named steps ----

  // The producer's place: the next (n-block, unit) this warp will ask for. Pointers only ever move by
  // constants; aim_fetch does the rest: at the next n-block, at the next line, and where K ends inside a
  // unit. What lies outside the matrix is clamped to something inside it: words past K meet zeros of x,
  // features past N are not written.
  constexpr int kUint4sPerBlock = L::kWordsPerBlock / 4;
  const int64_t word_row = static_cast<int64_t>(args.n_blocks) * kUint4sPerBlock;
  const int64_t scale_step =
      static_cast<int64_t>(args.group_stride) * kGroups * static_cast<int>(sizeof(S));
  const int short_unit = units * Smem::kBlocksPerUnit > args.k_blocks ? units - 1 - rank_begin : -1;
  const uint32_t lane_words = opaque(lane * 16);
  const uint32_t lane_scales =
      opaque(Smem::kWordBytes + t * Smem::kScaleRowBytes + g * 4 * static_cast<int>(sizeof(S)));
  const uint32_t ring_end = ring + kStages * Smem::kStageBytes;
  int fetch_first = first_block - args.n_blocks_at_once;  // of the n-blocks worked on together
  int fetch_position = 0;                                 // in their line
  int fetch_end = 0;                                      // of this warp's piece
  int fetch_unit = 0;
  int fetch_run = 0;  // units until pointers need more than their constant step; 0 after the last one
  uint32_t fetch_stage = ring;
  const uint4* fetch_words = nullptr;
  const char* fetch_scales = nullptr;
  const char* fetch_zeros = nullptr;
  int64_t fetch_block_step = 0;  // from the unit's first block to the next, 0 where there is none
  auto aim_fetch = [&] {
    while (true) {
      if (fetch_position == fetch_end) {  // the next line
        fetch_first += args.n_blocks_at_once;
        if (fetch_first >= end_block) return;
        const int line = blocks_from(fetch_first) * rank_units;
        fetch_position = piece_begin(line, warp);
        fetch_end = piece_begin(line, warp + 1);
        continue;
      }
      const int n_block = fetch_first + fetch_position / rank_units;
      fetch_unit = fetch_position % rank_units;
      fetch_run = min(rank_units - fetch_unit, fetch_end - fetch_position);
      const int real = min(fetch_run, rank_real_units - fetch_unit);
      if (real <= 0) {  // past K
        fetch_position += fetch_run;
        fetch_run = 0;
        continue;
      }
      const bool is_short = fetch_unit == short_unit;
      fetch_block_step = is_short ? 0 : word_row;
      const bool meets_short = fetch_unit < short_unit && short_unit < fetch_unit + real;
      fetch_run = is_short ? 1 : meets_short ? short_unit - fetch_unit : real;
      fetch_position +=
          is_short || meets_short ? fetch_run : min(rank_units - fetch_unit, fetch_end - fetch_position);
      const int unit = rank_begin + fetch_unit;
      fetch_words = args.words + unit * Smem::kBlocksPerUnit * word_row + n_block * kUint4sPerBlock + lane;
      const int n = min(n_block * L::kBlockN + 4 * g, args.n - 4);
      const int64_t at = static_cast<int64_t>(unit * kGroups + t % kGroups) * args.group_stride + n;
      fetch_scales = static_cast<const char*>(args.scales) + at * static_cast<int>(sizeof(S));
      if constexpr (kHasZeros)
        fetch_zeros = static_cast<const char*>(args.zeros) + at * static_cast<int>(sizeof(S));
      return;
    }
  };
  aim_fetch();
  auto fetch = [&] {
    if (fetch_run > 0) {
      copy_async<16>(fetch_stage + lane_words, fetch_words);
      static_assert(Smem::kBlocksPerUnit == 2 || Smem::kBlocksPerUnit == 4);
      copy_async<16>(fetch_stage + lane_words + Smem::kBlockBytes, fetch_words + fetch_block_step);
      if constexpr (Smem::kBlocksPerUnit == 4) {
        // 4-bit codes: K may end after any block.
#pragma unroll
        for (int i = 2; i < 4; ++i) {
          const bool real = (rank_begin + fetch_unit) * 4 + i < args.k_blocks;
          copy_async<16>(fetch_stage + lane_words + i * Smem::kBlockBytes,
                         fetch_words + (real ? i * word_row : 0));
        }
      }
      // Lane t of a g brings the unit's t-th group.
      const bool real_group = kGroups == 1 || (rank_begin + fetch_unit) * kUnitK + t * kGroupSize < args.k;
      if (t < kGroups && real_group) {
        copy_async<4 * sizeof(S)>(fetch_stage + lane_scales, fetch_scales);
        if constexpr (kHasZeros) {
          copy_async<4 * sizeof(S)>(fetch_stage + lane_scales + kGroups * Smem::kScaleRowBytes,
                                    fetch_zeros);
        }
      }
      fetch_words += Smem::kBlocksPerUnit * word_row;
      fetch_scales += scale_step;
      if constexpr (kHasZeros) fetch_zeros += scale_step;
      fetch_stage += Smem::kStageBytes;
      if (fetch_stage == ring_end) fetch_stage = ring;
      ++fetch_unit;
      if (--fetch_run == 0) aim_fetch();
    }
    commit_copies();
  };

  Math math(x_shared, slice);
  const uint32_t group_scales = opaque(Smem::kWordBytes + g * 4 * static_cast<int>(sizeof(S)));
  uint32_t use_stage = ring;
  auto multiply_unit = [&](int unit) {
    math.multiply(use_stage + lane_words, use_stage + group_scales, Smem::kScaleRowBytes, unit);
    use_stage += Smem::kStageBytes;
    if (use_stage == ring_end) use_stage = ring;
  };

  auto partial_of = [&](int warp, int slot) {
    return partial_shared + (warp * Smem::kPartialsPerWarp + slot) * Smem::kPartialFloats;
  };
  auto write_partials = [&](int slot) {
    float* to = partial_of(warp, slot) + 4 * g;
    math.finish([&](int token, const float4& sums) {
      *reinterpret_cast<float4*>(to + token * Smem::kPartialStride) = sums;
    });
  };

  // One item is four features of one token; those of the n-blocks from `block` on are numbered feature
  // first.
  constexpr int kQuads = L::kBlockN / 4;
  struct Item {
    int feature, token;
    float* sum;     // of the first warp that has a piece of it: the whole sum goes here too
    int warp, end;  // the warps that have one
  };
  auto item_at = [&](int block, int item) {
    const int quads = blocks_from(block) * kQuads;
    const int line = blocks_from(block) * rank_units;
    const int quad = item % quads;
    const int j = quad / kQuads;
    const int first = owner(line, j * rank_units);
    const int slot = piece_begin(line, first) < j * rank_units;
    const int token = item / quads;
    return Item{(block + j) * L::kBlockN + quad % kQuads * 4, token,
                partial_of(first, slot) + token * Smem::kPartialStride + quad % kQuads * 4, first,
                owner(line, (j + 1) * rank_units - 1) + 1};
  };
  bool leaves_out = false;  // some value of this block's x is not entirely in its digits
  auto sum_over_warps = [&](int block, const Item& item) {
    const int line = blocks_from(block) * rank_units;
    const int offset = item.sum - partial_of(item.warp, 0);
    float4 sum = *reinterpret_cast<const float4*>(item.sum);
    for (int w = item.warp + 1; w < item.end; ++w) {
      if (piece_begin(line, w) == piece_begin(line, w + 1)) continue;
      const float* from = partial_of(w, 0) + offset % Smem::kPartialFloats;  // its first n-block
      sum = sum + *reinterpret_cast<const float4*>(from);
    }
    if constexpr (Math::kLeavesOut) {
      if (leaves_out) {
        sum = sum + sum_of_left_out<Math, bits, T, S, kGroupSize, kHasZeros>(args, slice, x_shared,
                                                                             item.token, item.feature);
      }
    }
    return sum;
  };
  auto write_item = [&](const Item& item, const float4& sum) {
    if (item.feature < args.n) {
      const int64_t part = kCluster ? 0 : static_cast<int64_t>(rank) * args.m;
      const int64_t row = (part + first_token + item.token) * args.n;
      store_outputs<T>(args.y, row + item.feature, sum, args.y_is_f32);
    }
  };

  auto reduce_in_block = [&](int block) {
    const int items = blocks_from(block) * kQuads * slice.rows;
    __syncthreads();
    for (int i = threadIdx.x; i < items; i += kWarps * 32) {
      const Item item = item_at(block, i);
      write_item(item, sum_over_warps(block, item));
    }
    __syncthreads();
  };

  auto reduce_in_cluster = [&](int block) {
    const int items = blocks_from(block) * kQuads * slice.rows;
    __syncthreads();
    for (int i = threadIdx.x; i < items; i += kWarps * 32) {
      const Item item = item_at(block, i);
      const float4 sum = sum_over_warps(block, item);
      *reinterpret_cast<float4*>(item.sum) = sum;
    }
    cluster_arrive();
    cluster_wait();
    const int share = (items + ranks - 1) / ranks;
    const int end = min(items, (rank + 1) * share);
    for (int i = rank * share + threadIdx.x; i < end; i += kWarps * 32) {
      const Item item = item_at(block, i);
      const uint32_t address = shared_address(item.sum);
      float4 sum = load_remote(address, 0);
#pragma unroll 4
      for (int r = 1; r < ranks; ++r) sum = sum + load_remote(address, r);
      write_item(item, sum);
    }
    cluster_arrive();  // the wait comes before the sums are overwritten
  };

  // ---- the kernel ----

  const bool in_cluster = kCluster && ranks > 1;

  // Copies finish in the order they were committed: x first if it is copied, so that waiting for it
  // leaves the words in flight; else the words, to arrive while x is worked on.
  if constexpr (Math::kStagesByCopy) {
    Math::stage(x_shared, slice);
    commit_copies();
  }
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();
  if constexpr (Math::kStagesByCopy) {
    wait_for_copies<kStages - 1>();
  } else {
    leaves_out = Math::stage(x_shared, slice);
  }
  leaves_out = __syncthreads_or(leaves_out);
  Math::stage_sums(x_shared, slice);

  for (int block = first_block; block < end_block; block += args.n_blocks_at_once) {
    const int line = blocks_from(block) * rank_units;
    const int piece_end = piece_begin(line, warp + 1);
    if (in_cluster && block != first_block) cluster_wait();  // the others have read the last sums
    int slot = 0;
    for (int position = piece_begin(line, warp); position < piece_end;) {
      const int unit_begin = position % rank_units;
      const int count = min(rank_units - unit_begin, piece_end - position);
      const int unit_end = min(unit_begin + count, rank_real_units);
      math.begin(unit_begin);
      for (int unit = unit_begin; unit < unit_end; ++unit) {
        wait_for_copies<kStages - 2>();
        __syncwarp();
        multiply_unit(unit);
        __syncwarp();
        fetch();
      }
      write_partials(slot++);
      position += count;
    }
    if (in_cluster) {
      reduce_in_cluster(block);
    } else {
      reduce_in_block(block);
    }
  }
  wait_for_copies<0>();
  if (in_cluster) cluster_wait();  // nobody leaves while another block may read its sums
}

// y = the sum of `parts` matrices of m x n floats. One thread, four features of one token.
template <typename T>
__global__ void add_parts(const float* from, int parts, int64_t size, void* y, bool y_is_f32) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= size) return;
  float4 sum = *reinterpret_cast<const float4*>(from + at);
  for (int part = 1; part < parts; ++part)
    sum = sum + *reinterpret_cast<const float4*>(from + part * size + at);
  store_outputs<T>(y, at, sum, y_is_f32);
}

}  // namespace jax_trirun::cuda
