// What sm_90 has beyond ptx.cuh: barriers in shared memory that count bytes, the copy engine (TMA), and
// registers that move between warpgroups.
// Numbers in brackets are sections of the PTX ISA reference.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#include "ptx.cuh"

namespace jax_trirun::cuda {

// [mbarrier] One phase ends when `arrivals` threads have arrived and all expected bytes have come.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase with this parity; a barrier's first phase has parity 0.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for a barrier that other blocks of the cluster send to: what they sent is visible then.
__device__ __forceinline__ void barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  JAX_TRIRUN_FROM_SM_90(
      asm volatile("{\n.reg .pred done;\nagain:\n"
                   "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra again;\n}\n" ::"r"(barrier),
                   "r"(parity) : "memory"));
}

// [mapa] A shared address in the cluster's block `rank`.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, uint32_t address) {
  uint32_t remote = 0;
  JAX_TRIRUN_FROM_SM_90(
      asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank)));
  return remote;
}
// [mbarrier.arrive] Arrives at a barrier of another block of the cluster, at `address_in` it, if `wanted`: without a branch.
// (A release of the cluster's scope would wait for all that this thread has written: a fifth of the time of large tiles.)
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier, bool wanted) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %1, 0;\n"
      "@wanted mbarrier.arrive.shared::cluster.b64 _, [%0];\n}\n" ::"r"(barrier),
      "r"(static_cast<int>(wanted))
      : "memory");
}
// [st.async] Sends four floats to another block of the cluster: they count as bytes at its barrier.
__device__ __forceinline__ void send(uint32_t to, const float4& v, uint32_t barrier) {
  JAX_TRIRUN_FROM_SM_90(asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::
          "r"(to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory"));
}

// [cp.async.bulk] Contiguous bytes (a multiple of 16, both ends aligned to 16) that arrive at `barrier`.
__device__ __forceinline__ void copy_bulk(uint32_t to_shared, const void* from_global, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
          to_shared),
      "l"(from_global), "r"(bytes), "r"(barrier)
      : "memory");
}

// [cp.async.bulk.tensor] The box of a two-dimensional array that starts at (column, row); what lies outside
// arrives as zeros.
__device__ __forceinline__ void copy_box(uint32_t to_shared, const CUtensorMap& map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];\n" ::"r"(to_shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// [.multicast::cluster] The same to both blocks of a cluster of two, at the same place of their shared memory, and it
// counts at the same barrier of each.
__device__ __forceinline__ void copy_box_to_both(uint32_t to_shared, const CUtensorMap& map, int column,
                                                 int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to_shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// [elect.sync] One thread of a whole warp; the compiler knows that it is only one.
__device__ __forceinline__ bool elect_one() {
  uint32_t is_elected;
  asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\nselp.u32 %0, 1, 0, elected;\n}\n"
               : "=r"(is_elected));
  return is_elected != 0;
}

// [setmaxnreg] All warps of a warpgroup, once each.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace jax_trirun::cuda
