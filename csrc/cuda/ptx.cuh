// The PTX instructions the kernels use, each as one function with a name. Nothing else is here.
// Numbers in brackets are sections of the PTX ISA reference.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_trirun::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A value the compiler must keep instead of working it out again in the main loop.
__device__ __forceinline__ uint32_t opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// [cp.async] Copies kBytes from global to shared memory behind the thread's back, 16 bytes past L1. The L2 cache is to
// bring 128 bytes from memory at once, as a warp wants them all: with one row 8192 x 57344 takes 33.4 us instead of 33.8,
// 28672 x 8192 18.9 instead of 19.2. With 256 bytes they take 3 % longer.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to_shared, const void* from_global) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(to_shared), "l"(from_global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to_shared), "l"(from_global),
                 "n"(kBytes)
                 : "memory");
  }
}
// The same for 16 bytes that may lie outside: then zeros are written and nothing is read.
__device__ __forceinline__ void copy_or_zero_async(uint32_t to_shared, const void* from_global, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to_shared), "l"(from_global),
               "r"(real ? 16 : 0)
               : "memory");
}

// The same for the first `bytes` of 16, zeros after them, if `wanted`: without a branch.
__device__ __forceinline__ void copy_some_async(uint32_t to_shared, const void* from_global, int bytes,
                                                bool wanted) {
  asm volatile(
      "{\n.reg .pred wanted;\n"
      "setp.ne.b32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n}\n" ::"r"(to_shared),
      "l"(from_global), "r"(bytes), "r"(static_cast<int>(wanted))
      : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float4 load_shared_floats(uint32_t address) {
  const uint4 v = load_shared_16(address);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                     __uint_as_float(v.w));
}

// [bar] Barriers of kWarps warps; __syncthreads is number 0 with all of them. Who only arrives does not wait.
template <int kBarrier, int kWarps>
__device__ __forceinline__ void wait_at_barrier() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kBarrier), "n"(kWarps * 32) : "memory");
}
template <int kBarrier, int kWarps>
__device__ __forceinline__ void arrive_at_barrier() {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;\n" ::"n"(kBarrier), "n"(kWarps * 32) : "memory");
}

// [ldmatrix] Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix
// l / 8. Used on x[token][k] it yields the B fragments of two m16n8k16 steps.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// [mma.m16n8k16] d = a @ b + c, accumulated in float32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4]) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
}

// [mma.m16n8k32] d = a @ b + c; a holds unsigned bytes, b signed ones, sums are int32.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}

// [lop3] (word & mask) | magic in one instruction.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t magic) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(r) : "r"(word), "n"(kMask), "r"(magic));
  return r;
}

// Clusters exist from sm_90 on. Elsewhere these compile, so that templates need no second version, and
// trap if they are ever reached.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define JAX_TRIRUN_FROM_SM_90(...) __trap()
#else
#define JAX_TRIRUN_FROM_SM_90(...) __VA_ARGS__
#endif

// [barrier.cluster] All threads of all blocks of the cluster; what was written before arriving is
// visible after waiting, also in another block's shared memory.
__device__ __forceinline__ void cluster_arrive() {
  JAX_TRIRUN_FROM_SM_90(asm volatile("barrier.cluster.arrive.release.aligned;\n" :: : "memory"));
}
// The same without the visibility, of global memory above all, which takes half a microsecond.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  JAX_TRIRUN_FROM_SM_90(asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" :: : "memory"));
}
__device__ __forceinline__ void cluster_wait() {
  JAX_TRIRUN_FROM_SM_90(asm volatile("barrier.cluster.wait.acquire.aligned;\n" :: : "memory"));
}
// [griddepcontrol] Programmatic dependent launch: the next kernel's blocks may start once all of this one's have allowed
// it or ended; there, waiting lasts until the kernel before has ended and all it wrote is visible.
__device__ __forceinline__ void allow_dependents() {
  JAX_TRIRUN_FROM_SM_90(asm volatile("griddepcontrol.launch_dependents;\n" :: : "memory"));
}
__device__ __forceinline__ void wait_for_prerequisites() {
  JAX_TRIRUN_FROM_SM_90(asm volatile("griddepcontrol.wait;\n" :: : "memory"));
}
}  // namespace jax_trirun::cuda
