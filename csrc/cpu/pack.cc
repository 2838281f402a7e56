// codes [K, N] <-> words [K / kBlockK, N / kBlockN, 128].
//
// A code's byte inside its word is 2 * h + u; in that byte the even column's codes are the lower four
// bits and the odd one's the upper four, and q orders the codes of one column (layout.h). So the two
// (2 bits) or one (4 bits) rows k of one (kk, t, h, u), each shifted by bits * q, add up to the half
// bytes of all columns. Both directions work on eight columns at a time, over a strip of columns wide
// enough to read and write whole cache lines.
#include <algorithm>
#include <cstring>

#include "matmul.h"

namespace jax_trirun::cpu {
namespace {

constexpr int kStripBlocks = 16;  // 512 columns

template <int bits>
struct Packing {
  using Codes = Layout<bits>;
  static constexpr int kStripN = kStripBlocks * Codes::kBlockN;
  static constexpr int kChunks = kStripN / 8;  // uint64 of codes in a row of a strip
  static constexpr int kLayers = 4 / bits;     // rows that share half a byte: q
  static constexpr int kBytes = 4;             // of a word: 2 * h + u
  static constexpr int kStepsT = 4;            // index t
  static constexpr uint64_t kMask = 0x0101010101010101u * Codes::kCodeMask;
  static constexpr uint8_t kPadByte = Codes::kPadCode;

  static constexpr int row_of(int kk, int t, int byte, int layer) {
    return 16 * kLayers * kk + 16 * layer + 8 * (byte % 2) + 2 * t + byte / 2;
  }

  static constexpr bool layout_is_as_assumed() {
    for (int k = 0; k < Codes::kBlockK; ++k) {
      for (int n = 0; n < Codes::kBlockN; ++n) {
        const int kk = k / (16 * kLayers), layer = k / 16 % kLayers, t = k / 2 % 4;
        const int byte = 2 * (k % 2) + k / 8 % 2;
        const WordPosition at = Codes::locate(k, n);
        if (row_of(kk, t, byte, layer) != k) return false;
        if (at.word != 16 * (n / 4) + 4 * t + 2 * kk + n / 2 % 2) return false;
        if (at.shift != 8 * byte + 4 * (n % 2) + bits * layer) return false;
      }
    }
    return true;
  }
  static_assert(layout_is_as_assumed(), "bytes and bits are where layout.h puts them");

  // The rows of one (kk, t, byte) and the columns of one strip.
  struct Place {
    int64_t k;  // of the block
    int64_t n;  // of the strip
    int64_t columns;
    int kk, t, byte;
  };

  // Codes of one row and strip, or the same with padding where the matrix has ended.
  static const uint8_t* row(const uint8_t* codes, int64_t k_end, int64_t stride, const Place& at,
                            int layer, uint8_t* padded) {
    const int64_t k = at.k + row_of(at.kk, at.t, at.byte, layer);
    const bool inside = k < k_end;
    const uint8_t* const in = inside ? codes + k * stride + at.n : nullptr;
    if (inside && at.columns == kStripN) return in;
    std::memset(padded, kPadByte, kStripN);
    if (inside) std::memcpy(padded, in, at.columns);
    return padded;
  }

  // The half bytes [column] of one (kk, t, byte).
  static void pack_bytes(const uint8_t* codes, int64_t k, int64_t n, const Place& at,
                         uint8_t* bytes) {
    uint8_t padded[kLayers][kStripN];
    const uint8_t* rows[kLayers];
    for (int layer = 0; layer < kLayers; ++layer) {
      rows[layer] = row(codes, k, n, at, layer, padded[layer]);
    }
    for (int c = 0; c < kChunks; ++c) {
      uint64_t sum = 0;
      for (int layer = 0; layer < kLayers; ++layer) {
        uint64_t eight;
        std::memcpy(&eight, rows[layer] + 8 * c, 8);
        sum |= (eight & kMask) << (bits * layer);
      }
      std::memcpy(bytes + 8 * c, &sum, 8);
    }
  }

  static void unpack_bytes(const uint8_t* bytes, int64_t k, int64_t n, const Place& at,
                           uint8_t* codes) {
    uint8_t row[kStripN];
    for (int layer = 0; layer < kLayers; ++layer) {
      const int64_t to = at.k + row_of(at.kk, at.t, at.byte, layer);
      if (to >= k) continue;
      for (int c = 0; c < kChunks; ++c) {
        uint64_t eight;
        std::memcpy(&eight, bytes + 8 * c, 8);
        eight = eight >> (bits * layer) & kMask;
        std::memcpy(row + 8 * c, &eight, 8);
      }
      std::memcpy(codes + to * n + at.n, row, at.columns);
    }
  }

  // The word of one (kk, t) in a block, at lane = 2 * g + i: columns 2 * lane and 2 * lane + 1.
  static int word_of(int kk, int t, int lane) {
    return 16 * (lane / 2) + 4 * t + 2 * kk + lane % 2;
  }

  static void pack_strip(const uint8_t* codes, int64_t k, int64_t n, Place at, int64_t blocks,
                         uint32_t* words) {
    uint8_t halves[kBytes][kStripN];
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (at.byte = 0; at.byte < kBytes; ++at.byte) pack_bytes(codes, k, n, at, halves[at.byte]);
        for (int64_t block = 0; block < blocks; ++block) {
          for (int lane = 0; lane < Codes::kBlockN / 2; ++lane) {
            const int64_t column = block * Codes::kBlockN + 2 * lane;
            uint32_t word = 0;
            for (int byte = 0; byte < kBytes; ++byte) {
              const uint32_t both = halves[byte][column] | halves[byte][column + 1] << 4;
              word |= both << (8 * byte);
            }
            words[block * Codes::kWordsPerBlock + word_of(at.kk, at.t, lane)] = word;
          }
        }
      }
    }
  }

  static void unpack_strip(const uint32_t* words, int64_t k, int64_t n, Place at, int64_t blocks,
                           uint8_t* codes) {
    uint8_t halves[kBytes][kStripN] = {};
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (int64_t block = 0; block < blocks; ++block) {
          for (int lane = 0; lane < Codes::kBlockN / 2; ++lane) {
            const uint32_t word = words[block * Codes::kWordsPerBlock + word_of(at.kk, at.t, lane)];
            const int64_t column = block * Codes::kBlockN + 2 * lane;
            for (int byte = 0; byte < kBytes; ++byte) {
              halves[byte][column] = word >> (8 * byte) & 15;
              halves[byte][column + 1] = word >> (8 * byte + 4) & 15;
            }
          }
        }
        for (at.byte = 0; at.byte < kBytes; ++at.byte) unpack_bytes(halves[at.byte], k, n, at, codes);
      }
    }
  }

  // Calls strip(place, blocks, offset of its first word) for every block row and strip.
  template <class Strip>
  static void for_strips(int64_t k, int64_t n, const ParallelFor& parallel_for,
                         const Strip& strip) {
    const int64_t n_blocks = ceil_div(n, Codes::kBlockN);
    const int64_t strips = ceil_div(n_blocks, kStripBlocks);
    const int64_t tasks = ceil_div(k, Codes::kBlockK) * strips;
    if (tasks == 0) return;
    const auto body = [&](int64_t task) {
      const int64_t k_block = task / strips;
      const int64_t block = task % strips * kStripBlocks;
      Place at = {};
      at.k = k_block * Codes::kBlockK;
      at.n = block * Codes::kBlockN;
      at.columns = std::min<int64_t>(kStripN, n - at.n);
      strip(at, std::min<int64_t>(kStripBlocks, n_blocks - block),
            (k_block * n_blocks + block) * Codes::kWordsPerBlock);
    };
    if (tasks == 1) {
      body(0);
    } else {
      parallel_for(tasks, body);
    }
  }
};

}  // namespace

template <int bits>
void pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words,
          const ParallelFor& parallel_for) {
  using Packer = Packing<bits>;
  Packer::for_strips(k, n, parallel_for,
                     [&](const typename Packer::Place& at, int64_t blocks, int64_t first_word) {
                       Packer::pack_strip(codes, k, n, at, blocks, words + first_word);
                     });
}

template <int bits>
void unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes,
            const ParallelFor& parallel_for) {
  using Packer = Packing<bits>;
  Packer::for_strips(k, n, parallel_for,
                     [&](const typename Packer::Place& at, int64_t blocks, int64_t first_word) {
                       Packer::unpack_strip(words + first_word, k, n, at, blocks, codes);
                     });
}

template void pack<2>(const uint8_t*, int64_t, int64_t, uint32_t*, const ParallelFor&);
template void pack<4>(const uint8_t*, int64_t, int64_t, uint32_t*, const ParallelFor&);
template void unpack<2>(const uint32_t*, int64_t, int64_t, uint8_t*, const ParallelFor&);
template void unpack<4>(const uint32_t*, int64_t, int64_t, uint8_t*, const ParallelFor&);

}  // namespace jax_trirun::cpu
