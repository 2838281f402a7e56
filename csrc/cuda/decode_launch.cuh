// Launches one instantiation of the decode kernel. Included by the decode_*.cu files only, each of which
// compiles the kernels for one pair of activation and scale types.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "decode.cuh"
#include "decode_launch.h"

namespace jax_trirun::cuda {

inline constexpr int kMostClusters = 65535;  // in a grid's second dimension

template <DecodeKernel kernel, typename T, typename S, int kGroupSize, bool kHasZeros>
struct DecodeInstance {
  static constexpr DecodeShape kShape = shape_of(kernel);
  static constexpr bool kIsSlices = kernel == DecodeKernel::kSlices1 || kernel == DecodeKernel::kSlices2;
  static constexpr int kTiles = kIsSlices ? kShape.tokens / 2 : kShape.tokens / 8;
  template <bool kSlices, typename = void>
  struct MathOf {
    using Type = FloatMath<2, T, S, kTiles, kGroupSize, kHasZeros>;
  };
  template <typename Unused>
  struct MathOf<true, Unused> {
    using Type = SliceMath<2, T, S, kTiles, kGroupSize, kHasZeros>;
  };
  using Math = typename MathOf<kIsSlices>::Type;
  static_assert(Math::kTokens == kShape.tokens, "plan.h knows the kernels");
  // Fewer stages where scales and zeros make them large.
  static constexpr int kStages = [] {
    using OfOne = DecodeSmem<Math, 2, kShape.warps, 1, kHasZeros, sizeof(S)>;
    constexpr int kMostRingBytes = 112 * 1024;
    return std::min(kShape.stages, std::max(4, kMostRingBytes / OfOne::kRingBytes));
  }();
  using Smem = DecodeSmem<Math, 2, kShape.warps, kStages, kHasZeros, sizeof(S)>;
  static constexpr int kBlocksPerSm = kShape.cluster ? 1 : 2;

  static std::string launch(const DecodeLaunch& launch, DecodeArgs args) {
    const int rows = std::min<int>(args.m, Math::kTokens);
    const auto bytes_of = [rows](int units, int ranks, int blocks_per_warp) {
      return Smem::total_bytes(rows, units, kShape.cluster ? ranks : 1, blocks_per_warp);
    };
    const DecodePlan plan = plan_decode(launch.problem, kernel, launch.sms, launch.shared_memory, bytes_of);
    if (plan.ranks == 0) return kDoesNotFit;
    const int bytes = bytes_of(plan.units_per_rank, plan.ranks, plan.blocks_per_warp);
    const auto function = decode_kernel<Math, 2, T, S, kGroupSize, kHasZeros, kShape.warps, kStages,
                                        kShape.cluster, kBlocksPerSm, kShape.blocks_per_warp>;
    cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return describe("cudaFuncSetAttribute", error);

    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kShape.warps * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = launch.stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.ranks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = kShape.cluster && plan.ranks > 1 ? 1 : 0;

    // As many clusters as run at the same time: each takes the same share of the n-blocks.
    int slots = std::max(1, launch.sms * kBlocksPerSm / plan.ranks);
    if (config.numAttrs != 0) {
      config.gridDim = dim3(plan.ranks, slots);
      error = cudaOccupancyMaxActiveClusters(&slots, function, &config);
      if (error != cudaSuccess) return describe("cudaOccupancyMaxActiveClusters", error);
      if (slots == 0) return kDoesNotFit;
    }
    const int clusters = std::min({args.n_blocks, slots, kMostClusters});
    cut_work(args, plan.ranks, clusters, kShape.warps, plan.blocks_per_warp);
    const bool in_parts = !kShape.cluster && plan.ranks > 1;
    void* const y = args.y;
    const bool y_is_f32 = args.y_is_f32;
    if (in_parts) args.y = launch.scratch, args.y_is_f32 = true;
    config.gridDim = dim3(plan.ranks, clusters, static_cast<unsigned>(ceil_div(args.m, Math::kTokens)));
    error = cudaLaunchKernelEx(&config, function, args);
    if (error != cudaSuccess) return describe("launching the decode kernel", error);
    if (in_parts) {
      const int64_t size = static_cast<int64_t>(args.m) * args.n;
      add_parts<T><<<static_cast<unsigned>(ceil_div(size, 4 * 256)), 256, 0, launch.stream>>>(
          static_cast<const float*>(launch.scratch), plan.ranks, size, y, y_is_f32);
      error = cudaGetLastError();
      if (error != cudaSuccess) return describe("launching add_parts", error);
    }
    return "";
  }
};

template <DecodeKernel kernel, typename T, typename S, int kGroupSize>
std::string launch_for_zeros(const DecodeLaunch& launch, const DecodeArgs& args) {
  return args.zeros != nullptr ? DecodeInstance<kernel, T, S, kGroupSize, true>::launch(launch, args)
                               : DecodeInstance<kernel, T, S, kGroupSize, false>::launch(launch, args);
}

template <DecodeKernel kernel, typename T, typename S>
std::string launch_for_groups(const DecodeLaunch& launch, const DecodeArgs& args) {
  const int64_t group_size = launch.problem.groups == 1 ? kUnitK : launch.problem.group_size();
  if constexpr (shape_of(kernel).smallest_group <= 32) {
    if (group_size == 32) return launch_for_zeros<kernel, T, S, 32>(launch, args);
  }
  if constexpr (shape_of(kernel).smallest_group <= 64) {
    if (group_size == 64) return launch_for_zeros<kernel, T, S, 64>(launch, args);
  }
  // 128, or one group, whose sums are taken 128 at a time
  return launch_for_zeros<kernel, T, S, kUnitK>(launch, args);
}

template <typename T, typename S>
std::string launch_decode_of(const DecodeLaunch& launch, const DecodeArgs& args) {
  switch (launch.kernel) {
    case DecodeKernel::kSlices1: return launch_for_groups<DecodeKernel::kSlices1, T, S>(launch, args);
    case DecodeKernel::kSlices2: return launch_for_groups<DecodeKernel::kSlices2, T, S>(launch, args);
    case DecodeKernel::kFloat1: return launch_for_groups<DecodeKernel::kFloat1, T, S>(launch, args);
    case DecodeKernel::kFloat2: return launch_for_groups<DecodeKernel::kFloat2, T, S>(launch, args);
    case DecodeKernel::kFloat1Portable:
      return launch_for_groups<DecodeKernel::kFloat1Portable, T, S>(launch, args);
    case DecodeKernel::kFloat2Portable:
      return launch_for_groups<DecodeKernel::kFloat2Portable, T, S>(launch, args);
  }
  return "matmul: no such kernel";
}

}  // namespace jax_trirun::cuda
