#include <algorithm>
#include <string>

#include "choice.h"
#include "decode.cuh"
#include "decode_launch.h"
#include "gemm_launch.h"
#include "matmul.h"
#include "portable_gemm_launch.h"

namespace jax_trirun::cuda {
namespace {

constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;

Product product_of(const MatmulArgs& args) {
  return {args.problem, args.all_of_x_type(), args.zeros != nullptr, args.portable};
}

std::string sizes(const Problem& p) {
  return "M=" + std::to_string(p.m) + ", K=" + std::to_string(p.k) + ", N=" + std::to_string(p.n) +
         ", groups=" + std::to_string(p.groups);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

std::string why_misaligned(const MatmulArgs& args) {
  const struct {
    const char* name;
    const void* pointer;
  } buffers[] = {{"x", args.x},         {"words", args.words}, {"scales", args.scales},
                 {"zeros", args.zeros}, {"y", args.y},         {"scratch", args.scratch}};
  for (const auto& buffer : buffers) {
    if (!is_aligned(buffer.pointer)) {
      return std::string("matmul: ") + buffer.name +
             " must be aligned to 16 bytes, got an address that ends in " +
             std::to_string(reinterpret_cast<uintptr_t>(buffer.pointer) % 16);
    }
  }
  return "";
}

// Shared memory of a thread block of a kernel that needs no cluster, for the largest of its instances with
// this group size: float32 scales, and zeros. The split of K, and with it the scratch, follows from it
// on every GPU.
template <DecodeKernel kernel, int kGroupSize>
int portable_bytes(int rows, int units) {
  constexpr DecodeShape kShape = shape_of(kernel);
  using Math = FloatMath<2, __half, float, kShape.tokens / kMmaColumns, kGroupSize, true>;
  return DecodeSmem<Math, 2, kShape.warps, kShape.stages, true, 4>::total_bytes(rows, units, 1, 1);
}

template <DecodeKernel kernel>
int portable_bytes(const Problem& problem, int rows, int units) {
  switch (problem.groups == 1 ? kUnitK : problem.group_size()) {
    case 32: return portable_bytes<kernel, 32>(rows, units);
    case 64: return portable_bytes<kernel, 64>(rows, units);
    default: return portable_bytes<kernel, 128>(rows, units);
  }
}

// The most parts that any device and any types split K into.
int portable_parts(const Problem& problem) {
  const DecodeKernel kernel = choose_decode_kernel(problem, 1, /*portable=*/true);
  const int rows = static_cast<int>(std::min<int64_t>(problem.m, shape_of(kernel).tokens));
  const auto bytes_of = [&](int units, int, int) {
    return kernel == DecodeKernel::kFloat1Portable
               ? portable_bytes<DecodeKernel::kFloat1Portable>(problem, rows, units)
               : portable_bytes<DecodeKernel::kFloat2Portable>(problem, rows, units);
  };
  return plan_decode(problem, kernel, 1, kSmallestSharedMemory, bytes_of).ranks;
}

}  // namespace

std::string why_unsupported(const MatmulArgs& args, int compute_capability) {
  const Problem& p = args.problem;
  if (std::string error = p.error(); !error.empty()) return error;
  if (compute_capability < 80) {
    return "matmul: the CUDA kernels need compute capability 8.0 or later, got " +
           std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
  }
  if (args.x_type == DType::kF32) return "matmul: x must be float16 or bfloat16, got float32";
  if (args.scale_type != args.x_type && args.scale_type != DType::kF32) {
    return std::string("matmul: scales must have x's dtype ") + name_of(args.x_type) + " or float32, got " +
           name_of(args.scale_type);
  }
  if (args.y_type != args.x_type && args.y_type != DType::kF32) {
    return std::string("matmul: y must have x's dtype ") + name_of(args.x_type) + " or float32, got " +
           name_of(args.y_type);
  }
  if (p.m > kMaxGemmTokens) {
    return "matmul: the kernels take up to " + std::to_string(kMaxGemmTokens) + " rows of x, got " +
           sizes(p);
  }
  if (p.m > kMaxDecodeTokens && std::max(gemm_x_sums(p), portable_x_sums(p)) > kMaxInt) {
    return "matmul: M * K / group_size must be below 2^31, got " + sizes(p);
  }
  if (p.n % 8 != 0 || p.k % 8 != 0) return "matmul: N and K must be multiples of 8, got " + sizes(p);
  if (p.n > kMaxInt / 64 || p.k > kMaxInt / 64)
    return "matmul: N and K must be below 2^25, got " + sizes(p);
  if (p.m > 0 && p.m <= kMaxDecodeTokens && portable_parts(p) == 0)
    return "matmul: K does not fit, got " + sizes(p);
  return "";
}

int64_t scratch_bytes(const Problem& problem, DType x_type, bool portable) {
  if (problem.m == 0) return 0;
  int64_t bytes = portable_gemm_scratch_bytes(problem);
  if (!portable) bytes = std::max(bytes, gemm_scratch_bytes(problem));
  for (int64_t tile : {64, 128}) {  // any two launches that rows_at_first may choose
    const int64_t rest = problem.m % tile;
    for (int64_t rows : {rest, problem.m - rest}) {
      Problem some = problem;
      some.m = rows;
      if (problem.m > 64 && rows < problem.m)
        bytes = std::max(bytes, scratch_bytes(some, x_type, portable));
    }
  }
  if (problem.m > kMaxDecodeTokens) return bytes;
  const int64_t parts = portable_parts(problem);
  return std::max(bytes, parts > 1 ? parts * problem.m * problem.n * 4 : 0);
}

std::string describe_kernel(const MatmulArgs& args, int compute_capability, int sms) {
  return describe(product_of(args), compute_capability, sms);
}

std::string matmul(const MatmulArgs& args, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0, sms = 0, shared_memory = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&sms, cudaDevAttrMultiProcessorCount);
  get(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return describe("reading the device's attributes", error);

  if (std::string why = why_unsupported(args, major * 10 + minor); !why.empty()) return why;
  if (std::string why = why_misaligned(args); !why.empty()) return why;
  const Problem& p = args.problem;
  if (p.m == 0 || p.n == 0) return "";

  const Product product = product_of(args);
  const Kernels kernels = kernels_for(product, major * 10 + minor, sms);
  if (const int64_t first = rows_at_first(product, kernels, sms); first < p.m) {
    MatmulArgs part = args;
    part.problem.m = first;
    if (std::string failure = matmul(part, stream); !failure.empty()) return failure;
    part.problem.m = p.m - first;
    part.x = static_cast<const char*>(args.x) + first * p.k * size_of(args.x_type);
    part.y = static_cast<char*>(args.y) + first * p.n * size_of(args.y_type);
    return matmul(part, stream);
  }
  const bool is_f16 = args.x_type == DType::kF16;
  if (kernels == Kernels::kGemm)
    return is_f16 ? launch_gemm_f16(args, sms, stream) : launch_gemm_bf16(args, sms, stream);
  if (kernels == Kernels::kPortableGemm)
    return is_f16 ? launch_portable_gemm_f16(args, sms, stream)
                  : launch_portable_gemm_bf16(args, sms, stream);

  DecodeArgs decode = {};
  decode.x = args.x;
  decode.words = reinterpret_cast<const uint4*>(args.words);
  decode.scales = args.scales;
  decode.zeros = args.zeros;
  decode.y = args.y;
  decode.m = static_cast<int>(p.m);
  decode.n = static_cast<int>(p.n);
  decode.k = static_cast<int>(p.k);
  decode.k_blocks = static_cast<int>(p.k_blocks<2>());
  decode.n_blocks = static_cast<int>(p.n_blocks<2>());
  decode.group_stride = p.groups == 1 ? 0 : decode.n;
  decode.y_is_f32 = args.y_type == DType::kF32;

  const bool f32_scales = args.scale_type == DType::kF32;
  const auto launch_decode = is_f16 ? (f32_scales ? launch_decode_f16_f32 : launch_decode_f16_f16)
                                    : (f32_scales ? launch_decode_bf16_f32 : launch_decode_bf16_bf16);
  bool portable = args.portable || major < 9;
  while (true) {
    const DecodeKernel kernel = choose_decode_kernel(p, sms, portable);
    const DecodeLaunch launch = {p, kernel, sms, shared_memory, args.scratch, stream};
    const std::string failure = launch_decode(launch, decode);
    // Very long rows: without clusters K may be split into any number of parts.
    if (failure != kDoesNotFit) return failure;
    if (portable) return "matmul: K does not fit the shared memory of this device, got " + sizes(p);
    portable = true;
  }
}

}  // namespace jax_trirun::cuda
