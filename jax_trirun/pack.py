"""codes <-> words: pack and unpack, as FFI calls on CPU and as plain JAX elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from . import _ffi
from .layout import layout


def pack(codes: Any, *, bits: int = 2) -> jax.Array:
    """Pack codes into words, in the layout that every back end reads.

    Args:
        codes: integers [..., K, N] in 0 .. 2**bits - 1. Values known now are checked; traced ones
            (inside ``jax.jit``) are cut to their lowest ``bits`` bits.
        bits: 2 or 4.

    Returns:
        uint32 [..., ceil(K / block_k), ceil(N / block_n), 128]. Padding holds the code of zero.

    Raises:
        TypeError: codes are not integers.
        ValueError: fewer than two axes, a code out of range, or another number of bits.

    Example:
        >>> words = jax_trirun.pack(np.array([[0, 1], [2, 3]]))
        >>> jax_trirun.unpack(words, (2, 2))
        Array([[0, 1],
               [2, 3]], dtype=uint8)
    """
    lay = layout(bits)
    if not hasattr(codes, "dtype"):
        codes = np.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(
            f"pack: codes must be integers, got {codes.dtype}; quantize floats with jax_trirun.quantize"
        )
    if codes.ndim < 2:
        raise ValueError(f"pack: codes must have shape [..., K, N], got {tuple(codes.shape)}")
    if not isinstance(codes, jax.core.Tracer) and codes.size:
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high > lay.max_code:
            raise ValueError(
                f"pack: codes must lie in 0 .. {lay.max_code} for bits={bits}, got {low} .. {high}; "
                "codes are offsets from the zero point, not the signed weights"
            )
    return _pack_p.bind(jnp.asarray(codes.astype(np.uint8)), bits=bits)


def unpack(words: Any, shape: tuple[int, int], *, bits: int = 2) -> jax.Array:
    """The inverse of :func:`pack`.

    Args:
        words: uint32 [..., ceil(K / block_k), ceil(N / block_n), 128].
        shape: (K, N) of the codes.
        bits: 2 or 4.

    Returns:
        uint8 codes [..., K, N].

    Raises:
        TypeError: words are not uint32.
        ValueError: words do not have the shape that pack makes of ``shape``.
    """
    if str(getattr(words, "dtype", None)) != "uint32":
        raise TypeError(
            f"unpack: words must be a uint32 array made by pack, got {getattr(words, 'dtype', type(words).__name__)}"
        )
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"unpack: shape must be (K, N), got {shape!r}; leading axes come from words")
    k, n = (int(d) for d in shape)
    want = layout(bits).words_shape(k, n)
    if tuple(words.shape[-3:]) != want:
        raise ValueError(
            f"unpack: words of shape {(k, n)} with bits={bits} must end in axes {want}, got {tuple(words.shape)}"
        )
    return _unpack_p.bind(jnp.asarray(words), k=k, n=n, bits=bits)


def pack_reference(codes: jax.Array, *, bits: int) -> jax.Array:
    """uint8 codes [..., K, N] -> words, in plain JAX, by indexing the layout's tables."""
    lay = layout(bits)
    *lead, k, n = codes.shape
    kb, nb, _ = lay.words_shape(k, n)
    edges = [(0, 0)] * len(lead) + [(0, kb * lay.block_k - k), (0, nb * lay.block_n - n)]
    padded = jnp.pad(codes, edges, constant_values=lay.pad_code)
    blocks = jnp.swapaxes(padded.reshape(*lead, kb, lay.block_k, nb, lay.block_n), -3, -2)
    ordered = blocks[..., lay.k_of, lay.n_of].astype(jnp.uint32) & lay.max_code
    shifts = np.arange(lay.codes_per_word, dtype=np.uint32) * bits
    return jnp.sum(ordered << shifts, axis=-1, dtype=jnp.uint32)


def unpack_reference(words: jax.Array, *, k: int, n: int, bits: int) -> jax.Array:
    """Words -> uint8 codes [..., k, n], in plain JAX, by indexing the layout's tables."""
    lay = layout(bits)
    *lead, kb, nb, _ = words.shape
    blocks = (words[..., lay.word_of] >> lay.shift_of.astype(np.uint32)) & lay.max_code
    codes = jnp.swapaxes(blocks.astype(jnp.uint8), -3, -2)
    return codes.reshape(*lead, kb * lay.block_k, nb * lay.block_n)[..., :k, :n]


def _pack_abstract(codes, *, bits):
    return codes.update(
        shape=(*codes.shape[:-2], *layout(bits).words_shape(*codes.shape[-2:])), dtype=np.dtype("uint32")
    )


def _unpack_abstract(words, *, k, n, bits):
    return words.update(shape=(*words.shape[:-3], k, n), dtype=np.dtype("uint8"))


def _elementwise_over_leading_axes(primitive: Primitive, abstract_eval, reference, target: str) -> None:
    """Register what pack and unpack share: any leading axes, one operand, one result."""

    def lower_ffi(ctx, operand, *, bits, **_):
        return jax.ffi.ffi_lowering(target)(ctx, operand, bits=np.int64(bits))

    def batch(args, dims, **params):
        return primitive.bind(jnp.moveaxis(args[0], dims[0], 0), **params), 0

    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(lambda operand, **params: xla.apply_primitive(primitive, operand, **params))
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=False))
    mlir.register_lowering(primitive, lower_ffi, platform="cpu")


_pack_p = Primitive("jax_trirun_pack")
_unpack_p = Primitive("jax_trirun_unpack")
_elementwise_over_leading_axes(_pack_p, _pack_abstract, pack_reference, _ffi.PACK_TARGET)
_elementwise_over_leading_axes(_unpack_p, _unpack_abstract, unpack_reference, _ffi.UNPACK_TARGET)
