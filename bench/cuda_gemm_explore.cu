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

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../csrc/cuda/gemm.cuh"
#include "cuda_cublas.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

constexpr int kGroup = 128;

struct Variant {
  const char* name;
  GemmShape shape;
  int least, most;  // for M from least to most
  int rows;         // of float4 in a thread's sums
  int bytes;
  const void* kernel;
  const void* add;
  int threads() const { return (shape.warpgroups + 1) * 128; }
};
template <int kTokens, int kWarpgroups, int kWarpTiles, int kGroupSize, int kStages, bool kPairs = false>
Variant make(const char* name, int least, int most, int unit_clocks) {
  using Tile = TileLayout<kTokens, kWarpgroups, kWarpTiles>;
  return {name,
          {kTokens, kWarpgroups, kWarpTiles, kStages, unit_clocks, kGroupSize == 0, kPairs},
          least,
          most,
          Tile::kRows,
          GemmSmem<Tile, kGroupSize, false, kStages>::kBytes,
          (const void*)gemm_kernel<__half, kTokens, kWarpgroups, kWarpTiles, kGroupSize, false, kStages,
                                   kPairs>,
          (const void*)add_gemm_parts<__half, kTokens, kWarpgroups, kWarpTiles>};
}

// A kernel of the library.
template <GemmKernel kernel>
Variant make(const char* name, int least, int most) {
  constexpr GemmShape kShape = shape_of(kernel);
  return make<kShape.tokens, kShape.warpgroups, kShape.warp_tiles, kShape.on_weights ? 0 : kGroup,
              kShape.stages, kShape.pairs>(name, least, most, kShape.unit_clocks);
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
      make<GemmKernel::kSums16Medium>("sums16medium", 5, 16),
      make<GemmKernel::kSums16Narrow>("sums16narrow", 5, 16),
      make<GemmKernel::kSums32>("sums32", 17, 32),
      make<GemmKernel::kSums32Medium>("sums32medium", 17, 32),
      make<GemmKernel::kSums32Narrow>("sums32narrow", 17, 32),
      make<GemmKernel::kSums48>("sums48", 33, 48),
      make<GemmKernel::kSums48Narrow>("sums48narrow", 33, 48),
      make<GemmKernel::kSums64>("sums64", 33, 64),
      make<GemmKernel::kSums64Narrow>("sums64narrow", 33, 64),
      make<GemmKernel::kWeights80>("weights80", 65, 16384),
      make<GemmKernel::kWeights80Narrow>("weights80narrow", 65, 16384),
      make<GemmKernel::kWeights96>("weights96", 65, 16384),
      make<GemmKernel::kWeights96Narrow>("weights96narrow", 65, 16384),
      make<GemmKernel::kWeights112>("weights112", 65, 16384),
      make<GemmKernel::kWeights112Narrow>("weights112narrow", 65, 16384),
      make<GemmKernel::kWeights128>("weights128", 65, 16384),
      make<GemmKernel::kWeights128Narrow>("weights128narrow", 65, 16384),
      make<GemmKernel::kWeights128Pairs>("weights128pairs", 512, 16384),
      make<GemmKernel::kWeights144>("weights144", 65, 16384),
      make<GemmKernel::kWeights144Narrow>("weights144narrow", 65, 16384),
      make<GemmKernel::kWeights160Narrow>("weights160narrow", 65, 16384),
      make<GemmKernel::kWeights176Narrow>("weights176narrow", 65, 16384),
#endif
  };
  for (auto& v : variants) {
    std::printf("# clusters of 2, 3, .. 8 thread blocks of %s at once:", v.name);
    CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes));
    for (int ranks = 2; ranks <= 8; ++ranks)
      std::printf(" %d",
                  ClusterLaunch(dim3(ranks, sms), v.threads(), v.bytes, ranks).most_at_once(v.kernel));
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

  const Cublas cublas;

  struct Shape {
    int k, n;
  };
  std::vector<Shape> shapes = {{4096, 4096},  {4096, 6144},  {8192, 8192}, {14336, 4096},
                               {4096, 28672}, {28672, 8192}, {8192, 57344}};
  if (only_k) shapes = {{only_k, only_n}};
  const std::vector<int> tokens = {
#ifdef TOKENS
#include TOKENS
#else
      16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 512, 1000, 1024, 4096, 16384,
#endif
  };
  const int most = *std::max_element(tokens.begin(), tokens.end());
  Rotation weights = {};
  const size_t pool_bytes = Rotation::pool_bytes((size_t)1 << 29);
  CHECK(cudaMalloc(&weights.pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)weights.pool, pool_bytes / 4, 1);
  char* dense;  // for cuBLAS: finite values, about normal
  const size_t dense_bytes = Rotation::pool_bytes((size_t)1 << 30);
  CHECK(cudaMalloc(&dense, dense_bytes));
  fill_normal<<<1024, 256>>>((__half*)dense, dense_bytes / 2, 3, 0.02f);
  __half *x, *scales, *y;
  float4* parts;
  CHECK(cudaMalloc(&x, (size_t)most * 28672 * 2));
  fill_normal<<<1024, 256>>>(x, (size_t)most * 28672, 7, 1.f);
  CHECK(cudaMalloc(&scales, (size_t)64 << 20));
  fill_normal<<<1024, 256>>>(scales, (size_t)32 << 20, 9, 0.02f);
  CHECK(cudaMalloc(&y, (size_t)most * 57344 * 2));
  CHECK(cudaMalloc(&parts, (size_t)256 << 20));
  CHECK(cudaDeviceSynchronize());

  for (auto shape : shapes) {
    const int k = shape.k, n = shape.n;
    const int k_blocks = ceil_div(k, 64), n_blocks = ceil_div(n, 32);
    weights.word_bytes = (size_t)k_blocks * n_blocks * 512;
    weights.scale_bytes = (size_t)(k / kGroup) * n * 2;
    weights.set_scales(scales);
    const float floor_us = read_floor_us(weights, (uint32_t*)parts);
    for (int m : tokens) {
      if (only_m && only_m != m) continue;
      const bool large = (double)m * n * k > 4e11;
      const float settle_ms = (double)m * n * k > 1e10 ? 80 : 2;
      const int least_launches = large ? 2 : 12;
      const int launches = Rotation::launches_of(weights.copies(), least_launches);
      float cublas_us = 0, cublas_ghz = 0;
      if (cublas.available() && !*only_variant) {
        cublas_us = cublas.time_us(x, dense, y, m, n, k, settle_ms, least_launches);
        cublas_ghz = last_ghz();
      }
      const Sample sample = Sample::of(x, weights.copy(0), weights.scales(0), m, n, k, kGroup);
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
        CUtensorMap maps[2];  // of whole tiles, and of the tokens after them
        const cuuint64_t dims[2] = {(cuuint64_t)k, (cuuint64_t)m}, strides[1] = {(cuuint64_t)k * 2};
        const int rest = m % v.shape.tokens;
        for (int i = 0; i < 2; ++i) {
          const int box_tokens = v.shape.pairs ? v.shape.tokens / 2 : i && rest ? rest : v.shape.tokens;
          const cuuint32_t box[2] = {64, (cuuint32_t)box_tokens},
                           steps[2] = {1, 1};
          if (encode(&maps[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, x, dims, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
            std::printf("encode failed\n");
            return 1;
          }
        }
        CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes));
        auto launch = [&](int i, cudaStream_t s) {
          GemmArgs a = args;
          a.words = (const uint4*)weights.copy(i);
          a.scales = weights.scales(i);
          void* params[] = {&maps[0], &maps[1], &a};
          const int cluster = v.shape.pairs ? 2 : plan.ranks;
          const dim3 grid = plan.ranks > 1 ? dim3(plan.ranks, tiles) : dim3(plan.grid * cluster);
          ClusterLaunch(grid, v.threads(), v.bytes, cluster, s)(v.kernel, params);
          if (cut) {
            void* params[] = {&a};
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3(cut, v.rows, v.shape.warpgroups);
            config.blockDim = dim3(128);
            config.stream = s;
            cudaLaunchAttribute attr = {};
            attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attr.val.programmaticStreamSerializationAllowed = 1;
            config.attrs = &attr;
            config.numAttrs = 1;
            CHECK(cudaLaunchKernelExC(&config, v.add, params));
          }
        };
        CHECK(cudaMemset(y, 0xff, (size_t)m * n * 2));
        launch(0, 0);
        CHECK(cudaDeviceSynchronize());
        const double worst = sample.worst(y);
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
