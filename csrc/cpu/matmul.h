// The CPU back end's entry points: plain pointers in, plain pointers out, no XLA.
#pragma once

#include <cstdint>
#include <functional>

#include "../problem.h"

namespace jax_trirun::cpu {

// Threads to work on. The results of a matmul depend neither on their number nor on who does what.
struct ParallelFor {
  // Runs body(0) .. body(tasks - 1), possibly at the same time, and returns when all are done.
  std::function<void(int64_t tasks, const std::function<void(int64_t task)>& body)> run;
  int64_t threads;  // that do so, the caller's among them
};

struct MatmulArgs {
  Problem problem;
  const void* x = nullptr;  // [M, K], row-major
  DType x_type = DType::kF32;
  const uint32_t* words = nullptr;  // [K / kBlockK, N / kBlockN, 128], 2-bit codes
  const void* scales = nullptr;     // [groups, N]
  DType scale_type = DType::kF32;
  const void* zeros = nullptr;  // [groups, N], or null: every zero is Layout<2>::kZeroPoint
  DType zero_type = DType::kF32;
  void* y = nullptr;  // [M, N]
  DType y_type = DType::kF32;
};

// y = x @ (scales * (codes - zeros)), accumulated in float32.
void matmul(const MatmulArgs& args, const ParallelFor& parallel_for);

// codes [K, N], one byte each, <-> words [K / kBlockK, N / kBlockN, 128]. pack masks each code to
// `bits` bits and fills the padding with kPadCode.
template <int bits>
void pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words, const ParallelFor& parallel_for);
template <int bits>
void unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes, const ParallelFor& parallel_for);

// The instruction sets this build has kernels for and this machine can run, best first, and the one in
// use. set_isa (or the environment variable JAX_TRIRUN_CPU_ISA) picks another by name; an unknown or
// unsupported name returns false and changes nothing.
const char* const* available_isas(int* count);
const char* current_isa();
bool set_isa(const char* name);

}  // namespace jax_trirun::cpu
