"""From another format's codes and scales to a QuantTensor: what every importer shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..pack import pack
from ..types import FLOATS, GROUP_SIZES, QuantTensor
from .errors import CheckpointError, InexactError

Requantize = Mapping[str, Any] | None


def fields(words: np.ndarray, axis: int) -> np.ndarray:
    """Unpacks 2-bit fields along an axis, lowest bits first: index i * fields_a_word + j."""
    per_word = 4 * words.dtype.itemsize
    words = np.expand_dims(words.view(f"u{words.dtype.itemsize}"), axis + 1)
    shape = [1] * words.ndim
    shape[axis + 1] = per_word
    codes = (words >> (2 * np.arange(per_word, dtype=words.dtype)).reshape(shape) & 3).astype(np.uint8)
    return codes.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 2 :])


def integers(where: str, name: str, array: Any, dtypes: tuple[str, ...], ndim: int = 2) -> np.ndarray:
    """array as NumPy's, its dtype and number of axes checked."""
    array = np.ascontiguousarray(np.asarray(array))
    if str(array.dtype) not in dtypes or array.ndim != ndim:
        raise CheckpointError(
            f"{where}: {name} must be {' or '.join(dtypes)} with {ndim} axes, got {array.dtype} {array.shape}"
        )
    return array


def floats(where: str, name: str, array: Any) -> np.ndarray:
    """array as NumPy's, checked to be finite floats of a dtype that scales may have."""
    array = np.asarray(array)
    if str(array.dtype) not in FLOATS:
        raise CheckpointError(f"{where}: {name} must be {', '.join(FLOATS)}, got {array.dtype}")
    if not np.isfinite(array.astype(np.float32)).all():
        raise CheckpointError(f"{where}: {name} must be finite, got NaN or Inf; the file is damaged")
    return array


def expect_shape(where: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(shape):
        raise CheckpointError(f"{where}: {name} must have shape {tuple(shape)}, got {tuple(array.shape)}")


def packed_group_size(k: int, groups: int) -> int | None:
    """The group size that holds K rows in `groups` equal groups exactly, or None.

    Groups longer than 128 are cut into equal parts with the same scale.
    """
    if groups == 1:
        return -1
    if groups < 1 or k % groups:
        return None
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if k // groups % size == 0), None)


def quant_tensor(
    where: str,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    requantize: Requantize,
) -> QuantTensor:
    """A QuantTensor of codes [K, N], scales and zeros [groups, N] with any number of equal groups.

    Zeros that are all 1, the format's own zero point, are left out.

    Raises:
      CheckpointError: groups of a size that cannot be packed, unless `requantize` has arguments for
        jax_trirun.quantize.
    """
    (k, n), groups = codes.shape, scales.shape[0]
    expect_shape(where, "scales", scales, (groups, n))
    size = packed_group_size(k, groups)
    if size is None:
        return inexact(
            where,
            f"K={k} in {groups} groups makes groups of {k / max(groups, 1):g} rows, and only multiples of "
            f"{min(GROUP_SIZES)}, or one group, can be packed",
            lambda: dense(codes, scales, zeros),
            requantize,
        )
    if zeros is not None and (zeros == 1).all():
        zeros = None
    if size != -1 and (repeats := k // groups // size) > 1:
        scales = np.repeat(scales, repeats, axis=0)
        zeros = None if zeros is None else np.repeat(zeros, repeats, axis=0)
    return QuantTensor(
        pack(codes),
        jnp.asarray(scales),
        None if zeros is None else jnp.asarray(zeros),
        shape=(k, n),
        group_size=size,
    )


def dense(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """float32 W[k, n] = s (c - z), for any number of equal groups."""
    repeats = codes.shape[0] // scales.shape[0]
    wide = np.repeat(scales.astype(np.float32), repeats, axis=0)
    zero = 1 if zeros is None else np.repeat(zeros.astype(np.float32), repeats, axis=0)
    return wide * (codes.astype(np.float32) - zero)


def inexact(where: str, why: str, weight: Callable[[], np.ndarray], requantize: Requantize) -> QuantTensor:
    """Raises an InexactError that says why, or quantises the decoded weight again if that was asked."""
    if requantize is None:
        message = (
            f"{where}: this weight cannot be represented exactly: {why}. Pass requantize=dict(group_size=64), or "
            "other arguments of jax_trirun.quantize, to quantise the decoded weight again; that costs accuracy"
        )
        raise InexactError(message, why, weight)
    from ..quantizers import quantize

    return quantize(weight(), **requantize)
