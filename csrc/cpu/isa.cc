// Which kernels run: the best this build has and this machine can execute, unless told otherwise.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "matmul.h"

#if defined(JAX_TRIRUN_HAVE_AVX)
#include <cpuid.h>
#endif

namespace jax_trirun::cpu {
namespace {

#if defined(JAX_TRIRUN_HAVE_AVX)

// CPUID and XCR0 (Intel SDM volume 1, 13.3 and 14.3; volume 2, CPUID): an instruction set counts
// only if the processor has it and the operating system saves its registers.
struct X86Features {
  bool avx2 = false;
  bool avx512 = false;
};

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

X86Features detect() {
  const auto bit = [](unsigned value, int index) { return (value >> index & 1) != 0; };
  X86Features found;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return found;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx || !fma || !f16c || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  constexpr uint64_t kYmm = 0x6;   // XMM and the upper halves of YMM
  constexpr uint64_t kZmm = 0xe6;  // and the mask registers and all of ZMM
  const uint64_t state = enabled_state();
  const bool foundation = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  found.avx2 = bit(b, 5) && (state & kYmm) == kYmm;
  found.avx512 = found.avx2 && foundation && dq && bw && vl && (state & kZmm) == kZmm;
  return found;
}

#endif

constexpr int kMaxTargets = 4;

struct Targets {
  const Kernels* kernels[kMaxTargets] = {};
  const char* names[kMaxTargets] = {};
  int count = 0;

  void add(const Kernels* found) {
    kernels[count] = found;
    names[count++] = found->name;
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(names[i], name) == 0) return kernels[i];
    }
    return nullptr;
  }
};

Targets make_targets() {
  Targets targets;
#if defined(JAX_TRIRUN_HAVE_AVX)
  const X86Features features = detect();
  if (features.avx512) targets.add(avx512_kernels());
  if (features.avx2) targets.add(avx2_kernels());
#elif defined(JAX_TRIRUN_HAVE_NEON)
  targets.add(neon_kernels());
#endif
  targets.add(portable_kernels());
  return targets;
}

const Targets& targets() {
  static const Targets found = make_targets();
  return found;
}

const Kernels* first_choice() {
  const char* const wanted = std::getenv("JAX_TRIRUN_CPU_ISA");
  const Kernels* const best = targets().kernels[0];
  if (wanted == nullptr || *wanted == '\0') return best;
  const Kernels* const found = targets().find(wanted);
  if (found != nullptr) return found;
  std::fprintf(stderr, "jax_trirun: JAX_TRIRUN_CPU_ISA must be one of");
  for (int i = 0; i < targets().count; ++i) std::fprintf(stderr, " %s", targets().names[i]);
  std::fprintf(stderr, " on this machine, got %s; using %s\n", wanted, best->name);
  return best;
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> kernels{first_choice()};
  return kernels;
}

}  // namespace

const Kernels& current_kernels() { return *in_use().load(std::memory_order_acquire); }

const char* const* available_isas(int* count) {
  *count = targets().count;
  return targets().names;
}

const char* current_isa() { return current_kernels().name; }

bool set_isa(const char* name) {
  const Kernels* const found = targets().find(name);
  if (found != nullptr) in_use().store(found, std::memory_order_release);
  return found != nullptr;
}

}  // namespace jax_trirun::cpu
