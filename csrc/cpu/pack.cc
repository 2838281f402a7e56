// codes <-> words, block by block.
#include <algorithm>
#include <array>
#include <cstring>

#include "matmul.h"

namespace jax_trirun::cpu {
namespace {

template <int bits>
struct Positions {
  std::array<uint16_t, Layout<bits>::kBlockK * Layout<bits>::kBlockN> at{};  // of the code in a block
  constexpr Positions() {
    using L = Layout<bits>;
    for (int word = 0; word < L::kWordsPerBlock; ++word) {
      for (int i = 0; i < L::kCodesPerWord; ++i) {
        const CodePosition c = L::code_at(word, i * bits);
        at[word * L::kCodesPerWord + i] = static_cast<uint16_t>(c.k * L::kBlockN + c.n);
      }
    }
  }
};
template <int bits>
constexpr Positions<bits> kPositions{};

}  // namespace

template <int bits>
void pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words, const ParallelFor& parallel_for) {
  using L = Layout<bits>;
  const int64_t n_blocks = ceil_div(n, L::kBlockN);
  parallel_for(ceil_div(k, L::kBlockK), [&](int64_t kb) {
    uint8_t block[L::kBlockK * L::kBlockN];
    for (int64_t nb = 0; nb < n_blocks; ++nb) {
      const int64_t rows = std::min<int64_t>(L::kBlockK, k - kb * L::kBlockK);
      const int64_t columns = std::min<int64_t>(L::kBlockN, n - nb * L::kBlockN);
      std::memset(block, L::kPadCode, sizeof(block));
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(block + r * L::kBlockN, codes + (kb * L::kBlockK + r) * n + nb * L::kBlockN, columns);
      }
      uint32_t* out = words + (kb * n_blocks + nb) * L::kWordsPerBlock;
      for (int w = 0; w < L::kWordsPerBlock; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < L::kCodesPerWord; ++i) {
          const uint32_t code = block[kPositions<bits>.at[w * L::kCodesPerWord + i]];
          word |= (code & L::kCodeMask) << (i * bits);
        }
        out[w] = word;
      }
    }
  });
}

template <int bits>
void unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes, const ParallelFor& parallel_for) {
  using L = Layout<bits>;
  const int64_t n_blocks = ceil_div(n, L::kBlockN);
  parallel_for(ceil_div(k, L::kBlockK), [&](int64_t kb) {
    uint8_t block[L::kBlockK * L::kBlockN];
    for (int64_t nb = 0; nb < n_blocks; ++nb) {
      const uint32_t* in = words + (kb * n_blocks + nb) * L::kWordsPerBlock;
      for (int w = 0; w < L::kWordsPerBlock; ++w) {
        for (int i = 0; i < L::kCodesPerWord; ++i) {
          block[kPositions<bits>.at[w * L::kCodesPerWord + i]] =
              static_cast<uint8_t>(in[w] >> (i * bits) & L::kCodeMask);
        }
      }
      const int64_t rows = std::min<int64_t>(L::kBlockK, k - kb * L::kBlockK);
      const int64_t columns = std::min<int64_t>(L::kBlockN, n - nb * L::kBlockN);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(codes + (kb * L::kBlockK + r) * n + nb * L::kBlockN, block + r * L::kBlockN, columns);
      }
    }
  });
}

template void pack<2>(const uint8_t*, int64_t, int64_t, uint32_t*, const ParallelFor&);
template void pack<4>(const uint8_t*, int64_t, int64_t, uint32_t*, const ParallelFor&);
template void unpack<2>(const uint32_t*, int64_t, int64_t, uint8_t*, const ParallelFor&);
template void unpack<4>(const uint32_t*, int64_t, int64_t, uint8_t*, const ParallelFor&);

}  // namespace jax_trirun::cpu
