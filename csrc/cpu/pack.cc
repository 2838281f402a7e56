// codes [K, N] <-> words [K / kBlockK, N / kBlockN, 128].
//
// A code's byte inside its word is 2 * h + b, its place in that byte 2 * q + u (layout.h). So the
// four (2 bits) or two (4 bits) rows k of one (kk, t, h) share bytes: byte n of their codes,
// shifted by bits * (2 * q + u), is a byte of a word already. Both directions work on eight such
// bytes at a time, over a strip of columns wide enough to read and write whole cache lines.
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
  static constexpr int kLayers = 8 / bits;     // rows that share a byte: (q, u)
  static constexpr int kStepsT = 4;            // index t
  static constexpr uint64_t kMask = 0x0101010101010101u * Codes::kCodeMask;
  static constexpr uint8_t kPadByte = Codes::kPadCode;

  static constexpr int row_of(int kk, int t, int h, int layer) {
    const int half = 8 * kLayers;  // k of one kk
    return half * kk + 8 * layer + 2 * t + h;
  }

  static constexpr bool layout_is_as_assumed() {
    for (int k = 0; k < Codes::kBlockK; ++k) {
      for (int n = 0; n < Codes::kBlockN; ++n) {
        const int kk = k / (8 * kLayers), layer = k / 8 % kLayers, t = k / 2 % 4, h = k % 2;
        const WordPosition at = Codes::locate(k, n);
        if (row_of(kk, t, h, layer) != k) return false;
        if (at.word != 16 * (n / 4) + 4 * t + 2 * kk + n / 2 % 2) return false;
        if (at.shift != 16 * h + 8 * (n % 2) + bits * layer) return false;
      }
    }
    return true;
  }
  static_assert(layout_is_as_assumed(), "bytes and bits are where layout.h puts them");

  // The rows of one (kk, t, h) and the columns of one strip.
  struct Place {
    int64_t k;  // of the block
    int64_t n;  // of the strip
    int64_t columns;
    int kk, t, h;
  };

  // Codes of one row and strip, or the same with padding where the matrix has ended.
  static const uint8_t* row(const uint8_t* codes, int64_t k_end, int64_t stride, const Place& at,
                            int layer, uint8_t* padded) {
    const int64_t k = at.k + row_of(at.kk, at.t, at.h, layer);
    const bool inside = k < k_end;
    const uint8_t* const in = inside ? codes + k * stride + at.n : nullptr;
    if (inside && at.columns == kStripN) return in;
    std::memset(padded, kPadByte, kStripN);
    if (inside) std::memcpy(padded, in, at.columns);
    return padded;
  }

  // The bytes [column] of one (kk, t, h).
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
      const int64_t to = at.k + row_of(at.kk, at.t, at.h, layer);
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

  // Words of one (kk, t) in a block, at g and i: their bytes are h = 0 even and odd column, h = 1
  // even and odd column.
  static int word_of(int kk, int t, int lane) {
    return 16 * (lane / 2) + 4 * t + 2 * kk + lane % 2;
  }

  static void pack_strip(const uint8_t* codes, int64_t k, int64_t n, Place at, int64_t blocks,
                         uint32_t* words) {
    uint8_t bytes[2][kStripN];
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (at.h = 0; at.h < 2; ++at.h) pack_bytes(codes, k, n, at, bytes[at.h]);
        for (int64_t block = 0; block < blocks; ++block) {
          for (int lane = 0; lane < Codes::kBlockN / 2; ++lane) {
            const int64_t at_byte = block * Codes::kBlockN + 2 * lane;
            const uint32_t low = bytes[0][at_byte] | bytes[0][at_byte + 1] << 8;
            const uint32_t high = bytes[1][at_byte] | bytes[1][at_byte + 1] << 8;
            words[block * Codes::kWordsPerBlock + word_of(at.kk, at.t, lane)] = low | high << 16;
          }
        }
      }
    }
  }

  static void unpack_strip(const uint32_t* words, int64_t k, int64_t n, Place at, int64_t blocks,
                           uint8_t* codes) {
    uint8_t bytes[2][kStripN] = {};
    for (at.kk = 0; at.kk < 2; ++at.kk) {
      for (at.t = 0; at.t < kStepsT; ++at.t) {
        for (int64_t block = 0; block < blocks; ++block) {
          for (int lane = 0; lane < Codes::kBlockN / 2; ++lane) {
            const uint32_t word = words[block * Codes::kWordsPerBlock + word_of(at.kk, at.t, lane)];
            const int64_t at_byte = block * Codes::kBlockN + 2 * lane;
            for (int h = 0; h < 2; ++h) {
              bytes[h][at_byte] = static_cast<uint8_t>(word >> (16 * h));
              bytes[h][at_byte + 1] = static_cast<uint8_t>(word >> (16 * h + 8));
            }
          }
        }
        for (at.h = 0; at.h < 2; ++at.h) unpack_bytes(bytes[at.h], k, n, at, codes);
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
