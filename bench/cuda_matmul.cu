// Times the library's matmul as it is, through csrc/cuda/matmul.h: whatever kernels and launches it chooses for a size.
// Each row stands beside a kernel that only reads the same bytes and cuBLAS, timed in the same run: captured graphs over
// rotating weights that exceed the cache, random data, the median of seven, once the clocks have settled. Every result
// is held to a float64 product first (a sample of its columns, the last 64 of its rows). Below the rows of a shape come
// its cliffs: a larger M that is faster than a smaller one by more than 5 %.
//
//     nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a --threads 0 \
//       -o /tmp/cuda_matmul bench/cuda_matmul.cu csrc/cuda/*.cu -ldl
//     LD_LIBRARY_PATH=<where libcublas.so.13 is> /tmp/cuda_matmul [options] > bench/results/<name>.csv
//
//     --shape 8192x57344,4096x4096   K x N
//     --m 1,8,33                     rows of x
//     --dtype float16,bfloat16       of x, the scales and y (float16)
//     --group-size 128,64,32,-1      -1: one group for all of K (128)
//     --backend cuda,cuda-portable   (both)
//     --uncaptured                   also launched back to back on a stream, without a graph
//     --no-cublas                    without cuBLAS
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/cuda/matmul.h"
#include "cuda_cublas.cuh"
#include "cuda_timing.cuh"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

constexpr double kCliff = 1.05;

struct Options {
  std::vector<std::string> shapes = {"8192x57344", "28672x8192", "4096x28672", "4096x4096"};
  std::vector<std::string> m = {"1",   "4",   "8",   "16",   "24",   "32",   "33",
                                "48",  "64",  "65",  "96",   "128",  "129",  "192",
                                "256", "257", "512", "1000", "1024", "4096", "16384"};
  std::vector<std::string> dtypes = {"float16"};
  std::vector<std::string> group_sizes = {"128"};
  std::vector<std::string> backends = {"cuda", "cuda-portable"};
  bool uncaptured = false, cublas = true;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items(1);
  for (const char c : list) {
    if (c == ',') items.emplace_back();
    if (c != ',') items.back() += c;
  }
  return items;
}

[[noreturn]] void refuse(const std::string& what, const std::string& came) {
  std::fprintf(stderr, "cuda_matmul: %s, got '%s'\n", what.c_str(), came.c_str());
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options options;
  const struct {
    const char* name;
    std::vector<std::string>* into;
  } lists[] = {{"--shape", &options.shapes},
               {"--m", &options.m},
               {"--dtype", &options.dtypes},
               {"--group-size", &options.group_sizes},
               {"--backend", &options.backends}};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--uncaptured") {
      options.uncaptured = true;
    } else if (arg == "--no-cublas") {
      options.cublas = false;
    } else {
      bool known = false;
      for (const auto& list : lists) {
        if (arg != list.name) continue;
        if (++i == argc) refuse(arg + " wants a value", "nothing");
        *list.into = split(argv[i]);
        known = true;
      }
      if (!known) refuse("the options are those at the top of bench/cuda_matmul.cu", arg);
    }
  }
  for (const std::string& type : options.dtypes)
    if (type != "float16" && type != "bfloat16") refuse("--dtype must be float16 or bfloat16", type);
  for (const std::string& backend : options.backends)
    if (backend != "cuda" && backend != "cuda-portable")
      refuse("--backend must be cuda or cuda-portable", backend);
  return options;
}

int positive(const std::string& text, const char* name) {
  char* end;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (*end || value <= 0 || value > 1 << 20)
    refuse(std::string(name) + " must be numbers from 1 to 1048576", text);
  return (int)value;
}

// Activations, scales and the dense weights of cuBLAS, random, of one type.
template <typename T>
struct Data {
  static constexpr DType kType = std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
  static constexpr float kScale = 0.02f;
  T *x = nullptr, *y = nullptr, *scales = nullptr;
  char* dense = nullptr;

  static T* random(size_t size, uint32_t seed, float scale) {
    T* p;
    CHECK(cudaMalloc(&p, size * sizeof(T)));
    fill_normal<<<1024, 256>>>(p, size, seed, scale);
    CHECK(cudaGetLastError());
    return p;
  }
  void allocate(size_t most_x, size_t most_y, size_t most_scales, size_t dense_bytes) {
    x = random(most_x, 7, 1.f);
    y = random(most_y, 5, 1.f);
    scales = random(most_scales, 9, kScale);
    if (dense_bytes) dense = (char*)random(dense_bytes / sizeof(T), 3, kScale);
  }
};

// A row of the table; columns that nothing was added to stay empty.
class Row {
 public:
  static void print_header() {
    for (const char* column : kColumns) std::printf("%s%s", column == kColumns[0] ? "" : ",", column);
    std::printf("\n");
  }
  void add(const std::string& column, const std::string& text) {
    const auto found = std::find(std::begin(kColumns), std::end(kColumns), column);
    if (found == std::end(kColumns)) refuse("a row has the columns of kColumns", column);
    cells_[found - kColumns] = text;
  }
  void add(const std::string& column, int number) { add(column, std::to_string(number)); }
  void add(const std::string& column, int decimals, double number) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", decimals, number);
    add(column, std::string(text));
  }
  void print() const {
    for (size_t i = 0; i < std::size(kColumns); ++i)
      std::printf("%s%s", i == 0 ? "" : ",", cells_[i].c_str());
    std::printf("\n");
    std::fflush(stdout);
  }

 private:
  static constexpr const char* kColumns[] = {"K",          "N",
                                             "M",          "dtype",
                                             "group_size", "backend",
                                             "us",         "us_uncaptured",
                                             "floor_us",   "time_over_floor",
                                             "cublas_us",  "speedup",
                                             "words_read", "words_read_mb",
                                             "tflops",     "ghz",
                                             "cublas_ghz", "worst_c",
                                             "kernel"};
  std::string cells_[std::size(kColumns)];
};

struct Shape {
  int k, n;
};

struct Case {
  int k, n, m, group_size;  // 0: one group for all of K
  bool portable;
  float floor_us, cublas_us, cublas_ghz;  // 0: not measured

  double operations() const { return 2. * m * n * k; }
  // Products with many operations draw so much power that the clocks fall, and take a while to; the others need only
  // begin.
  float settle_ms() const { return operations() > 1e11 ? 600 : operations() > 8e9 ? 80 : 10; }
  int least_launches() const { return operations() > 8e11 ? 2 : 12; }

  int k_of_group() const { return group_size ? group_size : k; }
  const char* backend() const { return portable ? "cuda-portable" : "cuda"; }
  // What differs from other cases in M alone.
  std::string series(const std::string& dtype) const {
    return std::to_string(k) + "x" + std::to_string(n) + " " + dtype + ", groups of " +
           std::to_string(k_of_group()) + ", " + backend();
  }
  // With what is known before it is timed.
  Row row(const std::string& dtype) const {
    Row row;
    row.add("K", k), row.add("N", n), row.add("M", m), row.add("dtype", dtype);
    row.add("group_size", k_of_group()), row.add("backend", std::string(backend()));
    row.add("floor_us", 2, floor_us);
    if (cublas_us > 0) row.add("cublas_us", 2, cublas_us), row.add("cublas_ghz", 2, cublas_ghz);
    return row;
  }
};

struct Timed {
  Case c;
  std::string series;
  Row row;
  float us;  // in a graph; 0 where no kernel covers the product
};

// How often all words are read: the library says so for each of its launches.
int words_read(const std::string& kernel) {
  int times = 0;
  const std::string said = "words read ";
  for (size_t at = kernel.find(said); at != std::string::npos; at = kernel.find(said, at + 1))
    times += std::atoi(kernel.c_str() + at + said.size());
  return times;
}

template <typename T>
Timed time_case(const Case& c, const Rotation& weights, const Data<T>& data, bool uncaptured) {
  MatmulArgs args;
  args.problem = {c.m, c.n, c.k, c.group_size ? c.k / c.group_size : 1};
  args.x = data.x;
  args.y = data.y;
  args.words = (const uint32_t*)weights.copy(0);
  args.scales = weights.scales(0);
  args.x_type = args.scale_type = args.y_type = Data<T>::kType;
  args.portable = c.portable;

  int device, major, minor, sms;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  Timed timed = {c, c.series(name_of(args.x_type)), c.row(name_of(args.x_type)), 0};
  if (!why_unsupported(args, major * 10 + minor).empty()) return timed;
  if (const int64_t bytes = scratch_bytes(args.problem, args.x_type, c.portable))
    CHECK(cudaMalloc(&args.scratch, bytes));

  const auto launch = [&](int i, cudaStream_t stream) {
    MatmulArgs turn = args;
    turn.words = (const uint32_t*)weights.copy(i);
    turn.scales = weights.scales(i);
    const std::string error = matmul(turn, stream);
    if (error.empty()) return;
    std::printf("\n%s\n", error.c_str());
    std::exit(1);
  };
  CHECK(cudaMemset(data.y, 0xff, (size_t)c.m * c.n * sizeof(T)));
  launch(0, 0);
  CHECK(cudaDeviceSynchronize());
  const double worst =
      Sample::of(data.x, weights.copy(0), weights.scales(0), c.m, c.n, c.k, c.group_size).worst(data.y);

  const int launches = Rotation::launches_of(weights.copies(), c.least_launches());
  const float us = timed.us = graph_time_us(launches, launch, c.settle_ms());
  const float ghz = last_ghz();
  const std::string kernel = describe_kernel(args, major * 10 + minor, sms);
  Row& row = timed.row;
  row.add("us", 2, us), row.add("time_over_floor", 3, us / c.floor_us), row.add("ghz", 2, ghz);
  if (c.cublas_us > 0) row.add("speedup", 3, c.cublas_us / us);
  // Until the host's time for one launch no longer counts.
  const int in_a_row = std::max(launches, std::min(200, (int)(2e4 / us)));
  if (uncaptured) row.add("us_uncaptured", 2, stream_time_us(in_a_row, launch));
  row.add("words_read", words_read(kernel));
  row.add("words_read_mb", 1, words_read(kernel) * 1e-6 * weights.word_bytes);
  row.add("tflops", 0, c.operations() * 1e-6 / us);
  row.add("worst_c", 1, worst);
  row.add("kernel", "\"" + kernel + "\"");
  CHECK(cudaFree(args.scratch));
  return timed;
}

// Rows in the order of the shapes, and what they say together.
class Table {
 public:
  void add(const Timed& timed) {
    std::fprintf(stderr, "%s: M=%d %.2f us\n", timed.series.c_str(), timed.c.m, timed.us);
    rows_.push_back(timed);
  }

  void print(const Shape& shape) const {
    std::map<std::string, std::vector<std::pair<int, float>>> series;  // M, increasing, and microseconds
    for (const Timed& timed : rows_) {
      if (timed.c.k != shape.k || timed.c.n != shape.n) continue;
      timed.row.print();
      if (timed.us > 0) series[timed.series].push_back({timed.c.m, timed.us});
    }
    for (const auto& [name, times] : series) {
      for (size_t i = 0; i < times.size(); ++i) {
        for (size_t j = i + 1; j < times.size(); ++j) {
          if (times[i].second <= times[j].second * kCliff) continue;
          std::printf("# cliff: %s: M=%d takes %.2f us, M=%d %.2f us (%.3f of it)\n", name.c_str(),
                      times[i].first, times[i].second, times[j].first, times[j].second,
                      times[j].second / times[i].second);
        }
      }
    }
  }

 private:
  std::vector<Timed> rows_;
};

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  std::vector<int> tokens;
  for (const std::string& text : options.m) tokens.push_back(positive(text, "--m"));
  std::sort(tokens.begin(), tokens.end());
  std::vector<int> group_sizes;
  for (const std::string& text : options.group_sizes) {
    group_sizes.push_back(text == "-1" ? 0 : positive(text, "--group-size"));
    if (group_sizes.back() != 0 && group_sizes.back() != 32 && group_sizes.back() != 64 &&
        group_sizes.back() != 128)
      refuse("--group-size must be 32, 64, 128 or -1", text);
  }
  std::vector<Shape> shapes;
  for (const std::string& text : options.shapes) {
    const size_t x = text.find('x');
    if (x == std::string::npos) refuse("--shape must be KxN, such as 4096x14336", text);
    shapes.push_back({positive(text.substr(0, x), "--shape"), positive(text.substr(x + 1), "--shape")});
    if (shapes.back().k % 128 != 0 || shapes.back().n % 32 != 0)
      refuse("--shape must have K in multiples of 128 and N in multiples of 32", text);
  }

  size_t most_k = 0, most_n = 0, most_weights = 0, most_dense = 0;
  for (const auto& [k, n] : shapes) {
    const size_t size = (size_t)k * n;
    most_k = std::max<size_t>(most_k, k), most_n = std::max<size_t>(most_n, n);
    most_weights = std::max(most_weights, size);
    most_dense = std::max(most_dense, size * 2 * Rotation::copies_of(size * 2));
  }
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  int driver;
  CHECK(cudaDriverGetVersion(&driver));
  char date[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::localtime(&now));
  std::printf(
      "# %s, %d SMs, CUDA driver %d.%d, %s; captured graphs over rotating weights of more than %zu GB, "
      "medians of 7\n",
      properties.name, properties.multiProcessorCount, driver / 1000, driver % 1000 / 10, date,
      Rotation::kBytes >> 30);
  std::printf("# bench/cuda_matmul.cu");
  for (int i = 1; i < argc; ++i) std::printf(" %s", argv[i]);
  std::printf("\n");

  Rotation weights = {};
  const size_t pool_bytes = Rotation::pool_bytes(most_weights / 4 + most_weights / 16);  // scales for groups of 32
  CHECK(cudaMalloc(&weights.pool, pool_bytes));
  fill_random<<<1024, 256>>>((uint32_t*)weights.pool, pool_bytes / 4, 1);
  const Cublas cublas;
  const bool with_cublas = options.cublas && cublas.available();
  Data<__half> half;
  Data<__nv_bfloat16> bfloat16;
  for (const std::string& type : options.dtypes) {
    const auto allocate = [&](auto& data) {
      data.allocate(tokens.back() * most_k, tokens.back() * most_n, most_weights / 32,
                    with_cublas ? most_dense : 0);
    };
    type == "float16" ? allocate(half) : allocate(bfloat16);
  }
  CHECK(cudaDeviceSynchronize());

  const auto cut = [&](const Shape& shape, int group_size) {
    weights.word_bytes = (size_t)shape.k * shape.n / 4;
    weights.scale_bytes = (size_t)(group_size ? shape.k / group_size : 1) * shape.n * 2;
  };
  std::map<std::tuple<int, int, int>, float> floors;  // of K, N and the group size
  for (const Shape& shape : shapes) {
    for (const int group_size : group_sizes) {
      cut(shape, group_size);
      floors[{shape.k, shape.n, group_size}] =
          read_floor_us(weights, (uint32_t*)(half.y ? (void*)half.y : bfloat16.y));
    }
  }
  std::vector<Case> cases;
  for (const Shape& shape : shapes)
    for (const int m : tokens)
      for (const int group_size : group_sizes)
        cases.push_back(
            {shape.k, shape.n, m, group_size, false, floors[{shape.k, shape.n, group_size}], 0, 0});
  // Large products slow the card's clocks for a while, so they come last.
  std::stable_sort(cases.begin(), cases.end(),
                   [](const Case& a, const Case& b) { return a.operations() < b.operations(); });
  Table table;
  for (Case c : cases) {
    cut({c.k, c.n}, c.group_size);
    for (const std::string& type : options.dtypes) {
      const auto of_type = [&](const auto& data) {
        using T = std::remove_pointer_t<decltype(data.x)>;
        weights.set_scales(data.scales);
        if (with_cublas) {
          c.cublas_us = cublas.time_us<T>(data.x, data.dense, data.y, c.m, c.n, c.k, c.settle_ms(),
                                          c.least_launches());
          c.cublas_ghz = last_ghz();
        }
        for (const std::string& backend : options.backends) {
          c.portable = backend == "cuda-portable";
          table.add(time_case<T>(c, weights, data, options.uncaptured));
        }
      };
      type == "float16" ? of_type(half) : of_type(bfloat16);
    }
  }
  Row::print_header();
  for (const Shape& shape : shapes) table.print(shape);
}
