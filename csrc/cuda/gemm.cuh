// The kernel for many tokens on Hopper: y[M, N] = x[M, K] @ W by wgmma, with the weights as the operand in
// registers.
//
// A thread block is one producer warp and kWarpgroups warpgroups of consumers, and makes tiles of y of
// kWarpgroups * 128 features x kTokens. A stage of its ring holds one block of K (64): x by the copy engine
// as wgmma wants it, the packed words as they are. The words of one warp's 32 features are 16 bytes a
// lane; they become A fragments in registers, word by word, while the tensor cores work on the words before.
//
//     producer:      wait for an empty stage -> x, words, scales -> ...
//     a warpgroup:   wait for a full stage
//                    word 0 -> A fragments -> 2 wgmma; wait until all but three words' are through
//                    word 1 -> A fragments -> 2 wgmma; wait ...
//
// Measured on an H200 (8192 x 57344, 1024 tokens), and dropped: fragments made half a block at a time (two words,
// 7 % slower: the tensor cores ran dry); clusters of two blocks that fetch x for each other by multicast (8 %
// slower, though half the reads of the L2 cache: one more block to wait for); scales read from global memory
// instead of the ring (a quarter slower). From about 128 tokens on the card's power is what binds: at 700 TFLOP/s its
// clock falls from 1.98 to 1.5 GHz.
//
// Scales: either multiplied onto the weights (kGroupSize 0: scales of x's type, where a scale times -1, 0, 1 or
// 2 is exact), or onto the sums of each group, in float32. The first leaves room for 128 tokens of
// accumulators, the second is exact for every type of scale and every zero.
//
// Work: tiles in whole rounds of the grid first; the tiles of the last, incomplete round are cut along K
// so that every thread block gets the same number of units, and written in parts that add_gemm_parts adds
// up, in order (stream-K, arXiv:2301.03598; without its fix-up, in which blocks wait for each other).
#pragma once

#include <algorithm>
#include <utility>

#include "../problem.h"
#include "decode_math.cuh"
#include "gemm_plan.h"
#include "hopper.cuh"
#include "outputs.cuh"
#include "wgmma.cuh"

namespace jax_trirun::cuda {

struct GemmArgs {
  const uint4* words;
  const void* scales;
  const void* zeros;    // or null
  const float* x_sums;  // with zeros: the sum of x over each kGroupSize of K, [.., x_sums_stride]
  int x_sums_stride;    // M rounded up to whole tiles
  void* y;
  float4* parts;  // of the tiles that several thread blocks share
  int m, n;
  int k_blocks, n_blocks;  // blocks of the packed array
  int groups;              // rows of scales
  int group_stride;        // elements from one row of scales to the next: N, or 0 with a single group
  int group_shift;         // k >> group_shift is k's row of scales
  bool scales_are_f32, y_is_f32;
  int m_tiles, n_tiles;
  int band;         // tiles of M that are walked before the next tile of N
  int whole_tiles;  // the first tiles: each is made by one thread block
  int units;        // of K in a tile: what the others are cut into
};

struct TilePosition {
  int m_tile, n_tile;
};

// Tiles go through bands of M, and through the tiles of N inside a band: blocks that run at the same time
// share words and share x.
__host__ __device__ inline TilePosition tile_position(const GemmArgs& args, int tile) {
  const int in_band = args.band * args.n_tiles;
  const int first = tile / in_band * args.band;
  const int width = args.band < args.m_tiles - first ? args.band : args.m_tiles - first;
  const int rest = tile % in_band;
  return {first + rest % width, rest / width};
}

// The units that a thread block takes of the tiles that are cut, out of `total`: [begin(i), begin(i + 1)).
struct Shares {
  int base, extra;
  __host__ __device__ Shares(int total, int blocks) : base(total / blocks), extra(total % blocks) {}
  __host__ __device__ int begin(int block) const { return block * base + (block < extra ? block : extra); }
  // The block that has this unit.
  __host__ __device__ int owner(int unit) const {
    const int longer = extra * (base + 1);
    return unit < longer ? unit / (base + 1) : extra + (unit - longer) / base;
  }
};

// What a thread block makes at a time: the tile's sum over [first_block, last_block) of K.
struct Segment {
  int m_tile, n_tile;
  int first_block, last_block;
  int part;  // where the sums go in `parts`, or -1: they are y
};

// Calls visit(segment) for all of this thread block's. (Two loops: as one, their divisions kept ptxas from seeing that
// all threads of a warp walk alike, and wgmma waited for its descriptors.)
template <typename Visit>
__device__ __forceinline__ void for_each_segment(const GemmArgs& args, Visit visit) {
  const int grid = gridDim.x, block = blockIdx.x;
  for (int tile = block; tile < args.whole_tiles; tile += grid) {
    const TilePosition at = tile_position(args, tile);
    visit(Segment{at.m_tile, at.n_tile, 0, args.k_blocks, -1});
  }
  const Shares shares((args.m_tiles * args.n_tiles - args.whole_tiles) * args.units, grid);
  const int end = shares.begin(block + 1);
  for (int unit = shares.begin(block); unit < end;) {
    const TilePosition at = tile_position(args, args.whole_tiles + unit / args.units);
    const int first = unit % args.units;
    const int last = min(args.units, first + end - unit);
    const bool whole = first == 0 && last == args.units;
    // At most two parts a block: the end of a tile, then the start of another.
    visit(Segment{at.m_tile, at.n_tile, first * kGemmUnitBlocks, min(last * kGemmUnitBlocks, args.k_blocks),
                  whole ? -1 : 2 * block + (first == 0)});
    unit += last - first;
  }
}

// Four features of token 8 * j + 2 * t + e, out of a thread's accumulators.
template <int kSize>
__device__ __forceinline__ float4 features_of(const float (&d)[2][kSize], int j, int e) {
  return {d[0][4 * j + e], d[0][4 * j + 2 + e], d[1][4 * j + e], d[1][4 * j + 2 + e]};
}

// Shared memory: for each stage x, words and rows of scales; then the barriers.
template <int kTokens, int kWarpgroups, int kGroupSize, bool kHasZeros, int kStages>
struct GemmSmem {
  using L = Layout<2>;
  static constexpr int kBlocks = kWarpgroups * 4;  // n-blocks of a tile: one for each warp
  static constexpr int kFeatures = kBlocks * L::kBlockN;
  static constexpr int kBlockBytes = L::kWordsPerBlock * 4;
  static constexpr int kXBytes = kTokens * L::kBlockK * 2;
  // Rows of scales in a block. On the weights they are applied half a block at a time, whatever the group size.
  static constexpr int kRows = kGroupSize == 0 ? L::kHalves : std::max(1, L::kBlockK / kGroupSize);
  static constexpr int kScaleRowBytes = kFeatures * 4;  // room for float32
  static constexpr int kWords = kXBytes;
  static constexpr int kScales = kWords + kBlocks * kBlockBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle
  static constexpr int kStageBytes =
      (kScales + kRows * (kHasZeros ? 2 : 1) * kScaleRowBytes + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kBytes = kBarriers + 2 * kStages * 8 + kAlignment;
  static_assert(L::kBlockK * 2 == 128, "a token's k of a block are one row of the 128-byte swizzle");
};

// A ring's position: which stage, and the parity of the phase its barriers are in.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Registers of a thread: the kernel starts with the same number for all, then the producers leave what
// the consumers take.
template <bool kHasZeros>
inline constexpr int kProducerRegisters = kHasZeros ? 48 : 40;
template <int kWarpgroups, bool kHasZeros>
inline constexpr int kConsumerRegisters = [] {
  constexpr int kGroups = kWarpgroups + 1;
  constexpr int kAtStart = 65536 / (kGroups * 128) / 8 * 8;
  return (kAtStart * kGroups - kProducerRegisters<kHasZeros>) / kWarpgroups / 8 * 8;
}();

template <typename T>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (__is_same(T, __half)) {
    asm("add.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("add.rn.bf16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
}
template <typename T>
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (__is_same(T, __half)) {
    asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
}

// A number that a lambda's body can use as a template argument.
template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <typename F, int... kSteps>
__device__ __forceinline__ void unrolled_over(F f, std::integer_sequence<int, kSteps...>) {
  (f(Constant<kSteps>{}), ...);
}
template <int kCount, typename F>
__device__ __forceinline__ void unrolled(F f) {
  unrolled_over(f, std::make_integer_sequence<int, kCount>{});
}

template <typename T, int kTokens, int kWarpgroups, int kGroupSize, bool kHasZeros, int kStages>
__global__ void __launch_bounds__((kWarpgroups + 1) * 128, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<2>;
  constexpr bool kScaledSums = kGroupSize > 0;
  using Smem = GemmSmem<kTokens, kWarpgroups, kGroupSize, kHasZeros, kStages>;
  constexpr int kRows = Smem::kRows;
  constexpr int kRowK = L::kBlockK / kRows;
  constexpr int kSums = kTokens / 2;  // accumulators of a thread for one 64 x kTokens product

  extern __shared__ char raw_shared[];
  const uint32_t shared =
      (shared_address(raw_shared) + Smem::kAlignment - 1) / Smem::kAlignment * Smem::kAlignment;
  const auto stage_at = [&](int stage) { return shared + stage * Smem::kStageBytes; };
  const auto full = [&](int stage) { return shared + Smem::kBarriers + stage * 8; };
  const auto empty = [&](int stage) { return shared + Smem::kBarriers + (kStages + stage) * 8; };
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kWarpgroups * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();

  RingPosition<kStages> ring;

  const auto produce = [&] {
    for_each_segment(args, [&](const Segment& segment) {
      const int n_first = segment.n_tile * Smem::kBlocks;
      const int word_bytes = min(Smem::kBlocks, args.n_blocks - n_first) * Smem::kBlockBytes;
      const uint4* words =
          args.words +
          (static_cast<int64_t>(segment.first_block) * args.n_blocks + n_first) * (Smem::kBlockBytes / 16);
      const int feature = segment.n_tile * Smem::kFeatures;
      const int scale_size = args.scales_are_f32 ? 4 : 2;
      const int scale_bytes = min(Smem::kFeatures, args.n - feature) * scale_size;
      for (int block = segment.first_block; block < segment.last_block; ++block) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        const uint32_t to = stage_at(ring.stage), arrived = full(ring.stage);
        barrier_arrive_expecting(arrived,
                                 Smem::kXBytes + word_bytes + kRows * (kHasZeros ? 2 : 1) * scale_bytes);
        copy_bulk(to + Smem::kWords, words, word_bytes, arrived);
        copy_box(to, x_map, block * L::kBlockK, segment.m_tile * kTokens, arrived);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int64_t row = min((block * L::kBlockK + i * kRowK) >> args.group_shift, args.groups - 1);
          const int64_t from = (row * args.group_stride + feature) * scale_size;
          const uint32_t to_row = to + Smem::kScales + i * Smem::kScaleRowBytes;
          copy_bulk(to_row, static_cast<const char*>(args.scales) + from, scale_bytes, arrived);
          if constexpr (kHasZeros) {
            copy_bulk(to_row + kRows * Smem::kScaleRowBytes, static_cast<const char*>(args.zeros) + from,
                      scale_bytes, arrived);
          }
        }
        words += static_cast<int64_t>(args.n_blocks) * (Smem::kBlockBytes / 16);
        ring.advance();
      }
    });
  };

  const auto consume = [&] {
    float sums[L::kTiles][kSums];  // of the products
    float total[kScaledSums ? L::kTiles : 1][kScaledSums ? kSums : 1];
    // The A fragments of some words: one is being made while the tensor cores have the others to read.
    constexpr int kSets = kHasZeros || kGroupSize == 32 ? 2 : 4;
    uint32_t a[kSets][L::kStepsPerWord][4];
    const int feature_of_tile = warp * L::kBlockN + lane / 4 * 4;  // the first of the lane's four

    const auto wait_for = [&](const RingPosition<kStages>& at) { barrier_wait(full(at.stage), at.parity); };
    const auto load_words = [&](int stage) {
      return load_shared_16(stage_at(stage) + Smem::kWords + warp * Smem::kBlockBytes + lane * 16);
    };
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty(stage));
    };
    // x of `stage`, from the k-th on of the block.
    const auto x_at = [&](int stage, int k) { return swizzled_descriptor(stage_at(stage)) + k * 2 / 16; };

    // d += a word's weights @ its part of x, then waits until a set of fragments is free.
    const auto multiply = [&](float (&d)[kSums], const uint32_t (&fragments)[L::kStepsPerWord][4],
                              int stage, int half, bool accumulate) {
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < L::kStepsPerWord; ++q)
        Wgmma<T, kTokens>::mma(d, fragments[q], x_at(stage, half * L::kBlockK / L::kHalves + q * 16),
                               accumulate || q > 0);
      wgmma_commit();
      wgmma_wait<kSets - 1>();
    };

    // Scales on the weights.
    const auto multiply_scaled_weights = [&](const Segment& segment) {
      int stage_in_use = -1;  // whose x the tensor cores may still read
      for (int block = segment.first_block; block < segment.last_block; ++block) {
        wait_for(ring);
        const uint4 four = load_words(ring.stage);
        const uint32_t words[L::kWordsPerLane] = {four.x, four.y, four.z, four.w};
        uint2 scales[L::kHalves];
#pragma unroll
        for (int half = 0; half < L::kHalves; ++half) {
          scales[half] = load_shared_8(stage_at(ring.stage) + Smem::kScales + half * Smem::kScaleRowBytes +
                                       feature_of_tile * 2);
          const bool past_k = (block * L::kBlockK + half * kRowK) >> args.group_shift >= args.groups;
          if (past_k) scales[half] = make_uint2(0, 0);
        }
        unrolled<L::kWordsPerLane>([&](auto word_) {
          constexpr int word = decltype(word_)::value, half = word / L::kTiles, i = word % L::kTiles;
          dequantize_word<T, 2>(a[word], words[word]);
          const uint32_t pair = i == 0 ? scales[half].x : scales[half].y;
          const uint32_t of_row[2] = {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
#pragma unroll
          for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
            for (int r = 0; r < 4; ++r) a[word][q][r] = mul2<T>(a[word][q][r], of_row[r % 2]);
          }
          multiply(sums[i], a[word], ring.stage, half, half > 0 || block > segment.first_block);
          if constexpr (word == L::kWordsPerLane - 2) {
            if (stage_in_use >= 0) release(stage_in_use);
            stage_in_use = ring.stage;
          }
        });
        ring.advance();
      }
      wgmma_wait<0>();
      pin(sums[0]);
      pin(sums[1]);
      release(stage_in_use);
    };

    // Scales on the sums of a group: the first 16-row tiles of the warps, then the second, and while the tensor
    // cores make one, the other's sums are scaled and added up.
    const auto multiply_and_scale_sums = [&](const Segment& segment) {
      constexpr int kBlocks = std::max(1, kGroupSize / L::kBlockK);  // in a turn
      constexpr int kParts = kRows;                                  // groups in a turn
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int r = 0; r < kSums; ++r) total[i][r] = sums[i][r] = 0.f;
      }
      float scales[L::kTiles][2] = {};  // of the sums
      float rest[L::kTiles][2] = {};    // of the zero points, see split_zero
      uint32_t shift[L::kTiles][2] = {};
      [[maybe_unused]] int x_sums[L::kTiles] = {};  // where the tile's are, for this thread's first token
      const auto load_scales_of = [&](auto tile_, int stage, int block, int row) {
        constexpr int i = decltype(tile_)::value;
        const int group = (block * L::kBlockK + row * kRowK) >> args.group_shift;
        const uint32_t from = stage_at(stage) + Smem::kScales + row * Smem::kScaleRowBytes;
        const auto load = [&](float (&to)[2], uint32_t from) {
          if (args.scales_are_f32) {
            const uint2 raw = load_shared_8(from + (feature_of_tile + 2 * i) * 4);
            to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
          } else {
            const uint32_t raw = load_shared_4(from + (feature_of_tile + 2 * i) * 2);
            const T* pair = reinterpret_cast<const T*>(&raw);
            to[0] = static_cast<float>(pair[0]), to[1] = static_cast<float>(pair[1]);
          }
        };
        load(scales[i], from);
        if (kRows > 1 && group >= args.groups) scales[i][0] = scales[i][1] = 0.f;  // past K
        if constexpr (kHasZeros) {
          load(rest[i], from + kRows * Smem::kScaleRowBytes);
          for (int b = 0; b < 2; ++b) split_zero<T>(rest[i][b], shift[i][b], L::kZeroPoint);
          const int sum = (block * L::kBlockK + row * kRowK) / kGroupSize;  // one group is met as several
          x_sums[i] = (kRows > 1 ? min(sum, args.groups - 1) : sum) * args.x_sums_stride +
                      segment.m_tile * kTokens + lane % 4 * 2;
        }
      };
      const auto add_tile = [&](auto tile_) {
        constexpr int i = decltype(tile_)::value;
        pin(sums[i]);
#pragma unroll
        for (int r = 0; r < kSums; ++r) {
          float sum = sums[i][r];
          if constexpr (kHasZeros) {
            sum = fmaf(rest[i][r / 2 % 2], __ldg(args.x_sums + x_sums[i] + r / 4 * 8 + r % 2), sum);
          }
          total[i][r] = fmaf(scales[i][r / 2 % 2], sum, total[i][r]);
        }
        pin(total[i]);
      };
      for (int block = segment.first_block; block < segment.last_block; block += kBlocks) {
        RingPosition<kStages> at[kBlocks];
        uint32_t words[kBlocks][L::kWordsPerLane];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          at[j] = ring;
          ring.advance();
          wait_for(at[j]);
          const uint4 four = load_words(at[j].stage);
          words[j][0] = four.x, words[j][1] = four.y, words[j][2] = four.z, words[j][3] = four.w;
        }
        // Words in this order: groups of the turn, tiles, the group's words.
        constexpr int kWords = kBlocks * L::kHalves / kParts;  // of a group and tile
        unrolled<kParts * L::kTiles * kWords>([&](auto step_) {
          constexpr int step = decltype(step_)::value;
          constexpr int word = step % kWords, i = step / kWords % L::kTiles,
                        part = step / kWords / L::kTiles;
          constexpr int j = word / L::kHalves, half = kParts == 1 ? word % L::kHalves : part,
                        set = step % kSets;
          if constexpr (word == 0) load_scales_of(Constant<i>{}, at[0].stage, block, part);
          // Not before the tensor cores have left a set of registers.
          asm volatile("" : "+r"(words[j][half * L::kTiles + i]));
          dequantize_word<T, 2>(a[set], words[j][half * L::kTiles + i]);
          if constexpr (kHasZeros) {
#pragma unroll
            for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
              for (int r = 0; r < 4; ++r) a[set][q][r] = add2<T>(a[set][q][r], shift[i][r % 2]);
            }
          }
          multiply(sums[i], a[set], at[j].stage, half, word > 0);
          // The first tile's words are through when kSets - 1 of the second are not.
          constexpr int kFirstIsDone = std::min(kWords, kSets - 1) - 1;
          if constexpr (i == 1 && word == kFirstIsDone) {
            if constexpr (kWords < kSets - 1) wgmma_wait<kWords>();
            add_tile(Constant<0>{});
          }
          // The second tile's sums cannot wait for the next group's words as well: ptxas then serialises the wgmma.
          if constexpr (i == 1 && word == kWords - 1) {
            wgmma_wait<0>();
            if constexpr (part == kParts - 1) {
              for (int j = 0; j < kBlocks; ++j) release(at[j].stage);
            }
            add_tile(Constant<1>{});
          }
        });
      }
    };

    const auto store = [&](const Segment& segment, const auto& d) {
      const int feature = segment.n_tile * Smem::kFeatures + feature_of_tile;
      const int token0 = segment.m_tile * kTokens + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 v = features_of(d, j, e);
          const int token = token0 + 8 * j + e;
          if (segment.part >= 0) {
            const int64_t row =
                (static_cast<int64_t>(segment.part) * kWarpgroups + warpgroup) * (kTokens / 4);
            args.parts[(row + 2 * j + e) * 128 + threadIdx.x % 128] = v;
          } else if (feature < args.n && token < args.m) {
            store_outputs<T>(args.y, static_cast<int64_t>(token) * args.n + feature, v, args.y_is_f32);
          }
        }
      }
    };

    for_each_segment(args, [&](const Segment& segment) {
      if constexpr (kScaledSums) {
        multiply_and_scale_sums(segment);
        store(segment, total);
      } else {
        multiply_scaled_weights(segment);
        store(segment, sums);
      }
    });
  };

  if (warpgroup == kWarpgroups) {
    give_registers<kProducerRegisters<kHasZeros>>();
    if (threadIdx.x == kWarpgroups * 128) produce();
  } else {
    take_registers<kConsumerRegisters<kWarpgroups, kHasZeros>>();
    consume();
  }
#endif
}

// Adds up the parts of the tiles that were cut. blockIdx: x is the tile (after whole_tiles), y the
// warpgroup, z the 8 tokens.
template <typename T, int kTokens, int kWarpgroups>
__global__ void __launch_bounds__(128) add_gemm_parts(const GemmArgs args, int grid) {
  const int tiles = args.m_tiles * args.n_tiles - args.whole_tiles;
  const Shares shares(tiles * args.units, grid);
  const int begin = blockIdx.x * args.units, end = begin + args.units;
  const int first = shares.owner(begin), last = shares.owner(end - 1);
  if (first == last) return;  // one block made it whole
  const TilePosition at = tile_position(args, args.whole_tiles + blockIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature =
      ((at.n_tile * kWarpgroups + blockIdx.y) * 4 + warp) * Layout<2>::kBlockN + lane / 4 * 4;
  if (feature >= args.n) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int token = at.m_tile * kTokens + blockIdx.z * 8 + lane % 4 * 2 + e;
    if (token >= args.m) return;
    float4 sum = {};
    for (int block = first; block <= last; ++block) {
      const int part = 2 * block + (shares.begin(block) <= begin);
      const int64_t row =
          (static_cast<int64_t>(part) * kWarpgroups + blockIdx.y) * (kTokens / 4) + blockIdx.z * 2 + e;
      const float4 v = args.parts[row * 128 + threadIdx.x];
      sum = block == first ? v : sum + v;
    }
    store_outputs<T>(args.y, static_cast<int64_t>(token) * args.n + feature, sum, args.y_is_f32);
  }
}

}  // namespace jax_trirun::cuda
