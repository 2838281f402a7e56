// The library's matmul, and the kernel that only reads, under C names for peers.py: float16, no zeros.
#include "../csrc/cuda/matmul.h"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

namespace {

MatmulArgs args_of(int64_t m, int64_t n, int64_t k, int64_t groups, bool portable) {
  MatmulArgs args;
  args.problem = {m, n, k, groups};
  args.portable = portable;
  return args;
}

// Valid until the next call.
const char* keep(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

extern "C" {

// Empty, or why no kernel covers the product on a device of this compute capability (90 for 9.0).
const char* bench_why_unsupported(int64_t m, int64_t n, int64_t k, int64_t groups, bool portable,
                                  int capability) {
  return keep(why_unsupported(args_of(m, n, k, groups, portable), capability));
}

int64_t bench_scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t groups, bool portable) {
  return scratch_bytes(Problem{m, n, k, groups}, DType::kF16, portable);
}

// Empty, or what went wrong.
const char* bench_matmul(int64_t m, int64_t n, int64_t k, int64_t groups, bool portable, const void* x,
                         const void* words, const void* scales, void* y, void* scratch,
                         cudaStream_t stream) {
  MatmulArgs args = args_of(m, n, k, groups, portable);
  args.x = x, args.words = static_cast<const uint32_t*>(words), args.scales = scales, args.y = y;
  args.scratch = scratch;
  return keep(matmul(args, stream));
}

void bench_read_only(const void* p, int64_t bytes, void* out, int blocks, cudaStream_t stream) {
  read_only<<<blocks, 256, 0, stream>>>(static_cast<const uint4*>(p), bytes / 16,
                                        static_cast<uint32_t*>(out));
  CHECK(cudaGetLastError());
}

}  // extern "C"
