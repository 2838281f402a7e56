"""What the operation means: dequantise, then a plain matmul. Everything else is only faster."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .layout import layout
from .pack import unpack
from .types import QuantTensor, check_fits, check_weights

HIGHEST = jax.lax.Precision.HIGHEST
PART_BYTES = 64 << 20  # of a weight's rows that a backward pass makes dense at once, at most
SMALL_PART_BYTES = 1 << 20  # below which a part is not worth a turn of a loop


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


def dequantize_to(
    words: jax.Array, scales: jax.Array, zeros: jax.Array | None, k: int, bits: int, dtype: Any
) -> jax.Array:
    """W of ``dtype``, computed in float32 and rounded once."""
    return dequantize_float32(words, scales, zeros, k, bits).astype(dtype)


class Dense(NamedTuple):
    """How a platform makes products with a weight that it makes dense first.

    Attributes:
        dequantize: what ``dequantize_to`` is, or does.
        part_bytes: of a weight's rows that a backward pass makes dense at once, at most.
        tensor_cores: 16-bit activations meet weights of 16-bit scales as tensor cores take them. That rounds
            nothing: such a weight is its scale times a small whole number. With zeros it is not.
    """

    dequantize: Callable[..., jax.Array] = dequantize_to
    part_bytes: int = PART_BYTES
    tensor_cores: bool = False


PLAIN = Dense()


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
    dense: Dense = PLAIN,
) -> jax.Array:
    """x[M, K] @ W[K, N] -> [M, N], or with ``transpose`` x[M, N] @ W.T -> [M, K]; summed in float32."""
    groups, n = scales.shape

    def product(dtype, precision):
        def columns(words, scales, zeros, rows):
            w = dense.dequantize(words, scales, zeros, rows, bits, dtype)
            return _dot(x.astype(dtype), w, 1 if transpose else 0, precision).astype(out_dtype)

        if not transpose:
            return columns(words, scales, zeros, k)
        parts = _parts_of_k(k, n * jnp.dtype(dtype).itemsize, groups, bits, dense.part_bytes)
        y = _map_parts_of_k(columns, (words, scales, zeros), k, parts)  # [parts, M, K / parts]
        return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], k)

    if not dense.tensor_cores or zeros is not None:
        return product(jnp.float32, HIGHEST)
    dtype, precision = _exact_for_tensor_cores(x.dtype, scales.dtype)
    if dtype != jnp.float16:
        return product(dtype, precision)
    zero_point, max_code = layout(bits).zero_point, layout(bits).max_code
    largest_scale = float(jnp.finfo(dtype).max) / max(zero_point, max_code - zero_point)
    return jax.lax.cond(  # float16 may not hold a weight, which is a scale times a level
        jnp.all(jnp.abs(scales) <= largest_scale),
        lambda: product(dtype, precision),
        lambda: product(jnp.float32, precision),
    )


def scales_cotangent_reference(
    a: jax.Array,
    b: jax.Array,
    words: jax.Array,
    zeros: jax.Array | None,
    *,
    k: int,
    groups: int,
    bits: int,
    dense: Dense = PLAIN,
) -> jax.Array:
    """s_bar[g, n] = sum of a[m, k] b[m, n] (code[k, n] - zero[g, n]) over all m and the k of group g.

    a [M, K], b [M, N] -> float32 [groups, N]. Of ``a.T @ b`` only a part as large as the words is there at a time.
    """
    n = b.shape[1]
    dtype, precision = jnp.float32, HIGHEST
    if dense.tensor_cores:
        dtype, precision = _exact_for_tensor_cores(a.dtype, b.dtype)
    b = b.astype(dtype)

    def sums(words, a, zeros, rows):
        ones = jnp.ones((1, n), jnp.float32) if zeros is None else jnp.ones_like(zeros)
        levels = dense.dequantize(words, ones, zeros, rows, bits, jnp.float32)
        products = _dot(a.astype(dtype), b, 0, precision) * levels
        here = 1 if groups == 1 else groups * rows // k
        return jnp.sum(products.reshape(here, rows // here, n), axis=1)

    at_once = min(dense.part_bytes, max(SMALL_PART_BYTES, words.size * words.dtype.itemsize))
    s_bar = _map_parts_of_k(sums, (words, a.T, zeros), k, _parts_of_k(k, 4 * n, groups, bits, at_once))
    return jnp.sum(s_bar, axis=0) if groups == 1 else s_bar.reshape(groups, n)


def _exact_for_tensor_cores(*dtypes: Any) -> tuple[Any, jax.lax.Precision]:
    """The dtype and precision of a dot whose operands' values are of these dtypes, and are not to be rounded.

    Products of two float16 or two bfloat16 are exact in float32. TensorFloat-32, which is a GPU's default for
    float32, holds the values of both.
    """
    names = {str(dtype) for dtype in dtypes}
    if "float32" in names:
        return jnp.float32, HIGHEST
    return jnp.dtype(names.pop() if len(names) == 1 else "float32"), jax.lax.Precision.DEFAULT


def _dot(x: jax.Array, w: jax.Array, axis: int, precision: jax.lax.Precision) -> jax.Array:
    """x @ w, or with ``axis`` 1 x @ w.T, summed in float32."""
    return jax.lax.dot_general(
        x, w, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _map_parts_of_k(
    f: Callable[..., jax.Array], arrays: Sequence[jax.Array | None], k: int, parts: int
) -> jax.Array:
    """f(*arrays, K / parts) of one part of a weight's rows after the other, stacked.

    A backward pass needs every layer's weight dense. Those depend on nothing but arguments, so a compiler
    may make all of them first, and XLA's CPU scheduler does. It takes nothing out of a loop: with one,
    one part of one weight is dense at a time.

    Args:
        arrays: cut along their first axes, which count what lies along K; those of one row (of the one
            group there is) are every part's.
    """
    if parts == 1:
        return f(*arrays, k)[None]
    is_cut = [a is not None and a.shape[0] > 1 for a in arrays]
    cut = [
        a.reshape(parts, a.shape[0] // parts, *a.shape[1:]) if a is not None and a.shape[0] > 1 else a
        for a in arrays
    ]
    return map_slices(lambda *arrays: f(*arrays, k // parts), cut, is_cut)


def map_slices(f: Callable[..., Any], arrays: Sequence[Any], mapped: Sequence[bool]) -> Any:
    """f of one slice after the other, along their first axes, of the arrays that are mapped; of the others whole."""

    def one(slices):
        rest = iter(slices)
        return f(*(next(rest) if is_in else a for a, is_in in zip(arrays, mapped, strict=True)))

    return jax.lax.map(one, [a for a, is_in in zip(arrays, mapped, strict=True) if is_in])


def _parts_of_k(k: int, row_bytes: int, groups: int, bits: int, part_bytes: int) -> int:
    """At least two, and of ``part_bytes`` at most when a row is dense, where whole blocks and groups allow it."""
    block = layout(bits).block_k
    unit = block if groups == 1 else math.lcm(block, k // groups)
    if k % unit or k == 0:
        return 1
    units, wanted = k // unit, max(2, -(-k * row_bytes // part_bytes))
    return next((parts for parts in range(wanted, units) if units % parts == 0), units)
