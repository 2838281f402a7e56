"""The packed layout: one place for every code, and that place never moves under version 1."""

import numpy as np
import pytest

import jax_trirun
from jax_trirun.layout import layout


@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_of_a_block_has_one_place(bits):
    lay = layout(bits)
    places = lay.word_of * 32 + lay.shift_of
    assert sorted(places.ravel()) == list(range(0, 32 * lay.words_per_block, bits))
    assert lay.block_k * lay.block_n * bits == 32 * lay.words_per_block
    assert (lay.k_of[lay.word_of, lay.shift_of // bits] == np.arange(lay.block_k)[:, None]).all()
    assert (lay.n_of[lay.word_of, lay.shift_of // bits] == np.arange(lay.block_n)[None, :]).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_places_follow_the_tensor_cores_operand(bits):
    """Written from the fragment's definition, not from layout.h.

    In mma.m16n8k16 lane 4 g + t holds, of the 16 x 16 operand A, rows g and g + 8 and columns
    2 t, 2 t + 1, 2 t + 8, 2 t + 9. Here A's rows are n, its columns k; lane 4 g + t has n = 4 g .. 4 g + 3.
    """
    lay = layout(bits)
    lane = lay.word_of // 4
    k, n = np.meshgrid(np.arange(lay.block_k), np.arange(lay.block_n), indexing="ij")
    assert (lane == 4 * (n // 4) + k % 8 // 2).all()
    # The two codes of a register, k and k + 1, sit at the same bit of the two halves of one word.
    assert (lay.word_of[0::2] == lay.word_of[1::2]).all()
    assert (lay.shift_of[0::2] + 16 == lay.shift_of[1::2]).all()


def test_golden_block_of_two_bits():
    """Literal values of version 1. A change here is a new version of the layout."""
    assert jax_trirun.LAYOUT_VERSION == 1
    lay = layout(2)
    assert (lay.block_k, lay.block_n, lay.words_per_block, lay.zero_point, lay.pad_code) == (
        64,
        32,
        128,
        1,
        1,
    )
    assert (layout(4).block_k, layout(4).zero_point) == (32, 8)
    golden = {  # (k, n): (word, shift)
        (0, 0): (0, 0),
        (1, 0): (0, 16),
        (2, 0): (4, 0),
        (8, 0): (0, 8),
        (16, 0): (0, 2),
        (32, 0): (2, 0),
        (0, 1): (0, 4),
        (0, 2): (1, 0),
        (0, 4): (16, 0),
        (63, 31): (127, 30),
        (37, 18): (75, 16),
    }
    for (k, n), (word, shift) in golden.items():
        assert (lay.word_of[k, n], lay.shift_of[k, n]) == (word, shift), (k, n)


def test_golden_words():
    """codes[k, n] = (k + 3 n) % 4 packs to these words of the block's 128."""
    k, n = np.meshgrid(np.arange(64), np.arange(32), indexing="ij")
    words = np.asarray(jax_trirun.pack(((k + 3 * n) % 4).astype(np.uint8)))[0, 0]
    # (k + 3 n) % 4 is the same 8 and 16 further in k; it grows by 1 from k to k + 1 and by 3 from n to n + 1.
    # A byte holds n, n, n + 1, n + 1 from its lowest bits up; the upper half word is k + 1.
    first = [0x0505F0F0, 0xAFAF5A5A]
    assert [int(w) for w in words[:4]] == first * 2


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be 2 or 4, got 3"):
        layout(3)
