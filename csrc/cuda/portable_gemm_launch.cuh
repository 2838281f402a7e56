// Launches the portable kernels for many tokens. Included by the portable_gemm_*.cu files only, each of which compiles
// them for one type of x.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "decode_launch.h"
#include "gemm_launch.cuh"
#include "plan.h"
#include "portable_gemm.cuh"
#include "portable_gemm_launch.h"
#include "portable_gemm_plan.h"

namespace jax_trirun::cuda {

template <PortableGemmKernel kernel>
constexpr PortableGemmShape kShapeOf = shape_of(kernel);
template <PortableGemmKernel kernel>
using PortableTileOf =
    PortableTile<kShapeOf<kernel>.tokens, kShapeOf<kernel>.warp_tokens, kShapeOf<kernel>.warp_blocks,
                 kShapeOf<kernel>.warps, kShapeOf<kernel>.stage_blocks, kShapeOf<kernel>.stages,
                 kShapeOf<kernel>.blocks_per_sm>;

template <typename T, typename Tile, int kGroupSize, bool kHasZeros>
std::string launch_portable_tiles(const MatmulArgs& args, const GemmPlan& plan, int64_t part_bytes,
                                  cudaStream_t stream) {
  using Smem = PortableSmem<Tile, kGroupSize, kHasZeros>;
  static_assert(Smem::kBytes <= kSmallestSharedMemory);
  const Problem& p = args.problem;

  PortableGemmArgs gemm = args_of<PortableGemmArgs>(args, plan);
  gemm.x = args.x;
  gemm.k = static_cast<int>(p.k);
  if constexpr (kHasZeros) {
    std::string error = launch_sum_groups<T, kGroupSize>(gemm, args, part_bytes, portable_x_sums(p),
                                                         portable_x_sums_stride(p), stream);
    if (!error.empty()) return error;
  }

  const auto function = portable_gemm_kernel<T, Tile, kGroupSize, kHasZeros>;
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Smem::kBytes);
  if (error != cudaSuccess) return describe("cudaFuncSetAttribute", error);
  function<<<plan.grid, Tile::kThreads, Smem::kBytes, stream>>>(gemm);
  error = cudaGetLastError();
  if (error != cudaSuccess) return describe("launching the portable gemm kernel", error);
  if (plan.cut_tiles() == 0) return "";
  add_portable_parts<T, Tile><<<dim3(plan.cut_tiles(), Tile::kRows), Tile::kThreads, 0, stream>>>(gemm);
  error = cudaGetLastError();
  return error == cudaSuccess ? "" : describe("launching add_portable_parts", error);
}

template <PortableGemmKernel kernel, typename T, int kGroupSize, bool kHasZeros = false>
std::string launch_portable_instance(const MatmulArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  static_assert(PortableTileOf<kernel>::kFeatures == kShapeOf<kernel>.features());
  return launch_portable_tiles<T, PortableTileOf<kernel>, kGroupSize, kHasZeros>(
      args, plan, portable_part_bytes(args.problem, kernel), stream);
}

template <PortableGemmKernel kernel, typename T, bool kHasZeros = false>
std::string launch_portable_for_groups(const MatmulArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  switch (portable_group_size(args.problem)) {
    case 32: return launch_portable_instance<kernel, T, 32, kHasZeros>(args, plan, stream);
    case 64: return launch_portable_instance<kernel, T, 64, kHasZeros>(args, plan, stream);
    default: return launch_portable_instance<kernel, T, 128, kHasZeros>(args, plan, stream);
  }
}

template <typename T>
std::string launch_portable_gemm_of(const MatmulArgs& args, int sms, cudaStream_t stream) {
  using Kernel = PortableGemmKernel;
  const auto [kernel, plan] =
      choose_portable_gemm(args.problem, args.all_of_x_type(), args.zeros != nullptr, sms);
  switch (kernel) {
    case Kernel::kSums16: return launch_portable_for_groups<Kernel::kSums16, T>(args, plan, stream);
    case Kernel::kSums32: return launch_portable_for_groups<Kernel::kSums32, T>(args, plan, stream);
    case Kernel::kSums64: return launch_portable_for_groups<Kernel::kSums64, T>(args, plan, stream);
    case Kernel::kZeros32: return launch_portable_for_groups<Kernel::kZeros32, T, true>(args, plan, stream);
    case Kernel::kZeros64: return launch_portable_for_groups<Kernel::kZeros64, T, true>(args, plan, stream);
    case Kernel::kWeights128:
      return launch_portable_instance<Kernel::kWeights128, T, 0>(args, plan, stream);
    case Kernel::kWeights128Narrow:
      return launch_portable_instance<Kernel::kWeights128Narrow, T, 0>(args, plan, stream);
  }
  return "matmul: no such kernel";
}

}  // namespace jax_trirun::cuda
