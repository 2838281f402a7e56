// The packed layout, version 1: where the code of weight W[k, n] lives.
//
// This file is the only place that says so. Everything else asks it: the CPU and CUDA kernels at
// compile time, Python through the native module's tables. csrc/README.md draws one block by hand.
//
// A matrix of codes [K, N] is cut into blocks of kBlockK x kBlockN codes. Every block is 128 uint32
// words (512 bytes, 4 words for each of a warp's 32 lanes) that mean something on their own, so the
// packed array has shape [K / kBlockK, N / kBlockN, 128]: slices along either leading axis are packed
// arrays too. K and N are rounded up to whole blocks; the padding holds kPadCode.
//
// Why these positions:
//  * The four words of a lane are one 16-byte load, and become the A operand of mma.m16n8k16 (output
//    features are A's rows, tokens are B's columns) without a shuffle. The A fragment of wgmma is the
//    same one, stacked over four warps, so the words serve both.
//    (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Register Fragments for wgmma.m64nNk16".)
//  * A lane's rows over both 16-row tiles are n = 4g .. 4g + 3: its scales are one vector load and its
//    results one vector store.
//  * k is in its natural order inside each 16-wide step, so activations need no reordering, whether
//    ldmatrix, TMA or a plain load brings them.
//  * The two codes of a half2 register sit at the same bit of the two halves of a word. One LOP3 puts
//    both under a float16 or bfloat16 exponent; the lower byte of each half needs no shift.
//  * The four codes at the same bit of a word's four bytes share n: (word >> 2p) & 0x03030303 is a
//    register of the int8 A operand of mma.m16n8k32, and one word is one such 16 x 32 tile.
//  * Codes next to each other in a byte share n and are 16 apart in k: on a CPU, the low bits of a word
//    index a table of all values (one permute), and two neighbouring codes one of all sums of a pair
//    of activations.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_TRIRUN_HOST_DEVICE __host__ __device__
#else
#define JAX_TRIRUN_HOST_DEVICE
#endif

namespace jax_trirun {

// Goes into every file that holds packed words. Raise it when a code moves.
inline constexpr int kLayoutVersion = 1;

struct WordPosition {
  int word;   // 0 .. kWordsPerBlock - 1 inside the block
  int shift;  // the code's lowest bit inside the word
};

struct CodePosition {
  int k;  // 0 .. kBlockK - 1 inside the block
  int n;  // 0 .. kBlockN - 1 inside the block
};

template <int bits>
struct Layout {
  static_assert(bits == 2 || bits == 4, "packed codes have 2 or 4 bits");

  static constexpr int kBits = bits;
  static constexpr uint32_t kCodeMask = (1u << bits) - 1;
  static constexpr int kCodesPerWord = 32 / bits;
  static constexpr int kCodesPerHalf = kCodesPerWord / 2;

  static constexpr int kLanes = 32;        // of one warp
  static constexpr int kWordsPerLane = 4;  // one 16-byte load
  static constexpr int kWordsPerBlock = kLanes * kWordsPerLane;

  // A lane's words are a 2 x 2 grid: word 2 * kk + i covers the kk-th half of the block's k and the
  // i-th of its two 16-row tiles.
  static constexpr int kTiles = 2;                              // 16-row mma tiles in a block, index i
  static constexpr int kHalves = kWordsPerLane / kTiles;        // index kk
  static constexpr int kStepsPerWord = kCodesPerWord / 8;       // 16-wide mma steps in a word, index q
  static constexpr int kBlockN = 16 * kTiles;                   // 32
  static constexpr int kBlockK = 16 * kStepsPerWord * kHalves;  // 64 for 2 bits, 32 for 4 bits

  static_assert(kBlockK * kBlockN * bits == kWordsPerBlock * 32, "a block is full");

  // The code whose weight is zero: W = s * (code - kZeroPoint) when no zeros are given.
  static constexpr int kZeroPoint = bits == 2 ? 1 : 8;
  static constexpr int kPadCode = kZeroPoint;

  // Index grammar, as in the PTX pages: g = lane / 4 and t = lane % 4; b picks row g or g + 8 of a
  // 16-row tile; u picks the lower or upper 8 of a 16-wide step; h the half of a register.
  static JAX_TRIRUN_HOST_DEVICE constexpr WordPosition locate(int k, int n) {
    const int kk = k / (16 * kStepsPerWord);
    const int q = k / 16 % kStepsPerWord;
    const int u = k / 8 % 2;
    const int t = k / 2 % 4;
    const int h = k % 2;
    const int g = n / 4;
    const int i = n / 2 % 2;
    const int b = n % 2;
    const int lane = 4 * g + t;
    const int code = h * kCodesPerHalf + u * (kCodesPerHalf / 2) + b * kStepsPerWord + q;
    return {lane * kWordsPerLane + 2 * kk + i, code * bits};
  }

  // The inverse of locate.
  static JAX_TRIRUN_HOST_DEVICE constexpr CodePosition code_at(int word, int shift) {
    const int lane = word / kWordsPerLane;
    const int g = lane / 4;
    const int t = lane % 4;
    const int kk = word / 2 % 2;
    const int i = word % 2;
    const int code = shift / bits;
    const int h = code / kCodesPerHalf;
    const int u = code / (kCodesPerHalf / 2) % 2;
    const int b = code / kStepsPerWord % 2;
    const int q = code % kStepsPerWord;
    return {16 * (kStepsPerWord * kk + q) + 8 * u + 2 * t + h, 4 * g + 2 * i + b};
  }
};

namespace internal {
template <int bits>
constexpr bool locate_inverts_code_at() {
  for (int word = 0; word < Layout<bits>::kWordsPerBlock; ++word) {
    for (int shift = 0; shift < 32; shift += bits) {
      const CodePosition at = Layout<bits>::code_at(word, shift);
      const WordPosition back = Layout<bits>::locate(at.k, at.n);
      if (back.word != word || back.shift != shift) return false;
    }
  }
  return true;
}
}  // namespace internal

static_assert(internal::locate_inverts_code_at<2>(), "every 2-bit code has one place");
static_assert(internal::locate_inverts_code_at<4>(), "every 4-bit code has one place");

}  // namespace jax_trirun
