// cuBLAS as the CUDA benchmarks time it: found at run time, with the prototypes stated here, so that neither a header nor
// a library is needed to build them.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <type_traits>

#include "cuda_timing.cuh"

class Cublas {
 public:
  Cublas() {
    void* library = dlopen("libcublas.so.13", RTLD_NOW);
    if (!library) library = dlopen("libcublas.so.12", RTLD_NOW);
    if (!library) library = dlopen("libcublas.so", RTLD_NOW);
    if (!library) {
      std::printf("# no cuBLAS, its columns stay empty: %s\n", dlerror());
      return;
    }
    constexpr size_t kWorkspace = (size_t)64 << 20;
    void* workspace;
    CHECK(cudaMalloc(&workspace, kWorkspace));
    expect(((int (*)(void**))dlsym(library, "cublasCreate_v2"))(&handle_), "cublasCreate");
    expect(((int (*)(void*, void*, size_t))dlsym(library, "cublasSetWorkspace_v2"))(handle_, workspace,
                                                                                    kWorkspace),
           "cublasSetWorkspace");
    set_stream_ = (SetStream)dlsym(library, "cublasSetStream_v2");
    gemm_ = (Gemm)dlsym(library, "cublasGemmEx");
  }

  bool available() const { return gemm_ != nullptr; }

  // y [m, n] = x [m, k] @ W, all row-major and of T, summed in float32; W is [k, n], as Flax has it, or transposed [n, k].
  template <typename T>
  void multiply(const T* x, const T* w, bool transposed, T* y, int m, int n, int k,
                cudaStream_t stream) const {
    constexpr int kType = std::is_same_v<T, __nv_bfloat16> ? 14 : 2;  // CUDA_R_16BF, CUDA_R_16F
    constexpr int kFloat32 = 68, kDefault = -1;  // CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
    const float one = 1.f, zero = 0.f;
    expect(set_stream_(handle_, stream), "cublasSetStream");
    expect(gemm_(handle_, transposed, 0, n, m, k, &one, w, kType, transposed ? k : n, x, kType, k, &zero, y,
                 kType, n, kFloat32, kDefault),
           "cublasGemmEx");
  }

  // Microseconds a product in a captured graph, over weights in turn; of the two layouts of W the faster one counts.
  template <typename T>
  float time_us(const T* x, char* weights, T* y, int m, int n, int k, float settle_ms,
                int least_launches = 12) const {
    const size_t bytes = (size_t)k * n * sizeof(T);
    const int copies = Rotation::copies_of(bytes);
    float best = 1e9f;
    for (bool transposed : {false, true}) {
      best = std::min(best, graph_time_us(
                                Rotation::launches_of(copies, least_launches),
                                [&](int i, cudaStream_t stream) {
                                  multiply(x, (const T*)(weights + i % copies * bytes), transposed, y, m, n,
                                           k, stream);
                                },
                                settle_ms));
    }
    return best;
  }

 private:
  using SetStream = int (*)(void*, cudaStream_t);
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
                       int, const void*, void*, int, int, int, int);

  static void expect(int status, const char* what) {
    if (status == 0) return;
    std::printf("%s: status %d\n", what, status);
    std::exit(1);
  }

  void* handle_ = nullptr;
  SetStream set_stream_ = nullptr;
  Gemm gemm_ = nullptr;
};
