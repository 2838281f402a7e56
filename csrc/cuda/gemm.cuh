// The kernel for many tokens on Hopper: y[M, N] = x[M, K] @ W by wgmma, with the weights as the operand in
// registers.
//
// A thread block is one producer warp and kWarpgroups warpgroups of consumers, and makes tiles of y of
// kWarpgroups * 128 features x kTokens. A stage of its ring holds one block of K (64): x by the copy engine
// as wgmma wants it, the packed words as they are. The words of one warp's 32 features are 16 bytes a
// lane; they become A fragments in registers, half a stage at a time, while the tensor cores work on the
// other half.
//
//     producer:      wait for an empty stage -> x, words -> ...
//     a warpgroup:   wait for a full stage
//                    words 0, 1 -> A fragments -> 4 wgmma, wait for the other half's ->
//                    words 2, 3 -> A fragments -> 4 wgmma, wait for the other half's -> ...
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
#include "hopper.cuh"
#include "outputs.cuh"
#include "wgmma.cuh"

namespace jax_trirun::cuda {

struct GemmArgs {
  const uint4* words;
  const void* scales;
  const void* zeros;   // or null
  const float* sums;   // with zeros: sum of x over each group, [groups, M]
  void* y;
  float4* parts;       // of the tiles that several thread blocks share
  int m, n;
  int k_blocks, n_blocks;  // blocks of the packed array
  int group_stride;        // elements from one row of scales to the next: N, or 0 with a single group
  int group_shift;         // k >> group_shift is k's row of scales
  bool scales_are_f32, y_is_f32;
  int m_tiles, n_tiles;
  int band;         // tiles of M that are walked before the next tile of N
  int whole_tiles;  // the first tiles: each is made by one thread block
  int units;        // of K in a tile: what the others are cut into
};

// A unit of K is two blocks, so that no group is cut.
inline constexpr int kGemmUnitBlocks = 2;

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

// Shared memory: for each stage x, words and rows of scales; then the barriers. `kRows`: of scales in a block.
template <int kTokens, int kWarpgroups, int kRows, int kStages>
struct GemmSmem {
  using L = Layout<2>;
  static constexpr int kBlocks = kWarpgroups * 4;  // n-blocks of a tile: one for each warp
  static constexpr int kFeatures = kBlocks * L::kBlockN;
  static constexpr int kBlockBytes = L::kWordsPerBlock * 4;
  static constexpr int kXBytes = kTokens * L::kBlockK * 2;
  static constexpr int kScaleRowBytes = kFeatures * 4;  // room for float32
  static constexpr int kWords = kXBytes;
  static constexpr int kScales = kWords + kBlocks * kBlockBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle
  static constexpr int kStageBytes =
      (kScales + kRows * kScaleRowBytes + kAlignment - 1) / kAlignment * kAlignment;
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
inline constexpr int kProducerRegisters = 24;
template <int kWarpgroups>
inline constexpr int kConsumerRegisters = [] {
  constexpr int kGroups = kWarpgroups + 1;
  constexpr int kAtStart = 65536 / (kGroups * 128) / 8 * 8;
  return (kAtStart * kGroups - kProducerRegisters) / kWarpgroups / 8 * 8;
}();

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

template <typename T, int kTokens, int kWarpgroups, int kGroupSize, int kBanks, int kStages>
__global__ void __launch_bounds__((kWarpgroups + 1) * 128, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<2>;
  constexpr bool kScaledSums = kGroupSize > 0;
  constexpr int kRows = kScaledSums ? std::max(1, L::kBlockK / kGroupSize) : 2;  // of scales in a block
  constexpr int kRowK = L::kBlockK / kRows;
  using Smem = GemmSmem<kTokens, kWarpgroups, kRows, kStages>;
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
      const uint4* words = args.words + (static_cast<int64_t>(segment.first_block) * args.n_blocks + n_first) *
                                            (Smem::kBlockBytes / 16);
      const int feature = segment.n_tile * Smem::kFeatures;
      const int scale_size = args.scales_are_f32 ? 4 : 2;
      const int scale_bytes = min(Smem::kFeatures, args.n - feature) * scale_size;
      for (int block = segment.first_block; block < segment.last_block; ++block) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        const uint32_t to = stage_at(ring.stage), arrived = full(ring.stage);
        barrier_arrive_expecting(arrived, Smem::kXBytes + word_bytes + kRows * scale_bytes);
        copy_bulk(to + Smem::kWords, words, word_bytes, arrived);
        copy_box(to, x_map, block * L::kBlockK, segment.m_tile * kTokens, arrived);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int64_t row = (block * L::kBlockK + i * kRowK) >> args.group_shift;
          copy_bulk(to + Smem::kScales + i * Smem::kScaleRowBytes,
                    static_cast<const char*>(args.scales) + (row * args.group_stride + feature) * scale_size,
                    scale_bytes, arrived);
        }
        words += static_cast<int64_t>(args.n_blocks) * (Smem::kBlockBytes / 16);
        ring.advance();
      }
    });
  };

  const auto consume = [&] {
    float sums[kBanks][2][kSums];  // of the products
    float total[kScaledSums ? 2 : 1][kScaledSums ? kSums : 1];
    uint32_t a[L::kHalves][L::kTiles][L::kStepsPerWord][4];
    int stage_in_use = -1;  // whose x the tensor cores may still read

    const auto release = [&] {
      if (stage_in_use >= 0 && lane == 0) barrier_arrive(empty(stage_in_use));
    };
    // The 4 wgmma of half a block, from the A fragments a[half].
    const auto multiply = [&](auto half_, auto bank_, bool accumulate) {
      constexpr int half = decltype(half_)::value, bank = decltype(bank_)::value;
      const uint64_t x = swizzled_descriptor(shared + ring.stage * Smem::kStageBytes);
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < L::kStepsPerWord; ++q) {
        // 16 values of k are 32 bytes, and addresses count in 16.
        const uint64_t at = x + (half * L::kStepsPerWord + q) * 2;
#pragma unroll
        for (int i = 0; i < L::kTiles; ++i) {
          Wgmma<T, kTokens>::mma(sums[bank][i], a[half][i][q], at, accumulate || q > 0);
        }
      }
      wgmma_commit();
    };
    const auto pin_bank = [&](auto bank_) {
      pin(sums[decltype(bank_)::value][0]);
      pin(sums[decltype(bank_)::value][1]);
    };

    for_each_segment(args, [&](const Segment& segment) {
      const int feature = (segment.n_tile * Smem::kBlocks + warp) * L::kBlockN + lane / 4 * 4;
      const bool real = feature < args.n;
      const auto words_of = [&](int stage) {
        barrier_wait(full(stage), ring.parity);
        return load_shared_16(stage_at(stage) + Smem::kWords + warp * Smem::kBlockBytes + lane * 16);
      };
      const auto scales_of = [&](int stage, int row) {
        return stage_at(stage) + Smem::kScales + row * Smem::kScaleRowBytes;
      };
      const int feature_of_tile = warp * L::kBlockN + lane / 4 * 4;

      if constexpr (!kScaledSums) {
        const auto scaled = [&](auto half_, uint32_t word0, uint32_t word1, const uint2& scales) {
          constexpr int half = decltype(half_)::value;
          dequantize_word<T, 2>(a[half][0], word0);
          dequantize_word<T, 2>(a[half][1], word1);
#pragma unroll
          for (int i = 0; i < L::kTiles; ++i) {
            const uint32_t pair = i == 0 ? scales.x : scales.y;
            const uint32_t of_row[2] = {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
#pragma unroll
            for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
              for (int r = 0; r < 4; ++r) if (kGroupSize == 0) a[half][i][q][r] = mul2<T>(a[half][i][q][r], of_row[r % 2]);
            }
          }
        };
        const Constant<0> zero;
        const Constant<1> one;
        for (int block = segment.first_block; block < segment.last_block; ++block) {
          const uint4 words = words_of(ring.stage);
          const uint2 scales0 = load_shared_8(scales_of(ring.stage, 0) + feature_of_tile * 2);
          const uint2 scales1 = load_shared_8(scales_of(ring.stage, 1) + feature_of_tile * 2);
          scaled(zero, words.x, words.y, scales0);
          multiply(zero, zero, block > segment.first_block);
          wgmma_wait<1>();
          release();
          stage_in_use = ring.stage;
          scaled(one, words.z, words.w, scales1);
          multiply(one, zero, true);
          wgmma_wait<1>();
          ring.advance();
        }
        wgmma_wait<0>();
        pin_bank(zero);
      } else {
        constexpr int kHalvesOfGroup = kGroupSize * L::kHalves / L::kBlockK;
        // A turn: groups until banks and halves are back where they were.
        constexpr int kHalvesOfTurn = std::max(kHalvesOfGroup * kBanks, L::kHalves);
#pragma unroll
        for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
          for (int r = 0; r < kSums; ++r) {
            total[i][r] = 0.f;
            if constexpr (kBanks == 2) sums[1][i][r] = 0.f;
          }
        }
        float scales[4];                // of the group that is added next
        [[maybe_unused]] float next[4];  // with two banks: of the group that is multiplied meanwhile
        const auto load_scales_of = [&](int row, float (&to)[4]) {
          const uint32_t from = scales_of(ring.stage, row);
          if (args.scales_are_f32) {
            load_scales<float>(to, from + feature_of_tile * 4);
          } else {
            load_scales<T>(to, from + feature_of_tile * 2);
          }
        };
        const auto add_group = [&](auto bank_) {
          constexpr int bank = decltype(bank_)::value;
          pin_bank(bank_);
#pragma unroll
          for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
            for (int r = 0; r < kSums; ++r)
              total[i][r] = fmaf(scales[2 * i + r / 2 % 2], sums[bank][i][r], total[i][r]);
          }
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = 0.f;
        uint4 words;
        // Half a block, the h-th half of a turn. No branch may part the wgmma of a turn: ptxas would serialise
        // them (C7513).
        const auto half_block = [&](auto step) {
          constexpr int h = decltype(step)::value;
          constexpr int half = h % L::kHalves;
          constexpr int bank = h / kHalvesOfGroup % kBanks;
          constexpr bool kStarts = h % kHalvesOfGroup == 0;
          constexpr bool kEnds = h % kHalvesOfGroup == kHalvesOfGroup - 1;
          if constexpr (half == 0) words = words_of(ring.stage);
          if constexpr (kStarts) load_scales_of(half * kRows / L::kHalves, kBanks == 2 ? next : scales);
          dequantize_word<T, 2>(a[half][0], half == 0 ? words.x : words.z);
          dequantize_word<T, 2>(a[half][1], half == 0 ? words.y : words.w);
          multiply(Constant<half>{}, Constant<bank>{}, !kStarts);
          wgmma_wait<kBanks == 1 && kEnds ? 0 : 1>();
          if constexpr (half == 0) {
            release();
            stage_in_use = ring.stage;
          } else {
            ring.advance();
          }
          if constexpr (kBanks == 2 && kStarts) {
            add_group(Constant<1 - bank>{});
#pragma unroll
            for (int i = 0; i < 4; ++i) scales[i] = next[i];
          }
          if constexpr (kBanks == 1 && kEnds) add_group(Constant<0>{});
        };
        const int halves = (segment.last_block - segment.first_block) * L::kHalves;
        int begin = 0;
        for (; begin + kHalvesOfTurn <= halves; begin += kHalvesOfTurn) unrolled<kHalvesOfTurn>(half_block);
        if constexpr (kBanks == 2) {
          constexpr int kHalvesLeft = std::max(kHalvesOfGroup, L::kHalves);
          if (kHalvesLeft < kHalvesOfTurn && begin < halves) {
            unrolled<kHalvesLeft>(half_block);
            wgmma_wait<0>();
            add_group(Constant<0>{});
          } else {
            wgmma_wait<0>();
            add_group(Constant<1>{});
          }
        }
      }
      release();
      stage_in_use = -1;

      const auto store = [&](const auto& d) {
        const int token0 = segment.m_tile * kTokens + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float4 v = features_of(d, j, e);
            const int token = token0 + 8 * j + e;
            if (segment.part >= 0) {
              const int64_t row = (static_cast<int64_t>(segment.part) * kWarpgroups + warpgroup) * (kTokens / 4);
              args.parts[(row + 2 * j + e) * 128 + threadIdx.x % 128] = v;
            } else if (real && token < args.m) {
              store_outputs<T>(args.y, static_cast<int64_t>(token) * args.n + feature, v, args.y_is_f32);
            }
          }
        }
      };
      if constexpr (kScaledSums) {
        store(total);
      } else {
        store(sums[0]);
      }
    });
  };

  if (warpgroup == kWarpgroups) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kWarpgroups * 128) produce();
  } else {
    take_registers<kConsumerRegisters<kWarpgroups>>();
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
