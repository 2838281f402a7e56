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

// Unsigned bytes of A times signed ones of B, sums in int32.
template <int kColumns>
struct Int8Wgmma;

#define INT8_WGMMA(COLUMNS, ...)                                                                          \
  template <>                                                                                             \
  struct Int8Wgmma<COLUMNS> {                                                                             \
    static __device__ __forceinline__ void mma(int (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, \
                                               bool accumulate) {                                         \
      JAX_TRIRUN_WGMMA(COLUMNS, "k32.s32.u8.s8", JAX_TRIRUN_INTS, "", __VA_ARGS__);                       \
    }                                                                                                     \
  };
INT8_WGMMA(16, "%8, %9, %10, %11", "%12", "%13")
INT8_WGMMA(32, "%16, %17, %18, %19", "%20", "%21")
INT8_WGMMA(48, "%24, %25, %26, %27", "%28", "%29")
INT8_WGMMA(64, "%32, %33, %34, %35", "%36", "%37")
#undef INT8_WGMMA

template <int kSize>
__device__ __forceinline__ void pin(int (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Units of int8 digits by wgmma: four columns a token, of which a lane has all four.
template <int kTokens, int kWarpgroups>
__global__ void __launch_bounds__(kWarpgroups * 128, 1)
    multiply_digits_wgmma(float* out, long long* clocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  const uint32_t shared = (shared_address(memory) + 1023) / 1024 * 1024;
  fill_shared(shared);
  constexpr int kColumns = kTokens * 4, kSums = kColumns / 2, kWords = 4;
  constexpr int kOwn = kTokens / 4;  // tokens of a lane
  int sums[L::kTiles][kSums];
  float total[L::kTiles][kOwn * 2];
  float scales[L::kTiles][2] = {{1.f, 2.f}, {3.f, 4.f}};
  for (int i = 0; i < L::kTiles; ++i) {
    for (int r = 0; r < kSums; ++r) sums[i][r] = 0;
    for (int r = 0; r < kOwn * 2; ++r) total[i][r] = 0.f;
    for (int b = 0; b < 2; ++b) asm volatile("" : "+f"(scales[i][b]));
  }
  const uint32_t words_at = shared + 65536 + threadIdx.x / 32 * 4096 + threadIdx.x % 32 * 16;
  const uint32_t tokens_at = shared + 131072 + threadIdx.x % 4 * 16;
  uint32_t a[L::kTiles][kWords][4];
  const long long start = clock64();
#pragma unroll 1
  for (int unit = 0; unit < kUnits; ++unit) {
    const uint32_t x_at = shared + (unit & 3) * 16384;
    const uint4 v = load_shared_16(words_at), w = load_shared_16(words_at + 512);
    uint4 of_token[kOwn];  // what the higher and the lower two digits add up to, and the power of two
#pragma unroll
    for (int j = 0; j < kOwn; ++j) of_token[j] = load_shared_16(tokens_at + (unit & 3) * 256 + j * 64);
    const auto add_tile = [&](int i) {
      pin(sums[i]);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int* d = &sums[i][8 * j + 2 * b];
          const int high = d[0] * 256 + d[1] - static_cast<int>(b ? of_token[j].x << 4 : of_token[j].x);
          const int low = d[4] * 256 + d[5] - static_cast<int>(b ? of_token[j].y << 4 : of_token[j].y);
          const float value = fmaf(static_cast<float>(high), 65536.f, static_cast<float>(low));
          total[i][2 * j + b] =
              fmaf(value, scales[i][b] * __uint_as_float(of_token[j].z), total[i][2 * j + b]);
        }
      }
      pin(total[i]);
    };
    const uint32_t words[L::kTiles][kWords] = {{v.x, v.z, w.x, w.z}, {v.y, v.w, w.y, w.w}};
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t packed = words[i][word];
        asm volatile("" : "+r"(packed));
        const uint32_t high = packed >> 2;
        a[i][word][0] = packed & 0x03030303u, a[i][word][1] = packed & 0x30303030u;
        a[i][word][2] = high & 0x03030303u, a[i][word][3] = high & 0x30303030u;
      }
      wgmma_fence();
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        Int8Wgmma<kColumns>::mma(sums[i], a[i][word], swizzled_descriptor(x_at) + word * 2, word > 0);
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
    for (int r = 0; r < kOwn * 2; ++r) sum += total[i][r];
    for (int r = 0; r < kSums; ++r) sum += sums[i][r];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = end - start;
#endif
}

// mma.sync among so many LOP3 and HFMA2, spread evenly, none of which waits for another. A unit of words takes 16 dense
// ones, of 16 of K, for eight tokens; or 32 sparse ones, of 32, which could take the codes as the positions of A's
// values (each picks one of four rows of B: -x, 0, x and 2x).
template <bool kSparse, int kMmas, int kLop3s, int kHfma2s>
__global__ void __launch_bounds__(512, 1) multiply_among(float* out, long long* clocks) {
  constexpr int kChains = 8, kRounds = std::max(kMmas, 1);
  float d[kChains][4] = {};
  uint32_t a[4], b[4], positions[kChains], bits[kChains], halves[kChains];
  for (int i = 0; i < 4; ++i) a[i] = opaque(0x3c00), b[i] = opaque(threadIdx.x + i);
  for (int i = 0; i < kChains; ++i) {
    positions[i] = (threadIdx.x * 77u + i) * 2654435761u;
    bits[i] = threadIdx.x * i, halves[i] = threadIdx.x + i;
  }
  const long long start = clock64();
#pragma unroll 1
  for (int unit = 0; unit < kUnits; ++unit) {
    int lop3s = 0, hfma2s = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      float (&c)[4] = d[i % kChains];
      if constexpr (kMmas > 0 && kSparse) {
        asm volatile(
            "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
              "r"(positions[i % kChains]));
      } else if constexpr (kMmas > 0) {
        mma_m16n8k16<__half>(c, a, b[0], b[1], c);
      }
      for (; lop3s * kRounds < (i + 1) * kLop3s; ++lop3s)
        asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;\n" : "+r"(bits[lop3s % kChains]) : "r"(b[0]), "r"(b[1]));
      for (; hfma2s * kRounds < (i + 1) * kHfma2s; ++hfma2s)
        asm volatile("fma.rn.f16x2 %0, %0, %1, %2;\n"
                     : "+r"(halves[hfma2s % kChains])
                     : "r"(b[0]), "r"(b[1]));
    }
  }
  const long long end = clock64();
  float sum = 0;
  for (const auto& c : d) sum += c[0] + c[1] + c[2] + c[3];
  for (int i = 0; i < kChains; ++i) sum += static_cast<float>(bits[i] ^ halves[i]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = end - start;
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

template <int kTokens, int kWarpgroups>
void digits_wgmma() {
  const auto kernel = multiply_digits_wgmma<kTokens, kWarpgroups>;
  report("wgmma int8 digits", kTokens, kWarpgroups * 4, reinterpret_cast<const void*>(kernel),
         [&] { kernel<<<132, kWarpgroups * 128, kSharedBytes>>>(out, clocks); });
}

template <bool kSparse, int kMmas, int kLop3s, int kHfma2s>
void among(const char* name) {
  const auto kernel = multiply_among<kSparse, kMmas, kLop3s, kHfma2s>;
  report(name, 8, 16, reinterpret_cast<const void*>(kernel),
         [&] { kernel<<<132, 512, kSharedBytes>>>(out, clocks); });
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
  among<false, 0, 64, 0>("64 LOP3");
  among<false, 0, 0, 64>("64 HFMA2");
  among<false, 0, 64, 64>("64 LOP3 + 64 HFMA2");
  among<false, 16, 0, 0>("16 mma.sync");
  among<false, 16, 64, 0>("16 mma.sync + 64 LOP3");
  among<false, 16, 0, 64>("16 mma.sync + 64 HFMA2");
  among<false, 16, 64, 64>("16 mma.sync + 64 LOP3 + 64 HFMA2");
  among<true, 32, 0, 0>("32 mma.sp");
  among<true, 32, 48, 0>("32 mma.sp + 48 LOP3");
  among<true, 32, 48, 64>("32 mma.sp + 48 LOP3 + 64 HFMA2");
  digits_wgmma<4, 1>();
  digits_wgmma<4, 2>();
  digits_wgmma<4, 3>();
  digits_wgmma<4, 4>();
  digits_wgmma<8, 2>();
  digits_wgmma<8, 3>();
  digits_wgmma<8, 4>();
  digits_wgmma<12, 2>();
  digits_wgmma<12, 3>();
  digits_wgmma<16, 2>();
  digits_wgmma<16, 3>();
  wgmma<8, 3>();
  wgmma<16, 3>();
  wgmma<32, 1>();
  wgmma<32, 2>();
  wgmma<32, 3>();
  wgmma<64, 1>();
  wgmma<64, 2>();
}
