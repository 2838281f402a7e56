"""QuantTensor, the pytree of a packed weight, and the invariants of its arrays. No mathematics."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .layout import layout

GROUP_SIZES = (32, 64, 128)
FLOATS = ("float16", "bfloat16", "float32")


def check_float(where: str, name: str, array: Any) -> None:
    """Raise TypeError unless ``array`` is float16, bfloat16 or float32."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{where}: {name} must be an array of {' or '.join(FLOATS)}, got {type(array).__name__}"
        )
    if str(dtype) not in FLOATS:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16 or float32, got {dtype}; cast it with .astype first"
        )


def check_fits(where: str, name: str, values: Any, dtype: Any) -> None:
    """Raise ValueError when casting finite ``values`` to ``dtype`` would give infinities.

    Values that are being traced are not known yet, and pass.
    """
    if isinstance(values, jax.core.Tracer) or np.size(values) == 0:
        return
    largest, limit = (
        float(jnp.max(jnp.abs(jnp.where(jnp.isfinite(values), values, 0)))),
        float(jnp.finfo(dtype).max),
    )
    if largest > limit:
        raise ValueError(
            f"{where}: {name} reaches {largest:g}, beyond {jnp.dtype(dtype).name}'s largest value {limit:g}; "
            "use bfloat16 or float32, or scale it down"
        )


def check_group_size(where: str, k: int, group_size: int) -> int:
    """The number of groups that ``group_size`` cuts K into. Raises ValueError when it cannot."""
    if group_size == -1:
        return 1
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"{where}: group_size must be 32, 64, 128 or -1 (one group for all of K), got {group_size!r}"
        )
    if k % group_size:
        fitting = [str(g) for g in GROUP_SIZES if k % g == 0] + ["-1"]
        raise ValueError(
            f"{where}: group_size must divide K, got group_size={group_size}, K={k}; "
            f"use {' or '.join(fitting)}, or pad K"
        )
    return k // group_size


def check_weights(
    where: str, words: Any, scales: Any, zeros: Any | None, *, k: int, n: int | None = None, bits: int = 2
) -> tuple[int, int]:
    """Check the arrays of one packed [K, N] weight against each other; returns (N, groups).

    Any leading axes must be the same on all arrays. Only shapes and dtypes are looked at, so traced
    values and ``jax.ShapeDtypeStruct`` do. Raises TypeError for a dtype, ValueError for a shape.
    """
    lay = layout(bits)
    if str(getattr(words, "dtype", None)) != "uint32":
        raise TypeError(
            f"{where}: words must be a uint32 array made by jax_trirun.pack, "
            f"got {getattr(words, 'dtype', type(words).__name__)}"
        )
    check_float(where, "scales", scales)
    if len(scales.shape) < 2:
        raise ValueError(
            f"{where}: scales must have shape [K / group_size, N], got {tuple(scales.shape)}; "
            "scales of one group are s[None, :]"
        )
    *lead, groups, columns = scales.shape
    if n is not None and columns != n:
        raise ValueError(f"{where}: scales must have N={n} columns, got shape {tuple(scales.shape)}")
    if groups < 1 or (groups > 1 and (k % groups or k // groups not in GROUP_SIZES)):
        raise ValueError(
            f"{where}: scales must have 1 row, or K / group_size rows with group_size 32, 64 or 128; "
            f"got scales of shape {tuple(scales.shape)} for K={k}"
        )
    want = (*lead, *lay.words_shape(k, columns))
    if tuple(words.shape) != want:
        raise ValueError(
            f"{where}: words of a [K={k}, N={columns}] weight must have shape {want}, "
            f"got {tuple(words.shape)}; do K and N match the scales {tuple(scales.shape)} and x?"
        )
    if zeros is not None:
        check_float(where, "zeros", zeros)
        if tuple(zeros.shape) != tuple(scales.shape):
            raise ValueError(
                f"{where}: zeros must have the shape of scales, {tuple(scales.shape)}, got {tuple(zeros.shape)}"
            )
    return columns, groups


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A packed weight W[k, n] = scales[k // G, n] * (code[k, n] - zeros[k // G, n]).

    Without zeros the zero point is 1 for 2 bits (W in scale * {-1, 0, 1, 2}) and 8 for 4 bits. A pytree:
    the arrays are its leaves, the rest is static. Leading axes, the same on every array, stack weights
    (layers, experts): ``jax.lax.scan`` and ``jax.vmap`` take them apart.

    Attributes:
        words: uint32 [..., K / block_k, N / block_n, 128], from ``jax_trirun.pack``.
        scales: float16, bfloat16 or float32 [..., K / G, N]; may be negative.
        zeros: None, or a float array of the same shape, in units of codes.
        shape: (K, N), the weight's own size: (in, out).
        group_size: G in {32, 64, 128}, or -1: one group for all of K.
        bits: 2 or 4.

    Raises:
        TypeError, ValueError: an array has a wrong dtype or shape, or group_size does not fit K.
    """

    words: Any
    scales: Any
    zeros: Any = None
    shape: tuple[int, int] = field(kw_only=True)
    group_size: int = field(kw_only=True)
    bits: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"QuantTensor: shape must be (K, N), got {self.shape!r}")
        k, n = (int(d) for d in self.shape)
        object.__setattr__(self, "shape", (k, n))
        groups = check_group_size("QuantTensor", k, self.group_size)
        _, rows = check_weights("QuantTensor", self.words, self.scales, self.zeros, k=k, n=n, bits=self.bits)
        if rows != groups:
            raise ValueError(
                f"QuantTensor: group_size={self.group_size} cuts K={k} into {groups} groups, "
                f"but scales have {rows} rows (shape {tuple(self.scales.shape)})"
            )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that stack several weights; () for one."""
        return tuple(self.scales.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and zeros."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        kind = f"{self.batch_shape} x {self.shape}" if self.batch_shape else f"{self.shape}"
        zeros = ", zeros" if self.zeros is not None else ""
        dtype = getattr(self.scales, "dtype", type(self.scales).__name__)
        return f"QuantTensor({kind}, bits={self.bits}, group_size={self.group_size}, scales {dtype}{zeros})"


_LEAVES = ("words", "scales", "zeros")
_STATIC = ("shape", "group_size", "bits")


def _flatten_with_keys(qt: QuantTensor):
    leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(qt, name)) for name in _LEAVES)
    return leaves, tuple(getattr(qt, name) for name in _STATIC)


def _flatten(qt: QuantTensor):
    return tuple(getattr(qt, name) for name in _LEAVES), tuple(getattr(qt, name) for name in _STATIC)


def _unflatten(static, leaves) -> QuantTensor:
    # JAX also builds trees of shardings, axis numbers or None: nothing can be checked here.
    qt = object.__new__(QuantTensor)
    for name, value in zip(_LEAVES + _STATIC, (*leaves, *static), strict=True):
        object.__setattr__(qt, name, value)
    return qt


jax.tree_util.register_pytree_with_keys(QuantTensor, _flatten_with_keys, _unflatten, _flatten)
