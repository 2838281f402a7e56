// Times what the CUDA kernels do with words that are already in shared memory: no memory traffic, no barriers, nothing
// but the conversion, the multiplication and the scaling of units of 4096 weights (128 of K, 32 features). What comes
// out is a limit: a kernel cannot be faster than its arithmetic, whatever its pipeline.
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/cuda_arithmetic bench/cuda_arithmetic.cu && /tmp/cuda_arithmetic > bench/results/<name>.csv
//
// Clocks are those of a scheduler (a quarter of a multiprocessor) for a unit. On an H200 the memory brings it one every
// 252 clocks: 4.2 TB/s at 1.98 GHz.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "../csrc/cuda/decode_math.cuh"
#include "../csrc/cuda/wgmma.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;
using L = Layout<2>;

constexpr int kSharedBytes = 200 * 1024;
constexpr int kUnits = 2400;

// Any bits that are finite float16 numbers.
__device__ void fill_shared(uint32_t shared) {
  for (int i = threadIdx.x; i < kSharedBytes / 4 - 256; i += blockDim.x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared + i * 4), "r"(i * 2654435761u & 0x3bff3bffu));
  }
  __syncthreads();
}

// Units as the decode kernels take them: mma.sync, a warp each.
template <typename Math, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1)
    multiply_units(float* out, long long* clocks, int rows, int units) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  fill_shared(shared);
  const XSlice slice = {nullptr, 1 << 20, 0, rows, 0, units, units};
  Math math(memory, slice);
  math.begin(0);
  const uint32_t words = opaque(shared + 150016 + threadIdx.x / 32 * 1024 + threadIdx.x % 32 * 16);
  const uint32_t scales = opaque(shared + 180000 + threadIdx.x % 32 / 4 * 8);
  const long long start = clock64();
  for (int i = 0; i < kUnits; ++i) {
    if (i % units == 0) math.begin(0);
    math.multiply(words, scales, 64, i % units);
  }
  const long long end = clock64();
  float sum = 0;
  math.finish([&](int, const float4& v) { sum += v.x + v.y + v.z + v.w; });
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = end - start;
}

// Units as the kernels for many tokens take them: wgmma, a warpgroup four at a time, the words of a 16-row tile in one
// batch while the sums of the other are scaled.
template <int kTokens, int kWarpgroups>
__global__ void __launch_bounds__(kWarpgroups * 128, 1)
    multiply_units_wgmma(float* out, long long* clocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  const uint32_t shared = (shared_address(memory) + 1023) / 1024 * 1024;
  fill_shared(shared);
  constexpr int kSums = kTokens / 2, kWords = 4;
  float sums[L::kTiles][kSums], total[L::kTiles][kSums];
  float scales[L::kTiles][2] = {{1.f, 2.f}, {3.f, 4.f}};
  for (int i = 0; i < L::kTiles; ++i) {
    for (int r = 0; r < kSums; ++r) sums[i][r] = total[i][r] = 0.f;
    for (int b = 0; b < 2; ++b) asm volatile("" : "+f"(scales[i][b]));
  }
  const auto add_tile = [&](int i) {
    pin(sums[i]);
#pragma unroll
    for (int r = 0; r < kSums; ++r) total[i][r] = fmaf(scales[i][r / 2 % 2], sums[i][r], total[i][r]);
    pin(total[i]);
  };
  const uint32_t words_at = shared + 65536 + threadIdx.x / 32 * 4096 + threadIdx.x % 32 * 16;
  uint32_t a[L::kTiles][kWords][L::kStepsPerWord][4];
  const long long start = clock64();
#pragma unroll 1
  for (int unit = 0; unit < kUnits; ++unit) {
    const uint32_t x_at = shared + (unit & 3) * 16384;
    const uint4 v = load_shared_16(words_at), w = load_shared_16(words_at + 512);
    const uint32_t words[L::kTiles][kWords] = {{v.x, v.z, w.x, w.z}, {v.y, v.w, w.y, w.w}};
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t packed = words[i][word];
        asm volatile("" : "+r"(packed));
        dequantize_word<__half, 2>(a[i][word], packed);
      }
      wgmma_fence();
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
#pragma unroll
        for (int q = 0; q < L::kStepsPerWord; ++q) {
          const uint64_t x =
              swizzled_descriptor(x_at + word / 2 * 8192) + (word % 2 * 32 + q * 16) * 2 / 16;
          Wgmma<__half, kTokens>::mma(sums[i], a[i][word][q], x, word > 0 || q > 0);
        }
      }
      wgmma_commit();
      if (i > 0) {
        wgmma_wait<1>();
        add_tile(0);
      }
    }
    wgmma_wait<0>();
    add_tile(1);
  }
  const long long end = clock64();
  float sum = 0;
  for (int i = 0; i < L::kTiles; ++i) {
    for (int r = 0; r < kSums; ++r) sum += total[i][r];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = end - start;
#endif
}

float* out;
long long* clocks;

template <typename Launch>
void report(const char* name, int tokens, int warps, const void* kernel, const Launch& launch) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, kernel));
  long long best = 1ll << 60;
  for (int i = 0; i < 3; ++i) {
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    best = std::min(best, *clocks);
  }
  std::printf("%s,%d,%d,%d,%.0f\n", name, tokens, warps, attributes.numRegs,
              static_cast<double>(best) / kUnits / (warps / 4));
}

template <typename Math, int kWarps>
void decode(const char* name, int units) {
  const auto kernel = multiply_units<Math, kWarps>;
  report(name, Math::kTokens, kWarps, reinterpret_cast<const void*>(kernel),
         [&] { kernel<<<132, kWarps * 32, kSharedBytes>>>(out, clocks, Math::kTokens, units); });
}

template <int kTokens, int kWarpgroups>
void wgmma() {
  const auto kernel = multiply_units_wgmma<kTokens, kWarpgroups>;
  report("wgmma float16", kTokens, kWarpgroups * 4, reinterpret_cast<const void*>(kernel),
         [&] { kernel<<<132, kWarpgroups * 128, kSharedBytes>>>(out, clocks); });
}

template <template <int, typename, typename, int, int, bool> class Math, int kTiles>
using Of = Math<2, __half, __half, kTiles, 128, false>;

int main() {
  CHECK(cudaMalloc(&out, 132 * 1024 * 4));
  CHECK(cudaMallocManaged(&clocks, 8));
  std::printf("arithmetic,tokens,warps,registers,clocks_a_unit\n");
  decode<Of<SliceMath, 1>, 12>("mma.sync int8 digits", 32);
  decode<Of<SliceMath, 1>, 16>("mma.sync int8 digits", 32);
  decode<Of<SliceMath, 2>, 16>("mma.sync int8 digits", 32);
  decode<Of<SliceMath, 4>, 12>("mma.sync int8 digits", 16);
  decode<Of<FloatMath, 1>, 8>("mma.sync float16", 32);
  decode<Of<FloatMath, 1>, 12>("mma.sync float16", 32);
  decode<Of<FloatMath, 1>, 16>("mma.sync float16", 32);
  decode<Of<FloatMath, 1>, 20>("mma.sync float16", 32);
  decode<Of<FloatMath, 2>, 12>("mma.sync float16", 16);
  decode<Of<FloatMath, 2>, 16>("mma.sync float16", 16);
  wgmma<8, 3>();
  wgmma<16, 3>();
  wgmma<32, 1>();
  wgmma<32, 2>();
  wgmma<32, 3>();
  wgmma<64, 1>();
  wgmma<64, 2>();
}
