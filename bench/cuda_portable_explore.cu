// Times the portable kernels for many tokens (csrc/cuda/portable_gemm.cuh): variants of the tile x shapes x M, float16,
// groups of 128. csrc/cuda/portable_gemm_plan.h chooses by what comes out. Each row stands beside cuBLAS float16 and a
// kernel that only reads the same bytes, timed in the same run; all in captured graphs, over rotating weights that
// exceed the cache. Every result is checked against a float64 product first (at a sample of its columns).
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a \
//       -o /tmp/portable_explore bench/cuda_portable_explore.cu -ldl
//     LD_LIBRARY_PATH=<where libcublas.so.13 is> /tmp/portable_explore [KxN[,M[,variant]]] > bench/results/<name>.csv
//
// -DVARIANTS='"FILE"', -DSHAPES='"FILE"' and -DTOKENS='"FILE"' name files that hold other lists.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cuda/decode_launch.cuh"
#include "../csrc/cuda/portable_gemm_launch.cuh"
#include "cuda_cublas.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

constexpr int kGroup = 128;

using Launch = std::string (*)(const MatmulArgs&, const PortableGemmShape&, int sms, cudaStream_t);
struct Variant {
  const char* name;
  int least, most;  // for M from least to most
  PortableGemmShape shape;
  Launch launch;
};

template <typename Tile, bool kOnWeights>
std::string launch_tile(const MatmulArgs& args, const PortableGemmShape& shape, int sms,
                        cudaStream_t stream) {
  constexpr int kGroupSize = kOnWeights ? 0 : kGroup;
  return launch_portable_tiles<__half, Tile, kGroupSize, false>(
      args, plan_portable_gemm(args.problem, shape, sms), 0, stream);
}

template <int kTokens, int kWarpTokens, int kWarpBlocks, int kWarps, int kStageBlocks, int kStages,
          int kBlocksPerSm, bool kOnWeights>
Variant make(const char* name, int least, int most, int unit_clocks) {
  using Tile = PortableTile<kTokens, kWarpTokens, kWarpBlocks, kWarps, kStageBlocks, kStages, kBlocksPerSm>;
  return {name,
          least,
          most,
          {kTokens, kWarpTokens, kWarpBlocks, kWarps, kStageBlocks, kStages, kBlocksPerSm, unit_clocks,
           kOnWeights},
          launch_tile<Tile, kOnWeights>};
}

// A kernel of the library.
template <PortableGemmKernel kernel>
Variant make(const char* name, int least, int most) {
  constexpr PortableGemmShape kShape = shape_of(kernel);
  return make<kShape.tokens, kShape.warp_tokens, kShape.warp_blocks, kShape.warps, kShape.stage_blocks,
              kShape.stages, kShape.blocks_per_sm, kShape.on_weights>(name, least, most,
                                                                      kShape.unit_clocks);
}

// The kernel for few tokens, again and again.
std::string launch_decode(const MatmulArgs& args, const PortableGemmShape&, int sms, cudaStream_t stream) {
  DecodeArgs decode = {};
  decode.x = args.x, decode.y = args.y;
  decode.words = reinterpret_cast<const uint4*>(args.words), decode.scales = args.scales;
  decode.m = static_cast<int>(args.problem.m), decode.n = static_cast<int>(args.problem.n);
  decode.k = static_cast<int>(args.problem.k), decode.group_stride = decode.n;
  decode.k_blocks = static_cast<int>(args.problem.k_blocks<2>());
  decode.n_blocks = static_cast<int>(args.problem.n_blocks<2>());
  constexpr DecodeKernel kKernel = DecodeKernel::kFloat2Portable;
  return DecodeInstance<kKernel, __half, __half, kGroup, false>::launch(
      {args.problem, kKernel, sms, 227 * 1024, args.scratch, stream}, decode);
}

int main(int argc, char** argv) {
  int only_k = 0, only_n = 0, only_m = 0;
  char only_variant[64] = "";
  if (argc > 1) std::sscanf(argv[1], "%dx%d,%d,%63s", &only_k, &only_n, &only_m, only_variant);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  const int sms = prop.multiProcessorCount;
  std::printf(
      "# %s, %d SMs\nK,N,M,variant,tiles,grid,cut,us,floor_us,cublas_us,speedup,tflops,worst_c,ghz\n",
      prop.name, sms);
  const std::vector<Variant> variants = {
#ifdef VARIANTS
#include VARIANTS
#else
      {"decode", 1, 16, {16, 16, 1, 1, 1, 1, 1, 1, false}, launch_decode},
      make<PortableGemmKernel::kSums16>("sums16", 1, 16),
      make<PortableGemmKernel::kSums32>("sums32", 17, 32),
      make<PortableGemmKernel::kSums64>("sums64", 33, 16384),
      make<PortableGemmKernel::kWeights128>("weights128", 65, 16384),
      make<PortableGemmKernel::kWeights128Narrow>("weights128narrow", 65, 16384),
#endif
  };
  struct Shape {
    int k, n;
  };
  const std::vector<Shape> shapes = {
#ifdef SHAPES
#include SHAPES
#else
      {4096, 4096}, {8192, 8192}, {4096, 28672}, {28672, 8192}, {8192, 57344},
#endif
  };
  const std::vector<int> tokens = {
#ifdef TOKENS
#include TOKENS
#else
      8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 4096,
#endif
  };
  const size_t most = *std::max_element(tokens.begin(), tokens.end());
  char *pool, *dense;
  const size_t pool_bytes = Rotation::pool_bytes((size_t)1 << 29);
  CHECK(cudaMalloc(&pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)pool, pool_bytes / 4, 1);
  const size_t dense_bytes = Rotation::pool_bytes((size_t)1 << 30);
  CHECK(cudaMalloc(&dense, dense_bytes));
  fill_normal<<<1024, 256>>>((__half*)dense, dense_bytes / 2, 3, 0.02f);
  __half *x, *scales, *y;
  void* scratch;
  CHECK(cudaMalloc(&x, most * 28672 * 2));
  fill_normal<<<1024, 256>>>(x, most * 28672, 7, 1.f);
  CHECK(cudaMalloc(&scales, (size_t)64 << 20));
  fill_normal<<<1024, 256>>>(scales, (size_t)32 << 20, 9, 0.02f);
  CHECK(cudaMalloc(&y, most * 57344 * 2));
  CHECK(cudaMalloc(&scratch, (size_t)512 << 20));
  CHECK(cudaDeviceSynchronize());
  const Cublas cublas;

  for (const auto& shape : shapes) {
    const int k = shape.k, n = shape.n;
    if (only_k && (only_k != k || only_n != n)) continue;
    Problem problem;
    problem.n = n, problem.k = k, problem.groups = k / kGroup;
    const Rotation weights = {pool, (size_t)problem.words<2>() * 4, (size_t)(k / kGroup) * n * 2};
    weights.set_scales(scales);
    const float floor_us = read_floor_us(weights, (uint32_t*)scratch);
    for (int m : tokens) {
      if (only_m && only_m != m) continue;
      problem.m = m;
      const bool large = (double)m * n * k > 4e11;
      const float settle_ms = (double)m * n * k > 1e10 ? 40 : 2;
      float cublas_us = 0;
      if (cublas.available() && !*only_variant)
        cublas_us = cublas.time_us(x, dense, y, m, n, k, settle_ms, large ? 2 : 12);
      const Sample sample = Sample::of(x, pool, weights.scales(0), m, n, k, kGroup);
      for (const auto& v : variants) {
        if (m < v.least || m > v.most || (*only_variant && std::strcmp(only_variant, v.name))) continue;
        MatmulArgs args;
        args.problem = problem;
        args.x = x, args.y = y, args.scratch = scratch;
        const auto launch = [&](int i, cudaStream_t stream) {
          MatmulArgs a = args;
          a.words = (const uint32_t*)weights.copy(i);
          a.scales = weights.scales(i);
          if (std::string failure = v.launch(a, v.shape, sms, stream); !failure.empty()) {
            std::printf("%s: %s\n", v.name, failure.c_str());
            std::exit(1);
          }
        };
        CHECK(cudaMemset(y, 0xff, (size_t)m * n * 2));
        CHECK(cudaMemset(scratch, 0xff, (size_t)512 << 20));
        launch(0, 0);
        CHECK(cudaDeviceSynchronize());
        const double worst = sample.worst(y);
        const float us =
            graph_time_us(large ? 2 : Rotation::launches_of(weights.copies()), launch, settle_ms);
        const float ghz = last_ghz();
        const GemmPlan plan = plan_portable_gemm(problem, v.shape, sms);
        std::printf("%d,%d,%d,%s,%d,%d,%d,%.2f,%.2f,%.2f,%.3f,%.0f,%.1f,%.2f\n", k, n, m, v.name,
                    plan.tiles(), plan.grid, plan.cut_tiles(), us, floor_us, cublas_us, cublas_us / us,
                    2e-6 * m * n * k / us, worst, ghz);
      }
    }
  }
}
