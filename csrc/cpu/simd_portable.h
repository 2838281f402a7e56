// Vectors of 4 floats in the vector types of GCC and Clang, which become whatever the baseline of
// the machine has: SSE2, VSX, or plain scalars.
#define JAX_TRIRUN_HAS_TABLES 0

#include <cstring>

namespace jax_trirun::cpu {
namespace {

typedef float F32 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));
typedef int32_t S32 __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kMaxRows = 4;       // 4 x 2 accumulators of 16 registers
constexpr int kMicroVectors = 2;  // columns of the micro-kernel, in vectors
constexpr int kMaxFusedRows = 1;

inline F32 splat(float a) { return F32{a, a, a, a}; }
inline F32 zero() { return splat(0.f); }
inline F32 load(const float* p) {
  F32 a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline void store(float* p, F32 a) { std::memcpy(p, &a, sizeof(a)); }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

inline U32 load_words(const uint32_t* p) {
  U32 a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
template <int count>
inline U32 shift_right(U32 a) {
  return a >> count;
}

// The lowest two bits of each lane as floats: the code, and the code - 1.
inline F32 code_values(U32 a) { return __builtin_convertvector((S32)(a & 3), F32); }
inline F32 code_levels(U32 a) { return __builtin_convertvector((S32)(a & 3) - 1, F32); }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Exact: every float16 is a float32. The exponent moves from bias 15 to 127; a subnormal is its
// mantissa times 2^-24.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    return from_bits(sign | to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  }
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000;
  const uint32_t bits = to_bits(value) & 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x1ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more: infinity
  if (bits < 0x38800000) {
    // Subnormal: 0.5 has the unit 2^-24 in its last place, so the sum rounds as float16 does.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline F32 load_f16(const uint16_t* p) {
  return F32{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline F32 load_bf16(const uint16_t* p) {
  const auto wide = [&](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); };
  return F32{wide(0), wide(1), wide(2), wide(3)};
}
// Of 8 neighbours, those at even and at odd places.
inline void load_bf16_pairs(const uint16_t* p, F32* even, F32* odd) {
  const auto wide = [&](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); };
  *even = F32{wide(0), wide(2), wide(4), wide(6)};
  *odd = F32{wide(1), wide(3), wide(5), wide(7)};
}
inline void store_f16(uint16_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a[i]);
}
inline void store_bf16(uint16_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bfloat16(a[i]);
}

inline void deinterleave(F32 a, F32 b, F32* even, F32* odd) {
  *even = F32{a[0], a[2], b[0], b[2]};
  *odd = F32{a[1], a[3], b[1], b[3]};
}
inline void interleave(F32 even, F32 odd, F32* a, F32* b) {
  *a = F32{even[0], odd[0], even[1], odd[1]};
  *b = F32{even[2], odd[2], even[3], odd[3]};
}

// An 8 x 8 transpose of 64-bit elements (rows g, columns t and kk), the columns of two t at a time.
inline void transpose_half(const uint32_t* words, uint32_t* lanes, int half) {
  for (int g = 0; g < 8; ++g) {
    for (int t = 2 * half; t < 2 * half + 2; ++t) {
      for (int kk = 0; kk < 2; ++kk) {
        std::memcpy(lanes + 16 * (4 * kk + t) + 2 * g, words + 16 * g + 4 * t + 2 * kk, 8);
      }
    }
  }
}

}  // namespace
}  // namespace jax_trirun::cpu
