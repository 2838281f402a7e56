"""The packed layout as Python sees it: read from the native module, which compiled csrc/layout.h."""

import functools
from dataclasses import dataclass

import numpy as np

from . import _ffi

BITS = (2, 4)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the codes of a [K, N] matrix live inside words [K / block_k, N / block_n, words_per_block].

    ``k_of`` and ``n_of`` are int32 [words_per_block, codes_per_word]: the code with its lowest bit at
    ``i * bits`` of word ``w`` belongs to row ``k_of[w, i]`` and column ``n_of[w, i]`` of the block.
    ``word_of`` and ``shift_of``, int32 [block_k, block_n], are the inverse.
    """

    version: int
    bits: int
    block_k: int
    block_n: int
    words_per_block: int
    codes_per_word: int
    zero_point: int
    pad_code: int
    k_of: np.ndarray
    n_of: np.ndarray

    @functools.cached_property
    def _code_of(self) -> np.ndarray:
        """int32 [block_k, block_n]: the code's number, counting along the bits of word 0, 1, ..."""
        place = np.empty((self.block_k, self.block_n), np.int32)
        place[self.k_of, self.n_of] = np.arange(self.k_of.size, dtype=np.int32).reshape(self.k_of.shape)
        return place

    @property
    def word_of(self) -> np.ndarray:
        return self._code_of // self.codes_per_word

    @property
    def shift_of(self) -> np.ndarray:
        return self._code_of % self.codes_per_word * self.bits

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def words_shape(self, k: int, n: int) -> tuple[int, int, int]:
        """The shape of the packed array of a [k, n] matrix: whole blocks, rounded up."""
        return (-(-k // self.block_k), -(-n // self.block_n), self.words_per_block)


@functools.cache
def layout(bits: int = 2) -> Layout:
    """The layout of ``bits``-bit codes. Raises ValueError unless bits is 2 or 4."""
    if bits not in BITS:
        raise ValueError(f"bits must be 2 or 4, got {bits!r}")
    return Layout(**_ffi.cpu_module.layout(bits))


def zero_point(bits: int = 2) -> int:
    """The code whose weight is zero when no zeros are given."""
    return layout(bits).zero_point


LAYOUT_VERSION: int = layout(2).version
