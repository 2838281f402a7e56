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

#define JAX_TRIRUN_WGMMA(T, TYPE, COLUMNS, OPERANDS, A, B, ACCUMULATE, ...)                     \
  template <>                                                                                   \
  struct Wgmma<T, COLUMNS> {                                                                    \
    static __device__ __forceinline__ void mma(float (&d)[COLUMNS / 2], const uint32_t (&a)[4], \
                                               uint64_t b, bool accumulate) {                   \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE             \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE  \
                   "{" OPERANDS "}, {" A "}, " B ", accumulate, 1, 1, 0;\n}\n"                  \
                   : __VA_ARGS__                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                     "r"(static_cast<int>(accumulate)));                                        \
    }                                                                                           \
  };
#define JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(...)    \
  JAX_TRIRUN_WGMMA(__half, "f16", __VA_ARGS__) \
  JAX_TRIRUN_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__)

// Sixteen of the registers of d, or eight, from the i-th on.
#define JAX_TRIRUN_D8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_TRIRUN_D16(i) JAX_TRIRUN_D8(i), JAX_TRIRUN_D8(i + 8)

// clang-format off
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(8,
  "%0, %1, %2, %3",
  "%4, %5, %6, %7", "%8", "%9",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(16,
  "%0, %1, %2, %3, %4, %5, %6, %7",
  "%8, %9, %10, %11", "%12", "%13",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
  "+f"(d[7]))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(32,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
  "%16, %17, %18, %19", "%20", "%21",
  JAX_TRIRUN_D16(0))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(48,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
  "%20, %21, %22, %23",
  "%24, %25, %26, %27", "%28", "%29",
  JAX_TRIRUN_D16(0), JAX_TRIRUN_D8(16))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(64,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
  "%32, %33, %34, %35", "%36", "%37",
  JAX_TRIRUN_D16(0), JAX_TRIRUN_D16(16))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(96,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47",
  "%48, %49, %50, %51", "%52", "%53",
  JAX_TRIRUN_D16(0), JAX_TRIRUN_D16(16), JAX_TRIRUN_D16(32))
JAX_TRIRUN_WGMMA_OF_BOTH_TYPES(128,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
  "%56, %57, %58, %59, %60, %61, %62, %63",
  "%64, %65, %66, %67", "%68", "%69",
  JAX_TRIRUN_D16(0), JAX_TRIRUN_D16(16), JAX_TRIRUN_D16(32), JAX_TRIRUN_D16(48))
// clang-format on

#undef JAX_TRIRUN_D16
#undef JAX_TRIRUN_D8
#undef JAX_TRIRUN_WGMMA_OF_BOTH_TYPES
#undef JAX_TRIRUN_WGMMA

}  // namespace jax_trirun::cuda
