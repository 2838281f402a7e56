// Vectors of 8 floats: AVX2, FMA, F16C.
#define JAX_TRIRUN_HAS_TABLES 0

#include <immintrin.h>

namespace jax_trirun::cpu {
namespace {

using F32 = __m256;
using U32 = __m256i;
constexpr int kLanes = 8;
constexpr int kMaxRows = 6;       // 6 x 2 accumulators of the 16 registers
constexpr int kMicroVectors = 2;  // columns of the micro-kernel, in vectors
constexpr int kMaxFusedRows = 2;

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 splat(float a) { return _mm256_set1_ps(a); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

inline U32 load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int count>
inline U32 shift_right(U32 a) {
  return count == 0 ? a : _mm256_srli_epi32(a, count);
}

// The lowest two bits of each lane as floats: the code, and the code - 1. The permute reads those
// two bits only, so nothing needs masking.
inline F32 code_values(U32 a) {
  return _mm256_permutevar_ps(_mm256_setr_ps(0.f, 1.f, 2.f, 3.f, 0.f, 1.f, 2.f, 3.f), a);
}
inline F32 code_levels(U32 a) {
  return _mm256_permutevar_ps(_mm256_setr_ps(-1.f, 0.f, 1.f, 2.f, -1.f, 0.f, 1.f, 2.f), a);
}

inline F32 load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
// Of 16 neighbours, those at even and at odd places: the low and the high half of each word.
inline void load_bf16_pairs(const uint16_t* p, F32* even, F32* odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void store_f16(uint16_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, F32 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256i result =
      _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                             _mm256_castsi256_ps(quiet), is_nan)),
                        16);
  const __m256i halves = _mm256_packus_epi32(result, result);  // within each 128-bit half
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}

inline void deinterleave(F32 a, F32 b, F32* even, F32* odd) {
  const auto in_order = [](F32 v) {  // a0 a2 b0 b2 | a4 a6 b4 b6 to a0 a2 a4 a6 | b0 b2 b4 b6
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  };
  *even = in_order(_mm256_shuffle_ps(a, b, 0x88));
  *odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
}
inline void interleave(F32 even, F32 odd, F32* a, F32* b) {
  const F32 low = _mm256_unpacklo_ps(even, odd);   // 0 1 | 4 5
  const F32 high = _mm256_unpackhi_ps(even, odd);  // 2 3 | 6 7
  *a = _mm256_permute2f128_ps(low, high, 0x20);
  *b = _mm256_permute2f128_ps(low, high, 0x31);
}

// An 8 x 8 transpose of 64-bit elements (rows g, columns t and kk), as four 4 x 4 ones; the columns of two
// t at a time.
inline void transpose_half(const uint32_t* words, uint32_t* lanes, int half) {
  const int t = 2 * half;
  for (int g = 0; g < 8; g += 4) {
    const uint32_t* const in = words + 16 * g + 4 * t;
    const __m256i r0 = load_words(in), r1 = load_words(in + 16);
    const __m256i r2 = load_words(in + 32), r3 = load_words(in + 48);
    const auto put = [&](int kk, __m256i low, __m256i high) {
      const auto at = [&](int to_t) {
        return reinterpret_cast<__m256i*>(lanes + 16 * (4 * kk + to_t) + 2 * g);
      };
      _mm256_storeu_si256(at(t), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(at(t + 1), _mm256_permute2x128_si256(low, high, 0x31));
    };
    put(0, _mm256_unpacklo_epi64(r0, r1), _mm256_unpacklo_epi64(r2, r3));
    put(1, _mm256_unpackhi_epi64(r0, r1), _mm256_unpackhi_epi64(r2, r3));
  }
}

}  // namespace
}  // namespace jax_trirun::cpu
