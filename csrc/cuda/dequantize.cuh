// One packed word -> the A fragments of its mma steps, as exact float16 or bfloat16 values of
// (code - kZeroPoint).
//
// A code under a power of two's exponent is a float: 0x6400 | (c << p) is 1024 + c * 2^p in float16.
// One LOP3 does that for a pair of codes, one HFMA2 brings the pair to c - 1. Every intermediate is
// exactly representable (11 bits in float16, 8 in bfloat16), so the result is exact; the folded form,
// which leaves the offset in and takes it back through sums of activations, saves the HFMA2 and loses
// that, see "the bare magic" in csrc/README.md.
#pragma once

#include "../layout.h"
#include "ptx.cuh"

namespace jax_trirun::cuda {

namespace internal {

// bits of an exactly representable small value in either format
template <typename T>
struct Float16Format;
template <>
struct Float16Format<__half> {
  static constexpr int kMantissa = 10;
  static constexpr int kBias = 15;
};
template <>
struct Float16Format<__nv_bfloat16> {
  static constexpr int kMantissa = 7;
  static constexpr int kBias = 127;
};

// The pair of 16-bit encodings of `numerator / 2^shift`, where that is exact.
template <typename T>
__host__ __device__ constexpr uint32_t encode_pair(int numerator, int shift) {
  const uint32_t sign = numerator < 0 ? 0x8000u : 0u;
  uint32_t magnitude = numerator < 0 ? -numerator : numerator;
  int exponent = Float16Format<T>::kBias - shift + Float16Format<T>::kMantissa;
  while (magnitude >> (Float16Format<T>::kMantissa + 1)) magnitude >>= 1, ++exponent;
  while (!(magnitude >> Float16Format<T>::kMantissa)) magnitude <<= 1, --exponent;
  const uint32_t bits = sign | static_cast<uint32_t>(exponent) << Float16Format<T>::kMantissa |
                        (magnitude & ((1u << Float16Format<T>::kMantissa) - 1));
  return bits << 16 | bits;
}

template <typename T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (__is_same(T, __half)) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// Only sm_90 and later add and multiply bfloat16 pairs otherwise than by an fma.
template <typename T>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return fma2<T>(a, encode_pair<T>(1, 0), b);
#else
  uint32_t d;
  if constexpr (__is_same(T, __half)) {
    asm("add.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("add.rn.bf16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
#endif
}
template <typename T>
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (__is_same(T, __half)) {
    asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
}

}  // namespace internal

// Where the codes of a word lie, and the constants that turn them into floats. An instruction holds one constant; where
// it needs two, the other is in a register, and ptxas sets that again for every unit of K, with an instruction each.
template <typename T, int bits>
struct Conversion {
  __device__ __forceinline__ explicit Conversion(uint32_t = 0) {}

  using L = Layout<bits>;
  static constexpr int kMantissa = internal::Float16Format<T>::kMantissa;
  // Codes that fit under the leading one without a shift of the word.
  static constexpr int kPerShift = kMantissa / bits;
  static constexpr int kStride = kPerShift >= L::kCodesPerHalf / 2 ? L::kCodesPerHalf / 2 : kPerShift;
  static constexpr int kOne = 1 << kMantissa;
  static constexpr uint32_t kMagic = internal::encode_pair<T>(kOne, 0);
  static constexpr uint32_t unit_of(int index) { return internal::encode_pair<T>(1, index * bits); }

  static __device__ __forceinline__ uint32_t magic() { return kMagic; }
  template <int kIndex>
  static __device__ __forceinline__ uint32_t unit() {
    return unit_of(kIndex);
  }
};

// The same with the constants kept in registers: ptxas does not know what comes out of a shuffle, and nothing of a zero
// that it cannot know to be one.
template <typename T, int bits>
struct KeptConversion : Conversion<T, bits> {
  using Base = Conversion<T, bits>;
  uint32_t kept_magic, kept_unit[Base::kStride];

  __device__ __forceinline__ explicit KeptConversion(uint32_t zero) {
    kept_magic = __shfl_sync(0xffffffffu, Base::kMagic | zero, 0);
#pragma unroll
    for (int i = 1; i < Base::kStride; ++i)
      kept_unit[i] = __shfl_sync(0xffffffffu, Base::unit_of(i) | zero, 0);
  }
  __device__ __forceinline__ uint32_t magic() const { return kept_magic; }
  template <int kIndex>
  __device__ __forceinline__ uint32_t unit() const {
    return kept_unit[kIndex];
  }
};

// The pair of codes (k, k + 1) whose lower one is the `kIndex`-th of the half word: a register of
// {c - zero point, c' - zero point}.
template <typename T, int bits, int kIndex, typename Constants>
__device__ __forceinline__ uint32_t dequantize_pair(const uint32_t (&shifted)[4],
                                                    const Constants& constants) {
  using L = Layout<bits>;
  using C = Conversion<T, bits>;
  constexpr int kInShift = kIndex % C::kStride, kPosition = kInShift * bits;
  constexpr uint32_t kMask = (L::kCodeMask | L::kCodeMask << 16) << kPosition;
  constexpr uint32_t kOffset =
      internal::encode_pair<T>(-(C::kOne + (L::kZeroPoint << kPosition)), kPosition);
  const uint32_t raised = and_or<kMask>(shifted[kIndex / C::kStride], constants.magic());
  if constexpr (kInShift == 0) return internal::add2<T>(raised, kOffset);
  return internal::fma2<T>(raised, constants.template unit<kInShift>(), kOffset);
}

// a[q] is the A fragment of the word's q-th 16-wide step.
template <typename T, int bits, typename Constants = Conversion<T, bits>>
__device__ __forceinline__ void dequantize_word(uint32_t (&a)[Layout<bits>::kStepsPerWord][4],
                                                uint32_t word, const Constants& constants = Constants()) {
  using L = Layout<bits>;
  constexpr int kStride = Constants::kStride;
  const uint32_t shifted[4] = {word, word >> (kStride * bits), word >> (2 * kStride * bits),
                               word >> (3 * kStride * bits)};  // unused ones vanish
  // Register r of a step holds row half b = r % 2 and column half u = r / 2 (layout.h).
  constexpr int kB = L::kStepsPerWord;
  constexpr int kU = L::kCodesPerHalf / 2;
  a[0][0] = dequantize_pair<T, bits, 0>(shifted, constants);
  a[0][1] = dequantize_pair<T, bits, kB>(shifted, constants);
  a[0][2] = dequantize_pair<T, bits, kU>(shifted, constants);
  a[0][3] = dequantize_pair<T, bits, kU + kB>(shifted, constants);
  if constexpr (L::kStepsPerWord == 2) {
    a[1][0] = dequantize_pair<T, bits, 1>(shifted, constants);
    a[1][1] = dequantize_pair<T, bits, kB + 1>(shifted, constants);
    a[1][2] = dequantize_pair<T, bits, kU + 1>(shifted, constants);
    a[1][3] = dequantize_pair<T, bits, kU + kB + 1>(shifted, constants);
  }
}

}  // namespace jax_trirun::cuda
