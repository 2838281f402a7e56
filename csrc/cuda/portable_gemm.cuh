// The kernel for many tokens on every GPU since sm_80: y[M, N] = x[M, K] @ W by mma.sync, with the weights as the A
// operand (rows are output features, columns k) and tokens as B's columns.
//
// A thread block makes tiles of y. Its warps divide a tile into warp tiles of whole n-blocks (32 features) and
// kWarpTokens tokens. Stages of K (one or two blocks of the packed array) come through a ring that all warps fill
// (cp.async) and read: x, swizzled so that neither copies nor ldmatrix meet a bank twice, the packed words as they
// are, rows of scales. A warp reads the 16 bytes a lane that are its words of a block and makes A fragments of them
// in registers, 16 of K at a time, while the tensor cores work on those before:
//
//     x of step 1 -> registers | words of step 0 -> A fragments -> mma with x of step 0
//     x of step 2 -> registers | words of step 1 -> A fragments -> mma with x of step 1
//     ..
//     wait for the next stage, fetch into this one; its x of step 0 -> registers | the last step's mma
//
// so that the only barrier of a stage has a step's mma behind it.
//
// Measured on an H200 with 1024 tokens (8192 x 57344), and dropped: warp tiles of 64 x 64 instead of 32 features x 128
// tokens (8 % slower: twice the conversions), 16 warps of 32 x 64 (15 %), tiles of 128 features, two thread blocks side by
// side (9 %), stages of one block of K (3 %), copies with branches around them (18 %: nothing else was issued meanwhile).
//
// Scales: either multiplied onto the weights (kGroupSize 0: scales of x's type, where a scale times -1, 0, 1 or 2 is
// exact), or onto the sums of each group, in float32, which is exact for every type of scale and every zero and takes
// twice the accumulators. Tiles are shared out as gemm_walk.h says; tiles that several thread blocks share are written
// in parts, which add_portable_parts adds up, in order.
#pragma once

#include "../problem.h"
#include "decode_math.cuh"
#include "gemm_walk.h"
#include "outputs.cuh"
#include "ptx.cuh"

namespace jax_trirun::cuda {

struct PortableGemmArgs {
  const void* x;
  const uint4* words;
  const void* scales;
  const void* zeros;    // or null
  const float* x_sums;  // with zeros: the sum of x over each kGroupSize of K, [x_groups, x_sums_stride]
  int x_sums_stride;    // M rounded up to whole tiles
  int x_groups;
  void* y;
  float4* parts;  // of the tiles that several thread blocks share
  int m, n, k;
  int n_blocks;      // blocks of the packed array
  int groups;        // rows of scales
  int group_stride;  // elements from one row of scales to the next: N, or 0 with a single group
  int group_shift;   // k >> group_shift is k's row of scales
  bool scales_are_f32, y_is_f32;
  GemmWalk walk;  // how tiles are shared out
};

// A tile of y, how warps divide it, and the ring's stages, which are kStageBlocks blocks of K.
template <int kTokens_, int kWarpTokens_, int kWarpBlocks_, int kWarps_, int kStageBlocks_, int kStages_,
          int kBlocksPerSm_>
struct PortableTile {
  using L = Layout<2>;
  static constexpr int kTokens = kTokens_, kWarpTokens = kWarpTokens_, kWarpBlocks = kWarpBlocks_;
  static constexpr int kWarps = kWarps_, kStageBlocks = kStageBlocks_, kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTokenWarps = kTokens / kWarpTokens;
  static constexpr int kFeatureWarps = kWarps / kTokenWarps;
  static constexpr int kBlocks = kFeatureWarps * kWarpBlocks;  // n-blocks
  static constexpr int kFeatures = kBlocks * L::kBlockN;
  static constexpr int kColumns = kWarpTokens / kMmaColumns;  // column tiles of a warp
  static constexpr int kRows = kWarpBlocks * kColumns * 2;    // of float4 in a thread's sums
  static_assert(kTokens % kWarpTokens == 0 && kWarps % kTokenWarps == 0 && kColumns % 2 == 0);

  using Sums = float[kWarpBlocks][L::kTiles][kColumns][4];

  // Row r of a thread's sums: four features of a token.
  static __device__ __forceinline__ float4 row_of(const Sums& d, int r) {
    const int block = r / (kColumns * 2), column = r / 2 % kColumns, c = r % 2;
    return {d[block][0][column][c], d[block][0][column][2 + c], d[block][1][column][c],
            d[block][1][column][2 + c]};
  }

  // y = row r of this thread.
  template <typename T>
  static __device__ __forceinline__ void store(const PortableGemmArgs& args, const TilePosition& at, int r,
                                               const float4& v) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int block = at.n_tile * kBlocks + warp % kFeatureWarps * kWarpBlocks + r / (kColumns * 2);
    const int feature = block * L::kBlockN + lane / 4 * 4;
    const int token = at.m_tile * kTokens + warp / kFeatureWarps * kWarpTokens +
                      r / 2 % kColumns * kMmaColumns + lane % 4 * 2 + r % 2;
    if (feature >= args.n || token >= args.m) return;
    store_outputs<T>(args.y, static_cast<int64_t>(token) * args.n + feature, v, args.y_is_f32);
  }
};

// Shared memory of a stage: x, words, rows of scales (for kGroupSize 0 as many as groups of 32 need), with zeros as many
// rows of those and of sums of x.
template <typename Tile, int kGroupSize, bool kHasZeros>
struct PortableSmem {
  using L = Layout<2>;
  static constexpr int kRowBytes = L::kBlockK * 2;  // a token's x of a block of K
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kXBlockBytes = Tile::kTokens * kRowBytes;
  static constexpr int kBlockBytes = L::kWordsPerBlock * 4;
  static constexpr int kWordRowBytes = Tile::kBlocks * kBlockBytes;  // of one block of K
  static constexpr int kRowK = kGroupSize == 0 ? 32 : kGroupSize;    // what a row of scales is for
  static constexpr int kRows = Tile::kStageBlocks * L::kBlockK / kRowK;
  static constexpr int kScaleRowBytes = Tile::kFeatures * (kGroupSize == 0 ? 2 : 4);
  static constexpr int kWords = Tile::kStageBlocks * kXBlockBytes;
  static constexpr int kScales = kWords + Tile::kStageBlocks * kWordRowBytes;
  static constexpr int kZeros = kScales + kRows * kScaleRowBytes;
  static constexpr int kXSums = kZeros + (kHasZeros ? kRows * kScaleRowBytes : 0);
  static constexpr int kStageBytes = kXSums + (kHasZeros ? kRows * Tile::kTokens * 4 : 0);
  static constexpr int kBytes = Tile::kStages * kStageBytes;
  static_assert(kStageBytes % 128 == 0, "x must begin at whole rows of the swizzle");
  static_assert(kRows >= 1, "a group must not be cut");
};

// The A fragment of the q-th step of a word.
template <typename T, int q>
__device__ __forceinline__ void dequantize_step(uint32_t (&a)[4], uint32_t word) {
  uint32_t all[Layout<2>::kStepsPerWord][4];
  dequantize_word<T, 2>(all, word);  // the other steps vanish
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = all[q][r];
}

template <typename T, typename Tile, int kGroupSize, bool kHasZeros>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    portable_gemm_kernel(const __grid_constant__ PortableGemmArgs args) {
  constexpr bool kOnWeights = kGroupSize == 0;
  static_assert(!kOnWeights || !kHasZeros);
  using L = Layout<2>;
  using Smem = PortableSmem<Tile, kGroupSize, kHasZeros>;
  constexpr int kThreads = Tile::kThreads, kColumns = Tile::kColumns, kWarpBlocks = Tile::kWarpBlocks;
  constexpr int kStepsPerBlock = L::kBlockK / 16;
  constexpr int kSteps = Tile::kStageBlocks * kStepsPerBlock;
  constexpr int kRowSteps = Smem::kRowK / 16;  // of a row of scales
  // More than one group in a stage.
  constexpr bool kManyGroups = !kOnWeights && Smem::kRows > 1;
  // Whether x is read from shared memory a step ahead. Elsewhere it costs more than it gains, in registers for small
  // groups, and with scales on the weights (3 %).
  constexpr bool kAhead = kGroupSize == 128;

  extern __shared__ __align__(128) char shared_memory[];
  const uint32_t ring = shared_address(shared_memory);
  const uint32_t ring_end = ring + Smem::kBytes;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int feature_warp = warp % Tile::kFeatureWarps, token_warp = warp / Tile::kFeatureWarps;

  // ---- what comes into the ring ----
  // Every thread brings the same 16 bytes of x and of words in each stage, the first threads 16 bytes of scales too. All
  // of it without branches, so that the compiler can put it between the mma.

  constexpr int kXThreads = Smem::kChunks * Tile::kStageBlocks;  // of a token
  constexpr int kXStep = kThreads / kXThreads;
  constexpr int kXCopies = Tile::kTokens / kXStep;
  static_assert(kXStep % 8 == 0 && Tile::kTokens % kXStep == 0,
                "the swizzle of a thread's chunks is the same");
  const int x_chunk = threadIdx.x % kXThreads, x_token = threadIdx.x / kXThreads;
  const int x_k = args.k - x_chunk * 8;  // the chunk is there in stages that begin before
  const uint32_t x_to = x_chunk / Smem::kChunks * Smem::kXBlockBytes + x_token * Smem::kRowBytes +
                        (x_chunk % Smem::kChunks ^ x_token % 8) * 16;

  constexpr int kWordChunks = Smem::kWordRowBytes / 16;  // of a block of K
  constexpr int kWordCopies = kWordChunks / kThreads;
  static_assert(kWordChunks % kThreads == 0);
  const int64_t word_row = static_cast<int64_t>(args.n_blocks) * Smem::kBlockBytes;

  const int scale_size = !kOnWeights && args.scales_are_f32 ? 4 : 2;
  const int scale_chunks = Tile::kFeatures * scale_size / 16;
  const int scale_row = static_cast<int>(threadIdx.x) / scale_chunks;
  const int scale_chunk = static_cast<int>(threadIdx.x) % scale_chunks;
  const uint32_t scale_to = Smem::kScales + scale_row * Smem::kScaleRowBytes + scale_chunk * 16;
  const int scale_row_bytes = args.group_stride * scale_size;
  static_assert(Smem::kRows * Smem::kScaleRowBytes / 16 <= kThreads);
  constexpr int kSumChunks = Tile::kTokens / 4;
  const int sums_row = static_cast<int>(threadIdx.x) / kSumChunks;
  const int sums_chunk = static_cast<int>(threadIdx.x) % kSumChunks;
  static_assert(Smem::kRows * kSumChunks <= kThreads);

  int fetch_block = 0, fetch_end = 0;  // of K
  uint32_t fetch_stage = ring;
  const char* fetch_x[kXCopies];
  const char* fetch_words[kWordCopies];
  bool brings_scales = false;
  const char* fetch_scales = nullptr;
  [[maybe_unused]] const char* fetch_zeros = nullptr;
  [[maybe_unused]] const float* fetch_sums = nullptr;

  // Tokens past M bring others instead, not all the same one, which would be read by every thread block at once (33
  // rows took a sixth longer than 48); n-blocks past N the last one. They make sums that nobody asks for. Pointers are a
  // step behind: they move before a copy, because after it they would wait until it has read them.
  const auto aim = [&](const Segment& segment, int end) {
    fetch_block = segment.first_block;
    fetch_end = end;
    fetch_stage = ring;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      int token = segment.m_tile * Tile::kTokens + x_token + i * kXStep;
      if (token >= args.m) token = min(token - args.m, args.m - 1);
      fetch_x[i] = static_cast<const char*>(args.x) +
                   (static_cast<int64_t>(token) * args.k + fetch_block * L::kBlockK + x_chunk * 8) * 2 -
                   Tile::kStageBlocks * Smem::kRowBytes;
    }
#pragma unroll
    for (int i = 0; i < kWordCopies; ++i) {
      const int chunk = i * kThreads + threadIdx.x;
      const int n_block = min(segment.n_tile * Tile::kBlocks + chunk / L::kLanes, args.n_blocks - 1);
      fetch_words[i] = reinterpret_cast<const char*>(args.words) + (fetch_block - 1) * word_row +
                       static_cast<int64_t>(n_block) * Smem::kBlockBytes + chunk % L::kLanes * 16;
    }
    const int feature = segment.n_tile * Tile::kFeatures + scale_chunk * (16 / scale_size);
    brings_scales = scale_row < Smem::kRows && feature < args.n;
    const int64_t at = static_cast<int64_t>(feature) * scale_size;
    fetch_scales = static_cast<const char*>(args.scales) + at;
    if constexpr (kHasZeros) {
      fetch_zeros = static_cast<const char*>(args.zeros) + at;
      fetch_sums = args.x_sums + segment.m_tile * Tile::kTokens + sums_chunk * 4;
    }
  };

  // Past K everything is zero: words then meet x that is zero, and rows of scales are zero.
  const auto fetch = [&] {
    const bool wanted = fetch_block < fetch_end;
    const int k = fetch_block * L::kBlockK;
    const int x_bytes = k < x_k ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      fetch_x[i] += Tile::kStageBlocks * Smem::kRowBytes;
      copy_some_async(fetch_stage + x_to + i * kXStep * Smem::kRowBytes, fetch_x[i], x_bytes, wanted);
    }
#pragma unroll
    for (int i = 0; i < kWordCopies; ++i) {
      const int chunk = i * kThreads + threadIdx.x;
#pragma unroll
      for (int j = 0; j < Tile::kStageBlocks; ++j) {
        fetch_words[i] += word_row;
        copy_some_async(fetch_stage + Smem::kWords + j * Smem::kWordRowBytes + chunk * 16, fetch_words[i],
                        fetch_block + j < args.walk.k_blocks ? 16 : 0, wanted);
      }
    }
    const int row = (k + scale_row * Smem::kRowK) >> args.group_shift;
    const int64_t row_at = static_cast<int64_t>(row) * scale_row_bytes;
    const int row_bytes = row < args.groups ? 16 : 0;
    copy_some_async(fetch_stage + scale_to, fetch_scales + row_at, row_bytes, wanted && brings_scales);
    if constexpr (kHasZeros) {
      copy_some_async(fetch_stage + scale_to + (Smem::kZeros - Smem::kScales), fetch_zeros + row_at,
                      row_bytes, wanted && brings_scales);
      const int from_row = k / Smem::kRowK + sums_row;
      copy_some_async(fetch_stage + Smem::kXSums + (sums_row * Tile::kTokens + sums_chunk * 4) * 4,
                      fetch_sums + static_cast<int64_t>(from_row) * args.x_sums_stride,
                      from_row < args.x_groups ? 16 : 0, wanted && sums_row < Smem::kRows);
    }
    commit_copies();
    fetch_block += Tile::kStageBlocks;
    fetch_stage += Smem::kStageBytes;
    if (fetch_stage == ring_end) fetch_stage = ring;
  };

  // ---- what the warps make of it ----

  uint32_t stage = ring;
  typename Tile::Sums sums;
  typename Tile::Sums total;  // of the scaled sums; unused if the weights are scaled

  // The warp's B fragments of a step: [column tile][register].
  using X = uint32_t[kColumns][2];
  const uint32_t x_from = (token_warp * Tile::kWarpTokens + lane / 16 * 8 + lane % 8) * Smem::kRowBytes +
                          (lane / 8 % 2 ^ lane % 8) * 16;
  const auto load_x = [&](X& to, int step) {
    const uint32_t at = (stage + x_from + step / kStepsPerBlock * Smem::kXBlockBytes) ^
                        (step % kStepsPerBlock * 32);  // chunk 2 step, or its neighbour
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      uint32_t four[4];
      load_matrix_x4(four, at + i * kMmaColumns * Smem::kRowBytes);
      to[i][0] = four[0], to[i][1] = four[1], to[i + 1][0] = four[2], to[i + 1][1] = four[3];
    }
  };

  // The lane's words of a block of K.
  using Words = uint32_t[kWarpBlocks][L::kHalves][L::kTiles];
  const uint32_t words_from = Smem::kWords + feature_warp * kWarpBlocks * Smem::kBlockBytes + lane * 16;
  const auto load_words = [&](Words& to, int block) {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
      const uint4 four =
          load_shared_16(stage + words_from + block * Smem::kWordRowBytes + n * Smem::kBlockBytes);
      to[n][0][0] = four.x, to[n][0][1] = four.y, to[n][1][0] = four.z, to[n][1][1] = four.w;
    }
  };

  // Of the lane's features 4g .. 4g + 3 of each n-block.
  const int feature_from = feature_warp * kWarpBlocks * L::kBlockN + lane / 4 * 4;
  const auto load_row = [&](float (&to)[4], uint32_t rows, int row, int n) {
    const uint32_t from = stage + rows + row * Smem::kScaleRowBytes;
    const int feature = feature_from + n * L::kBlockN;
    if (args.scales_are_f32) {
      load_scales<float>(to, from + feature * 4);
    } else {
      load_scales<T>(to, from + feature * 2);
    }
  };

  uint32_t splat[kWarpBlocks][4];  // scales for the weights, as pairs
  const auto load_splat = [&](int row) {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
      const uint2 four = load_shared_8(stage + Smem::kScales + row * Smem::kScaleRowBytes +
                                       (feature_from + n * L::kBlockN) * 2);
      splat[n][0] = __byte_perm(four.x, 0, 0x1010), splat[n][1] = __byte_perm(four.x, 0, 0x3232);
      splat[n][2] = __byte_perm(four.y, 0, 0x1010), splat[n][3] = __byte_perm(four.y, 0, 0x3232);
    }
  };

  float scale[kWarpBlocks][4];
  [[maybe_unused]] float rest[kWarpBlocks][4];      // of the zeros, see split_zero
  [[maybe_unused]] uint32_t shift[kWarpBlocks][4];  // what the codes take of them
  [[maybe_unused]] float x_sums[kColumns][2];
  const auto load_zeros = [&](int row) {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
      load_row(rest[n], Smem::kZeros, row, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_zero<T>(rest[n][i], shift[n][i], L::kZeroPoint);
    }
  };
  const auto load_for_sums = [&](int row) {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) load_row(scale[n], Smem::kScales, row, n);
    if constexpr (kHasZeros) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const uint2 two = load_shared_8(
            stage + Smem::kXSums +
            (row * Tile::kTokens + token_warp * Tile::kWarpTokens + i * kMmaColumns + lane % 4 * 2) * 4);
        x_sums[i][0] = __uint_as_float(two.x), x_sums[i][1] = __uint_as_float(two.y);
      }
    }
  };
  const auto add_sums = [&] {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float sum = sums[n][i][m][c];
            if constexpr (kHasZeros) sum = fmaf(rest[n][2 * i + c / 2], x_sums[m][c % 2], sum);
            total[n][i][m][c] = fmaf(scale[n][2 * i + c / 2], sum, total[n][i][m][c]);
          }
        }
      }
    }
  };

  // The A fragments of a step: [n-block][16-row tile].
  using Fragments = uint32_t[kWarpBlocks][L::kTiles][4];
  const auto dequantize = [&](Fragments& a, const Words& words, int step) {
    const int half = step / L::kStepsPerWord % L::kHalves;
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        if (step % L::kStepsPerWord == 0) {
          dequantize_step<T, 0>(a[n][i], words[n][half][i]);
        } else {
          dequantize_step<T, 1>(a[n][i], words[n][half][i]);
        }
        constexpr uint32_t kMinusZero = 0x80008000u;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          uint32_t& pair = a[n][i][r];
          if constexpr (kOnWeights) pair = internal::fma2<T>(pair, splat[n][2 * i + r % 2], kMinusZero);
          if constexpr (kHasZeros) pair = internal::add2<T>(pair, shift[n][2 * i + r % 2]);
        }
      }
    }
  };

  // sums = or += the weights of a step @ its x
  const auto multiply = [&](const Fragments& a, const X& x, bool first) {
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
          if (first) {
            const float none[4] = {0.f, 0.f, 0.f, 0.f};
            mma_m16n8k16<T>(sums[n][i][m], a[n][i], x[m][0], x[m][1], none);
          } else {
            mma_m16n8k16<T>(sums[n][i][m], a[n][i], x[m][0], x[m][1], sums[n][i][m]);
          }
        }
      }
    }
  };

  const auto clear = [](typename Tile::Sums& d) {
#pragma unroll
    for (int r = 0; r < static_cast<int>(sizeof(d) / 4); ++r) (&d[0][0][0][0])[r] = 0.f;
  };

  const auto multiply_segment = [&](const Segment& segment) {
    // Whole units, so that the last group's sums are scaled too: past K x is zero.
    const int end = segment.first_block + (segment.last_block - segment.first_block + kGemmUnitBlocks - 1) /
                                              kGemmUnitBlocks * kGemmUnitBlocks;
    __syncthreads();  // the ring is free
    aim(segment, end);
#pragma unroll 1
    for (int i = 0; i < Tile::kStages; ++i) fetch();
    if constexpr (kOnWeights || kManyGroups) clear(sums);
    if constexpr (!kOnWeights) clear(total);
    wait_for_copies<Tile::kStages - 1>();
    __syncthreads();
    stage = ring;
    X x[kAhead ? 2 : 1];
    Words words;
    if constexpr (kAhead) {
      load_x(x[0], 0);
      load_words(words, 0);
    }
#pragma unroll 1
    for (int block = segment.first_block; block < end; block += Tile::kStageBlocks) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (!kAhead) {
          if (step % kStepsPerBlock == 0) load_words(words, step / kStepsPerBlock);
          load_x(x[0], step);
        }
        const int row = step / kRowSteps;
        const bool begins = step % kRowSteps == 0, ends = step % kRowSteps == kRowSteps - 1;
        if (begins) {
          if constexpr (kOnWeights) load_splat(row);
          if constexpr (kHasZeros) load_zeros(row);
        }
        if (!kOnWeights && ends) load_for_sums(row);
        Fragments a;
        dequantize(a, words, step);
        if (step + 1 == kSteps) {  // all of the stage is in registers
          wait_for_copies<Tile::kStages - 2>();
          __syncthreads();
          fetch();
          stage += Smem::kStageBytes;
          if (stage == ring_end) stage = ring;
        }
        if constexpr (kAhead) {
          const int next = (step + 1) % kSteps;
          load_x(x[(step + 1) % 2], next);
          if (next % kStepsPerBlock == 0) load_words(words, next / kStepsPerBlock);
        }
        multiply(a, x[kAhead ? step % 2 : 0], !kOnWeights && !kManyGroups && begins);
        if (!kOnWeights && ends) {
          if constexpr (kManyGroups) {
            // Always: a branch keeps the compiler from working on several groups at once, and spilling.
            if (args.groups > 0) {
              add_sums();
              clear(sums);
            }
          } else {
            add_sums();
          }
        }
      }
    }
  };

  for_each_segment(args.walk, blockIdx.x, 0, gridDim.x, [&](const Segment& segment) {
    multiply_segment(segment);
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const float4 v = Tile::row_of(kOnWeights ? sums : total, r);
      if (segment.part >= 0) {
        args.parts[(static_cast<int64_t>(segment.part) * Tile::kRows + r) * kThreads + threadIdx.x] = v;
      } else {
        Tile::template store<T>(args, {segment.m_tile, segment.n_tile}, r, v);
      }
    }
  });
}

// Adds up the parts of the tiles that were cut. blockIdx: x is the tile (after whole_tiles), y the row of the threads'
// sums.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    add_portable_parts(const __grid_constant__ PortableGemmArgs args) {
  const int begin = blockIdx.x * args.walk.units, end = begin + args.walk.units;
  const int first = args.walk.shares.owner(begin), last = args.walk.shares.owner(end - 1);
  if (first == last) return;  // one block made it whole
  const int row = blockIdx.y;
  const float4* const from = args.parts + static_cast<int64_t>(row) * Tile::kThreads + threadIdx.x;
  const float4 sum = sum_of_parts(from, int64_t{Tile::kRows} * Tile::kThreads, first, last);
  Tile::template store<T>(args, tile_position(args.walk, args.walk.whole_tiles + blockIdx.x), row, sum);
}

}  // namespace jax_trirun::cuda
