// Vectors of 4 floats: AArch64's Advanced SIMD, which every 64-bit Arm has.
#define JAX_TRIRUN_HAS_TABLES 0

#include <arm_neon.h>

namespace jax_trirun::cpu {
namespace {

using F32 = float32x4_t;
using U32 = uint32x4_t;
constexpr int kLanes = 4;
constexpr int kMaxRows = 6;       // 6 x 4 accumulators of the 32 registers
constexpr int kMicroVectors = 4;  // columns of the micro-kernel, in vectors
constexpr int kMaxFusedRows = 2;

inline F32 zero() { return vdupq_n_f32(0.f); }
inline F32 splat(float a) { return vdupq_n_f32(a); }
inline F32 load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F32 a) { vst1q_f32(p, a); }
inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
inline F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }

inline U32 load_words(const uint32_t* p) { return vld1q_u32(p); }
template <int count>
inline U32 shift_right(U32 a) {
  if constexpr (count == 0) {
    return a;
  } else {
    return vshrq_n_u32(a, count);
  }
}

// The lowest two bits of each lane as floats: the code, and the code - 1.
inline F32 code_values(U32 a) { return vcvtq_f32_u32(vandq_u32(a, vdupq_n_u32(3))); }
inline F32 code_levels(U32 a) { return vsubq_f32(code_values(a), vdupq_n_f32(1.f)); }

inline F32 load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F32 load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
// Of 8 neighbours, those at even and at odd places.
inline void load_bf16_pairs(const uint16_t* p, F32* even, F32* odd) {
  const uint16x4x2_t pairs = vld2_u16(p);
  *even = vreinterpretq_f32_u32(vshll_n_u16(pairs.val[0], 16));
  *odd = vreinterpretq_f32_u32(vshll_n_u16(pairs.val[1], 16));
}
inline void store_f16(uint16_t* p, F32 a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
inline void store_bf16(uint16_t* p, F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16));
}

inline void deinterleave(F32 a, F32 b, F32* even, F32* odd) {
  *even = vuzp1q_f32(a, b);
  *odd = vuzp2q_f32(a, b);
}
inline void interleave(F32 even, F32 odd, F32* a, F32* b) {
  *a = vzip1q_f32(even, odd);
  *b = vzip2q_f32(even, odd);
}

// An 8 x 8 transpose of 64-bit elements (rows g, columns t and kk), as sixteen 2 x 2 ones; the columns of
// two t at a time.
inline void transpose_half(const uint32_t* words, uint32_t* lanes, int half) {
  for (int g = 0; g < 8; g += 2) {
    for (int t = 2 * half; t < 2 * half + 2; ++t) {
      const uint64x2_t low = vreinterpretq_u64_u32(vld1q_u32(words + 16 * g + 4 * t));
      const uint64x2_t high = vreinterpretq_u64_u32(vld1q_u32(words + 16 * (g + 1) + 4 * t));
      uint32_t* const out = lanes + 16 * t + 2 * g;
      vst1q_u32(out, vreinterpretq_u32_u64(vzip1q_u64(low, high)));
      vst1q_u32(out + 64, vreinterpretq_u32_u64(vzip2q_u64(low, high)));
    }
  }
}

}  // namespace
}  // namespace jax_trirun::cpu
