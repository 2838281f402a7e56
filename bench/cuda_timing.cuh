// What the programs here that time CUDA kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <type_traits>
#include <vector>

#include "../csrc/layout.h"

#define CHECK(call)                                                                    \
  do {                                                                                 \
    cudaError_t e = (call);                                                            \
    if (e != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (0)

__device__ inline uint32_t hash(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}
__global__ void fill_random(uint32_t* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    p[i] = hash((uint32_t)i * 2654435761u + seed);
}

// About normal: the sum of four uniforms, of variance 4/3 * scale^2.
template <typename T>
__global__ void fill_normal(T* p, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    float sum = 0;
    for (int j = 0; j < 4; ++j)
      sum += (hash((uint32_t)(4 * i + j) * 2654435761u + seed) >> 8) * (2.f / 16777216.f) - 1.f;
    p[i] = T(sum * scale);
  }
}

// The limit that a kernel is shown against: it only reads.
__global__ void __launch_bounds__(256) read_only(const uint4* p, size_t n, uint32_t* out) {
  uint32_t acc = 0;
  const size_t step = (size_t)gridDim.x * 256;
  size_t i = blockIdx.x * (size_t)256 + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                   : "l"(p + i + j * step));
#pragma unroll
    for (int j = 0; j < 4; ++j) acc ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < n; i += step) acc ^= p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
  if (acc == 0x12345678u) out[threadIdx.x] = acc;
}

// What is launched by turns, so that none of it is in the cache: weights (words, then scales), one after the other in a
// pool, that exceed the L2 cache many times. (With 300 MB in all, six times the cache, the kernel that only reads still
// found some: 27.4 us for 8192 x 57344, where it takes 28.5 with 2 GB and with 16.)
struct Rotation {
  char* pool;
  size_t word_bytes, scale_bytes;

  static constexpr size_t kBytes = (size_t)2 << 30;
  // Enough for the copies of any weight of up to `most` bytes.
  static constexpr size_t pool_bytes(size_t most) { return kBytes + 2 * most; }
  static int copies_of(size_t bytes) { return std::max<int>(2, kBytes / bytes + 1); }
  // A multiple of the copies, so that a graph that is launched again begins with the copy that was read longest ago.
  static int launches_of(int copies, int least = 12) { return (least + copies - 1) / copies * copies; }

  size_t bytes() const { return word_bytes + scale_bytes; }
  int copies() const { return copies_of(bytes()); }
  char* copy(int i) const { return pool + i % copies() * bytes(); }
  char* scales(int i) const { return copy(i) + word_bytes; }
  void set_scales(const void* from) const {
    for (int i = 0; i < copies(); ++i)
      CHECK(cudaMemcpy(scales(i), from, scale_bytes, cudaMemcpyDeviceToDevice));
  }
};

// A stream, and the time that what is enqueued on it takes there.
class Stopwatch {
 public:
  Stopwatch() {
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
  }
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    CHECK(cudaEventDestroy(begin_));
    CHECK(cudaEventDestroy(end_));
    CHECK(cudaStreamDestroy(stream));
  }

  template <typename Enqueue>
  float milliseconds(const Enqueue& enqueue) const {
    CHECK(cudaEventRecord(begin_, stream));
    enqueue();
    CHECK(cudaEventRecord(end_, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return ms;
  }

  // The median over repeats, after one that does not count.
  template <typename Enqueue>
  float median_milliseconds(int repeats, const Enqueue& enqueue) const {
    milliseconds(enqueue);
    std::vector<float> times(repeats);
    for (float& ms : times) ms = milliseconds(enqueue);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  cudaStream_t stream;

 private:
  cudaEvent_t begin_, end_;
};

// Microseconds a launch, the median over repeats of a captured graph of them.
inline float graph_time_us(int launches, const std::function<void(int, cudaStream_t)>& launch,
                           float settle_ms = 0, int repeats = 7) {
  const Stopwatch watch;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(watch.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i, watch.stream);
  CHECK(cudaStreamEndCapture(watch.stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  const auto replay = [&] { CHECK(cudaGraphLaunch(exec, watch.stream)); };
  // Products that draw more power than the card may slow its clocks: first until they have settled.
  float warm_ms = 0;
  while (warm_ms < settle_ms) warm_ms += watch.milliseconds(replay);
  const float ms = watch.median_milliseconds(repeats, replay);
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  return ms * 1000.f / launches;
}

// Microseconds a launch without a graph, back to back on a stream, the median over repeats: where the host takes longer
// to launch than the GPU to compute, it is the host that is timed.
inline float stream_time_us(int launches, const std::function<void(int, cudaStream_t)>& launch,
                            int repeats = 7) {
  const Stopwatch watch;
  return watch.median_milliseconds(repeats,
                                   [&] {
                                     for (int i = 0; i < launches; ++i) launch(i, watch.stream);
                                   }) *
         1000.f / launches;
}

// Microseconds that only reading the weights takes: the best of several launch shapes.
inline float read_floor_us(const Rotation& weights, uint32_t* out) {
  float best = 1e9f;
  for (int blocks : {132, 264, 396, 528, 792, 1056}) {
    const auto launch = [&](int i, cudaStream_t stream) {
      read_only<<<blocks, 256, 0, stream>>>((const uint4*)weights.copy(i), weights.bytes() / 16, out);
    };
    best = std::min(best, graph_time_us(Rotation::launches_of(weights.copies()), launch, /*settle_ms=*/10));
  }
  return best;
}

// Clock of an SM, in GHz, right after the work before it: up to 0.2 GHz more than during work that draws the card's power.
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
inline float last_ghz() {
  static float* ghz = nullptr;
  if (!ghz) CHECK(cudaMalloc(&ghz, 4));
  read_clock<<<1, 1>>>(ghz);
  float host;
  CHECK(cudaMemcpy(&host, ghz, 4, cudaMemcpyDeviceToHost));
  return host;
}

// A grid of clusters of `ranks` thread blocks along x.
struct ClusterLaunch {
  cudaLaunchAttribute size = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(dim3 grid, int threads, int shared_bytes, int ranks, cudaStream_t stream = nullptr) {
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {(unsigned)ranks, 1, 1};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = ranks > 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  void operator()(const void* kernel, void** params) const {
    CHECK(cudaLaunchKernelExC(&config, kernel, params));
  }
  // Clusters that run at the same time.
  int most_at_once(const void* kernel) const {
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return clusters;
  }
};

// Rows m0 and on of x @ W in float64, and of |x| @ |W|, at the columns 0, 29, 58, .. modulo n. A group of 0: one for
// all of K.
constexpr int kColumnStep = 29;
template <typename T>
__global__ void reference(const T* x, const uint32_t* words, const T* scales, double* y, double* bound,
                          int m0, int n, int k, int group) {
  using L = jax_trirun::Layout<2>;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, columns = gridDim.x * blockDim.x;
  const int col = (int)((int64_t)i * kColumnStep % n);
  double sum = 0, magnitude = 0;
  for (int j = 0; j < k; ++j) {
    const auto at = L::locate(j % L::kBlockK, col % L::kBlockN);
    const size_t block = (size_t)(j / L::kBlockK) * ((n + L::kBlockN - 1) / L::kBlockN) + col / L::kBlockN;
    const int code = (int)(words[block * L::kWordsPerBlock + at.word] >> at.shift & 3);
    const double p = (double)(float)scales[(size_t)(group ? j / group : 0) * n + col] *
                     (code - L::kZeroPoint) * (double)(float)x[(size_t)(m0 + blockIdx.y) * k + j];
    sum += p;
    magnitude += fabs(p);
  }
  y[(size_t)blockIdx.y * columns + i] = sum;
  bound[(size_t)blockIdx.y * columns + i] = magnitude;
}

// A sample of one product in float64, against which results are held.
struct Sample {
  static constexpr int kColumns = 2048, kMostRows = 64;
  int m0, rows, n;
  std::vector<double> y, bound;

  // The last rows of x [m, k].
  template <typename T>
  static Sample of(const T* x, const void* words, const void* scales, int m, int n, int k, int group) {
    static double *y = nullptr, *bound = nullptr;
    constexpr size_t kMost = (size_t)kColumns * kMostRows;
    if (!y) {
      CHECK(cudaMalloc(&y, kMost * 8));
      CHECK(cudaMalloc(&bound, kMost * 8));
    }
    Sample sample = {m - std::min(m, kMostRows), std::min(m, kMostRows), n, {}, {}};
    reference<<<dim3(kColumns / 128, sample.rows), 128>>>(x, (const uint32_t*)words, (const T*)scales, y,
                                                          bound, sample.m0, n, k, group);
    CHECK(cudaGetLastError());
    sample.y.resize((size_t)sample.rows * kColumns);
    sample.bound.resize(sample.y.size());
    CHECK(cudaMemcpy(sample.y.data(), y, sample.y.size() * 8, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(sample.bound.data(), bound, sample.y.size() * 8, cudaMemcpyDeviceToHost));
    return sample;
  }

  // The largest c with |got - y| = eps(T) |y| + c eps(float32) (|x| @ |W|), and infinity if something is not a number.
  template <typename T>
  double worst(const T* got) const {
    constexpr double kEps =
        std::is_same_v<T, __nv_bfloat16> ? 1. / 256 : 1. / 2048;  // half a unit in the last place
    std::vector<T> here((size_t)rows * n);
    CHECK(cudaMemcpy(here.data(), got + (size_t)m0 * n, here.size() * sizeof(T), cudaMemcpyDeviceToHost));
    double worst = 0;
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < kColumns; ++i) {
        const size_t at = (size_t)r * kColumns + i;
        const double is = (double)(float)here[(size_t)r * n + (int64_t)i * kColumnStep % n];
        const double over = std::fabs(is - y[at]) - kEps * std::fabs(y[at]);
        if (!std::isfinite(is)) return INFINITY;
        worst = std::max(worst, over / (1.2e-7 * bound[at] + 1e-30));
      }
    }
    return worst;
  }
};
