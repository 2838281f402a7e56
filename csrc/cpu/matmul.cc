// How a matmul is cut into tasks. The cuts are along M and N only, so that every element of y is
// summed in the same order whoever computes it.
#include "matmul.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "kernels.h"

namespace jax_trirun::cpu {
namespace {

using Codes = Layout<2>;

// Enough tasks for a small last one. More would shorten the strips of words that are read in one go and, as every task
// makes its own tables of x, cost a narrow layer more: 576 x 960 with four rows takes two threads half again as long
// with 30 tasks as with 8.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kManyTasks = 32;  // that large machines are content with, unless they have more threads
// Long strips are rounded up to whole pages of memory (8 blocks): of words in DRAM, 16 blocks take 10 % less
// time than 14 when pages begin with strips.
constexpr int64_t kPageBlocks = 4096 / (Codes::kWordsPerBlock * sizeof(uint32_t));
// Rows that share one decoded panel of weights.
constexpr int64_t kMaxRegionRows = 96;
// Staged rows of one round: what a last-level cache can hold.
constexpr int64_t kScratchBytes = 4 << 20;
// Below these, waking other threads costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 18;
constexpr int64_t kSerialStagedFloats = 1 << 14;
constexpr int64_t kStageBlocks = 8;

class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

void run_tasks(int64_t tasks, bool serial, const ParallelFor& parallel_for,
               const std::function<void(int64_t)>& body) {
  if (serial || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
  } else {
    parallel_for.run(tasks, body);
  }
}

KernelArgs kernel_args(const MatmulArgs& args) {
  const Problem& problem = args.problem;
  KernelArgs out = {};
  out.m = problem.m;
  out.n = problem.n;
  out.k = problem.k;
  out.k_blocks = problem.k_blocks<2>();
  out.n_blocks = problem.n_blocks<2>();
  out.groups = problem.groups;
  out.group_size = problem.group_size();
  out.x = args.x;
  out.words = args.words;
  out.scales = args.scales;
  out.zeros = args.zeros;
  out.y = args.y;
  out.x_type = args.x_type;
  out.scale_type = args.scale_type;
  out.zero_type = args.zero_type;
  out.y_type = args.y_type;
  return out;
}

// The rows of x are cut into tiles of equal height, a round of tiles at a time.
class Matmul {
 public:
  Matmul(const MatmulArgs& args, const ParallelFor& parallel_for)
      : kernels_(current_kernels()), args_(kernel_args(args)), parallel_for_(parallel_for) {
    tables_ = kernels_.max_table_rows > 0 && args_.zeros == nullptr;
    const int64_t max_rows = tables_ ? kernels_.max_table_rows : kernels_.max_rows;
    tile_rows_ = ceil_div(args_.m, ceil_div(args_.m, max_rows));
    k_padded_ = args_.k_blocks * Codes::kBlockK;
  }

  void run() {
    const int64_t row_bytes = k_padded_ * static_cast<int64_t>(sizeof(float));
    const int64_t tiles = ceil_div(args_.m, tile_rows_);
    const int64_t round_tiles = std::clamp<int64_t>(kScratchBytes / (tile_rows_ * row_bytes), 1, tiles);
    const int64_t round_rows = round_tiles * tile_rows_;
    const Scratch staged(std::min(args_.m, round_rows) * k_padded_);
    for (int64_t row = 0; row < args_.m; row += round_rows) {
      const int64_t rows = std::min(round_rows, args_.m - row);
      stage(row, rows, staged.data());
      compute(row, rows, staged.data());
    }
  }

 private:
  void stage(int64_t row, int64_t rows, float* staged) const {
    const int64_t parts = ceil_div(args_.k_blocks, kStageBlocks);
    const int64_t tiles = ceil_div(rows, tile_rows_);
    const bool serial = rows * k_padded_ <= kSerialStagedFloats;
    run_tasks(tiles * parts, serial, parallel_for_, [&](int64_t task) {
      const int64_t first = task / parts * tile_rows_;
      const int tile = static_cast<int>(std::min(tile_rows_, rows - first));
      const int64_t block = task % parts * kStageBlocks;
      const int64_t blocks = std::min(kStageBlocks, args_.k_blocks - block);
      kernels_.stage(args_, row + first, tile, block, blocks, staged + first * k_padded_);
    });
  }

  void compute(int64_t row, int64_t rows, const float* staged) const {
    const int64_t region_rows =
        tables_ ? tile_rows_ : std::max<int64_t>(1, kMaxRegionRows / tile_rows_) * tile_rows_;
    const int64_t bands = ceil_div(rows, region_rows);
    const int64_t most = std::min(int64_t{kMaxRegionBlocks}, kMaxRowBlocks / std::min(region_rows, rows));
    const int64_t threads = parallel_for_.threads;
    const int64_t wanted = std::min(kTasksPerThread * threads, std::max(kManyTasks, threads));
    int64_t strip = std::max<int64_t>(args_.n_blocks * bands / wanted, 1);
    if (strip > kPageBlocks) strip = ceil_div(strip, kPageBlocks) * kPageBlocks;
    strip = std::min(strip, most);
    const bool serial = rows * args_.n * args_.k <= kSerialProducts;
    // The bands of one strip follow each other: its words are still in the cache.
    run_tasks(ceil_div(args_.n_blocks, strip) * bands, serial, parallel_for_, [&](int64_t task) {
      const int64_t first = task % bands * region_rows;
      const int64_t n_block = task / bands * strip;
      const Region region = {row + first, std::min(region_rows, rows - first), n_block,
                             std::min(strip, args_.n_blocks - n_block)};
      if (tables_) {
        kernels_.run_tables(args_, region, staged + first * k_padded_);
      } else {
        kernels_.run(args_, region, static_cast<int>(tile_rows_), staged + first * k_padded_);
      }
    });
  }

  const Kernels& kernels_;
  const KernelArgs args_;
  const ParallelFor& parallel_for_;
  bool tables_;
  int64_t tile_rows_;
  int64_t k_padded_;
};

}  // namespace

void matmul(const MatmulArgs& args, const ParallelFor& parallel_for) {
  const Problem& problem = args.problem;
  if (problem.m == 0 || problem.n == 0) return;
  if (problem.k == 0) {
    std::memset(args.y, 0, problem.m * problem.n * size_of(args.y_type));
    return;
  }
  Matmul(args, parallel_for).run();
}

}  // namespace jax_trirun::cpu
