"""What the operation means: dequantise, then a plain matmul. Everything else is only faster."""

from typing import Any

import jax
import jax.numpy as jnp

from .layout import layout
from .pack import unpack
from .types import QuantTensor, check_fits, check_weights

HIGHEST = jax.lax.Precision.HIGHEST


def repeat_groups(per_group: jax.Array, k: int) -> jax.Array:
    """[..., groups, N] -> [..., k, N]: each group's row for every k of the group."""
    *lead, groups, n = per_group.shape
    rows = jnp.broadcast_to(per_group[..., :, None, :], (*lead, groups, k // groups, n))
    return rows.reshape(*lead, k, n)


def dequantize_float32(
    words: jax.Array, scales: jax.Array, zeros: jax.Array | None, k: int, bits: int
) -> jax.Array:
    """W = scales * (codes - zeros) in float32, [..., K, N]."""
    codes = unpack(words, (k, scales.shape[-1]), bits=bits).astype(jnp.float32)
    if zeros is None:
        levels = codes - layout(bits).zero_point
    else:
        levels = codes - repeat_groups(zeros.astype(jnp.float32), k)
    return levels * repeat_groups(scales.astype(jnp.float32), k)


def dequantize(
    qt_or_words: Any,
    s: Any = None,
    zeros: Any = None,
    *,
    shape: tuple[int, int] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """The weight W[..., K, N] = s * (code - zero) that packed words stand for.

    Args:
        qt_or_words: a QuantTensor, or 2-bit words, which need ``s`` and ``shape``.
        s: scales [..., K / G, N], with words only.
        zeros: None or [..., K / G, N], with words only.
        shape: (K, N), with words only.
        dtype: of the result, computed in float32 before; None means the scales' dtype.

    Raises:
        TypeError, ValueError: the arguments do not fit each other, or W is beyond ``dtype``'s range.
    """
    if isinstance(qt_or_words, QuantTensor):
        if s is not None or zeros is not None or shape is not None:
            raise TypeError("dequantize: s, zeros and shape come with the QuantTensor; pass none of them")
        words, s, zeros = qt_or_words.words, qt_or_words.scales, qt_or_words.zeros
        (k, n), bits = qt_or_words.shape, qt_or_words.bits
    else:
        words, bits = qt_or_words, 2
        if s is None or shape is None:
            raise TypeError(
                "dequantize: words need their scales s and their shape=(K, N); a QuantTensor has both"
            )
        k, n = shape
    check_weights("dequantize", words, s, zeros, k=k, n=n, bits=bits)
    wanted, dtype = dtype, jnp.dtype(s.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dequantize: dtype must be a floating-point dtype, got {wanted!r}")
    w = dequantize_float32(words, jnp.asarray(s), None if zeros is None else jnp.asarray(zeros), k, bits)
    if jnp.finfo(dtype).max < jnp.finfo(jnp.float32).max:
        check_fits("dequantize", "the weight", w, dtype)
    return w.astype(dtype)


def matmul_reference(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    k: int,
    out_dtype: Any,
    transpose: bool,
    bits: int,
) -> jax.Array:
    """x[M, K] @ W[K, N] -> [M, N], or with ``transpose`` x[M, N] @ W.T -> [M, K]; summed in float32."""
    w = dequantize_float32(words, scales, zeros, k, bits)
    axis = 1 if transpose else 0
    y = jax.lax.dot_general(
        x.astype(jnp.float32), w, (((1,), (axis,)), ((), ())), precision=HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y.astype(out_dtype)
