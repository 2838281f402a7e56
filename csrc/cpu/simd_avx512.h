// Vectors of 16 floats: AVX-512 F, BW, DQ, VL.
#define JAX_TRIRUN_HAS_TABLES 1

#include <immintrin.h>

namespace jax_trirun::cpu {
namespace {

using F32 = __m512;
using U32 = __m512i;
constexpr int kLanes = 16;
constexpr int kMaxRows = 12;      // 12 x 2 accumulators of the 32 registers
constexpr int kMicroVectors = 2;  // columns of the micro-kernel, in vectors
constexpr int kMaxFusedRows = 2;
constexpr int kMaxTableRows = 8;  // a block's tables take 2 KB a row: half of a 32 KB L1

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 splat(float a) { return _mm512_set1_ps(a); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

// A value that the compiler must not look into, and so keeps in a register.
template <typename Vector>
inline Vector opaque(Vector a) {
  __asm__("" : "+v"(a));
  return a;
}

inline U32 load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
template <int count>
inline U32 shift_right(U32 a) {
  return count == 0 ? a : _mm512_srli_epi32(a, count);
}

// The lowest two bits of each lane as floats: the code, and the code - 1. The permute reads those
// two bits only, so nothing needs masking.
inline F32 code_values(U32 a) { return _mm512_permutevar_ps(_mm512_setr4_ps(0.f, 1.f, 2.f, 3.f), a); }
inline F32 code_levels(U32 a) { return _mm512_permutevar_ps(_mm512_setr4_ps(-1.f, 0.f, 1.f, 2.f), a); }

// table[lowest four bits of each lane]
inline F32 look_up(U32 a, F32 table) { return _mm512_permutexvar_ps(a, table); }

// For entry e of a table: the levels of the codes e % 4 and e / 4.
inline F32 low_levels() { return _mm512_setr4_ps(-1.f, 0.f, 1.f, 2.f); }
inline F32 high_levels() {
  return _mm512_setr_ps(-1.f, -1.f, -1.f, -1.f, 0.f, 0.f, 0.f, 0.f, 1.f, 1.f, 1.f, 1.f, 2.f, 2.f, 2.f, 2.f);
}

inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Of 32 neighbours, those at even and at odd places: the low and the high half of each word.
inline void load_bf16_pairs(const uint16_t* p, F32* even, F32* odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void store_f16(uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, F32 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}

inline void deinterleave(F32 a, F32 b, F32* even, F32* odd) {
  const __m512i from_even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i from_odd = _mm512_add_epi32(from_even, _mm512_set1_epi32(1));
  *even = _mm512_permutex2var_ps(a, from_even, b);
  *odd = _mm512_permutex2var_ps(a, from_odd, b);
}
inline void interleave(F32 even, F32 odd, F32* a, F32* b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  *a = _mm512_permutex2var_ps(even, low, odd);
  *b = _mm512_permutex2var_ps(even, high, odd);
}

// An 8 x 8 transpose of 64-bit elements (rows g, columns t and kk), the columns of two t at a time: the
// loads bring rows g and g + 2 together, the unpacks rows g and g + 1, the shuffles rows g and g + 4.
inline void transpose_half(const uint32_t* words, uint32_t* lanes, int half) {
  const auto rows = [&](int g) {
    const uint32_t* const in = words + 16 * g + 8 * half;
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 2 * 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  };
  const __m512i r02 = rows(0), r13 = rows(1), r46 = rows(4), r57 = rows(5);
  const auto put = [&](int kk, __m512i low, __m512i high) {
    uint32_t* const out = lanes + 16 * (4 * kk + 2 * half);
    _mm512_storeu_si512(out, _mm512_shuffle_i64x2(low, high, 0x88));
    _mm512_storeu_si512(out + 16, _mm512_shuffle_i64x2(low, high, 0xdd));
  };
  put(0, _mm512_unpacklo_epi64(r02, r13), _mm512_unpacklo_epi64(r46, r57));
  put(1, _mm512_unpackhi_epi64(r02, r13), _mm512_unpackhi_epi64(r46, r57));
}

}  // namespace
}  // namespace jax_trirun::cpu
