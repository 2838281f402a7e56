// One straightforward kernel, for any machine.
#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace jax_trirun::cpu {
namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

float load(const void* data, DType type, int64_t i) {
  if (type == DType::kF32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  if (type == DType::kF16) return half_to_float(h);
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (u < 0x38800000u) {                        // subnormal: let the addition round
    float v;
    std::memcpy(&v, &u, 4);
    v += 0.5f;
    std::memcpy(&u, &v, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (u >> 13));
}

void store(void* data, DType type, int64_t i, float value) {
  if (type == DType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        type == DType::kF16 ? float_to_half(value) : float_to_bf16(value);
  }
}

}  // namespace

void matmul(const MatmulArgs& a, const ParallelFor& parallel_for) {
  using L = Layout<2>;
  const Problem& p = a.problem;
  const int64_t n_blocks = p.n_blocks<2>();
  parallel_for(n_blocks, [&](int64_t nb) {
    std::vector<float> w(p.k);
    for (int64_t n = nb * L::kBlockN; n < std::min<int64_t>(p.n, (nb + 1) * L::kBlockN); ++n) {
      for (int64_t k = 0; k < p.k; ++k) {
        const WordPosition at = L::locate(k % L::kBlockK, n % L::kBlockN);
        const uint32_t word =
            a.words[(k / L::kBlockK * n_blocks + nb) * L::kWordsPerBlock + at.word];
        const int64_t g = k / p.group_size() * p.n + n;
        const float zero = a.zeros ? load(a.zeros, a.zero_type, g) : L::kZeroPoint;
        w[k] = load(a.scales, a.scale_type, g) * ((word >> at.shift & L::kCodeMask) - zero);
      }
      for (int64_t m = 0; m < p.m; ++m) {
        float sum = 0;
        for (int64_t k = 0; k < p.k; ++k) sum += load(a.x, a.x_type, m * p.k + k) * w[k];
        store(a.y, a.y_type, m * p.n + n, sum);
      }
    }
  });
}

namespace {
const char* const kIsas[] = {"scalar"};
}
const char* const* available_isas(int* count) {
  *count = 1;
  return kIsas;
}
const char* current_isa() { return kIsas[0]; }
bool set_isa(const char* name) { return std::strcmp(name, kIsas[0]) == 0; }

}  // namespace jax_trirun::cpu
