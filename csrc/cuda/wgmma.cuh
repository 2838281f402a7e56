// wgmma: 64 rows of A from the registers of a warpgroup, times B from shared memory, asynchronously.
// [Asynchronous Warpgroup Level Matrix Instructions, PTX ISA]. Only sm_90a has them.
#pragma once

#include "ptx.cuh"

namespace jax_trirun::cuda {

// [wgmma.fence] Before the first wgmma, and whenever other instructions have written its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// [wgmma.wait_group] Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across a wait or a fence.
template <int kSize>
__device__ __forceinline__ void pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// [Matrix Descriptor] B as rows of 128 bytes (64 16-bit values of k for one token), swizzled by 128 bytes as
// TMA writes them: groups of eight rows are 1024 bytes apart. `address` is a multiple of 1024.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// [wgmma.mma_async] d = a @ b, or d += a @ b: a is 64 x 16, b 16 x kColumns, d in float32. A thread's
// d[4 * j + 2 * b + e] is row 16 * warp + g + 8 * b, column 8 * j + 2 * t + e, as in mma.m16n8k16.
template <typename T, int kColumns>
struct Wgmma;

// The registers of d, four for 8 columns: X(i, ..) of each four, with AND() between them.
// clang-format off
#define JAX_TRIRUN_REGISTERS_8(X, AND) X(0, 1, 2, 3)
#define JAX_TRIRUN_REGISTERS_16(X, AND) JAX_TRIRUN_REGISTERS_8(X, AND) AND() X(4, 5, 6, 7)
#define JAX_TRIRUN_REGISTERS_32(X, AND) JAX_TRIRUN_REGISTERS_16(X, AND) AND() X(8, 9, 10, 11) AND() X(12, 13, 14, 15)
#define JAX_TRIRUN_REGISTERS_48(X, AND) JAX_TRIRUN_REGISTERS_32(X, AND) AND() X(16, 17, 18, 19) AND() X(20, 21, 22, 23)
#define JAX_TRIRUN_REGISTERS_64(X, AND) JAX_TRIRUN_REGISTERS_48(X, AND) AND() X(24, 25, 26, 27) AND() X(28, 29, 30, 31)
#define JAX_TRIRUN_REGISTERS_80(X, AND) JAX_TRIRUN_REGISTERS_64(X, AND) AND() X(32, 33, 34, 35) AND() X(36, 37, 38, 39)
#define JAX_TRIRUN_REGISTERS_96(X, AND) JAX_TRIRUN_REGISTERS_80(X, AND) AND() X(40, 41, 42, 43) AND() X(44, 45, 46, 47)
#define JAX_TRIRUN_REGISTERS_112(X, AND) JAX_TRIRUN_REGISTERS_96(X, AND) AND() X(48, 49, 50, 51) AND() X(52, 53, 54, 55)
#define JAX_TRIRUN_REGISTERS_128(X, AND) JAX_TRIRUN_REGISTERS_112(X, AND) AND() X(56, 57, 58, 59) AND() X(60, 61, 62, 63)
#define JAX_TRIRUN_REGISTERS_144(X, AND) JAX_TRIRUN_REGISTERS_128(X, AND) AND() X(64, 65, 66, 67) AND() X(68, 69, 70, 71)
#define JAX_TRIRUN_REGISTERS_160(X, AND) JAX_TRIRUN_REGISTERS_144(X, AND) AND() X(72, 73, 74, 75) AND() X(76, 77, 78, 79)
#define JAX_TRIRUN_REGISTERS_176(X, AND) JAX_TRIRUN_REGISTERS_160(X, AND) AND() X(80, 81, 82, 83) AND() X(84, 85, 86, 87)
// clang-format on
#define JAX_TRIRUN_OPERANDS(i0, i1, i2, i3) "%" #i0 ", %" #i1 ", %" #i2 ", %" #i3
#define JAX_TRIRUN_TEXT_COMMA() ", "
#define JAX_TRIRUN_FLOATS(i0, i1, i2, i3) "+f"(d[i0]), "+f"(d[i1]), "+f"(d[i2]), "+f"(d[i3])
#define JAX_TRIRUN_INTS(i0, i1, i2, i3) "+r"(d[i0]), "+r"(d[i1]), "+r"(d[i2]), "+r"(d[i3])
#define JAX_TRIRUN_COMMA() ,

// The instruction for d, a, b and accumulate of that name: `TYPES` is what follows the columns, `SUMS` JAX_TRIRUN_FLOATS or
// JAX_TRIRUN_INTS, `FLAGS` what follows the predicate; A, B and ACCUMULATE are the operands after the registers of d.
#define JAX_TRIRUN_WGMMA(COLUMNS, TYPES, SUMS, FLAGS, A, B, ACCUMULATE)                              \
  asm volatile(                                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE                               \
      ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS TYPES "{" JAX_TRIRUN_REGISTERS_##COLUMNS(   \
          JAX_TRIRUN_OPERANDS, JAX_TRIRUN_TEXT_COMMA) "}, {" A "}, " B ", accumulate" FLAGS ";\n}\n" \
      : JAX_TRIRUN_REGISTERS_##COLUMNS(SUMS, JAX_TRIRUN_COMMA)                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

#define JAX_TRIRUN_WGMMA_OF(T, TYPE, COLUMNS, ...)                                                      \
  template <>                                                                                           \
  struct Wgmma<T, COLUMNS> {                                                                            \
    static __device__ __forceinline__ void mma(float (&d)[COLUMNS / 2], const uint32_t (&a)[4],         \
                                               uint64_t b, bool accumulate) {                           \
      JAX_TRIRUN_WGMMA(COLUMNS, "k16.f32." TYPE "." TYPE, JAX_TRIRUN_FLOATS, ", 1, 1, 0", __VA_ARGS__); \
    }                                                                                                   \
  };
#define JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(...)       \
  JAX_TRIRUN_WGMMA_OF(__half, "f16", __VA_ARGS__) \
  JAX_TRIRUN_WGMMA_OF(__nv_bfloat16, "bf16", __VA_ARGS__)

JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(8, "%4, %5, %6, %7", "%8", "%9")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(16, "%8, %9, %10, %11", "%12", "%13")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(32, "%16, %17, %18, %19", "%20", "%21")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(48, "%24, %25, %26, %27", "%28", "%29")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(64, "%32, %33, %34, %35", "%36", "%37")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(80, "%40, %41, %42, %43", "%44", "%45")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(96, "%48, %49, %50, %51", "%52", "%53")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(112, "%56, %57, %58, %59", "%60", "%61")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(128, "%64, %65, %66, %67", "%68", "%69")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(144, "%72, %73, %74, %75", "%76", "%77")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(160, "%80, %81, %82, %83", "%84", "%85")
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(176, "%88, %89, %90, %91", "%92", "%93")

#undef JAX_TRIRUN_WGMMA_OF_BOTH_TYPES
#undef JAX_TRIRUN_WGMMA_OF

}  // namespace jax_trirun::cuda
