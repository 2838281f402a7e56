// Times the kernels for many tokens (csrc/cuda/gemm.cuh): variants x shapes x M, float16, groups of 128.
// csrc/cuda/plan.h chooses by what comes out. Each row stands beside cuBLAS float16 and a kernel that only
// reads the same bytes, timed in the same run; all in captured graphs, over rotating weights that exceed the
// cache. Every result is checked against a float64 product first (at a sample of its columns).
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/gemm_explore bench/cuda_gemm_explore.cu -ldl
//     LD_LIBRARY_PATH=<where libcublas.so.13 is> /tmp/gemm_explore [K,N[,M[,variant]]]
//
// -DVARIANTS='"FILE"' and -DTOKENS='"FILE"' name files that hold other lists.
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cuda/gemm.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

__global__ void fill_half(__half* p, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    // about normal: the sum of four uniforms
    float sum = 0;
    for (int j = 0; j < 4; ++j)
      sum += (hash((uint32_t)(4 * i + j) * 2654435761u + seed) >> 8) * (2.f / 16777216.f) - 1.f;
    p[i] = __float2half(sum * scale);
  }
}
constexpr int kGroup = 128;
constexpr int kSampledColumns = 2048;

// Columns (i * 29) % n.
__global__ void reference(const __half* x, const uint32_t* words, const __half* s, double* y, double* bound,
                          int m0, int n, int k) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int col = (int)((int64_t)i * 29 % n);
  const int row = m0 + blockIdx.y;
  using L = Layout<2>;
  double sum = 0, mag = 0;
  for (int j = 0; j < k; ++j) {
    auto at = L::locate(j % L::kBlockK, col % L::kBlockN);
    size_t block = (size_t)(j / L::kBlockK) * ((n + L::kBlockN - 1) / L::kBlockN) + col / L::kBlockN;
    int code = words[block * L::kWordsPerBlock + at.word] >> at.shift & 3;
    double p = (double)__half2float(s[(size_t)(j / kGroup) * n + col]) * (code - 1) *
               (double)__half2float(x[(size_t)row * k + j]);
    sum += p;
    mag += fabs(p);
  }
  y[(size_t)blockIdx.y * kSampledColumns + i] = sum;
  bound[(size_t)blockIdx.y * kSampledColumns + i] = mag;
}

// Clock of an SM, in GHz, right after the work before it.
__global__ void read_clock(float* ghz) {
  uint64_t t0, t1;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t0));
  const long long c0 = clock64();
  while (clock64() - c0 < 20000) {
  }
  const long long c1 = clock64();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t1));
  *ghz = (float)(c1 - c0) / (float)(t1 - t0);
}
float last_ghz() {
  static float* ghz = nullptr;
  if (!ghz) CHECK(cudaMalloc(&ghz, 4));
  read_clock<<<1, 1>>>(ghz);
  float host;
  CHECK(cudaMemcpy(&host, ghz, 4, cudaMemcpyDeviceToHost));
  return host;
}

struct Variant {
  const char* name;
  GemmShape shape;
  int least, most;  // for M from least to most
  int rows;         // of float4 in a thread's sums
  int bytes;
  const void* kernel;
  const void* add;
};
template <int kTokens, int kWarpgroups, int kWarpTiles, int kGroupSize, int kStages>
Variant make(const char* name, int least, int most, int unit_clocks) {
  using Tile = TileLayout<kTokens, kWarpgroups, kWarpTiles>;
  return {name,
          {kTokens, kWarpgroups, kWarpTiles, kStages, unit_clocks},
          least,
          most,
          Tile::kRows,
          GemmSmem<Tile, kTokens, kGroupSize, false, kStages>::kBytes,
          (const void*)gemm_kernel<__half, kTokens, kWarpgroups, kWarpTiles, kGroupSize, false, kStages>,
          (const void*)add_gemm_parts<__half, kTokens, kWarpgroups, kWarpTiles>};
}

// A kernel of the library.
template <GemmKernel kernel>
Variant make(const char* name, int least, int most) {
  constexpr GemmShape kShape = shape_of(kernel);
  return make<kShape.tokens, kShape.warpgroups, kShape.warp_tiles, kShape.tokens == 128 ? 0 : kGroup,
              kShape.stages>(name, least, most, kShape.unit_clocks);
}

int main(int argc, char** argv) {
  int only_k = 0, only_n = 0, only_m = 0;
  char only_variant[64] = "";
  if (argc > 1) sscanf(argv[1], "%d,%d,%d,%63s", &only_k, &only_n, &only_m, only_variant);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  const int sms = prop.multiProcessorCount;
  std::printf(
      "# %s, %d "
      "SMs\nK,N,M,variant,tiles,ranks,cut,us,floor_us,ratio,cublas_us,speedup,tflops,worst_c,ghz,cublas_"
      "ghz\n",
      prop.name, sms);
  std::vector<Variant> variants = {
#ifdef VARIANTS
#include VARIANTS
#else
      make<GemmKernel::kSums16>("sums16", 5, 16),
      make<GemmKernel::kSums32>("sums32", 17, 32),
      make<GemmKernel::kSums32Narrow>("sums32narrow", 17, 32),
      make<GemmKernel::kSums64>("sums64", 33, 64),
      make<GemmKernel::kSums64Narrow>("sums64narrow", 33, 64),
      make<GemmKernel::kWeights128>("weights128", 65, 16384),
      make<GemmKernel::kWeights128Narrow>("weights128narrow", 65, 16384),
#endif
  };
  for (auto& v : variants) {
    std::printf("# clusters of 2, 3, .. 8 thread blocks of %s at once:", v.name);
    CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes));
    for (unsigned ranks = 2; ranks <= 8; ++ranks) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(ranks, sms);
      config.blockDim = dim3((v.shape.warpgroups + 1) * 128);
      config.dynamicSmemBytes = v.bytes;
      cudaLaunchAttribute attr = {};
      attr.id = cudaLaunchAttributeClusterDimension;
      attr.val.clusterDim = {ranks, 1, 1};
      config.attrs = &attr;
      config.numAttrs = 1;
      int clusters = 0;
      CHECK(cudaOccupancyMaxActiveClusters(&clusters, v.kernel, &config));
      std::printf(" %d", clusters);
    }
    std::printf("\n");
  }
  typedef CUresult (*encode_t)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                               const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                               CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                               CUtensorMapFloatOOBfill);
  encode_t encode = nullptr;
  cudaDriverEntryPointQueryResult query;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000,
                                         cudaEnableDefault, &query));

  void* lib = dlopen("libcublas.so.13", RTLD_NOW);
  if (!lib) lib = dlopen("libcublas.so", RTLD_NOW);
  typedef int (*create_t)(void**);
  typedef int (*stream_t)(void*, cudaStream_t);
  typedef int (*gemm_t)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*,
                        int, int, const void*, void*, int, int, int, int);
  void* handle = nullptr;
  stream_t set_stream = nullptr;
  gemm_t gemm = nullptr;
  if (lib) {
    ((create_t)dlsym(lib, "cublasCreate_v2"))(&handle);
    set_stream = (stream_t)dlsym(lib, "cublasSetStream_v2");
    gemm = (gemm_t)dlsym(lib, "cublasGemmEx");
    typedef int (*ws_t)(void*, void*, size_t);
    void* ws;
    CHECK(cudaMalloc(&ws, 64 << 20));
    ((ws_t)dlsym(lib, "cublasSetWorkspace_v2"))(handle, ws, 64 << 20);
  } else {
    std::printf("# no cuBLAS: %s\n", dlerror());
  }

  struct Shape {
    int k, n;
  };
  std::vector<Shape> shapes = {{4096, 4096},  {4096, 6144},  {8192, 8192}, {14336, 4096},
                               {4096, 28672}, {28672, 8192}, {8192, 57344}};
  const std::vector<int> tokens = {
#ifdef TOKENS
#include TOKENS
#else
      16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 512, 1000, 1024, 4096, 16384,
#endif
  };
  const int most = *std::max_element(tokens.begin(), tokens.end());
  char* pool;
  const size_t pool_bytes = (size_t)4 << 30;
  CHECK(cudaMalloc(&pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)pool, pool_bytes / 4, 1);
  char* dense;  // for cuBLAS: finite values, about normal
  const size_t dense_bytes = (size_t)2 << 30;
  CHECK(cudaMalloc(&dense, dense_bytes));
  fill_half<<<1024, 256>>>((__half*)dense, dense_bytes / 2, 3, 0.02f);
  __half *x, *scales, *y;
  float4* parts;
  CHECK(cudaMalloc(&x, (size_t)most * 28672 * 2));
  fill_half<<<1024, 256>>>(x, (size_t)most * 28672, 7, 1.f);
  CHECK(cudaMalloc(&scales, (size_t)64 << 20));
  fill_half<<<1024, 256>>>(scales, (size_t)32 << 20, 9, 0.02f);
  CHECK(cudaMalloc(&y, (size_t)most * 57344 * 2));
  CHECK(cudaMalloc(&parts, (size_t)256 << 20));
  double *ref, *mag;
  CHECK(cudaMalloc(&ref, 64 * kSampledColumns * 8));
  CHECK(cudaMalloc(&mag, 64 * kSampledColumns * 8));
  CHECK(cudaDeviceSynchronize());

  for (auto shape : shapes) {
    const int k = shape.k, n = shape.n;
    if (only_k && (only_k != k || only_n != n)) continue;
    const int k_blocks = ceil_div(k, 64), n_blocks = ceil_div(n, 32);
    const size_t word_bytes = (size_t)k_blocks * n_blocks * 512;
    const size_t scale_bytes = (size_t)(k / kGroup) * n * 2;
    const size_t bytes = word_bytes + scale_bytes;
    const int copies = std::max<int>(2, ((size_t)300 << 20) / bytes + 1);
    for (int c = 0; c < copies; ++c)
      CHECK(cudaMemcpy(pool + c * bytes + word_bytes, scales, scale_bytes, cudaMemcpyDeviceToDevice));
    float floor_us = 1e9f;
    for (int blocks : {132, 264, 396, 528, 792, 1056}) {
      floor_us = std::min(floor_us, graph_time_us(std::max(copies, 12), [&](int i, cudaStream_t s) {
                            read_only<<<blocks, 256, 0, s>>>((const uint4*)(pool + (i % copies) * bytes),
                                                             bytes / 16, (uint32_t*)parts);
                          }));
    }
    for (int m : tokens) {
      if (only_m && only_m != m) continue;
      const bool large = (double)m * n * k > 4e11;
      const float settle_ms = (double)m * n * k > 1e10 ? 80 : 2;
      const int launches = large ? 3 : std::max(copies, 12);
      float cublas_us = 0, cublas_ghz = 0;
      if (gemm && !*only_variant) {
        const size_t one_dense = (size_t)k * n * 2;
        const int dcopies = std::max<int>(2, ((size_t)300 << 20) / one_dense + 1);
        float one = 1.f, zero = 0.f;
        for (int transposed :
             {0, 1}) {  // weights [K, N], as Flax has them, or [N, K]: the faster one counts
          const float us = graph_time_us(
              large ? 3 : std::max(dcopies, 12),
              [&](int i, cudaStream_t s) {
                set_stream(handle, s);
                gemm(handle, transposed, 0, n, m, k, &one, dense + (i % dcopies) * one_dense, 2,
                     transposed ? k : n, x, 2, k, &zero, y, 2, n, 68, -1);
              },
              settle_ms);
          cublas_us = transposed ? std::min(cublas_us, us) : us;
        }
        cublas_ghz = last_ghz();
      }
      const int rows = std::min(m, 64);
      reference<<<dim3(kSampledColumns / 128, rows), 128>>>(x, (uint32_t*)pool, scales, ref, mag, m - rows,
                                                            n, k);
      CHECK(cudaDeviceSynchronize());
      std::vector<double> href(rows * kSampledColumns), hmag(rows * kSampledColumns);
      CHECK(cudaMemcpy(href.data(), ref, href.size() * 8, cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(hmag.data(), mag, hmag.size() * 8, cudaMemcpyDeviceToHost));
      Problem problem;
      problem.m = m, problem.n = n, problem.k = k, problem.groups = k / kGroup;
      for (auto& v : variants) {
        if (m < v.least || m > v.most || (*only_variant && strcmp(only_variant, v.name))) continue;
        GemmArgs args = {};
        args.y = y;
        args.parts = parts;
        args.m = m, args.n = n;
        args.n_blocks = n_blocks;
        args.groups = k / kGroup, args.group_stride = n, args.group_shift = 7;
        args.unit_rows = 1, args.row_shift = 2;
        const GemmPlan plan = plan_gemm(problem, v.shape, sms);
        args.walk = walk_of(plan, k_blocks);
        const int cut = plan.cut_tiles(), tiles = plan.tiles();
        CUtensorMap map;
        const cuuint64_t dims[2] = {(cuuint64_t)k, (cuuint64_t)m}, strides[1] = {(cuuint64_t)k * 2};
        const cuuint32_t box[2] = {64, (cuuint32_t)v.shape.tokens}, steps[2] = {1, 1};
        if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, x, dims, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
          std::printf("encode failed\n");
          return 1;
        }
        CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes));
        auto launch = [&](int i, cudaStream_t s) {
          GemmArgs a = args;
          char* base = pool + (i % copies) * bytes;
          a.words = (const uint4*)base;
          a.scales = base + word_bytes;
          void* params[] = {&map, &a};
          cudaLaunchConfig_t config = {};
          config.gridDim = plan.ranks > 1 ? dim3(plan.ranks, tiles) : dim3(plan.grid);
          config.blockDim = dim3((v.shape.warpgroups + 1) * 128);
          config.dynamicSmemBytes = v.bytes;
          config.stream = s;
          cudaLaunchAttribute attr = {};
          attr.id = cudaLaunchAttributeClusterDimension;
          attr.val.clusterDim = {(unsigned)plan.ranks, 1, 1};
          config.attrs = &attr;
          config.numAttrs = plan.ranks > 1;
          CHECK(cudaLaunchKernelExC(&config, v.kernel, params));
          if (cut) {
            void* params[] = {&a};
            config.gridDim = dim3(cut, v.rows, v.shape.warpgroups);
            config.blockDim = dim3(128);
            config.dynamicSmemBytes = 0;
            attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attr.val.programmaticStreamSerializationAllowed = 1;
            config.numAttrs = 1;
            CHECK(cudaLaunchKernelExC(&config, v.add, params));
          }
        };
        CHECK(cudaMemset(y, 0xff, (size_t)m * n * 2));
        launch(0, 0);
        CHECK(cudaDeviceSynchronize());
        std::vector<__half> hy((size_t)rows * n);
        CHECK(cudaMemcpy(hy.data(), y + (size_t)(m - rows) * n, hy.size() * 2, cudaMemcpyDeviceToHost));
        double worst = 0;
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < kSampledColumns; ++i) {
            const size_t at = (size_t)r * kSampledColumns + i;
            const double got = __half2float(hy[(size_t)r * n + (int64_t)i * 29 % n]);
            double err = std::fabs(got - href[at]) - 4.9e-4 * std::fabs(href[at]);
            double c = std::max(0.0, err) / (1.2e-7 * hmag[at] + 1e-30);
            if (!(c <= worst)) worst = c;
          }
        }
        const float us = graph_time_us(launches, launch, settle_ms);
        const float ghz = last_ghz();
        std::printf("%d,%d,%d,%s,%d,%d,%d,%.2f,%.2f,%.3f,%.2f,%.3f,%.0f,%.1f,%.2f,%.2f\n", k, n, m, v.name,
                    tiles, plan.ranks, cut, us, floor_us, us / floor_us, cublas_us, cublas_us / us,
                    2e-6 * m * n * k / us, worst, ghz, cublas_ghz);
        std::fflush(stdout);
      }
    }
  }
}
