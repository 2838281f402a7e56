// How a decode matmul is launched: which kernel, how K is split, how much work runs side by side.
//
// Every choice that bench/results/ has numbers for is made here and nowhere else. Plain C++: no GPU,
// no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace jax_trirun::cuda {

// The kernels of decode.cuh that are compiled: arithmetic, mma column tiles, warps, ring stages.
enum class DecodeKernel {
  kSlices1,  // int8 digits, up to 2 tokens
  kSlices2,  // up to 4
  kFloat1,   // 16-bit floats, up to 8 tokens
  kFloat2,   // up to 16
  kFloat1Portable,
  kFloat2Portable,
};

struct DecodeShape {
  int tokens, warps, stages;
  bool cluster;  // needs sm_90
};

constexpr DecodeShape shape_of(DecodeKernel kernel) {
  switch (kernel) {
    case DecodeKernel::kSlices1: return {2, 16, 4, true};
    case DecodeKernel::kSlices2: return {4, 16, 4, true};
    case DecodeKernel::kFloat1: return {8, 16, 3, true};
    case DecodeKernel::kFloat2: return {16, 12, 3, true};
    case DecodeKernel::kFloat1Portable: return {8, 8, 3, false};
    case DecodeKernel::kFloat2Portable: return {16, 4, 3, false};
  }
  return {};
}

// More are for the kernels for many tokens.
inline constexpr int64_t kMaxDecodeTokens = 16;

// The shared memory a thread block may have on every GPU since sm_80 (sm_86 and sm_89 have the least).
inline constexpr int kSmallestSharedMemory = 99 * 1024;

struct DecodePlan {
  DecodeKernel kernel = DecodeKernel::kFloat1Portable;
  int ranks = 0;  // thread blocks that share an n-block; 0: no launch fits
  int units_per_rank = 0;
};

// Whether every multiprocessor has several n-blocks of its own (4096 x 28672 and wider, on 132 of them). Else the
// blocks of a cluster share n-blocks: each needs less of x, which is worth adding their sums.
inline bool is_wide(const Problem& problem, int sms) { return problem.n_blocks<2>() >= 3 * sms; }

// The kernel for M tokens of an N x K problem on a GPU with `sms` multiprocessors.
inline DecodeKernel choose_decode_kernel(const Problem& problem, int sms, bool portable) {
  if (portable) return problem.m <= 8 ? DecodeKernel::kFloat1Portable : DecodeKernel::kFloat2Portable;
  if (problem.m <= 2) return DecodeKernel::kSlices1;
  // Cutting more activations into digits takes long, and pays where many words meet them.
  if (problem.m <= 4 && is_wide(problem, sms)) return DecodeKernel::kSlices2;
  return problem.m <= 8 ? DecodeKernel::kFloat1 : DecodeKernel::kFloat2;
}

// The smallest split of K (a power of two for clusters) whose slice of x fits `shared_memory`, as
// `bytes_of(units)` counts it, and that gives every multiprocessor something to do.
template <typename BytesOf>
DecodePlan plan_decode(const Problem& problem, DecodeKernel kernel, int sms, int shared_memory,
                       const BytesOf& bytes_of) {
  const int units = static_cast<int>(std::max<int64_t>(1, ceil_div(problem.k, 128)));
  const bool cluster = shape_of(kernel).cluster;
  for (int ranks = 1; ranks <= (cluster ? 8 : units); ranks = cluster ? ranks * 2 : ranks + 1) {
    const int units_per_rank = static_cast<int>(ceil_div(units, ranks));
    if (units_per_rank * (ranks - 1) >= units && ranks > 1) continue;  // a rank without work
    if (bytes_of(units_per_rank) > shared_memory) continue;
    if (cluster && ranks < 8 && !is_wide(problem, sms)) {
      const int64_t x_units = units_per_rank * problem.m;
      if (kernel == DecodeKernel::kSlices1 || kernel == DecodeKernel::kSlices2) {
        // Digits take long to cut.
        if (x_units > (ranks < 4 ? 64 : 128)) continue;
      } else if (ranks == 1 && units >= 2) {
        // 16-bit floats are only copied; but shares of n-blocks should be even.
        const bool even = ceil_div(problem.n_blocks<2>(), sms) * sms * 8 <= problem.n_blocks<2>() * 9;
        if (x_units > 256 || !even) continue;
      }
      // Clusters of four leave some multiprocessors out (30 run on 132), and share few n-blocks unevenly.
      const bool into_eight = ceil_div(units, 8) * 7 < units;
      if (ranks == 4 && problem.n_blocks<2>() < sms && into_eight) continue;
    }
    // Too few n-blocks for the multiprocessors: split K further, while a warp keeps a unit of its own.
    const bool idle = cluster && problem.n_blocks<2>() * ranks * 2 <= sms + sms / 8;
    if (idle && ranks < 8 && units_per_rank >= 2 * shape_of(kernel).warps) continue;
    return {kernel, ranks, units_per_rank};
  }
  return {kernel, 0, 0};
}

}  // namespace jax_trirun::cuda
