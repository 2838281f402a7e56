// The kernel for many tokens on Hopper: y[M, N] = x[M, K] @ W by wgmma, with the weights as the operand in
// registers.
//
// A thread block is one producer warp and kWarpgroups warpgroups of consumers, and makes tiles of y of kTokens and
// kWarpgroups * 64 or * 128 features. A stage of its ring holds one unit of K (128): x by the copy engine as wgmma
// wants it, the packed words as they are. The words of one warp's 32 features are 16 bytes a lane for each block of K;
// they become A fragments in registers while the tensor cores work on those before, scales on the weights word by
// word, else a group's words of a 16-row tile at once:
//
//     producer:      wait for an empty stage -> x, words, scales -> ...
//     a warpgroup:   wait for a full stage
//                    words of the first tiles  -> A fragments -> 8 wgmma
//                    words of the second tiles -> A fragments -> 8 wgmma; wait for the first; scale and add them up
//                    the next stage's words; wait for the second; scale and add them up
//
// Measured on an H200, and dropped. At 1024 tokens (8192 x 57344): fragments made half a block at a time (two words,
// 7 % slower: the tensor cores ran dry); scales read from global memory instead of the ring (a quarter slower); tiles
// of 192 or 256 tokens x 128 features, or of 192 x 192 (2 to 15 % slower from 512 tokens on, though each word is
// converted half as often). From about 128 tokens on the card's power is what binds: at 700 TFLOP/s its clock falls
// from 1.98 to 1.5 GHz. wgmma by itself, over operands that stay where they are, does 840 TFLOP/s at 1.7 GHz, and 830
// with the conversions (bench/cuda_tensor_power.cu); of 1024 tokens' time 6 to 7 % go into copying x, 1 % into the
// words, 1 to 4 % into storing y. So pairs of thread blocks read x from the L2 cache once for both, which takes 1 to
// 3 % off 4096 tokens, 2 to 3 % off 16384, and nothing off 1024. These clocks are read after a kernel; in it, by
// clock64, 4096 tokens run at 1.30 to 1.34 GHz, and the tensor cores are at work for 96 % of the clocks: what is left
// to gain is energy. Weights whose scales are powers of two take 5 to 7 % less time, as the tensor cores multiply by
// nothing but -1, 0, 1 and 2. But to keep the rest of a scale for the sums, and to multiply these by the quotient of
// two groups' at the end of each (128 multiplications a thread and unit), costs 8 to 9 %, with the warpgroups by turns
// or not. At 32 tokens: words one by one as above, in stages of 64 of K (a quarter slower: a barrier and an empty
// pipeline for every 64); four warpgroups of 32 registers less (no faster). What the arithmetic takes by itself is in
// bench/results/cuda_arithmetic_*.csv: the conversion's pipes and the registers that wgmma reads are the limit,
// whatever the order.
//
// With 16, 32 and 64 tokens a unit takes 390, 480 and 745 clocks where the arithmetic alone takes 345, 413 and 577. It is
// the instructions (228 and more of a warp, and dispatch waits while wgmma reads its registers), not the memory: nothing
// copied gains 3 to 5 %, no barriers 2 %, and 16 instructions less were worth up to 7 %. Tried there: scales on the weights
// (0 to 30 % slower), with tiles of 384 features, too (up to 20 % slower with 64 to 96 tokens, 3 % faster with 80 in two
// layers), a tile always in flight, over the loop's end (ptxas then serialises wgmma), branches that keep ptxas from moving
// the second tile's conversions before the first tile's wgmma (within 2 % on average), two or three producer warps, for
// words, x and scales (2 to 5 % slower), warpgroups that take units of K by turns, with tiles of 128 features (as fast as
// narrow tiles: x is fetched as often).
//
// For up to eight tokens, cut into int8 digits by a kernel before this one: 8192 x 57344 takes 41.5 us where decode.cuh
// takes 46.7, 28672 x 8192 24.3 instead of 28.8, but layers below 100 million weights as long or longer: 2 us of it are
// the cutting, another 2 add_gemm_parts, neither of which starts sooner where registers are left for it.
//
// Scales: either multiplied onto the weights (kGroupSize 0: scales of x's type, where a scale times -1, 0, 1 or
// 2 is exact), or onto the sums of each group, in float32. The first leaves room for 144 or 176 tokens of
// accumulators, the second is exact for every type of scale and every zero.
//
// Work: tiles in whole rounds of the grid first; the tiles of the last, incomplete round are cut along K
// so that every thread block gets the same number of units, and written in parts that add_gemm_parts adds
// up, in order (stream-K, arXiv:2301.03598; without its fix-up, in which blocks wait for each other). Where there
// are few tiles, a cluster shares each: every thread block takes a run of K, and they add up each other's parts.
// GemmPlan chooses.
#pragma once

#include <algorithm>
#include <utility>

#include "../problem.h"
#include "decode_math.cuh"
#include "gemm_walk.h"
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
  int x_groups;         // rows of them
  void* y;
  float4* parts;  // of the tiles that several thread blocks share
  int m, n;
  int n_blocks;      // blocks of the packed array
  int groups;        // rows of scales
  int group_stride;  // elements from one row of scales to the next: N, or 0 with a single group
  int group_shift;   // k >> group_shift is k's row of scales
  int unit_rows;     // rows of scales that a unit of K has: 4, 2 or 1
  int row_shift;     // 32 << row_shift is a row's share of the unit
  bool scales_are_f32, y_is_f32;
  GemmWalk walk;  // how tiles are shared out
};

// A tile of y: kWarpTiles 16-row tiles of features for each consumer warp, so one n-block or half of it.
template <int kTokens_, int kWarpgroups, int kWarpTiles>
struct TileLayout {
  using L = Layout<2>;
  static constexpr int kTokens = kTokens_;
  static_assert(L::kTiles == 2 && (kWarpTiles == 1 || kWarpTiles == 2));
  static constexpr int kWarps = kWarpgroups * 4;
  static constexpr int kBlocks = kWarps * kWarpTiles / L::kTiles;  // n-blocks
  static constexpr int kFeatures = kBlocks * L::kBlockN;
  static constexpr int kSums = kTokens / 2;  // accumulators of a thread for one 64 x kTokens product
  // A thread's sums as float4: row r of a warpgroup's is d[.][..] of its 128 threads.
  static constexpr int kRows = kTokens * kWarpTiles / 8;

  // The lane's first feature in the tile: of 2 * kWarpTiles.
  static __device__ __forceinline__ int first_feature(int warp, int lane) {
    return warp * kWarpTiles / L::kTiles * L::kBlockN + lane / 4 * 4 +
           (kWarpTiles == 1 ? warp % L::kTiles * 2 : 0);
  }

  // The j-th of the four accumulators of row r of a thread: four features of a token, or two of two tokens.
  template <typename Sums>
  static __device__ __forceinline__ auto& sum_at(Sums& d, int r, int j) {
    if constexpr (kWarpTiles == 2) {
      return d[j / 2][r / 2 * 4 + r % 2 + j % 2 * 2];
    } else {
      return d[0][4 * r + j % 2 * 2 + j / 2];
    }
  }
  static __device__ __forceinline__ float4 row_of(const float (&d)[kWarpTiles][kSums], int r) {
    return {sum_at(d, r, 0), sum_at(d, r, 1), sum_at(d, r, 2), sum_at(d, r, 3)};
  }
  static __device__ __forceinline__ void add_to_row(float (&d)[kWarpTiles][kSums], int r, const float4& v) {
    sum_at(d, r, 0) += v.x, sum_at(d, r, 1) += v.y, sum_at(d, r, 2) += v.z, sum_at(d, r, 3) += v.w;
  }

  // y = row r of a thread of `warpgroup`.
  template <typename T>
  static __device__ __forceinline__ void store(const GemmArgs& args, const TilePosition& at, int warpgroup,
                                               int r, const float4& v) {
    const int warp = warpgroup * 4 + threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int feature = at.n_tile * kFeatures + first_feature(warp, lane);
    const int token = at.m_tile * kTokens + (kWarpTiles == 2 ? r / 2 * 8 + r % 2 : r * 8) + lane % 4 * 2;
    if (feature >= args.n || token >= args.m) return;
    const int64_t y_at = static_cast<int64_t>(token) * args.n + feature;
    if constexpr (kWarpTiles == 2) {
      store_outputs<T>(args.y, y_at, v, args.y_is_f32);
    } else {
      store_outputs<T>(args.y, y_at, make_float2(v.x, v.y), args.y_is_f32);
      if (token + 1 < args.m) store_outputs<T>(args.y, y_at + args.n, make_float2(v.z, v.w), args.y_is_f32);
    }
  }
};

// Shared memory: for each stage x, words and rows of scales; then the barriers. A stage is one unit of K.
template <typename Tile, int kGroupSize, bool kHasZeros, int kStages>
struct GemmSmem {
  using L = Layout<2>;
  static constexpr int kUnitK = kGemmUnitBlocks * L::kBlockK;
  static constexpr int kBlockBytes = L::kWordsPerBlock * 4;
  static constexpr int kXBlockBytes = Tile::kTokens * L::kBlockK * 2;  // of one block of K
  static constexpr int kXBytes = kGemmUnitBlocks * kXBlockBytes;
  static constexpr int kWordRowBytes = Tile::kBlocks * kBlockBytes;  // of one block of K
  static constexpr int kRows =
      kUnitK / (kGroupSize == 0 ? kSmallestGroup : kGroupSize);  // of scales, at most
  static constexpr int kScaleRowBytes = Tile::kFeatures * (kGroupSize == 0 ? 2 : 4);
  static constexpr int kWords = kXBytes;
  static constexpr int kScales = kWords + kGemmUnitBlocks * kWordRowBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle
  static constexpr int kStageBytes =
      (kScales + kRows * (kHasZeros ? 2 : 1) * kScaleRowBytes + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kBytes = kBarriers + (2 * kStages + 1) * 8 + kAlignment;
  static_assert(L::kBlockK * 2 == 128, "a token's k of a block are one row of the 128-byte swizzle");
};

// The scales of a lane's two features in each of its 16-row tiles, as they are in shared memory: float32 or T, whichever
// they are. A branch (kBranches) would go before the first wgmma, together with the conversions, which wait for what is
// loaded; only the smallest tile is 3 % faster with one, and with zeros there are no registers for both types.
template <typename T, int kWarpTiles, bool kBranches>
struct RawScales {
  static_assert(kWarpTiles == 1 || kWarpTiles == 2);
  float f32[2 * kWarpTiles];
  uint32_t t[kWarpTiles];

  // From a row of scales, in which the lane's are at of_lane(bytes of a scale).
  template <typename OfLane>
  __device__ __forceinline__ void load(uint32_t row, const OfLane& of_lane, bool are_f32) {
    if constexpr (kBranches) {
      if (are_f32) {
        load_scales<float>(f32, row + of_lane(4));
      } else {
        load_scales<T>(f32, row + of_lane(2));
      }
      return;
    }
    const uint32_t address = row + of_lane(are_f32 ? 4 : 2);
    if constexpr (kWarpTiles == 2) {
      asm volatile(
          "{\n.reg .pred f32;\nsetp.ne.b32 f32, %7, 0;\n"
          "@f32 ld.shared.v4.f32 {%0, %1, %2, %3}, [%6];\n"
          "@!f32 ld.shared.v2.u32 {%4, %5}, [%6];\n}\n"
          : "=f"(f32[0]), "=f"(f32[1]), "=f"(f32[2]), "=f"(f32[3]), "=r"(t[0]), "=r"(t[1])
          : "r"(address), "r"(static_cast<int>(are_f32))
          : "memory");
    } else {
      asm volatile(
          "{\n.reg .pred f32;\nsetp.ne.b32 f32, %4, 0;\n"
          "@f32 ld.shared.v2.f32 {%0, %1}, [%3];\n"
          "@!f32 ld.shared.u32 %2, [%3];\n}\n"
          : "=f"(f32[0]), "=f"(f32[1]), "=r"(t[0])
          : "r"(address), "r"(static_cast<int>(are_f32))
          : "memory");
    }
  }
  __device__ __forceinline__ void set_to_zero() {
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) f32[2 * i] = f32[2 * i + 1] = 0.f, t[i] = 0;
  }
  // Of the i-th tile, as floats.
  __device__ __forceinline__ float2 of_tile(int i, bool are_f32) const {
    float2 scales = {f32[2 * i], f32[2 * i + 1]};
    if constexpr (kBranches) {
      return scales;
    } else if constexpr (__is_same(T, __half)) {
      asm("{\n.reg .pred t;\n.reg .b16 low, high;\nsetp.eq.b32 t, %3, 0;\nmov.b32 {low, high}, %2;\n"
          "@t cvt.f32.f16 %0, low;\n@t cvt.f32.f16 %1, high;\n}\n"
          : "+f"(scales.x), "+f"(scales.y)
          : "r"(t[i]), "r"(static_cast<int>(are_f32)));
    } else {
      asm("{\n.reg .pred t;\nsetp.eq.b32 t, %3, 0;\n"
          "@t shl.b32 %0, %2, 16;\n@t and.b32 %1, %2, 0xffff0000;\n}\n"
          : "+f"(scales.x), "+f"(scales.y)
          : "r"(t[i]), "r"(static_cast<int>(are_f32)));
    }
    return scales;
  }
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

constexpr int largest_divisor(int n, int most) {
  while (n % most != 0) --most;
  return most;
}

// Registers of a thread: the kernel starts with the same number for all, then the producers leave what
// the consumers take.
inline constexpr int kProducerRegisters = 32;
template <int kWarpgroups>
inline constexpr int kConsumerRegisters = [] {
  constexpr int kGroups = kWarpgroups + 1;
  constexpr int kAtStart = 65536 / (kGroups * 128) / 8 * 8;
  return (kAtStart * kGroups - kProducerRegisters) / kWarpgroups / 8 * 8;
}();

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

// kPairs: thread blocks 2 i and 2 i + 1 are a cluster. They make neighbouring tiles of N at the same time, and each brings
// half of the tokens for both; x_map has boxes of that many.
template <typename T, int kTokens, int kWarpgroups, int kWarpTiles, int kGroupSize, bool kHasZeros,
          int kStages, bool kPairs = false>
__global__ void __launch_bounds__((kWarpgroups + 1) * 128, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap x_rest_map,
                const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<2>;
  constexpr bool kScaledSums = kGroupSize > 0;
  using Tile = TileLayout<kTokens, kWarpgroups, kWarpTiles>;
  using Smem = GemmSmem<Tile, kGroupSize, kHasZeros, kStages>;
  constexpr int kSums = Tile::kSums;
  constexpr int kHalfK = L::kBlockK / L::kHalves;

  extern __shared__ char raw_shared[];
  uint32_t shared =
      (shared_address(raw_shared) + Smem::kAlignment - 1) / Smem::kAlignment * Smem::kAlignment;
  // Uniform, and not worked out again for every unit: that took 16 of 252 instructions, and up to 7 % of the time. With
  // zeros there are no registers to keep it in.
  if constexpr (!kHasZeros) shared = __shfl_sync(0xffffffffu, shared, 0);
  const auto stage_at = [&](int stage) { return shared + stage * Smem::kStageBytes; };
  const auto full = [&](int stage) { return shared + Smem::kBarriers + stage * 8; };
  const auto empty = [&](int stage) { return shared + Smem::kBarriers + (kStages + stage) * 8; };
  const uint32_t exchanged = shared + Smem::kBarriers + 2 * kStages * 8;  // the sums of a cluster's blocks
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // The consumers wait for the producer to have made the barriers; it goes on at once, but for pairs.
  constexpr int kWorkingWarps = kWarpgroups * 4 + 1;
  RingPosition<kStages> ring;
  allow_dependents();  // add_gemm_parts may be brought up as soon as there is room

  const int in_pair = kPairs ? blockIdx.x % 2 : 0;
  const auto for_each_of_mine = [&](const auto& visit) {
    constexpr int kOfPair = kPairs ? 2 : 1;
    for_each_segment(args.walk, blockIdx.x / kOfPair, blockIdx.y, gridDim.x / kOfPair,
                     [&](Segment segment) {
                       segment.n_tile = segment.n_tile * kOfPair + in_pair;
                       visit(segment);
                     });
  };

  // All threads of both.
  const auto meet_other_of_pair = [] {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  };

  // One warp, of which one thread asks for the copies.
  const auto produce = [&] {
    const bool asks = elect_one();
    if (asks) {
      prefetch_map(x_map);
      prefetch_map(x_rest_map);
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full(stage), 1);
        barrier_init(empty(stage),
                     kWarpgroups * (kPairs ? 128 + 4 : 128));  // and a thread of each warp of the other's
      }
      barrier_init(exchanged, 1);
      barrier_init_fence();
    }
    if constexpr (kPairs) {
      meet_other_of_pair();
    } else {
      arrive_at_barrier<0, kWorkingWarps>();
    }
    const int rows = kScaledSums ? Smem::kRows : args.unit_rows;
    for_each_of_mine([&](const Segment& segment) {
      const int n_first = segment.n_tile * Tile::kBlocks;
      const int word_bytes = min(Tile::kBlocks, args.n_blocks - n_first) * Smem::kBlockBytes;
      const int64_t word_row = static_cast<int64_t>(args.n_blocks) * Smem::kBlockBytes;
      const char* words = reinterpret_cast<const char*>(args.words) + segment.first_block * word_row +
                          static_cast<int64_t>(n_first) * Smem::kBlockBytes;
      const int feature = segment.n_tile * Tile::kFeatures;
      const int scale_size = args.scales_are_f32 ? 4 : 2;
      const int scale_bytes = min(Tile::kFeatures, args.n - feature) * scale_size;
      const int all_scale_bytes = rows * (kHasZeros ? 2 : 1) * scale_bytes;
      const int64_t scale_row = static_cast<int64_t>(args.group_stride) * scale_size;
      const int64_t first_scale = static_cast<int64_t>(feature) * scale_size;
      // Only tokens that exist: the copy engine writes the zeros of others at some 15 bytes a clock, longer than narrow
      // tiles are multiplied. What the ring holds in their place becomes sums that are not stored.
      const int token = segment.m_tile * kTokens;
      const int tokens = kPairs ? kTokens : min(kTokens, args.m - token);
      const CUtensorMap& map = tokens == kTokens ? x_map : x_rest_map;
      const int x_bytes = tokens * (Smem::kXBytes / kTokens);
      const bool has_words =
          !kPairs || n_first < args.n_blocks;  // the last tile of N may have no other beside it
      for (int block = segment.first_block; block < segment.last_block; block += kGemmUnitBlocks) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        if (asks) {
          const uint32_t to = stage_at(ring.stage), arrived = full(ring.stage);
          const int blocks = min(kGemmUnitBlocks, args.walk.k_blocks - block);  // K may end inside a unit
          barrier_arrive_expecting(arrived,
                                   x_bytes + (has_words ? blocks * word_bytes + all_scale_bytes : 0));
          if (has_words) copy_bulk(to + Smem::kWords, words, word_bytes, arrived);
          if (has_words && blocks == kGemmUnitBlocks)
            copy_bulk(to + Smem::kWords + Smem::kWordRowBytes, words + word_row, word_bytes, arrived);
#pragma unroll
          for (int j = 0; j < kGemmUnitBlocks; ++j) {  // past K it brings zeros
            const uint32_t to_x = to + j * Smem::kXBlockBytes;
            if constexpr (kPairs) {
              copy_box_to_both(to_x + in_pair * (Smem::kXBlockBytes / 2), map, (block + j) * L::kBlockK,
                               token + in_pair * (kTokens / 2), arrived);
            } else {
              copy_box(to_x, map, (block + j) * L::kBlockK, token, arrived);
            }
          }
#pragma unroll 1
          for (int i = 0; has_words && i < rows; ++i) {
            const int row =
                min((block * L::kBlockK + i * (Smem::kUnitK / rows)) >> args.group_shift, args.groups - 1);
            const int64_t from = row * scale_row + first_scale;
            const uint32_t to_row = to + Smem::kScales + i * Smem::kScaleRowBytes;
            copy_bulk(to_row, static_cast<const char*>(args.scales) + from, scale_bytes, arrived);
            if constexpr (kHasZeros) {
              copy_bulk(to_row + Smem::kRows * Smem::kScaleRowBytes,
                        static_cast<const char*>(args.zeros) + from, scale_bytes, arrived);
            }
          }
        }
        words += kGemmUnitBlocks * word_row;
        ring.advance();
      }
    });
  };

  const auto consume = [&] {
    if constexpr (kPairs) {
      meet_other_of_pair();
    } else {
      wait_at_barrier<0, kWorkingWarps>();
    }
    float sums[kWarpTiles][kSums];  // of the products
    float total[kScaledSums ? kWarpTiles : 1][kScaledSums ? kSums : 1];
    // Where the lane's words and scales of `size` bytes are in a stage. ptxas would compute them again for every unit;
    // with zeros there are no registers to keep them in.
    const auto words_at = [&] {
      const int of_tile = kWarpTiles == 1 ? warp % L::kTiles * 4 : 0;
      return Smem::kWords + warp * kWarpTiles / L::kTiles * Smem::kBlockBytes + lane * 16 + of_tile;
    };
    const auto scales_at = [&](int size) { return Tile::first_feature(warp, lane) * size; };
    const uint32_t kept_words = kHasZeros ? 0 : opaque(words_at());
    const uint32_t kept_scales = kHasZeros ? 0 : opaque(scales_at(args.scales_are_f32 ? 4 : 2));
    const auto lane_words = [&]() -> uint32_t { return kHasZeros ? words_at() : kept_words; };
    const auto lane_scales = [&](int size) -> uint32_t {
      return kHasZeros ? scales_at(size) : kept_scales;
    };

    const auto wait_for = [&](const RingPosition<kStages>& at) { barrier_wait(full(at.stage), at.parity); };
    // The lane's words of a unit: [block of K][half][16-row tile]. A warp of a narrow tile reads every other word: where it
    // read all and picked its own, it waited for them at once, 3 to 5 % of the time with up to 48 tokens.
    using Words = uint32_t[kGemmUnitBlocks][L::kHalves][kWarpTiles];
    const auto load_words = [&](Words& words, int stage) {
      const uint32_t from = stage_at(stage) + lane_words();
#pragma unroll
      for (int j = 0; j < kGemmUnitBlocks; ++j) {
        const uint32_t at = from + j * Smem::kWordRowBytes;
        if constexpr (kWarpTiles == 2) {
          const uint4 four = load_shared_16(at);
          words[j][0][0] = four.x, words[j][0][1] = four.y;
          words[j][1][0] = four.z, words[j][1][1] = four.w;
        } else {
          words[j][0][0] = load_shared_4(at), words[j][1][0] = load_shared_4(at + L::kTiles * 4);
        }
      }
    };
    // Every thread for itself: that took 2 % less time than one for its warp.
    const uint32_t empty_of_other = kPairs ? opaque(address_in(in_pair ^ 1, empty(0))) : 0;
    const auto release = [&](int stage) {
      barrier_arrive(empty(stage));
      if constexpr (kPairs) barrier_arrive_in_cluster(empty_of_other + stage * 8, lane == 0);
    };

    // d += a word's weights @ its part of x; the word is the `half`-th of its block of K, x of which is at
    // `x_block`.
    const auto multiply_word = [&](float (&d)[kSums], const uint32_t (&fragments)[L::kStepsPerWord][4],
                                   uint64_t x_block, int half, bool accumulate) {
#pragma unroll
      for (int q = 0; q < L::kStepsPerWord; ++q)
        Wgmma<T, kTokens>::mma(d, fragments[q], x_block + (half * kHalfK + q * 16) * 2 / 16,
                               accumulate || q > 0);
    };
    const uint64_t first_x = swizzled_descriptor(shared);
    const auto x_of = [&](int stage, int block) {
      if constexpr (kScaledSums && kWarpTiles == 2 && !kHasZeros) {
        // The same in seven instructions less: a descriptor's address is counted in 16 bytes, and does not carry. The
        // other kernels are 1 to 2 % slower this way.
        const uint32_t low = static_cast<uint32_t>(first_x) + stage * (Smem::kStageBytes / 16);
        return (first_x >> 32 << 32 | low) + block * (Smem::kXBlockBytes / 16);
      }
      return swizzled_descriptor(stage_at(stage) + block * Smem::kXBlockBytes);
    };

    // Scales on the weights: words go to the tensor cores one by one, up to four at a time.
    const auto multiply_scaled_weights = [&](const Segment& segment) {
      constexpr int kSets = 4;
      uint32_t a[kSets][L::kStepsPerWord][4];
      int stage_in_use = -1;  // whose x the tensor cores may still read
      for (int block = segment.first_block; block < segment.last_block; block += kGemmUnitBlocks) {
        wait_for(ring);
        Words words;
        load_words(words, ring.stage);
        const uint32_t first_row = stage_at(ring.stage) + Smem::kScales + lane_scales(2);
        unrolled<kGemmUnitBlocks * L::kHalves>([&](auto step_) {
          constexpr int step = decltype(step_)::value, j = step / L::kHalves, half = step % L::kHalves;
          // The step's row of scales; past K there is none.
          const uint32_t row = first_row + (step >> args.row_shift) * Smem::kScaleRowBytes;
          uint2 scales;
          if constexpr (kWarpTiles == 2) {
            scales = load_shared_8(row);
          } else {
            scales.x = load_shared_4(row);
          }
          const bool past_k = (block * L::kBlockK + step * kHalfK) >> args.group_shift >= args.groups;
          if (past_k) scales = make_uint2(0, 0);
          unrolled<kWarpTiles>([&](auto tile_) {
            constexpr int i = decltype(tile_)::value, turn = step * kWarpTiles + i, set = turn % kSets;
            const uint32_t pair = i == 0 ? scales.x : scales.y;
            const uint32_t of_row[2] = {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
            dequantize_word<T, 2>(a[set], words[j][half][i]);
#pragma unroll
            for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
              for (int r = 0; r < 4; ++r) a[set][q][r] = internal::mul2<T>(a[set][q][r], of_row[r % 2]);
            }
            wgmma_fence();
            multiply_word(sums[i], a[set], x_of(ring.stage, j), half,
                          step > 0 || block > segment.first_block);
            wgmma_commit();
            wgmma_wait<kSets - 1>();
            if constexpr (turn == kSets - 1) {
              if (stage_in_use >= 0) release(stage_in_use);
              stage_in_use = ring.stage;
            }
          });
        });
        ring.advance();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) pin(sums[i]);
      release(stage_in_use);
    };

    // Scales on the sums of a group: all words of the first 16-row tiles of the warps, then of the second; while
    // the tensor cores make one, the other's sums are scaled and added up.
    const auto multiply_and_scale_sums = [&](const Segment& segment) {
      constexpr int kGroups = Smem::kRows;                            // in a unit
      constexpr int kWords = kGemmUnitBlocks * L::kHalves / kGroups;  // of a group and tile
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
        for (int r = 0; r < kSums; ++r) total[i][r] = sums[i][r] = 0.f;
      }
      uint32_t a[kWarpTiles][kWords][L::kStepsPerWord][4];
      constexpr int kLaneFeatures = 2 * kWarpTiles;
      using Scales = RawScales<T, kWarpTiles, kHasZeros || (kWarpTiles == 1 && kTokens == 16)>;
      Scales scales;
      float rest[kLaneFeatures] = {};  // of the zero points, see split_zero
      uint32_t shift[kLaneFeatures] = {};
      [[maybe_unused]] int x_sums[kWarpTiles] = {};  // where the tile's are, for this thread's first token
      const auto load_scales_of = [&](int stage, int block, int group) {
        const uint32_t row = stage_at(stage) + Smem::kScales + group * Smem::kScaleRowBytes;
        const int k = block * L::kBlockK + group * kGroupSize;
        scales.load(row, lane_scales, args.scales_are_f32);
        if (kGroups > 1 && k >> args.group_shift >= args.groups) scales.set_to_zero();  // past K
        if constexpr (kHasZeros) {
          Scales zeros;
          zeros.load(row + Smem::kRows * Smem::kScaleRowBytes, lane_scales, args.scales_are_f32);
#pragma unroll
          for (int i = 0; i < kWarpTiles; ++i) {
            const float2 of_tile = zeros.of_tile(i, args.scales_are_f32);
            rest[2 * i] = of_tile.x, rest[2 * i + 1] = of_tile.y;
          }
#pragma unroll
          for (int i = 0; i < kLaneFeatures; ++i) {
            split_zero<T>(rest[i], shift[i], L::kZeroPoint);
            if (k >= args.x_groups * kGroupSize)
              rest[i] = 0.f;  // past K, where one group is met as several
          }
        }
      };
      const auto x_sums_of = [&](int block, int group) {
        const int row = block * L::kBlockK / std::max(kGroupSize, 1) + group;
        return min(row, args.x_groups - 1) * args.x_sums_stride + segment.m_tile * kTokens + lane % 4 * 2;
      };
      // Of a group's scales and zeros, which are the tile's own: the next group's may have been loaded by now.
      const auto add_tile = [&](auto tile_, const Scales& of_group, const float (&more)[2]) {
        constexpr int i = decltype(tile_)::value;
        const float2 of_tile = of_group.of_tile(i, args.scales_are_f32);
        const float scale[2] = {of_tile.x, of_tile.y};
        pin(sums[i]);
#pragma unroll
        for (int r = 0; r < kSums; ++r) {
          float sum = sums[i][r];
          if constexpr (kHasZeros)
            sum = fmaf(more[r / 2 % 2], __ldg(args.x_sums + x_sums[i] + r / 4 * 8 + r % 2), sum);
          total[i][r] = fmaf(scale[r / 2 % 2], sum, total[i][r]);
        }
        pin(total[i]);
      };
      // The smallest tile is 1 % faster without, and with zeros there are no registers for them.
      constexpr bool kKeepsConstants = !kHasZeros && !(kWarpTiles == 1 && kTokens == 16);
      using Constants = std::conditional_t<kKeepsConstants, KeptConversion<T, 2>, Conversion<T, 2>>;
      const Constants constants(args.m >> 31);  // 0, which the compiler cannot know
      // Words are fetched while the tensor cores work on those before; with zeros there are no registers for that.
      constexpr bool kAhead = !kHasZeros;
      Words words;
      if constexpr (kAhead) {
        wait_for(ring);
        load_words(words, ring.stage);
      }
      // Counted down: in a register that ptxas knows to be uniform.
      int left =
          __shfl_sync(0xffffffffu, (segment.last_block - segment.first_block + 1) / kGemmUnitBlocks, 0);
      for (int block = segment.first_block; left > 0; --left, block += kGemmUnitBlocks) {
        if constexpr (!kAhead) {
          wait_for(ring);
          load_words(words, ring.stage);
        }
        RingPosition<kStages> next = ring;
        next.advance();
        Scales scale[kWarpTiles];  // of the group that a tile's sums are of
        float more[kWarpTiles][2];
        unrolled<kGroups * kWarpTiles>([&](auto step_) {
          constexpr int step = decltype(step_)::value, i = step % kWarpTiles, group = step / kWarpTiles;
          if constexpr (i == 0) load_scales_of(ring.stage, block, group);
          scale[i] = scales;
          more[i][0] = rest[2 * i], more[i][1] = rest[2 * i + 1];
          if constexpr (kHasZeros) x_sums[i] = x_sums_of(block, group);
          unrolled<kWords>([&](auto word_) {
            constexpr int word = decltype(word_)::value, at = group * kWords + word;
            // Not before the tensor cores have left these registers.
            uint32_t packed = words[at / L::kHalves][at % L::kHalves][i];
            asm volatile("" : "+r"(packed));
            dequantize_word<T, 2>(a[i][word], packed, constants);
            if constexpr (kHasZeros) {
#pragma unroll
              for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
                for (int r = 0; r < 4; ++r)
                  a[i][word][q][r] = internal::add2<T>(a[i][word][q][r], shift[2 * i + r % 2]);
              }
            }
          });
          wgmma_fence();
          unrolled<kWords>([&](auto word_) {
            constexpr int word = decltype(word_)::value, at = group * kWords + word;
            multiply_word(sums[i], a[i][word], x_of(ring.stage, at / L::kHalves), at % L::kHalves,
                          word > 0);
          });
          wgmma_commit();
          constexpr bool kLast = step == kGroups * kWarpTiles - 1;
          if constexpr (kAhead && kLast) {
            if (left > 1) {
              wait_for(next);
              load_words(words, next.stage);
            }
          }
          if constexpr (kWarpTiles == 2 && step > 0) {
            wgmma_wait<1>();
            add_tile(Constant<1 - i>{}, scale[1 - i], more[1 - i]);
          }
          if constexpr (kWarpTiles == 1 || kLast) {
            wgmma_wait<0>();
            if constexpr (kLast) release(ring.stage);
            add_tile(Constant<i>{}, scale[i], more[i]);
          }
        });
        ring = next;
      }
    };

    // Each block of a cluster adds up a run of the tile's rows: to its own sums those of the others, in the order of
    // ranks. Small ones are sent to its shared memory; others go through the L2 cache.
    const int ranks = args.walk.ranks;
    const auto first_row_of = [&](int rank) { return rank * Tile::kRows / ranks; };
    constexpr int kThreads = kWarpgroups * 128;
    const auto send_and_store = [&](const TilePosition& at, float (&d)[kWarpTiles][kSums]) {
      constexpr int kRowBytes = kThreads * 16;  // of the sums of a block, or of what one sends to another
      const int rank = opaque(blockIdx.x);
      const int begin = first_row_of(rank), rows = first_row_of(rank + 1) - begin;
      if (threadIdx.x == 0) barrier_arrive_expecting(exchanged, (ranks - 1) * rows * kRowBytes);
      cluster_arrive_relaxed();
      cluster_wait();  // the others are through with their rings, where the sums go now
      const uint32_t mine = shared + threadIdx.x * 16;
#pragma unroll 1
      for (int other = 0; other < ranks; ++other) {
        if (other == rank) continue;
        const int first = first_row_of(other), end = first_row_of(other + 1);
        const int source = rank < other ? rank : rank - 1;
        const uint32_t to = address_in(other, mine) + (source * (end - first) - first) * kRowBytes;
        const uint32_t arrived = address_in(other, exchanged);
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
          if (r >= first && r < end) send(to + r * kRowBytes, Tile::row_of(d, r), arrived);
        }
      }
      barrier_wait_for_cluster(exchanged, 0);
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        if (r < begin || r >= begin + rows) continue;
#pragma unroll 1
        for (int source = 0; source < ranks - 1; ++source)
          Tile::add_to_row(d, r, load_shared_floats(mine + (source * rows + r - begin) * kRowBytes));
        Tile::template store<T>(args, at, warpgroup, r, Tile::row_of(d, r));
      }
    };

    const auto store = [&](const Segment& segment, float (&d)[kWarpTiles][kSums]) {
      const TilePosition at = {segment.m_tile, segment.n_tile};
      if (segment.part < 0) {
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r)
          Tile::template store<T>(args, at, warpgroup, r, Tile::row_of(d, r));
        return;
      }
      constexpr bool kSends = Tile::kRows * kThreads * 16 <= kMostBytesSent;
      if (kSends && ranks > 1) {
        send_and_store(at, d);
        return;
      }
      // Where this thread's sums of row 0 are, in its block's part; a row is 128 of these.
      constexpr int kPart = Tile::kRows * kThreads;
      float4* const part = args.parts + (static_cast<int64_t>(segment.part) * kPart +
                                         opaque(warpgroup * Tile::kRows * 128 + threadIdx.x % 128));
      const int rank = opaque(blockIdx.x);
      const int begin = kSends || ranks == 1 ? 0 : first_row_of(rank);
      const int end = kSends || ranks == 1 ? 0 : first_row_of(rank + 1);
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        if (r < begin || r >= end) part[r * 128] = Tile::row_of(d, r);
      }
      if (kSends || ranks == 1) return;
      cluster_arrive();
      cluster_wait();
      constexpr int kAtOnce = largest_divisor(Tile::kRows, 8);  // rows on their way
#pragma unroll
      for (int first = 0; first < Tile::kRows; first += kAtOnce) {
        if (first >= end || first + kAtOnce <= begin) continue;
#pragma unroll 1
        for (int other = -rank; other < ranks - rank; ++other) {
          if (other == 0) continue;
          const float4* const from = part + other * kPart;
          float4 v[kAtOnce] = {};
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i >= begin && first + i < end) v[i] = __ldcg(from + (first + i) * 128);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) Tile::add_to_row(d, first + i, v[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= begin && first + i < end)
            Tile::template store<T>(args, at, warpgroup, first + i, Tile::row_of(d, first + i));
        }
      }
    };
    for_each_of_mine([&](const Segment& segment) {
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
    give_registers<kProducerRegisters>();
    if (warp == kWarpgroups * 4) {
      produce();
    } else if constexpr (kPairs) {
      meet_other_of_pair();
    }
  } else {
    take_registers<kConsumerRegisters<kWarpgroups>>();
    consume();
  }
  if constexpr (kPairs) meet_other_of_pair();  // which may still arrive at barriers here
#endif
}

// Adds up the parts of the tiles that were cut. blockIdx: x is the tile (after whole_tiles), y the row of a
// warpgroup's sums, z the warpgroup.
template <typename T, int kTokens, int kWarpgroups, int kWarpTiles>
__global__ void __launch_bounds__(128) add_gemm_parts(const __grid_constant__ GemmArgs args) {
  using Tile = TileLayout<kTokens, kWarpgroups, kWarpTiles>;
  const int begin = blockIdx.x * args.walk.units, end = begin + args.walk.units;
  const int first = args.walk.shares.owner(begin), last = args.walk.shares.owner(end - 1);
  const TilePosition at = tile_position(args.walk, args.walk.whole_tiles + blockIdx.x);
  const int row = blockIdx.z * Tile::kRows + blockIdx.y;
  const float4* const from = args.parts + static_cast<int64_t>(row) * 128 + threadIdx.x;
  wait_for_prerequisites();
  if (first == last) return;  // one block made it whole
  const float4 sum = sum_of_parts(from, int64_t{kWarpgroups} * Tile::kRows * 128, first, last);
  Tile::template store<T>(args, at, blockIdx.z, blockIdx.y, sum);
}

}  // namespace jax_trirun::cuda
