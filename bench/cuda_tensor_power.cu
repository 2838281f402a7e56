// What the tensor cores reach within the power of the card: how much faster than cuBLAS any kernel can be that feeds
// wgmma from registers. From some 128 rows on the clock falls until the card draws what it may, so the limit is energy
// a product, not time: kernels that do nothing but wgmma, over operands that are in registers and in shared memory
// already, beside the same with the conversion of 2-bit words, and beside cuBLAS float16, all in one run, each long
// enough for the clock to settle. Random data.
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/cuda_tensor_power bench/cuda_tensor_power.cu -ldl
//     LD_LIBRARY_PATH=<where libcublas.so.13 is> /tmp/cuda_tensor_power > bench/results/<name>.csv
#include <cuda_runtime.h>

#include <cstdio>
#include <utility>

#include "../csrc/cuda/gemm.cuh"
#include "cuda_cublas.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

constexpr int kUnits = 64;  // of 128 of K in a product's sums: 8192
constexpr int kStages = 4;  // of x in shared memory, each 64 of K
constexpr float kSettleMs = 400;

enum class Work {
  kTensor,          // wgmma over fragments that stay
  kTensorAndWords,  // each word converted and scaled before its wgmma, as in gemm.cuh
};

// Every thread block makes `products` tiles of kTokens x (2 warpgroups * kTiles * 64 features), of K = kUnits * 128, from
// words and activations that are there already.
template <Work kWork, int kTokens, int kTiles>
__global__ void __launch_bounds__(256, 1)
    multiply(const uint4* words, const __half* x, const uint32_t* scales, float* out, int products) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<2>;
  extern __shared__ char memory[];
  const uint32_t shared = (shared_address(memory) + 1023) / 1024 * 1024;
  constexpr int kBlockBytes = kTokens * 128;  // 64 of K of all tokens
  for (int i = threadIdx.x; i < kStages * kBlockBytes / 4; i += blockDim.x)
    asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(shared + i * 4), "r"(reinterpret_cast<const uint32_t*>(x)[i])
                 : "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  __syncthreads();

  constexpr int kSets = 4;  // fragments of so many words
  uint32_t packed[kSets], a[kSets][L::kStepsPerWord][4];
  const uint4 mine = words[blockIdx.x * blockDim.x + threadIdx.x];
  packed[0] = mine.x, packed[1] = mine.y, packed[2] = mine.z, packed[3] = mine.w;
  const uint32_t scale[2] = {scales[threadIdx.x % 32], scales[32 + threadIdx.x % 32]};
  const auto convert = [&](auto set_) {
    constexpr int set = decltype(set_)::value;
    asm volatile("" : "+r"(packed[set]));
    dequantize_word<__half, 2>(a[set], packed[set]);
#pragma unroll
    for (int q = 0; q < L::kStepsPerWord; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[set][q][r] = cuda::internal::mul2<__half>(a[set][q][r], scale[r % 2]);
    }
  };
  unrolled<kSets>(convert);
  float sums[kTiles][kTokens / 2], total = 0.f;
  for (int product = 0; product < products; ++product) {
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) {
      unrolled<4>([&](auto word_) {  // of each 16-row tile: 32 of K each
        constexpr int word = decltype(word_)::value;
        unrolled<kTiles>([&](auto tile_) {
          constexpr int i = decltype(tile_)::value, set = (word * kTiles + i) % kSets;
          if constexpr (kWork == Work::kTensorAndWords) convert(Constant<set>{});
          wgmma_fence();
#pragma unroll
          for (int q = 0; q < L::kStepsPerWord; ++q) {
            const int stage = (unit * 2 + word / 2) % kStages;
            Wgmma<__half, kTokens>::mma(
                sums[i], a[set][q],
                swizzled_descriptor(shared + stage * kBlockBytes) + (word % 2 * 32 + q * 16) * 2 / 16,
                unit > 0 || word > 0 || q > 0);
          }
          wgmma_commit();
          wgmma_wait<kSets - 1>();
        });
      });
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      pin(sums[i]);
      total += sums[i][0];
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
#endif
}

struct Measured {
  double tflops;
  float ghz;
};

template <Work kWork, int kTokens, int kTiles>
Measured measure(const uint4* words, const __half* x, const uint32_t* scales, float* out, int sms) {
  const auto kernel = multiply<kWork, kTokens, kTiles>;
  constexpr int kBytes = kStages * kTokens * 128 + 1024, kProducts = 200;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const float us = graph_time_us(
      4, [&](int, cudaStream_t s) { kernel<<<sms, 256, kBytes, s>>>(words, x, scales, out, kProducts); },
      kSettleMs);
  CHECK(cudaGetLastError());
  const float ghz = last_ghz();
  const double flops = 2.0 * sms * kProducts * kTokens * (2 * kTiles * 64) * (kUnits * 128);
  return {flops / us * 1e-6, ghz};
}

int main() {
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  const int sms = prop.multiProcessorCount;
  std::printf("# %s, %d SMs\nwork,rows,k,n,tflops,ghz\n", prop.name, sms);
  const Cublas cublas;
  uint4* words;
  uint32_t* scales;
  __half *x, *y;
  float* out;
  char* weights;
  constexpr int kMostRows = 4096;
  const size_t most = (size_t)8192 * 57344 * 2, weight_bytes = Rotation::pool_bytes(most);
  CHECK(cudaMalloc(&words, sms * 256 * 16));
  CHECK(cudaMalloc(&scales, 64 * 4));
  CHECK(cudaMalloc(&out, sms * 256 * 4));
  CHECK(cudaMalloc(&x, (size_t)kMostRows * 28672 * 2));
  CHECK(cudaMalloc(&y, (size_t)kMostRows * 57344 * 2));
  CHECK(cudaMalloc(&weights, weight_bytes));
  fill_random<<<64, 256>>>((uint32_t*)words, sms * 256 * 4, 1);
  fill_normal<<<64, 256>>>((__half*)scales, 128, 2, 0.05f);
  fill_normal<<<256, 256>>>(x, (size_t)kMostRows * 28672, 3, 1.f);
  fill_normal<<<1024, 256>>>((__half*)weights, weight_bytes / 2, 4, 0.05f);
  CHECK(cudaDeviceSynchronize());

  const auto print = [](const char* work, int rows, int k, int n, const Measured& m) {
    std::printf("%s,%d,%d,%d,%.0f,%.2f\n", work, rows, k, n, m.tflops, m.ghz);
    std::fflush(stdout);
  };
  for (int round = 0; round < 2; ++round) {
    print("wgmma", 64, 8192, 256, measure<Work::kTensor, 64, 2>(words, x, scales, out, sms));
    print("wgmma and words", 64, 8192, 256, measure<Work::kTensorAndWords, 64, 2>(words, x, scales, out, sms));
    print("wgmma", 128, 8192, 256, measure<Work::kTensor, 128, 2>(words, x, scales, out, sms));
    print("wgmma and words", 128, 8192, 256, measure<Work::kTensorAndWords, 128, 2>(words, x, scales, out, sms));
    print("wgmma", 144, 8192, 256, measure<Work::kTensor, 144, 2>(words, x, scales, out, sms));
    print("wgmma", 176, 8192, 128, measure<Work::kTensor, 176, 1>(words, x, scales, out, sms));
    if (!cublas.available()) continue;
    for (int m : {1024, 4096}) {
      for (const auto& [k, n] : {std::pair{8192, 57344}, {28672, 8192}, {4096, 28672}}) {
        const float us = cublas.time_us(x, weights, y, m, n, k, kSettleMs);
        print("cuBLAS", m, k, n, {2e-6 * m * n * k / us, last_ghz()});
      }
    }
  }
}
