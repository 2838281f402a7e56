// The CUDA back end as XLA and Python see it: the FFI handlers, and which products have a kernel.
//
// The handlers check every size again. Python has done so with better words; here it is for safety, as a
// custom call can also come out of an exported file. They allocate nothing and wait for nothing, so XLA
// may capture them in a CUDA graph; they run again whenever buffers have moved.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "../ffi_checks.h"
#include "../ffi_module.h"
#include "dequantize_weight.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_trirun::cuda {
namespace {

// ---- Checks -------------------------------------------------------------------------------------

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// "" or what is wrong with the address of an array that is not empty. `where` begins the sentence.
std::string alignment_error(const std::string& where, const char* name, const ffi::AnyBuffer& buffer) {
  if (buffer.element_count() == 0 || is_aligned(buffer.untyped_data())) return "";
  return where + ": " + name + " must be aligned to 16 bytes, got an address " +
         std::to_string(reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16) +
         " bytes past one that is";
}

// "" or what is wrong with the zeros of a weight that read_weight has read.
template <typename Args>
std::string zeros_error(const std::string& where, const Args& args, const ffi::AnyBuffer& zeros) {
  if (args.zeros == nullptr || float_type(zeros) == args.scale_type) return "";
  return where + ": zeros must be of the scales' type " + name_of(args.scale_type) + ", got " +
         name_of(*float_type(zeros));
}

// ---- matmul -------------------------------------------------------------------------------------

// How often XLA ran this handler. A captured graph replays without it: tests see by this that it is captured.
std::atomic<int64_t> handler_runs{0};

// x [M, K], words [K / kBlockK, N / kBlockN, 128], scales [groups, N], zeros [groups, N] of the scales'
// type, or [0, N] when the zero point is Layout<2>::kZeroPoint -> y [M, N] in x's type or float32, and, where
// scratch_bytes() are not 0, scratch: at least as many of uint8. `portable`: only instructions that sm_80 has.
//
// Scratch of 0 bytes may be a result too (exported files have it), but none is better: XLA lays an empty result on any
// memory, such as that of a result of the program which moves with every call, and then writes the product's node in
// the CUDA graph anew each time.
ffi::Error matmul_impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer words, ffi::AnyBuffer scales,
                       ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets more,
                       int64_t portable) {
  handler_runs.fetch_add(1, std::memory_order_relaxed);
  MatmulArgs args;
  if (std::string e = read_matmul(args, x, words, scales, zeros, *y); !e.empty()) {
    return ffi::Error::InvalidArgument(e);
  }
  const Problem& p = args.problem;
  const std::string where = "matmul";
  for (const std::string& e :
       {alignment_error(where, "x", x), alignment_error(where, "words", words),
        alignment_error(where, "scales", scales), alignment_error(where, "zeros", zeros),
        alignment_error(where, "y", *y), zeros_error(where, args, zeros)}) {
    if (!e.empty()) return ffi::Error::InvalidArgument(e);
  }
  args.portable = portable != 0;
  int64_t scratch_size = 0;
  if (more.size() > 1) {
    return ffi::Error::InvalidArgument("matmul: wanted results y and scratch, got " +
                                       std::to_string(1 + more.size()));
  }
  if (more.size() == 1) {
    auto scratch = more.get<ffi::AnyBuffer>(0);
    if (scratch.has_error()) return scratch.error();
    if (std::string e = alignment_error(where, "scratch", **scratch); !e.empty()) {
      return ffi::Error::InvalidArgument(e);
    }
    args.scratch = (*scratch)->untyped_data();
    scratch_size = static_cast<int64_t>((*scratch)->size_bytes());
  }
  const int64_t wanted = scratch_bytes(p, args.x_type, args.portable);
  if (scratch_size < wanted) {
    return ffi::Error::InvalidArgument("matmul: scratch must have at least " + std::to_string(wanted) +
                                       " bytes, got " + std::to_string(scratch_size));
  }
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();
  if (p.k == 0) {  // an empty sum
    const cudaError_t error = cudaMemsetAsync(args.y, 0, p.m * p.n * size_of(args.y_type), stream);
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("matmul: clearing y failed: ") + cudaGetErrorString(error));
  }
  if (std::string e = matmul(args, stream); !e.empty()) return ffi::Error::Internal(e);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(matmul_handler, matmul_impl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .RemainingRets()
                           .Attr<int64_t>("portable"),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- dequantize ---------------------------------------------------------------------------------

// words [K / kBlockK, N / kBlockN, 128], scales [groups, N], zeros [groups, N] of the scales' type, or [0, N] when
// the zero point is Layout<2>::kZeroPoint -> w [K, N] in any of the three types.
ffi::Error dequantize_impl(cudaStream_t stream, ffi::AnyBuffer words, ffi::AnyBuffer scales,
                           ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> w) {
  const std::string where = "dequantize";
  if (w->dimensions().size() != 2 || scales.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("dequantize: w must be [K, N] and scales [groups, N], got " +
                                       shape_of(w->dimensions()) + " and " + shape_of(scales.dimensions()));
  }
  DequantizeArgs args;
  Problem& p = args.problem;
  p.k = w->dimensions()[0];
  p.groups = scales.dimensions()[0];
  p.n = scales.dimensions()[1];
  if (std::string e = p.weight_error(where); !e.empty()) return ffi::Error::InvalidArgument(e);
  for (const std::string& e :
       {read_weight(where, args, words, scales, zeros), operand_error(where, "w", *w, {p.k, p.n}),
        alignment_error(where, "words", words), alignment_error(where, "scales", scales),
        alignment_error(where, "zeros", zeros), alignment_error(where, "w", *w),
        zeros_error(where, args, zeros)}) {
    if (!e.empty()) return ffi::Error::InvalidArgument(e);
  }
  args.w = w->untyped_data();
  args.w_type = *float_type(*w);
  if (std::string e = dequantize_weight(args, stream); !e.empty()) return ffi::Error::Internal(e);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(dequantize_handler, dequantize_impl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- Python -------------------------------------------------------------------------------------

DType dtype_of(const std::string& name) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (name == name_of(type)) return type;
  }
  throw nb::value_error(("dtype must be float32, float16 or bfloat16, got " + name).c_str());
}

Problem problem_of(int64_t m, int64_t n, int64_t k, int64_t groups) {
  Problem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.groups = groups;
  return p;
}

// The least of this machine's GPUs; where there is none (lowering for export), the least that is supported.
int compute_capability() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) {
    cudaGetLastError();  // leave no error behind for the next call
    devices = 0;
  }
  int least = 0;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    const int capability = 10 * major + minor;
    least = least == 0 ? capability : std::min(least, capability);
  }
  return least == 0 ? 80 : least;
}

MatmulArgs args_by_name(int64_t m, int64_t n, int64_t k, int64_t groups, const std::string& x_dtype,
                        const std::string& scale_dtype, const std::string& out_dtype, bool portable) {
  MatmulArgs args;
  args.problem = problem_of(m, n, k, groups);
  args.x_type = dtype_of(x_dtype);
  args.scale_type = dtype_of(scale_dtype);
  args.y_type = dtype_of(out_dtype);
  args.portable = portable;
  return args;
}

std::string why_unsupported_by_name(int64_t m, int64_t n, int64_t k, int64_t groups,
                                    const std::string& x_dtype, const std::string& scale_dtype,
                                    const std::string& out_dtype, bool portable) {
  static const int capability = compute_capability();
  return why_unsupported(args_by_name(m, n, k, groups, x_dtype, scale_dtype, out_dtype, portable),
                         capability);
}

std::string describe_kernel_by_name(int64_t m, int64_t n, int64_t k, int64_t groups,
                                    const std::string& x_dtype, const std::string& scale_dtype,
                                    const std::string& out_dtype, bool zeros, bool portable) {
  MatmulArgs args = args_by_name(m, n, k, groups, x_dtype, scale_dtype, out_dtype, portable);
  if (zeros) args.zeros = &args;  // only whether there are any counts
  int sms = 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) != cudaSuccess) cudaGetLastError();
  return describe_kernel(args, compute_capability(), std::max(sms, 1));
}

int64_t scratch_bytes_by_name(int64_t m, int64_t n, int64_t k, int64_t groups, const std::string& x_dtype,
                              bool portable) {
  return scratch_bytes(problem_of(m, n, k, groups), dtype_of(x_dtype), portable);
}

nb::dict ffi_handlers() {
  nb::dict d;
  d["jax_trirun_matmul_v1"] = capsule(matmul_handler);
  d["jax_trirun_dequantize_v1"] = capsule(dequantize_handler);
  return d;
}

}  // namespace
}  // namespace jax_trirun::cuda

NB_MODULE(_cuda, m) {
  using namespace jax_trirun::cuda;
  m.doc() = "The CUDA back end of jax_trirun: the FFI handlers, and which products have a kernel.";
  m.def("ffi_handlers", &ffi_handlers, "FFI target name -> handler.");
  jax_trirun::def_ffi_api_version(m);
  m.def(
      "why_unsupported", &why_unsupported_by_name, nb::arg("m"), nb::arg("n"), nb::arg("k"),
      nb::arg("groups"), nb::arg("x_dtype"), nb::arg("scale_dtype"), nb::arg("out_dtype"),
      nb::arg("portable"),
      "\"\" or one sentence that says why no kernel covers these sizes and dtypes on this machine's GPUs.");
  m.def("describe_kernel", &describe_kernel_by_name, nb::arg("m"), nb::arg("n"), nb::arg("k"),
        nb::arg("groups"), nb::arg("x_dtype"), nb::arg("scale_dtype"), nb::arg("out_dtype"),
        nb::arg("zeros"), nb::arg("portable"),
        "Which kernel a product that is supported takes on this machine's GPU, with its tiles, for people "
        "to read.");
  m.def(
      "handler_runs", [] { return handler_runs.load(); },
      "How often XLA ran the FFI handler of matmul in this process; replays of a captured graph do not "
      "count.");
  m.def("scratch_bytes", &scratch_bytes_by_name, nb::arg("m"), nb::arg("n"), nb::arg("k"),
        nb::arg("groups"), nb::arg("x_dtype"), nb::arg("portable"),
        "Bytes of the call's second result, which the kernels use while they run; with 0 there need be "
        "none.");
}
