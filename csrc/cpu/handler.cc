// The CPU back end as XLA and Python see it: FFI handlers, the layout's tables, instruction sets.
//
// The handlers check every size again. Python has done so with better words; here it is for safety, as
// a custom call can also come out of an exported file.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../ffi_checks.h"
#include "../ffi_module.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_trirun::cpu {
namespace {

// ---- Threads ------------------------------------------------------------------------------------

std::atomic<int> max_threads{0};  // 0: as many as XLA's pool has

// A hint to the processor that this thread only waits.
inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the caller and its helpers share. A helper may get its turn after everything is done and the
// caller has returned: it then finds no task left and never touches body.
struct SharedWork {
  SharedWork(int64_t tasks, const std::function<void(int64_t)>* body) : tasks(tasks), body(body) {}

  void take_tasks() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      (*body)(task);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
      }
    }
  }

  void wait() {
    // What other threads still work on is one task each: to sleep and be woken takes longer than most of them.
    for (int i = 0; i < kSpins; ++i) {
      if (finished()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [&] { return finished(); });
  }

  bool finished() const { return done.load(std::memory_order_acquire) == tasks; }

  static constexpr int kSpins = 400;  // some 10 microseconds

  const int64_t tasks;
  const std::function<void(int64_t)>* const body;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable all_done;
};

// The caller works too, and waits only for tasks that some running thread has taken: it cannot
// deadlock, even when it is itself one of the pool's threads and the others are busy.
ParallelFor on_pool(ffi::ThreadPool& pool) {
  const int limit = max_threads.load(std::memory_order_relaxed);
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  if (limit > 0) threads = std::min<int64_t>(threads, limit);
  const auto run = [&pool, threads](int64_t tasks, const std::function<void(int64_t)>& body) {
    const int64_t helpers = std::min(tasks, threads) - 1;
    if (helpers <= 0) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    auto work = std::make_shared<SharedWork>(tasks, &body);
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->take_tasks(); });
    work->take_tasks();
    work->wait();
  };
  return {run, threads};
}

// ---- matmul -------------------------------------------------------------------------------------

// x [M, K], words [K / kBlockK, N / kBlockN, 128], scales [groups, N], zeros [groups, N], or [0, N]
// when the zero point is Layout<2>::kZeroPoint -> y [M, N] in x's type or float32.
ffi::Error matmul_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer words, ffi::AnyBuffer scales,
                       ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> y) {
  MatmulArgs args;
  if (std::string e = read_matmul(args, x, words, scales, zeros, *y); !e.empty()) {
    return ffi::Error::InvalidArgument(e);
  }
  args.zero_type = *float_type(zeros);
  const Problem& p = args.problem;
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();
  if (p.k == 0) {  // an empty sum
    std::fill_n(static_cast<uint8_t*>(args.y), p.m * p.n * size_of(args.y_type), uint8_t{0});
    return ffi::Error::Success();
  }
  matmul(args, on_pool(pool));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(matmul_handler, matmul_impl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>());

// ---- pack and unpack ------------------------------------------------------------------------------

// The sizes of codes [.., K, N] with words [.., K / kBlockK, N / kBlockN, 128], leading axes alike.
struct PackSizes {
  int64_t batch = 1, k = 0, n = 0, words = 0;
};

template <int bits>
std::string pack_sizes(const ffi::AnyBuffer& codes, const ffi::AnyBuffer& words, PackSizes& sizes) {
  const auto c = codes.dimensions();
  const auto w = words.dimensions();
  const std::string got = ", got codes " + shape_of(c) + " and words " + shape_of(w);
  if (codes.element_type() != ffi::DataType::U8 || words.element_type() != ffi::DataType::U32) {
    return "pack: codes must be uint8 and words uint32" + got;
  }
  if (c.size() < 2 || w.size() != c.size() + 1)
    return "pack: words must have one axis more than codes" + got;
  const size_t lead = c.size() - 2;
  for (size_t i = 0; i < lead; ++i) {
    if (c[i] != w[i]) return "pack: leading axes must be equal" + got;
    sizes.batch *= c[i];
  }
  sizes.k = c[lead];
  sizes.n = c[lead + 1];
  const int64_t k_blocks = ceil_div(sizes.k, Layout<bits>::kBlockK);
  const int64_t n_blocks = ceil_div(sizes.n, Layout<bits>::kBlockN);
  if (w[lead] != k_blocks || w[lead + 1] != n_blocks || w[lead + 2] != Layout<bits>::kWordsPerBlock) {
    return "pack: words must end in " + of_shape({k_blocks, n_blocks, Layout<bits>::kWordsPerBlock}) + got;
  }
  sizes.words = k_blocks * n_blocks * Layout<bits>::kWordsPerBlock;
  return "";
}

template <int bits>
ffi::Error pack_bits(ffi::ThreadPool& pool, const ffi::AnyBuffer& codes, const ffi::AnyBuffer& words) {
  PackSizes sizes;
  if (std::string e = pack_sizes<bits>(codes, words, sizes); !e.empty()) {
    return ffi::Error::InvalidArgument(e);
  }
  const auto* from = static_cast<const uint8_t*>(codes.untyped_data());
  auto* to = static_cast<uint32_t*>(words.untyped_data());
  for (int64_t i = 0; i < sizes.batch && sizes.words > 0; ++i) {
    pack<bits>(from + i * sizes.k * sizes.n, sizes.k, sizes.n, to + i * sizes.words, on_pool(pool));
  }
  return ffi::Error::Success();
}

template <int bits>
ffi::Error unpack_bits(ffi::ThreadPool& pool, const ffi::AnyBuffer& words, const ffi::AnyBuffer& codes) {
  PackSizes sizes;
  if (std::string e = pack_sizes<bits>(codes, words, sizes); !e.empty()) {
    return ffi::Error::InvalidArgument("un" + e);
  }
  const auto* from = static_cast<const uint32_t*>(words.untyped_data());
  auto* to = static_cast<uint8_t*>(codes.untyped_data());
  for (int64_t i = 0; i < sizes.batch && sizes.words > 0; ++i) {
    unpack<bits>(from + i * sizes.words, sizes.k, sizes.n, to + i * sizes.k * sizes.n, on_pool(pool));
  }
  return ffi::Error::Success();
}

ffi::Error bad_bits(int64_t bits) {
  return ffi::Error::InvalidArgument("pack: bits must be 2 or 4, got " + std::to_string(bits));
}

ffi::Error pack_impl(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::Result<ffi::AnyBuffer> words,
                     int64_t bits) {
  if (bits == 2) return pack_bits<2>(pool, codes, *words);
  if (bits == 4) return pack_bits<4>(pool, codes, *words);
  return bad_bits(bits);
}

ffi::Error unpack_impl(ffi::ThreadPool pool, ffi::AnyBuffer words, ffi::Result<ffi::AnyBuffer> codes,
                       int64_t bits) {
  if (bits == 2) return unpack_bits<2>(pool, words, *codes);
  if (bits == 4) return unpack_bits<4>(pool, words, *codes);
  return bad_bits(bits);
}

XLA_FFI_DEFINE_HANDLER(
    pack_handler, pack_impl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>(
        "bits"));
XLA_FFI_DEFINE_HANDLER(
    unpack_handler, unpack_impl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>(
        "bits"));

// ---- What is missing ----------------------------------------------------------------------------

// Stands in the CUDA module's place where that was not built: a program exported elsewhere then says what it wants,
// and not only that a target has no name here.
ffi::Error missing_cuda_impl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      "matmul: this program calls jax_trirun's CUDA kernels, but jax_trirun was installed without its "
      "CUDA module; reinstall it where nvcc is found (pip install -v . says what it builds)");
}

XLA_FFI_DEFINE_HANDLER(missing_cuda_handler, missing_cuda_impl,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

// ---- Python -------------------------------------------------------------------------------------

using Table = nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>;

template <int bits>
nb::dict layout_dict() {
  using L = Layout<bits>;
  const size_t size = static_cast<size_t>(L::kWordsPerBlock) * L::kCodesPerWord;
  auto* k_of = new int32_t[size];
  auto* n_of = new int32_t[size];
  nb::capsule own_k(k_of, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  nb::capsule own_n(n_of, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  for (int word = 0; word < L::kWordsPerBlock; ++word) {
    for (int code = 0; code < L::kCodesPerWord; ++code) {
      const CodePosition at = L::code_at(word, code * bits);
      k_of[word * L::kCodesPerWord + code] = at.k;
      n_of[word * L::kCodesPerWord + code] = at.n;
    }
  }
  const size_t shape[2] = {L::kWordsPerBlock, L::kCodesPerWord};
  nb::dict d;
  d["version"] = kLayoutVersion;
  d["bits"] = bits;
  d["block_k"] = L::kBlockK;
  d["block_n"] = L::kBlockN;
  d["words_per_block"] = L::kWordsPerBlock;
  d["codes_per_word"] = L::kCodesPerWord;
  d["zero_point"] = L::kZeroPoint;
  d["pad_code"] = L::kPadCode;
  d["k_of"] = Table(k_of, 2, shape, own_k);
  d["n_of"] = Table(n_of, 2, shape, own_n);
  return d;
}

nb::dict layout(int bits) {
  if (bits == 2) return layout_dict<2>();
  if (bits == 4) return layout_dict<4>();
  throw nb::value_error(("layout: bits must be 2 or 4, got " + std::to_string(bits)).c_str());
}

nb::dict ffi_handlers() {
  nb::dict d;
  d["jax_trirun_matmul_v1"] = capsule(matmul_handler);
  d["jax_trirun_pack_v1"] = capsule(pack_handler);
  d["jax_trirun_unpack_v1"] = capsule(unpack_handler);
  return d;
}

nb::dict missing_cuda_handlers() {
  nb::dict d;
  for (const char* target : {"jax_trirun_matmul_v1", "jax_trirun_dequantize_v1"}) {
    d[target] = capsule(missing_cuda_handler);
  }
  return d;
}

std::vector<std::string> isas() {
  int count = 0;
  const char* const* names = available_isas(&count);
  return std::vector<std::string>(names, names + count);
}

}  // namespace
}  // namespace jax_trirun::cpu

NB_MODULE(_cpu, m) {
  using namespace jax_trirun::cpu;
  m.doc() = "The CPU back end of jax_trirun: FFI handlers and the packed layout's tables.";
  m.def("ffi_handlers", &ffi_handlers, "FFI target name -> handler.");
  m.def("missing_cuda_handlers", &missing_cuda_handlers,
        "FFI target name -> a handler that says that the CUDA module is missing.");
  jax_trirun::def_ffi_api_version(m);
  m.def("layout", &layout, nb::arg("bits"),
        "Sizes and tables of the packed layout: k_of and n_of are int32 [words_per_block, "
        "codes_per_word]; the code of entry (w, i) sits in word w at bit i * bits.");
  m.def("available_isas", &isas, "Instruction sets that this build has and this machine runs, best first.");
  m.def("current_isa", [] { return std::string(current_isa()); }, "The instruction set in use.");
  m.def(
      "set_isa", [](const std::string& name) { return set_isa(name.c_str()); }, nb::arg("name"),
      "Use another of available_isas(); False, and no change, for any other name.");
  m.def(
      "set_max_threads", [](int n) { max_threads.store(n < 0 ? 0 : n); }, nb::arg("n"),
      "Use at most n threads of XLA's pool; 0 takes the limit away. Results do not depend on it.");
}
