// Launches the kernels of gemm.cuh. Included by the gemm_*.cu files only, each of which compiles them for one
// type of x.
#pragma once

#include <cuda_runtime.h>

#include <iterator>
#include <string>
#include <utility>

#include "decode_launch.h"
#include "gemm.cuh"
#include "gemm_launch.h"
#include "gemm_plan.h"

namespace jax_trirun::cuda {

// sum(x) of each `group_size` of K, for zeros: sums[group * stride + token]. A warp takes one sum.
template <typename T>
__global__ void __launch_bounds__(256)
    sum_groups(const T* x, float* sums, int m, int k, int group_size, int stride) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int groups = (k + group_size - 1) / group_size;
  const int token = static_cast<int>(item / groups), group = static_cast<int>(item % groups);
  if (token >= stride) return;
  float sum = 0.f;
  if (token < m) {
    const T* row = x + static_cast<int64_t>(token) * k;
    const int end = min(k, (group + 1) * group_size);
    for (int i = group * group_size + threadIdx.x % 32; i < end; i += 32) sum += static_cast<float>(row[i]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) sums[static_cast<int64_t>(group) * stride + token] = sum;
}

// x as the copy engine reads it: boxes of `tokens` rows and one block of K, swizzled for wgmma.
inline std::string make_x_map(CUtensorMap& map, const MatmulArgs& args, int tokens) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // From the driver, at run time: the module must load on machines that have none.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                        : nullptr;
  }();
  if (encode == nullptr)
    return "matmul: the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or later has it";
  const Problem& p = args.problem;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.m)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(p.k) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(Layout<2>::kBlockK), static_cast<cuuint32_t>(tokens)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult result = encode(
      &map, args.x_type == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(args.x), sizes, row_bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "matmul: cuTensorMapEncodeTiled failed with error " + std::to_string(result);
}

// The arguments that the kernels of gemm.cuh and of portable_gemm.cuh have in common.
template <typename Args>
Args args_of(const MatmulArgs& args, const GemmPlan& plan) {
  const Problem& p = args.problem;
  Args gemm = {};
  gemm.words = reinterpret_cast<const uint4*>(args.words);
  gemm.scales = args.scales;
  gemm.zeros = args.zeros;
  gemm.y = args.y;
  gemm.parts = static_cast<float4*>(args.scratch);
  gemm.m = static_cast<int>(p.m), gemm.n = static_cast<int>(p.n);
  gemm.n_blocks = static_cast<int>(p.n_blocks<2>());
  gemm.groups = static_cast<int>(p.groups);
  gemm.group_stride = p.groups == 1 ? 0 : gemm.n;
  gemm.group_shift = p.groups == 1 ? 31 : p.group_size() == 32 ? 5 : p.group_size() == 64 ? 6 : 7;
  gemm.scales_are_f32 = args.scale_type == DType::kF32;
  gemm.y_is_f32 = args.y_type == DType::kF32;
  gemm.walk = walk_of(plan, static_cast<int>(p.k_blocks<2>()));
  return gemm;
}

// With zeros: the sums of x over each group, `count` floats in the scratch from `offset` on, `stride` from one group
// to the next.
template <typename T, int kGroupSize, typename Args>
std::string launch_sum_groups(Args& gemm, const MatmulArgs& args, int64_t offset, int64_t count,
                              int64_t stride, cudaStream_t stream) {
  const int k = static_cast<int>(args.problem.k);
  float* x_sums = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + offset);
  gemm.x_sums = x_sums;
  gemm.x_groups = static_cast<int>(ceil_div(k, kGroupSize));
  gemm.x_sums_stride = static_cast<int>(stride);
  if (gemm.x_groups == 0) return "";
  sum_groups<T><<<static_cast<unsigned>(ceil_div(count, 8)), 256, 0, stream>>>(
      static_cast<const T*>(args.x), x_sums, gemm.m, k, kGroupSize, gemm.x_sums_stride);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : describe("launching sum_groups", error);
}

template <GemmKernel kernel, typename T, int kGroupSize, bool kHasZeros>
std::string launch_gemm_instance(const MatmulArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  constexpr GemmShape kShape = shape_of(kernel);
  using Tile = TileLayout<kShape.tokens, kShape.warpgroups, kShape.warp_tiles>;
  using Smem = GemmSmem<Tile, kGroupSize, kHasZeros, kShape.stages>;
  static_assert(Smem::kBytes <= 227 * 1024, "what a thread block may have on sm_90");
  const Problem& p = args.problem;

  GemmArgs gemm = args_of<GemmArgs>(args, plan);
  gemm.unit_rows = gemm.group_shift < 7 ? 128 >> gemm.group_shift : 1;
  gemm.row_shift = std::min(gemm.group_shift, 7) - 5;

  CUtensorMap x_map;
  const int box = kShape.tokens / (kShape.pairs ? 2 : 1);
  if (std::string error = make_x_map(x_map, args, box); !error.empty()) return error;
  CUtensorMap x_rest_map = x_map;  // of the tokens after whole tiles
  if (const int rest = static_cast<int>(p.m % kShape.tokens); rest > 0 && !kShape.pairs) {
    if (std::string error = make_x_map(x_rest_map, args, rest); !error.empty()) return error;
  }
  if constexpr (kHasZeros) {
    std::string error = launch_sum_groups<T, kGroupSize>(gemm, args, gemm_part_bytes(p, kernel),
                                                         gemm_x_sums(p), gemm_x_sums_stride(p), stream);
    if (!error.empty()) return error;
  }

  const auto function = gemm_kernel<T, kShape.tokens, kShape.warpgroups, kShape.warp_tiles, kGroupSize,
                                    kHasZeros, kShape.stages, kShape.pairs>;
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Smem::kBytes);
  if (error != cudaSuccess) return describe("cudaFuncSetAttribute", error);
  cudaLaunchConfig_t config = {};
  const int cluster_size = kShape.pairs ? 2 : plan.ranks;
  config.gridDim = plan.ranks > 1 ? dim3(plan.ranks, plan.tiles()) : dim3(plan.grid * cluster_size);
  config.blockDim = dim3((kShape.warpgroups + 1) * 128);
  config.dynamicSmemBytes = Smem::kBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, function, x_map, x_rest_map, gemm);
  if (error != cudaSuccess) return describe("launching the gemm kernel", error);
  if (plan.cut_tiles() == 0) return "";
  config.gridDim = dim3(plan.cut_tiles(), Tile::kRows, kShape.warpgroups);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 0;
  cudaLaunchAttribute dependent = {};  // brought up while the first kernel ends
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &dependent;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config,
                             add_gemm_parts<T, kShape.tokens, kShape.warpgroups, kShape.warp_tiles>, gemm);
  return error == cudaSuccess ? "" : describe("launching add_gemm_parts", error);
}

template <GemmKernel kernel, typename T>
std::string launch_gemm_kernel(const MatmulArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  constexpr bool kHasZeros = kernel == GemmKernel::kZeros48;
  if constexpr (shape_of(kernel).on_weights) {
    return launch_gemm_instance<kernel, T, 0, false>(args, plan, stream);
  } else {
    switch (gemm_group_size(args.problem)) {
      case 32: return launch_gemm_instance<kernel, T, 32, kHasZeros>(args, plan, stream);
      case 64: return launch_gemm_instance<kernel, T, 64, kHasZeros>(args, plan, stream);
      default: return launch_gemm_instance<kernel, T, 128, kHasZeros>(args, plan, stream);
    }
  }
}

template <typename T, size_t... kIndices>
std::string launch_one_of(std::index_sequence<kIndices...>, GemmKernel kernel, const MatmulArgs& args,
                          const GemmPlan& plan, cudaStream_t stream) {
  std::string error = "matmul: no such kernel";
  static_cast<void>(((kernel == kGemmKernels[kIndices] &&
                      (error = launch_gemm_kernel<kGemmKernels[kIndices], T>(args, plan, stream), true)) ||
                     ...));
  return error;
}

template <typename T>
std::string launch_gemm_of(const MatmulArgs& args, int sms, cudaStream_t stream) {
  const auto [kernel, plan] = choose_gemm(args.problem, args.all_of_x_type(), args.zeros != nullptr, sms);
  return launch_one_of<T>(std::make_index_sequence<std::size(kGemmKernels)>{}, kernel, args, plan, stream);
}

}  // namespace jax_trirun::cuda
