"""pack and unpack are exact inverses, wherever they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_trirun
from jax_trirun.layout import layout
from jax_trirun.pack import pack_reference, unpack_reference

sizes = st.integers(1, 150)
bit_widths = st.sampled_from([2, 4])


def random_codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@given(k=sizes, n=sizes, bits=bit_widths, seed=st.integers(0, 1000))
def test_unpack_inverts_pack(k, n, bits, seed):
    codes = random_codes((k, n), bits, seed)
    words = jax_trirun.pack(codes, bits=bits)
    assert words.shape == layout(bits).words_shape(k, n) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(jax_trirun.unpack(words, (k, n), bits=bits), codes)


@settings(max_examples=10)  # each compiles three programs
@given(k=sizes, n=sizes, bits=bit_widths)
def test_native_and_plain_jax_agree(k, n, bits):
    codes = random_codes((k, n), bits)
    words = jax_trirun.pack(codes, bits=bits)
    np.testing.assert_array_equal(words, pack_reference(jnp.asarray(codes), bits=bits))
    np.testing.assert_array_equal(unpack_reference(words, k=k, n=n, bits=bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_pack_inverts_unpack(bits):
    """Onto: every word array of whole blocks is the image of some codes."""
    lay = layout(bits)
    words = np.random.default_rng(0).integers(0, 2**32, (2, 3, lay.words_per_block), dtype=np.uint32)
    codes = jax_trirun.unpack(words, (2 * lay.block_k, 3 * lay.block_n), bits=bits)
    np.testing.assert_array_equal(jax_trirun.pack(codes, bits=bits), words)


@pytest.mark.parametrize("bits", [2, 4])
def test_each_code_goes_where_the_table_says(bits):
    lay = layout(bits)
    k, n = lay.block_k + 5, lay.block_n + 3
    codes = random_codes((k, n), bits)
    words = np.asarray(jax_trirun.pack(codes, bits=bits))
    for at_k, at_n in [(0, 0), (1, 2), (5, lay.block_n - 1), (k - 1, n - 1)]:
        block = words[at_k // lay.block_k, at_n // lay.block_n]
        place = at_k % lay.block_k, at_n % lay.block_n
        assert block[lay.word_of[place]] >> lay.shift_of[place] & lay.max_code == codes[at_k, at_n]


@pytest.mark.parametrize("bits", [2, 4])
def test_padding_holds_the_code_of_zero(bits):
    lay = layout(bits)
    whole = (2 * lay.block_k, 2 * lay.block_n)
    k, n = lay.block_k + 1, lay.block_n + 1
    padded = np.array(
        jax_trirun.unpack(jax_trirun.pack(random_codes((k, n), bits), bits=bits), whole, bits=bits)
    )
    padded[:k, :n] = lay.zero_point
    assert (padded == lay.zero_point).all()


def test_a_slice_of_blocks_is_packed_itself():
    lay = layout(2)
    codes = random_codes((3 * lay.block_k, 4 * lay.block_n), 2)
    words = jax_trirun.pack(codes)
    part = jax_trirun.unpack(words[1:3, 2:3], (2 * lay.block_k, lay.block_n))
    np.testing.assert_array_equal(part, codes[lay.block_k :, 2 * lay.block_n : 3 * lay.block_n])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint32])
def test_every_integer_dtype_will_do(dtype):
    codes = random_codes((70, 40), 2).astype(dtype)
    np.testing.assert_array_equal(jax_trirun.unpack(jax_trirun.pack(codes), (70, 40)), codes)


def test_lists_will_do():
    assert jax_trirun.unpack(jax_trirun.pack([[0, 1], [2, 3]]), (2, 2)).tolist() == [[0, 1], [2, 3]]


def test_leading_axes_jit_and_vmap():
    codes = random_codes((2, 3, 70, 40), 2)
    words = jax_trirun.pack(codes)
    assert words.shape[:2] == (2, 3)
    np.testing.assert_array_equal(words[1, 2], jax_trirun.pack(codes[1, 2]))
    np.testing.assert_array_equal(jax.jit(jax_trirun.pack)(codes), words)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(jax_trirun.pack))(codes), words)
    np.testing.assert_array_equal(jax.vmap(jax_trirun.pack, in_axes=1, out_axes=1)(codes), words)
    back = jax.jit(jax.vmap(lambda w: jax_trirun.unpack(w, (70, 40))))(words)
    np.testing.assert_array_equal(back, codes)


def test_traced_codes_are_cut_to_their_bits():
    codes = jnp.full((64, 32), 7, jnp.int32)
    np.testing.assert_array_equal(jax.jit(jax_trirun.pack)(codes), jax_trirun.pack(codes & 3))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 64, 32)])
def test_nothing_packs_to_nothing(shape):
    words = jax_trirun.pack(np.zeros(shape, np.uint8))
    assert words.size == 0
    assert jax_trirun.unpack(words, shape[-2:]).shape == shape
