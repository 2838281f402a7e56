// The decode kernel: y[M, N] = x[M, K] @ W for a few tokens, at the speed the packed words arrive.
//
// A cluster of blocks takes a run of the matrix's blocks of 32 output features (n-blocks), and each of
// its thread blocks a slice of K of all of them. Inside a thread block the work of up to twice as many n-blocks
// as it has warps is one line of units (128 of K of one n-block), cut into equal pieces, a warp each:
//
//      n-block 0            n-block 1            n-block 2
//    |--------------------|--------------------|--------------------|
//     warp 0       | warp 1       | warp 2       | warp 3        ..
//
// So all warps finish together, whatever N and K are, and a warp meets at most two n-blocks, or three of long lines: it
// leaves a partial sum for each, and the block adds the pieces up once at the end. Between two lines the memory has
// nothing to do for some 3,000 clocks: with three and four tokens long lines take 3 to 6 % off the largest layers. Other
// kernels are as fast or faster with short ones.
//
// x stays in shared memory: a block brings its K slice once and meets it again in every n-block. Words
// and scales come through a ring that belongs to one warp alone (cp.async, no block-wide barrier), so
// warps drift apart. The packed words are the A operand (rows are output features, columns k), tokens
// are B's columns.
//
// A launch lasts 3 to 40 us, and all warps of a multiprocessor run what comes before the first words and after the
// last ones: there 100 instructions take 0.2 us, so the host does the divisions and addresses stay short.
//
// Measured on an H200, and dropped: digits by wgmma for three to eight tokens, the four warps of a warpgroup side by
// side. By itself that arithmetic takes a quarter less (bench/results/cuda_arithmetic_*.csv); but 8192 x 57344 took 38.4
// us instead of 39.7 at four tokens, smaller layers longer, and eight tokens longer everywhere: their digits leave
// shared memory for half as many words on their way, and a block of 128 features is a coarse share. With x cut by a
// kernel of its own before it, eight tokens take 45.1 us instead of 46.7, and 4 us longer in small layers. With words by
// the copy engine, a ring for each of four warpgroups, and digits cut in the kernel, three and four tokens of 8192 x 8192
// take 8 % less and of 8192 x 57344 and 4096 x 28672 3 to 5 %, but of 28672 x 8192 and 14336 x 4096 10 and 40 % more (tiles of
// 128 features leave blocks idle), and eight tokens as long or 20 % longer: 16 values a lane are cut in 1,250 clocks a round
// of all warps, 1,300 go by at the cluster's barrier and 2,200 with adding up through L2. And x asked for
// by several warps, before a barrier or after the first words: within 1 %, as all blocks want it from L2 at once. The
// conversions' constants in registers instead of instructions: 2 % slower. And, without having been built, the codes as
// the positions of a sparse mma's values, each of which picks -x, 0, x or 2x, with no conversion at all: 32 mma.sp for
// a unit and eight tokens take 266 clocks by themselves, and whatever else is issued comes on top of them, as it does
// of mma.sync (101 clocks and 157 of conversions are 261). The memory brings a unit every 252.
//
// With one row 26 of the 132 multiprocessors read a seventh faster than the others, and 8192 x 57344 is at its end when
// the slowest is: 34 us, where they all need 30 on average. But n-blocks that are not dealt out, and taken one by one by
// thread blocks that are through with theirs, cost a microsecond each, with and without barriers between them and
// however early they are asked for: a piece of four units is too short for what begins and ends it.
//
// Digits: the values of one unit for a warp instead of four (10 to 20 % slower: the steps that a warp takes together
// weigh more), the loop over a warp's values unrolled (1 to 4 % slower, though a fifth fewer instructions: they have to be
// read), x by the copy engine (it arrives 2,000 clocks after the words that were asked for at the same time), x by
// asynchronous copies to shared memory, from where it is cut (1 % faster with one token, 3 % slower with four).
//
// The first words asked for before x: large layers 1 % faster or slower, small ones 12 % slower, as x then waits behind
// the words. All words of a thread block, or the first 32 KB, asked for in L2 at the very beginning
// (cp.async.bulk.prefetch): 1 to 60 % slower, as what is asked for twice is read from memory twice.
//
// Two units in a step, with one wait and their words asked for together (197 instructions a unit of 16-bit floats instead
// of 229, 104 of digits instead of 121): 8192 x 57344 8 % faster with five rows and 5 % with eight, most other sizes 4 %
// slower, as their code is longer. A unit asked for before one is multiplied: 4 % slower with three and four rows, else the
// same. x's bulk copies issued by all warps instead of one: within 1 %, 4096 x 4096 with 16 rows 4 % slower. Thread blocks
// of eight warps: 1024 x 4096 a tenth faster with one row and 4096 x 4096 2 %, large layers 3 to 10 % slower.
//
// Without clusters (before sm_90) the thread blocks that share an n-block write one part of the result
// each, in float32, and add_parts adds them up.
//
// Sums: a group's products in float32 by the tensor cores, at most 128 of K before they are scaled
// and added in float32; then over the warps of a block and the blocks of a cluster, always in the same
// order, so the same inputs give the same bits.
#pragma once

#include <algorithm>

#include "../problem.h"
#include "decode_math.cuh"
#include "outputs.cuh"
#include "plan.h"
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

  // How the work is cut, see cut_work. The grid is (thread blocks that share an n-block, each with a slice
  // of K: ranks; clusters; tiles of tokens).
  int units;             // of kUnitK in K
  int units_per_rank;    // in a slice
  uint32_t unit_magic;   // position / units_per_rank = the high word of position * unit_magic; 0 for 1
  int blocks_each;       // n-blocks of a cluster ..
  int blocks_extra;      // .. the first few of which have one more
  int n_blocks_at_once;  // of a line
  int log_blocks;        // 2^log_blocks >= n_blocks_at_once
};

// Fills in the work's cut for `ranks` slices of K in each of `clusters` clusters of blocks of `warps` warps. A line has at
// most `blocks_per_warp` n-blocks for each warp.
inline void cut_work(DecodeArgs& args, int ranks, int clusters, int warps, int blocks_per_warp) {
  args.units = static_cast<int>(ceil_div(args.k, kUnitK));
  args.units_per_rank = static_cast<int>(ceil_div(args.units, ranks));
  const uint64_t divisor = std::max(args.units_per_rank, 1);
  args.unit_magic = static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor);
  args.blocks_each = args.n_blocks / clusters;
  args.blocks_extra = args.n_blocks % clusters;
  const int most = static_cast<int>(ceil_div(args.n_blocks, clusters));
  args.n_blocks_at_once = static_cast<int>(ceil_div(most, ceil_div(most, warps * blocks_per_warp)));
  args.log_blocks = 0;
  while (1 << args.log_blocks < args.n_blocks_at_once) ++args.log_blocks;
}

// Shared memory of one block, in this order: x as Math wants it, rings, where the partial sums lie, the barriers that x
// arrives at and the one for the sums of the blocks of a cluster, the partial sums, and those of the blocks.
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
  // A piece that is as long as so many n-blocks may lie in one more.
  static __host__ __device__ int partials_per_warp(int blocks_per_warp) { return blocks_per_warp + 1; }

  static constexpr int kPieceBytes = kWarps * kMostBlocksPerWarp * static_cast<int>(sizeof(int4));
  static constexpr int kBarriers = Math::kBarriers + 1;
  static constexpr int kBarrierBytes = (kBarriers + 1) / 2 * 16;

  // Of every item (see below) that this block adds up, each block's sums.
  static int exchange_bytes(int rows, int ranks, int blocks_per_warp) {
    int blocks = 1;
    while (blocks < kWarps * blocks_per_warp) blocks *= 2;
    return ranks == 1 ? 0 : rows * blocks * Layout<bits>::kBlockN * 4;
  }
  static int total_bytes(int rows, int units_per_rank, int ranks, int blocks_per_warp) {
    return Math::bytes(rows, units_per_rank) + kRingBytes + kPieceBytes + kBarrierBytes +
           kWarps * partials_per_warp(blocks_per_warp) * kPartialFloats * 4 +
           exchange_bytes(rows, ranks, blocks_per_warp);
  }
};

// What is left of a token's values that its digits do not hold entirely, times the weights of four features: from the
// words in memory.
template <typename Math, int bits, typename S, int kGroupSize, bool kHasZeros>
__device__ __forceinline__ float4 sum_of_left_out(const DecodeArgs& args, const XSlice& slice,
                                                  char* x_shared, int token, int n) {
  using L = Layout<bits>;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  Math::for_each_left_out(x_shared, slice, token, [&](int k_of_slice, float v) {
    const int k = slice.first_unit * kUnitK + k_of_slice;
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
  });
  return make_float4(sum[0], sum[1], sum[2], sum[3]);
}

// A line has at most kBlocksPerWarp n-blocks for each warp.
template <typename Math, int bits, typename T, typename S, int kGroupSize, bool kHasZeros, int kWarps,
          int kStages, bool kCluster, int kBlocksPerSm, int kBlocksPerWarp>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kCluster) __trap();  // never launched there; the rest vanishes
  if constexpr (kCluster) return;
#endif
  using L = Layout<bits>;
  using Smem = DecodeSmem<Math, bits, kWarps, kStages, kHasZeros, sizeof(S)>;
  constexpr int kGroups = Math::kGroups;
  extern __shared__ __align__(128) char smem[];

  const int lane = threadIdx.x % 32;
  const int warp =
      __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // which the compiler then knows to be uniform
  const int g = lane / 4;
  const int t = lane % 4;
  const int ranks = gridDim.x;  // a cluster, or without clusters a part of the result each
  const int rank = blockIdx.x;
  const int cluster = blockIdx.y;

  const int rank_units = args.units_per_rank;
  const int rank_begin = rank * rank_units;
  const int rank_real_units = max(0, min(rank_units, args.units - rank_begin));  // the last may have fewer
  const int first_block = cluster * args.blocks_each + min(cluster, args.blocks_extra);
  const int end_block = first_block + args.blocks_each + (cluster < args.blocks_extra ? 1 : 0);
  const int first_token = blockIdx.z * Math::kTokens;
  const XSlice slice = {args.x,     args.k,          first_token, min(args.m - first_token, Math::kTokens),
                        rank_begin, rank_real_units, rank_units};

  char* const x_shared = smem;
  char* const ring_shared = x_shared + Math::bytes(slice.rows, rank_units);
  int4* const pieces_shared = reinterpret_cast<int4*>(ring_shared + Smem::kRingBytes);
  char* const barriers_shared = reinterpret_cast<char*>(pieces_shared) + Smem::kPieceBytes;
  float* const partial_shared = reinterpret_cast<float*>(barriers_shared + Smem::kBarrierBytes);
  const bool long_lines = kBlocksPerWarp > 1 && args.n_blocks_at_once > kWarps;
  const int partials_per_warp = Smem::partials_per_warp(long_lines ? kBlocksPerWarp : 1);
  float* const exchange_shared = partial_shared + kWarps * partials_per_warp * Smem::kPartialFloats;
  const uint32_t x_barriers = shared_address(barriers_shared);
  const uint32_t exchange_barrier = x_barriers + Math::kBarriers * 8;
  const uint32_t ring = shared_address(ring_shared) + warp * kStages * Smem::kStageBytes;

  // The line of units of the n-blocks from `block` on that are worked on together, and where a warp's
  // piece of it begins; one past the last warp it is the line's end.
  auto blocks_from = [&](int block) { return min(args.n_blocks_at_once, end_block - block); };
  auto piece_begin = [&](int line, int warp) {
    return static_cast<int>(static_cast<uint32_t>(line * warp) / kWarps);
  };
  auto owner = [&](int line, int position) { return ((position + 1) * kWarps - 1) / line; };
  auto n_block_at = [&](int position) {
    return args.unit_magic == 0 ? position : static_cast<int>(__umulhi(position, args.unit_magic));
  };

  // ---- the named steps ----

  // A warp's piece of a line: units of one n-block, perhaps to its end, then of the next, and of the one after that. It
  // begins with the last one, so that the warps are all at about the same place of K: there their words are neighbours in
  // memory.
  struct Piece {
    int n_block, unit;  // where it begins; n-blocks counted from the line's first
    int count;          // of units of n_block
    int more;           // of units of those after it
  };
  auto piece_of = [&](int line) {
    const int begin = piece_begin(line, warp);
    const int n_block = n_block_at(begin);
    const int unit = begin - n_block * rank_units;
    const int count = piece_begin(line, warp + 1) - begin;
    const int in_first = min(count, rank_units - unit);
    return Piece{n_block, unit, in_first, count - in_first};
  };
  // N-blocks after the first one, and units of the last one of them.
  auto blocks_after_first = [&](const Piece& piece) {
    return (piece.more > 0) + (kBlocksPerWarp > 1 && piece.more > rank_units);
  };
  auto units_of_last = [&](const Piece& piece) {
    return kBlocksPerWarp > 1 && piece.more > rank_units ? piece.more - rank_units : piece.more;
  };

  // The producer's place: what this warp will ask for next. Pointers move by constants within an n-block.
  // What lies outside the matrix is not copied, and the ring keeps whatever was there: words past K meet zeros
  // of x, features past N are not written.
  const uint32_t word_row = opaque(args.n_blocks * Smem::kBlockBytes);
  const uint32_t scale_step = opaque(args.group_stride * kGroups * static_cast<int>(sizeof(S)));
  const uint32_t lane_words = opaque(lane * 16);
  const uint32_t lane_scales =
      opaque(Smem::kWordBytes + t * Smem::kScaleRowBytes + g * 4 * static_cast<int>(sizeof(S)));
  const uint32_t ring_end = ring + kStages * Smem::kStageBytes;
  int fetch_first = first_block;  // of the n-blocks worked on together
  int fetch_block = 0;
  int fetch_unit = 0;
  int fetch_left = 0;  // units of this n-block
  int fetch_more = 0;  // units of those before, up to their ends
  bool fetch_scale = false;
  uint32_t fetch_stage = ring;
  const char* fetch_words = nullptr;
  const char* fetch_scales = nullptr;
  const char* fetch_zeros = nullptr;
  auto aim_at = [&](int n_block, int unit, int count) {
    fetch_block = n_block;
    fetch_unit = rank_begin + unit;
    fetch_left = min(count, rank_real_units - unit);
    const int n = n_block * L::kBlockN + 4 * g;
    fetch_scale = t < kGroups && n < args.n;
    const uint32_t block =
        static_cast<uint32_t>(fetch_unit * Smem::kBlocksPerUnit) * args.n_blocks + n_block;
    fetch_words = reinterpret_cast<const char*>(args.words) +
                  (static_cast<uint64_t>(block) * Smem::kBlockBytes + lane * 16);
    const int64_t at = static_cast<int64_t>(fetch_unit * kGroups + t) * args.group_stride + n;
    fetch_scales = static_cast<const char*>(args.scales) + at * static_cast<int>(sizeof(S));
    if constexpr (kHasZeros)
      fetch_zeros = static_cast<const char*>(args.zeros) + at * static_cast<int>(sizeof(S));
  };
  auto aim_fetch = [&] {
    const Piece piece = piece_of(blocks_from(fetch_first) * rank_units);
    const int after = blocks_after_first(piece), units = units_of_last(piece);
    aim_at(fetch_first + piece.n_block + after, after ? 0 : piece.unit, after ? units : piece.count);
    fetch_more = after ? piece.count + (piece.more - units) : 0;
  };
  auto aim_next = [&] {
    while (fetch_left <= 0) {
      if (fetch_more > 0) {
        const int count = kBlocksPerWarp == 1 ? fetch_more : min(fetch_more, rank_units);
        aim_at(fetch_block - 1, rank_units - count, count);
        fetch_more -= count;
      } else {  // the next line
        fetch_first += args.n_blocks_at_once;
        if (fetch_first >= end_block) return;
        aim_fetch();
      }
    }
  };
  const int whole_units = opaque(args.k_blocks / Smem::kBlocksPerUnit);
  auto fetch = [&] {
    if (fetch_left > 0) {
#pragma unroll
      for (int i = 0; i < Smem::kBlocksPerUnit; ++i) {
        if (i == 0 || fetch_unit < whole_units)  // K may end inside a unit
          copy_async<16>(fetch_stage + lane_words + i * Smem::kBlockBytes, fetch_words + i * word_row);
      }
      // Lane t of a g brings the unit's t-th group.
      if (fetch_scale && (kGroups == 1 || fetch_unit * kUnitK + t * kGroupSize < args.k)) {
        copy_async<4 * sizeof(S)>(fetch_stage + lane_scales, fetch_scales);
        if constexpr (kHasZeros)
          copy_async<4 * sizeof(S)>(fetch_stage + lane_scales + kGroups * Smem::kScaleRowBytes,
                                    fetch_zeros);
      }
      fetch_words += Smem::kBlocksPerUnit * word_row;
      fetch_scales += scale_step;
      if constexpr (kHasZeros) fetch_zeros += scale_step;
      fetch_stage += Smem::kStageBytes;
      if (fetch_stage == ring_end) fetch_stage = ring;
      ++fetch_unit;
      if (--fetch_left == 0) aim_next();
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

  auto offset_of = [&](int warp, int slot) {
    return (warp * partials_per_warp + slot) * Smem::kPartialFloats;
  };
  auto write_partials = [&](int slot) {
    float* to = partial_shared + offset_of(warp, slot) + 4 * g;
    math.finish([&](int token, const float4& sums) {
      *reinterpret_cast<float4*>(to + token * Smem::kPartialStride) = sums;
    });
  };

  // Which warps have a piece of an n-block: thread j writes it down for the j-th of the line, while the
  // words are still on their way.
  struct Pieces {
    int offset;        // of the first warp's partial sum; the whole sum goes there too
    int others, more;  // of the first partial sums of the warps after it, and how many
  };
  auto find_pieces = [&](int block) {
    const int j = threadIdx.x;
    if (j >= blocks_from(block)) return;
    const int line = blocks_from(block) * rank_units;
    const int begin = j * rank_units;
    const int first = owner(line, begin);
    const int slot = j - n_block_at(piece_begin(line, first));
    pieces_shared[j] = make_int4(offset_of(first, slot), offset_of(first + 1, 0),
                                 owner(line, begin + rank_units - 1) - first, 0);
  };

  // An item is 32 features of one token, for eight threads; items are numbered n-block first.
  constexpr int kItemsAtOnce = kWarps * 4;
  const int quad = threadIdx.x % 8 * 4;
  bool leaves_out = false;  // some value of this block's x is not entirely in its digits
  auto sum_over_warps = [&](int block, int j, int token) {
    const int4 raw = pieces_shared[j];
    const Pieces pieces = {raw.x, raw.y, raw.z};
    const float* const at = partial_shared + token * Smem::kPartialStride + quad;
    const float* const others = at + pieces.others;
    const int of_warp = offset_of(1, 0);
    float4 sum = *reinterpret_cast<const float4*>(at + pieces.offset);
#pragma unroll 4
    for (int i = 0; i < pieces.more; ++i)
      sum = sum + *reinterpret_cast<const float4*>(others + i * of_warp);
    if constexpr (Math::kLeavesOut) {
      if (leaves_out) {
        sum = sum + sum_of_left_out<Math, bits, S, kGroupSize, kHasZeros>(args, slice, x_shared, token,
                                                                          (block + j) * L::kBlockN + quad);
      }
    }
    return sum;
  };
  auto write_item = [&](int n_block, int token, const float4& sum) {
    const int feature = n_block * L::kBlockN + quad;
    if (feature < args.n) {
      const int64_t part = kCluster ? 0 : static_cast<int64_t>(rank) * args.m;
      const int64_t row = (part + first_token + token) * args.n;
      store_outputs<T>(args.y, row + feature, sum, args.y_is_f32);
    }
  };

  auto reduce_in_block = [&](int block) {
    const int blocks = blocks_from(block);
    __syncthreads();
    for (int i = threadIdx.x / 8; i < slice.rows << args.log_blocks; i += kItemsAtOnce) {
      const int j = i & ((1 << args.log_blocks) - 1);
      const int token = i >> args.log_blocks;
      if (j < blocks) write_item(block + j, token, sum_over_warps(block, j, token));
    }
    if (block + args.n_blocks_at_once < end_block) __syncthreads();
  };

  // Every ranks-th item (ranks is a power of two) is this block's to add up and write. The others send it their sums,
  // which count as bytes at its barrier: that is all it waits for.
  auto reduce_in_cluster = [&](int block, uint32_t parity) {
    // Again, or what follows from them takes registers that the main loop needs (up to 16 of its 300 instructions more).
    const int ranks = opaque(gridDim.x), rank = opaque(blockIdx.x);
    const int blocks = blocks_from(block);
    const int items = slice.rows << args.log_blocks;
    const bool is_last = block + args.n_blocks_at_once >= end_block;
    const uint32_t exchange = shared_address(exchange_shared) + quad * 4;
    constexpr int kItemBytes = L::kBlockN * 4;
    __syncthreads();
    if (threadIdx.x == 0)
      barrier_arrive_expecting(exchange_barrier, ((items - rank + ranks - 1) & -ranks) * kItemBytes);
    cluster_wait();  // the others have begun, or read the last sums
    for (int i = threadIdx.x / 8; i < items; i += kItemsAtOnce) {
      const int j = i & ((1 << args.log_blocks) - 1);
      const int token = i >> args.log_blocks;
      float4 sum = {};
      if (j < blocks) sum = sum_over_warps(block, j, token);
      const uint32_t owner = i & (ranks - 1);
      send(address_in(owner, exchange + ((i & -ranks) + rank) * kItemBytes), sum,
           address_in(owner, exchange_barrier));
    }
    if (!is_last) __syncthreads();  // the partial sums have been read
    barrier_wait_for_cluster(exchange_barrier, parity);
    for (int i = threadIdx.x / 8 * ranks + rank; i < items; i += kItemsAtOnce * ranks) {
      const int j = i & ((1 << args.log_blocks) - 1);
      const int token = i >> args.log_blocks;
      if (j >= blocks) continue;
      const uint32_t from = exchange + (i - rank) * kItemBytes;
      float4 sum = load_shared_floats(from);
#pragma unroll 4
      for (int r = 1; r < ranks; ++r) sum = sum + load_shared_floats(from + r * kItemBytes);
      write_item(block + j, token, sum);
    }
    if (!is_last) cluster_arrive_relaxed();
  };

  // ---- the kernel ----

  const bool in_cluster = kCluster && ranks > 1;

  // x comes by the copy engine where there is one, run by run: a warp waits for the run it has reached.
  constexpr bool kBulk = Math::kStagesByCopy && kCluster;
  auto wait_for_x = [&](int run) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    barrier_wait(x_barriers + run * 8, 0);
#endif
  };
  int x_run_shift = 0;
  if constexpr (kBulk) x_run_shift = Math::run_shift(slice);

  // It is asked for before the words, which are many and would be in its way.
  typename Math::FirstValues first_values;
  Math::load_first(first_values, slice);
  if constexpr (Math::kStagesByCopy) {
    if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      if (warp == kWarps - 1) Math::stage_bulk(x_shared, slice, x_barriers, cluster);
#endif
    } else {
      Math::stage(x_shared, slice, first_values);
      commit_copies();
    }
  }
  aim_fetch();
  aim_next();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();
  if (in_cluster) {
    if (threadIdx.x == 0) {
      barrier_init(exchange_barrier, 1);
      barrier_init_fence();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  find_pieces(first_block);
  if constexpr (!Math::kStagesByCopy) {
    leaves_out = __syncthreads_or(Math::stage(x_shared, slice, first_values));
  } else if constexpr (kBulk) {
    Math::stage_rest(x_shared, slice);
    __syncthreads();
    for (int i = 0; kHasZeros && i < Math::kBarriers; ++i) wait_for_x(i);  // stage_sums reads all of it
  } else {
    wait_for_copies<kStages - 1>();  // leaves the words in flight
    __syncthreads();
  }
  Math::stage_sums(x_shared, slice);

  uint32_t parity = 0;
  for (int block = first_block; block < end_block; block += args.n_blocks_at_once) {
    if (block != first_block) find_pieces(block);
    const Piece piece = piece_of(blocks_from(block) * rank_units);
    const int after = blocks_after_first(piece);
    int unit = after ? 0 : piece.unit;
    int count = after ? units_of_last(piece) : piece.count;
    // A warp without a piece (of a short line) leaves a sum too: zero.
    for (int slot = after; slot >= 0; --slot) {
      const int end = min(unit + count, rank_real_units);
      math.begin(unit);
      int x_until = 0;  // the units before it have their x
      for (; unit < end; ++unit) {
        if constexpr (kBulk) {
          if (unit >= x_until) {
            const int run = unit / Math::kPieceUnits >> x_run_shift;
            wait_for_x(run);
            x_until = (run + 1) * Math::kPieceUnits << x_run_shift;
          }
        }
        wait_for_copies<kStages - 2>();
        __syncwarp();
        multiply_unit(unit);
        __syncwarp();
        fetch();
      }
      write_partials(slot);
      const bool is_whole = kBlocksPerWarp > 1 && slot > 1;
      unit = is_whole ? 0 : piece.unit;
      count = is_whole ? rank_units : piece.count;
    }
    if (in_cluster) {
      reduce_in_cluster(block, parity);
      parity ^= 1;
    } else {
      reduce_in_block(block);
    }
  }
  wait_for_copies<0>();
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
