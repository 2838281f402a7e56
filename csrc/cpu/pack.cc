// codes [K, N] <-> words [K / kBlockK, N / kBlockN, 128].
//
// A code's byte inside its word is 2 * h + u; in that byte the even column's codes are the lower four
// bits and the odd one's the upper four, and q orders the codes of one column (layout.h). So the two
// (2 bits) or one (4 bits) rows k of one (kk, t, h, u), each shifted by bits * q, add up to the half
// bytes of all columns, and the half bytes of two neighbouring columns make one byte of a word. Both
// directions work on eight columns at a time, over a strip of columns wide enough to read and write
// whole cache lines. The bytes of uint64 and uint16 are taken in little-endian order, as JAX's
// platforms have it.
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
  static constexpr int kChunks = kStripN / 8;        // uint64 of codes in a row of a strip
  static constexpr int kLayers = 4 / bits;           // rows that share half a byte: q
  static constexpr int kBytes = 4;                   // of a word: 2 * h + u
  static constexpr int kStepsT = 4;                  // index t
  static constexpr int kPairs = Codes::kBlockN / 4;  // index g
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
  static const uint8_t* row(const uint8_t* codes, int64_t k_end, int64_t stride, const Place& at, int layer,
                            uint8_t* padded) {
    const int64_t k = at.k + row_of(at.kk, at.t, at.byte, layer);
    const bool inside = k < k_end;
    const uint8_t* const in = inside ? codes + k * stride + at.n : nullptr;
    if (inside && at.columns == kStripN) return in;
    std::memset(padded, kPadByte, kStripN);
    if (inside) std::memcpy(padded, in, at.columns);
    return padded;
  }

  // One byte of a word for each pair of columns, of one (kk, t, byte), in the low byte of a uint16.
  static void pack_bytes(const uint8_t* codes, int64_t k, int64_t n, const Place& at, uint16_t* bytes) {
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
      sum = (sum | sum >> 4) & 0x00ff00ff00ff00ffu;
      std::memcpy(bytes + 4 * c, &sum, 8);
    }
  }

  static void unpack_bytes(const uint16_t* bytes, int64_t k, int64_t n, const Place& at, uint8_t* codes) {
    uint8_t row[kStripN];
    for (int layer = 0; layer < kLayers; ++layer) {
      const int64_t to = at.k + row_of(at.kk, at.t, at.byte, layer);
      if (to >= k) continue;
      for (int c = 0; c < kChunks; ++c) {
        uint64_t eight;
        std::memcpy(&eight, bytes + 4 * c, 8);
        eight = (eight | eight << 4) >> (bits * layer) & kMask;
        std::memcpy(row + 8 * c, &eight, 8);
      }
      std::memcpy(codes + to * n + at.n, row, at.columns);
    }
  }

  // The words of one (kk, t) in a block stand in pairs, the i = 0 and 1 of one g.
  static int pair_of(int kk, int t, int g) { return 16 * g + 4 * t + 2 * kk; }

  static void pack_strip(const uint8_t* codes, int64_t k, int64_t n, Place at, int64_t blocks,
                         uint32_t* words) {
    uint16_t bytes[kBytes][kStripN / 2];
    uint32_t lanes[kStripN / 2];
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (at.byte = 0; at.byte < kBytes; ++at.byte) pack_bytes(codes, k, n, at, bytes[at.byte]);
        for (int lane = 0; lane < kStripN / 2; ++lane) {
          const uint32_t low = bytes[0][lane] | bytes[1][lane] << 8;
          const uint32_t high = bytes[2][lane] | bytes[3][lane] << 8;
          lanes[lane] = low | high << 16;
        }
        for (int64_t block = 0; block < blocks; ++block) {
          for (int g = 0; g < kPairs; ++g) {
            std::memcpy(words + block * Codes::kWordsPerBlock + pair_of(at.kk, at.t, g),
                        lanes + (block * kPairs + g) * 2, 8);
          }
        }
      }
    }
  }

  static void unpack_strip(const uint32_t* words, int64_t k, int64_t n, Place at, int64_t blocks,
                           uint8_t* codes) {
    uint16_t bytes[kBytes][kStripN / 2];
    uint32_t lanes[kStripN / 2] = {};
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (int64_t block = 0; block < blocks; ++block) {
          for (int g = 0; g < kPairs; ++g) {
            std::memcpy(lanes + (block * kPairs + g) * 2,
                        words + block * Codes::kWordsPerBlock + pair_of(at.kk, at.t, g), 8);
          }
        }
        for (at.byte = 0; at.byte < kBytes; ++at.byte) {
          const int shift = 8 * at.byte;
          for (int lane = 0; lane < kStripN / 2; ++lane) {
            bytes[at.byte][lane] = static_cast<uint16_t>(lanes[lane] >> shift & 0xff);
          }
          unpack_bytes(bytes[at.byte], k, n, at, codes);
        }
      }
    }
  }

  // Calls strip(place, blocks, offset of its first word) for every block row and strip.
  template <class Strip>
  static void for_strips(int64_t k, int64_t n, const ParallelFor& parallel_for, const Strip& strip) {
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
      parallel_for.run(tasks, body);
    }
  }
};

}  // namespace

template <int bits>
void pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words, const ParallelFor& parallel_for) {
  using Packer = Packing<bits>;
  Packer::for_strips(k, n, parallel_for,
                     [&](const typename Packer::Place& at, int64_t blocks, int64_t first_word) {
                       Packer::pack_strip(codes, k, n, at, blocks, words + first_word);
                     });
}

template <int bits>
void unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes, const ParallelFor& parallel_for) {
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
