// Times the decode kernel under every launch shape: variants (arithmetic, warps, ring stages) x splits of K,
// float16 and groups of 128. csrc/cuda/plan.h chooses by what comes out. Each row stands beside a kernel that only reads
// the same bytes, timed in the same run; all in captured graphs, over rotating weights that exceed the cache. Every
// result is checked against a float64 product first. (cuda_matmul.cu has cuBLAS beside what the library chooses.)
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/cuda_explore bench/cuda_explore.cu
//     /tmp/cuda_explore full > bench/results/<name>.csv
//
// Without "full" only the best five rows of every size; with "K,N,M,variant,ranks,blocks_per_warp" that one launch, for a
// profiler.
#include <cuda_runtime.h>

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

struct Variant {
  const char* name;
  const void* kernel;
  int warps, blocks_per_sm, blocks_per_warp, stages, tokens;
  int (*smem)(int rows, int upr, int ranks, int blocks_per_warp);
};

template <template <int, typename, typename, int, int, bool> class MathOf, int kTT, int kWarps, int kStages,
          int kBps, int kBpw = 1, typename T = __half, int G = 128>
Variant make(const char* name) {
  using Math = MathOf<2, T, T, kTT, G, false>;
  return {name,
          (const void*)decode_kernel<Math, 2, T, T, G, false, kWarps, kStages, true, kBps, kBpw>,
          kWarps,
          kBps,
          kBpw,
          kStages,
          Math::kTokens,
          [](int rows, int upr, int ranks, int blocks_per_warp) {
            return DecodeSmem<Math, 2, kWarps, kStages, false, sizeof(T)>::total_bytes(rows, upr, ranks,
                                                                                       blocks_per_warp);
          }};
}

int main(int argc, char** argv) {
  const bool full = argc > 1 && !strcmp(argv[1], "full");
  const char* only = argc > 1 && !full ? argv[1] : nullptr;  // "K,N,M,variant,ranks,blocks_per_warp", for a profiler
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  const int sms = prop.multiProcessorCount;
  std::printf("# %s, %d SMs\n", prop.name, sms);
  std::vector<Variant> variants = {
      make<SliceMath, 1, 16, 6, 1>("s1w16s6b1"), make<SliceMath, 2, 16, 4, 1, 2>("s2w16s4b1"),
      make<FloatMath, 1, 16, 3, 1>("f1w16s3b1"), make<FloatMath, 2, 12, 3, 1>("f2w12s3b1"),
      // Not compiled into the library: other rings, more warps, two smaller blocks a multiprocessor.
      make<SliceMath, 1, 16, 4, 1>("s1w16s4b1"), make<SliceMath, 1, 16, 8, 1>("s1w16s8b1"),
      make<SliceMath, 2, 16, 5, 1>("s2w16s5b1"), make<FloatMath, 1, 16, 4, 1>("f1w16s4b1"),
      make<FloatMath, 1, 20, 3, 1>("f1w20s3b1"), make<FloatMath, 1, 8, 4, 2>("f1w8s4b2")};
  std::printf("k,n,m,variant,ranks,blocks_per_warp,slots,us,read_floor_us,time_over_floor,worst_c\n");

  struct Shape {
    int k, n;
  };
  std::vector<Shape> shapes = {
      {1024, 4096},  {2048, 2048},  {2048, 8192},  {3072, 24576}, {3584, 4608},  {4096, 1024},
      {4096, 4096},  {4096, 6144},  {4096, 12288}, {4096, 14336}, {4096, 28672}, {5120, 5120},
      {5120, 13824}, {7168, 8192},  {8192, 1024},  {8192, 2048},  {8192, 8192},  {8192, 14336},
      {8192, 28672}, {8192, 57344}, {14336, 4096}, {14336, 8192}, {28672, 2048}, {28672, 8192}};
  const int group = 128;
  Rotation weights = {};
  const size_t pool_bytes = Rotation::pool_bytes((size_t)1 << 29);
  CHECK(cudaMalloc(&weights.pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)weights.pool, pool_bytes / 4, 1);
  __half *x, *scales, *y;
  CHECK(cudaMalloc(&x, 32 * 28672 * 2));
  fill_normal<<<256, 256>>>(x, 32 * 28672, 7, 1.f);
  CHECK(cudaMalloc(&scales, (size_t)64 << 20));
  fill_normal<<<1024, 256>>>(scales, (size_t)32 << 20, 9, 0.05f);
  CHECK(cudaMalloc(&y, 32 * 57344 * 2));
  CHECK(cudaDeviceSynchronize());

  for (auto shape : shapes) {
    const int k = shape.k, n = shape.n;
    const int k_blocks = ceil_div(k, 64), n_blocks = ceil_div(n, 32);
    weights.word_bytes = (size_t)k_blocks * n_blocks * 512;
    weights.scale_bytes = (size_t)(k / group) * n * 2;
    weights.set_scales(scales);
    const int launches = Rotation::launches_of(weights.copies());
    const float floor_us = read_floor_us(weights, (uint32_t*)y);
    for (int m : {1, 2, 3, 4, 6, 8, 12, 16}) {
      const Sample sample = Sample::of(x, weights.copy(0), weights.scales(0), m, n, k, group);
      struct Row {
        float us;
        std::string text;
      };
      std::vector<Row> rows;
      for (auto& v : variants) {
        if (v.tokens < std::min(m, 16) || (v.tokens >= 2 * m && v.tokens > 8)) continue;
        for (int ranks : {1, 2, 4, 8}) {
          for (int blocks_per_warp = 1; blocks_per_warp <= v.blocks_per_warp; ++blocks_per_warp) {
            const int units = ceil_div(k, 128);
            const int upr = ceil_div(units, ranks);
            if (upr * (ranks - 1) >= units) continue;
            const int smem = v.smem(std::min(m, v.tokens), upr, ranks, blocks_per_warp);
            if (smem > 227 * 1024 / v.blocks_per_sm - 1024) continue;
            const void* kernel = v.kernel;
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
            int slots = sms * v.blocks_per_sm;
            if (ranks > 1) {
              const dim3 grid(ranks, sms * v.blocks_per_sm / ranks);
              slots = ClusterLaunch(grid, v.warps * 32, smem, ranks).most_at_once(kernel);
            }
            if (slots < 1) continue;
            const int clusters = std::min(n_blocks, slots);
            if (blocks_per_warp > 1 && ceil_div(n_blocks, clusters) <= v.warps) continue;  // one line anyway
            if (only) {
              char id[128];
              std::snprintf(id, sizeof id, "%d,%d,%d,%s,%d,%d", k, n, m, v.name, ranks, blocks_per_warp);
              if (strcmp(id, only)) continue;
            }
            DecodeArgs args = {};
            args.x = x, args.y = y, args.m = m, args.n = n, args.k = k;
            args.k_blocks = k_blocks, args.n_blocks = n_blocks, args.group_stride = n;
            cut_work(args, ranks, clusters, v.warps, blocks_per_warp);
            auto launch = [&](int i, cudaStream_t s) {
              DecodeArgs a = args;
              a.words = (const uint4*)weights.copy(i);
              a.scales = weights.scales(i);
              void* params[] = {&a};
              const dim3 grid(ranks, clusters, ceil_div(m, v.tokens));
              ClusterLaunch(grid, v.warps * 32, smem, ranks, s)(kernel, params);
            };
            CHECK(cudaMemset(y, 0xff, (size_t)m * n * 2));
            launch(0, 0);
            CHECK(cudaDeviceSynchronize());
            const double worst = sample.worst(y);
            const float us = graph_time_us(launches, launch);
            char text[256];
            std::snprintf(text, sizeof text, "%d,%d,%d,%s,%d,%d,%d,%.2f,%.2f,%.3f,%.1f", k, n, m, v.name,
                          ranks, blocks_per_warp, slots, us, floor_us, us / floor_us, worst);
            rows.push_back({us, text});
          }
        }
      }
      std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.us < b.us; });
      for (size_t i = 0; i < rows.size() && (full || i < 5); ++i) std::printf("%s\n", rows[i].text.c_str());
      std::fflush(stdout);
    }
  }
}
