// Times the decode kernel under every launch shape: variants (arithmetic, warps, ring stages) x splits of K,
// float16 and groups of 128. csrc/cuda/plan.h chooses by what comes out. Each row stands beside the two
// things it is judged against, timed in the same run: a kernel that only reads the same bytes, and cuBLAS
// float16. All in captured graphs, over rotating weights that exceed the cache. Every result is checked
// against a float64 product first.
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/cuda_explore bench/cuda_explore.cu -ldl
//     LD_LIBRARY_PATH=<where libcublas.so.13 is> /tmp/cuda_explore full > bench/results/<name>.csv
//
// Without "full" only the best five rows of every size; with "K,N,M,variant,ranks" that one launch, for a
// profiler.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cuda/decode.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

__device__ float uniform(uint32_t i, uint32_t seed) {
  return (hash(i * 2654435761u + seed) >> 8) * (2.f / 16777216.f) - 1.f;
}
__global__ void fill_half(__half* p, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    p[i] = __float2half(uniform((uint32_t)i, seed) * scale);
}

__global__ void to_bfloat16(__nv_bfloat16* to, const __half* from, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    to[i] = __float2bfloat16(__half2float(from[i]));
}

__global__ void reference(const __half* x, const uint32_t* words, const __half* s, double* y, double* bound,
                          int m, int n, int k, int group) {
  const int col = blockIdx.x * blockDim.x + threadIdx.x;
  const int row = blockIdx.y;
  if (col >= n) return;
  using L = Layout<2>;
  double sum = 0, mag = 0;
  for (int i = 0; i < k; ++i) {
    auto at = L::locate(i % L::kBlockK, col % L::kBlockN);
    size_t block = (size_t)(i / L::kBlockK) * ((n + L::kBlockN - 1) / L::kBlockN) + col / L::kBlockN;
    int code = words[block * L::kWordsPerBlock + at.word] >> at.shift & 3;
    double w = (double)__half2float(s[(size_t)(group ? i / group : 0) * n + col]) * (code - 1);
    double p = w * (double)__half2float(x[(size_t)row * k + i]);
    sum += p;
    mag += fabs(p);
  }
  y[(size_t)row * n + col] = sum;
  bound[(size_t)row * n + col] = mag;
}

struct Variant {
  const char* name;
  const void* kernel;
  int warps, blocks_per_sm, stages, tokens;
  int (*smem)(int rows, int upr);
};

template <template <int, typename, typename, int, int, bool> class MathOf, int kTT, int kWarps, int kStages,
          int kBps, typename T = __half, int G = 128>
Variant make(const char* name) {
  using Math = MathOf<2, T, T, kTT, G, false>;
  return {name,
          (const void*)decode_kernel<Math, 2, T, T, G, false, kWarps, kStages, true, kBps>,
          kWarps,
          kBps,
          kStages,
          Math::kTokens,
          [](int rows, int upr) {
            return DecodeSmem<Math, 2, kWarps, kStages, false, sizeof(T)>::total_bytes(rows, upr);
          }};
}

// The same kernels with other types and group sizes, in graphs and launched one by one ("K,N,M,kernel,type,group,
// microseconds in a graph, without one"). Only timed: the tests check what they compute.
void time_types(char* pool, size_t pool_bytes, const __half* x, void* y, int sms) {
  const size_t x_size = 8 * 8192;
  __nv_bfloat16* x_bfloat16;
  CHECK(cudaMalloc(&x_bfloat16, x_size * 2));
  to_bfloat16<<<64, 256>>>(x_bfloat16, x, x_size);
  CHECK(cudaDeviceSynchronize());
  struct Typed {
    Variant slices, floats;
    const char* type;
    int group;  // 0: one for all of K
  };
#define TYPED(T, NAME, G, GROUP)                                                                      \
  {                                                                                                   \
    make<SliceMath, 1, 16, 4, 1, T, G>("s1w16s4b1"), make<FloatMath, 1, 16, 3, 1, T, G>("f1w16s3b1"), \
        NAME, GROUP                                                                                   \
  }
  const Typed all[] = {
      TYPED(__half, "float16", 128, 128),         TYPED(__half, "float16", 64, 64),
      TYPED(__half, "float16", 32, 32),           TYPED(__half, "float16", 128, 0),
      TYPED(__nv_bfloat16, "bfloat16", 128, 128), TYPED(__nv_bfloat16, "bfloat16", 64, 64),
      TYPED(__nv_bfloat16, "bfloat16", 32, 32),   TYPED(__nv_bfloat16, "bfloat16", 128, 0)};
#undef TYPED
  const struct {
    int k, n, m, ranks;
  } cases[] = {{4096, 4096, 1, 1}, {4096, 28672, 1, 1}, {8192, 57344, 1, 1},
               {4096, 4096, 8, 2}, {4096, 28672, 8, 1}, {8192, 57344, 8, 1}};
  for (const auto& c : cases) {
    for (const Typed& typed : all) {
      const Variant& v = c.m <= 2 ? typed.slices : typed.floats;
      const int n_blocks = ceil_div(c.n, 32);
      const size_t word_bytes = (size_t)ceil_div(c.k, 64) * n_blocks * 512;
      const size_t bytes = word_bytes + (size_t)(typed.group ? c.k / typed.group : 1) * c.n * 2;
      const int copies = std::min(pool_bytes / bytes, std::max<size_t>(2, ((size_t)300 << 20) / bytes + 1));
      const int launches = std::max(copies, 12) / copies * copies;
      DecodeArgs args = {};
      args.x = typed.type[0] == 'b' ? (const void*)x_bfloat16 : x;
      args.y = y, args.m = c.m, args.n = c.n, args.k = c.k;
      args.k_blocks = ceil_div(c.k, 64), args.n_blocks = n_blocks,
      args.group_stride = typed.group ? c.n : 0;
      cut_work(args, c.ranks, std::min(n_blocks, sms / c.ranks), v.warps);
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(c.ranks, std::min(n_blocks, sms / c.ranks));
      config.blockDim = dim3(v.warps * 32);
      config.dynamicSmemBytes = v.smem(c.m, args.units_per_rank);
      cudaLaunchAttribute attr = {};
      attr.id = cudaLaunchAttributeClusterDimension;
      attr.val.clusterDim = {(unsigned)c.ranks, 1, 1};
      config.attrs = &attr;
      config.numAttrs = c.ranks > 1;
      CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 config.dynamicSmemBytes));
      auto launch = [&](int i, cudaStream_t s) {
        DecodeArgs a = args;
        a.words = (const uint4*)(pool + (i % copies) * bytes);
        a.scales = pool + (i % copies) * bytes + word_bytes;
        cudaLaunchConfig_t here = config;
        here.stream = s;
        void* params[] = {&a};
        CHECK(cudaLaunchKernelExC(&here, v.kernel, params));
      };
      const float graph_us = graph_time_us(launches, launch);
      cudaStream_t stream;
      cudaEvent_t begin, end;
      CHECK(cudaStreamCreate(&stream));
      CHECK(cudaEventCreate(&begin));
      CHECK(cudaEventCreate(&end));
      std::vector<float> times;
      for (int r = 0; r < 8; ++r) {
        CHECK(cudaEventRecord(begin, stream));
        for (int i = 0; i < launches; ++i) launch(i, stream);
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (r > 0) times.push_back(ms * 1000.f / launches);
      }
      std::sort(times.begin(), times.end());
      std::printf("# types: %d,%d,%d,%s,%s,%d,%.2f,%.2f\n", c.k, c.n, c.m, v.name, typed.type, typed.group,
                  graph_us, times[times.size() / 2]);
      CHECK(cudaEventDestroy(begin));
      CHECK(cudaEventDestroy(end));
      CHECK(cudaStreamDestroy(stream));
    }
  }
}

int main(int argc, char** argv) {
  const bool full = argc > 1 && !strcmp(argv[1], "full");
  const char* only = argc > 1 && !full ? argv[1] : nullptr;  // "K,N,M,variant,ranks", for a profiler
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  const int sms = prop.multiProcessorCount;
  std::printf("# %s, %d SMs\n", prop.name, sms);
  std::vector<Variant> variants = {
      make<SliceMath, 1, 16, 4, 1>("s1w16s4b1"), make<SliceMath, 2, 16, 4, 1>("s2w16s4b1"),
      make<FloatMath, 1, 16, 3, 1>("f1w16s3b1"), make<FloatMath, 2, 12, 3, 1>("f2w12s3b1"),
      // Not compiled into the library: two smaller blocks a multiprocessor, more warps.
      make<SliceMath, 1, 8, 4, 2>("s1w8s4b2"), make<FloatMath, 1, 8, 4, 2>("f1w8s4b2"),
      make<FloatMath, 1, 20, 3, 1>("f1w20s3b1"), make<FloatMath, 2, 8, 3, 2>("f2w8s3b2")};

  // cuBLAS by dlopen: prototypes stated here, so that no header is needed.
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
  std::vector<Shape> shapes = {{4096, 4096},  {4096, 6144},  {8192, 8192}, {4096, 28672},
                               {14336, 4096}, {28672, 8192}, {8192, 57344}};
  const int group = 128;
  char* pool;
  const size_t pool_bytes = (size_t)3 << 30;
  CHECK(cudaMalloc(&pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)pool, pool_bytes / 4, 1);
  __half *x, *scales, *y;
  double *ref, *mag;
  CHECK(cudaMalloc(&x, 32 * 28672 * 2));
  fill_half<<<256, 256>>>(x, 32 * 28672, 7, 1.f);
  CHECK(cudaMalloc(&scales, (size_t)64 << 20));
  fill_half<<<1024, 256>>>(scales, (size_t)32 << 20, 9, 0.05f);
  CHECK(cudaMalloc(&y, 32 * 57344 * 2));
  CHECK(cudaMalloc(&ref, 32 * 57344 * 8));
  CHECK(cudaMalloc(&mag, 32 * 57344 * 8));
  CHECK(cudaDeviceSynchronize());

  for (auto shape : shapes) {
    const int k = shape.k, n = shape.n;
    const int k_blocks = ceil_div(k, 64), n_blocks = ceil_div(n, 32);
    const size_t word_bytes = (size_t)k_blocks * n_blocks * 512;
    const size_t scale_bytes = (size_t)(k / group) * n * 2;
    const size_t bytes = word_bytes + scale_bytes;  // a copy: words, then scales
    const int copies = std::max<int>(2, ((size_t)300 << 20) / bytes + 1);
    const int launches = std::max(copies, 12) / copies * copies;
    // scales inside the pool: every copy its own
    for (int c = 0; c < copies; ++c)
      CHECK(cudaMemcpy(pool + c * bytes + word_bytes, scales, scale_bytes, cudaMemcpyDeviceToDevice));
    float floor_us = 1e9f;
    for (int blocks : {132, 264, 396, 528, 792, 1056}) {
      floor_us = std::min(floor_us, graph_time_us(launches, [&](int i, cudaStream_t s) {
                            read_only<<<blocks, 256, 0, s>>>((const uint4*)(pool + (i % copies) * bytes),
                                                             bytes / 16, (uint32_t*)y);
                          }));
    }
    for (int m : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}) {
      float cublas_us = 0;
      if (gemm) {
        const size_t dense = (size_t)k * n * 2;
        const int dcopies = std::max<int>(2, ((size_t)300 << 20) / dense + 1);
        if (dense * dcopies <= pool_bytes) {
          float one = 1.f, zero = 0.f;
          cublas_us = graph_time_us(std::max(dcopies, 10), [&](int i, cudaStream_t s) {
            set_stream(handle, s);
            gemm(handle, 0, 0, n, m, k, &one, pool + (i % dcopies) * dense, 2, n, x, 2, k, &zero, y, 2, n,
                 68, -1);
          });
        }
      }
      reference<<<dim3((n + 127) / 128, m), 128>>>(x, (uint32_t*)pool, scales, ref, mag, m, n, k, group);
      CHECK(cudaDeviceSynchronize());
      std::vector<double> href((size_t)m * n), hmag((size_t)m * n);
      CHECK(cudaMemcpy(href.data(), ref, href.size() * 8, cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(hmag.data(), mag, hmag.size() * 8, cudaMemcpyDeviceToHost));
      struct Row {
        float us;
        std::string text;
      };
      std::vector<Row> rows;
      for (auto& v : variants) {
        if (v.tokens < std::min(m, 16) || (v.tokens >= 2 * m && v.tokens > 8)) continue;
        for (int ranks : {1, 2, 4, 8}) {
          {
            const int units = ceil_div(k, 128);
            const int upr = ceil_div(units, ranks);
            if (upr * (ranks - 1) >= units) continue;
            const int smem = v.smem(std::min(m, v.tokens), upr);
            if (smem > 227 * 1024 / v.blocks_per_sm - 1024) continue;
            const void* kernel = v.kernel;
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
            int slots = sms * v.blocks_per_sm;
            if (ranks > 1) {
              cudaLaunchConfig_t config = {};
              config.gridDim = dim3(ranks, sms * v.blocks_per_sm / ranks);
              config.blockDim = dim3(v.warps * 32);
              config.dynamicSmemBytes = smem;
              cudaLaunchAttribute attr[1];
              attr[0].id = cudaLaunchAttributeClusterDimension;
              attr[0].val.clusterDim = {(unsigned)ranks, 1, 1};
              config.attrs = attr;
              config.numAttrs = 1;
              CHECK(cudaOccupancyMaxActiveClusters(&slots, kernel, &config));
            }
            if (slots < 1) continue;
            if (only) {
              char id[128];
              std::snprintf(id, sizeof id, "%d,%d,%d,%s,%d", k, n, m, v.name, ranks);
              if (strcmp(id, only)) continue;
            }
            const int clusters = std::min(n_blocks, slots);
            DecodeArgs args = {};
            args.x = x, args.y = y, args.m = m, args.n = n, args.k = k;
            args.k_blocks = k_blocks, args.n_blocks = n_blocks, args.group_stride = n;
            cut_work(args, ranks, clusters, v.warps);
            auto launch = [&](int i, cudaStream_t s) {
              DecodeArgs a = args;
              char* base = pool + (i % copies) * bytes;
              a.words = (const uint4*)base;
              a.scales = base + word_bytes;
              cudaLaunchConfig_t config = {};
              config.gridDim = dim3(ranks, clusters, ceil_div(m, v.tokens));
              config.blockDim = dim3(v.warps * 32);
              config.dynamicSmemBytes = smem;
              config.stream = s;
              cudaLaunchAttribute attr[1];
              attr[0].id = cudaLaunchAttributeClusterDimension;
              attr[0].val.clusterDim = {(unsigned)ranks, 1, 1};
              config.attrs = attr;
              config.numAttrs = ranks > 1;
              void* params[] = {&a};
              CHECK(cudaLaunchKernelExC(&config, kernel, params));
            };
            CHECK(cudaMemset(y, 0xff, (size_t)m * n * 2));
            launch(0, 0);
            CHECK(cudaDeviceSynchronize());
            std::vector<__half> hy((size_t)m * n);
            CHECK(cudaMemcpy(hy.data(), y, hy.size() * 2, cudaMemcpyDeviceToHost));
            double worst = 0;
            for (size_t i = 0; i < hy.size(); ++i) {
              double err = std::fabs(__half2float(hy[i]) - href[i]) - 4.9e-4 * std::fabs(href[i]);
              double c = std::max(0.0, err) / (1.2e-7 * hmag[i] + 1e-30);
              if (!(c <= worst)) worst = c;
            }
            const float us = graph_time_us(launches, launch);
            char text[256];
            std::snprintf(text, sizeof text, "%d,%d,%d,%s,%d,%d,%.2f,%.2f,%.3f,%.2f,%.2f,%.1f", k, n, m,
                          v.name, ranks, slots, us, floor_us, us / floor_us, cublas_us, cublas_us / us,
                          worst);
            rows.push_back({us, text});
          }
        }
      }
      std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.us < b.us; });
      for (size_t i = 0; i < rows.size() && (full || i < 5); ++i) std::printf("%s\n", rows[i].text.c_str());
      std::fflush(stdout);
    }
  }
  if (!only) time_types(pool, pool_bytes, x, y, sms);
}
