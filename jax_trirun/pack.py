"""codes <-> words: pack and unpack, as FFI calls on CPU and as plain JAX elsewhere."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from . import _ffi
from .layout import layout
from .partition import (
    blocks_on_explicit_mesh,
    by_mapped_shards,
    explicit_mesh,
    lower_partitioned,
    partitioned_blocks,
)


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
    k, n = codes.shape[-2:]
    return _bind("pack", _pack_p, jnp.asarray(codes.astype(np.uint8)), k, n, bits)


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
    return _bind("unpack", _unpack_p, jnp.asarray(words), k, n, bits)


def _bind(where: str, primitive: Primitive, array: jax.Array, k: int, n: int, bits: int) -> jax.Array:
    if (mesh := explicit_mesh(where, array)) is None:
        return primitive.bind(array, k=k, n=n, bits=bits)
    local = partial(primitive.bind, bits=bits)
    return blocks_on_explicit_mesh(where, mesh, local, array, k=k, n=n, bits=bits, packs=primitive is _pack_p)


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


def _pack_abstract(codes, *, k, n, bits):
    return _updated(codes, (*codes.shape[:-2], *layout(bits).words_shape(k, n)), "uint32")


def _unpack_abstract(words, *, k, n, bits):
    del bits
    return _updated(words, (*words.shape[:-3], k, n), "uint8")


def _updated(aval, shape, dtype):
    """The type with another shape; on a mesh only where its axes are Auto or Manual, so nothing is sharded."""
    spec = jax.sharding.PartitionSpec(*[None] * len(shape))
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
    return aval.update(shape=shape, dtype=np.dtype(dtype), sharding=sharding)


def _elementwise_over_leading_axes(
    name: str, abstract_eval, reference, target: str, *, packs: bool
) -> Primitive:
    """Make what pack and unpack share: any leading axes, one operand, one result, blocks on any device.

    As for matmul there are two primitives: the one that JAX transforms and, below it, a device's call.
    """
    primitive, call = Primitive(name), Primitive(f"{name}_call")

    def lower_ffi(ctx, operand, *, bits, **_):
        return _ffi.lower_call(target, ctx, [operand], {"bits": np.int64(bits)})

    def parts(bind, operands, **params):
        return partitioned_blocks(bind, *operands, packs=packs, **params)

    def batch(args, _, **params):  # the mapped axis comes first
        return primitive.bind(*args, **params), 0

    batching.primitive_batchers[primitive] = by_mapped_shards(batch)
    lower_partitioned(primitive, call, name, parts)
    mlir.register_lowering(call, mlir.lower_fun(reference, multiple_results=False))
    mlir.register_lowering(call, lower_ffi, platform="cpu")
    for p in (primitive, call):
        p.def_abstract_eval(abstract_eval)
        p.def_impl(partial(xla.apply_primitive, p))
    return primitive


_pack_p = _elementwise_over_leading_axes(
    "jax_trirun_pack", _pack_abstract, lambda codes, *, bits, **_: pack_reference(codes, bits=bits),
    _ffi.PACK_TARGET, packs=True,
)  # fmt: skip
_unpack_p = _elementwise_over_leading_axes(
    "jax_trirun_unpack", _unpack_abstract, unpack_reference, _ffi.UNPACK_TARGET, packs=False
)
