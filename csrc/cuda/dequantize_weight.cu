#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "dequantize_weight.cuh"
#include "dequantize_weight.h"

namespace jax_trirun::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

template <typename T, typename S>
cudaError_t launch(const DequantizeKernelArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kBlockColumns<T>)),
                  static_cast<unsigned>(std::min(args.k_blocks, kMaxGridY)));
  const bool whole = args.n % 8 == 0;
  const auto kernel = whole ? dequantize_weight_kernel<T, S, true> : dequantize_weight_kernel<T, S, false>;
  kernel<<<grid, kDequantizeThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_scales(const DequantizeKernelArgs& args, DType scale_type, cudaStream_t stream) {
  switch (scale_type) {
    case DType::kF32: return launch<T, float>(args, stream);
    case DType::kF16: return launch<T, __half>(args, stream);
    case DType::kBF16: return launch<T, __nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_for_types(const DequantizeKernelArgs& args, DType w_type, DType scale_type,
                             cudaStream_t stream) {
  switch (w_type) {
    case DType::kF32: return launch_for_scales<float>(args, scale_type, stream);
    case DType::kF16: return launch_for_scales<__half>(args, scale_type, stream);
    case DType::kBF16: return launch_for_scales<__nv_bfloat16>(args, scale_type, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

std::string dequantize_weight(const DequantizeArgs& args, cudaStream_t stream) {
  const Problem& p = args.problem;
  if (p.k == 0 || p.n == 0) return "";
  DequantizeKernelArgs kernel = {};
  kernel.words = reinterpret_cast<const uint4*>(args.words);
  kernel.scales = args.scales;
  kernel.zeros = args.zeros;
  kernel.w = args.w;
  kernel.k = p.k;
  kernel.n = p.n;
  kernel.k_blocks = p.k_blocks<2>();
  kernel.n_blocks = p.n_blocks<2>();
  kernel.group_parts = static_cast<uint32_t>(ceil_div(p.group_size(), kSmallestGroup));
  const cudaError_t error = launch_for_types(kernel, args.w_type, args.scale_type, stream);
  if (error == cudaSuccess) return "";
  return std::string("dequantize: launching the kernel failed: ") + cudaGetErrorString(error);
}

}  // namespace jax_trirun::cuda
