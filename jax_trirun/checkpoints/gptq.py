"""GPTQ: AutoGPTQ's and GPTQModel's 2-bit linear layers.

    qweight  int32 [K / 16, N]        row r holds k = 16 r + i in bits 2 i, 2 i + 1
    qzeros   int32 [groups, N / 16]   column c holds the zero of n = 16 c + i there
    scales   float [groups, N]
    g_idx    int32 [K]                the group of each row
    W[k, n] = scales[g, n] * (code - zero[g, n]), g = g_idx[k]

Version 1 ("gptq") stores zero - 1, so that 0 became 3: the 1 is added to each field and wraps inside it.
Adding 0x55555555 to whole words, as some converters do, carries into the next field. Version 2
("gptq_v2") stores the zero itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import Requantize, expect_shape, fields, floats, inexact, integers, quant_tensor
from .errors import CheckpointError

_WHERE = "from_gptq"


def from_gptq(
    qweight: Any,
    qzeros: Any,
    scales: Any,
    g_idx: Any = None,
    *,
    version: int,
    reorder: bool = False,
    requantize: Requantize = None,
) -> QuantTensor:
    """A 2-bit GPTQ layer as a QuantTensor of W [K, N] = [in, out].

    Args:
      qweight, qzeros, scales: as above.
      g_idx: None means rows in equal groups one after another.
      version: 1 or 2; `checkpoint_format` in quantize_config.json, "gptq" or "gptq_v2".
      reorder: with act-order (desc_act), rows of one group are scattered, and a QuantTensor cannot say so.
        True sorts the rows by group: the result is W[gptq_order(g_idx)], to be multiplied with
        x[..., gptq_order(g_idx)].
      requantize: arguments of jax_trirun.quantize, used when W cannot be represented exactly.

    Raises:
      CheckpointError: shapes or dtypes that do not fit each other, or a weight that cannot be
        represented exactly and neither reorder nor requantize to help.
    """
    if version not in (1, 2):
        raise CheckpointError(
            f"{_WHERE}: version must be 1 (checkpoint_format gptq) or 2 (gptq_v2), got {version!r}"
        )
    codes = fields(integers(_WHERE, "qweight", qweight, ("int32", "uint32")), axis=0)
    stored = fields(integers(_WHERE, "qzeros", qzeros, ("int32", "uint32")), axis=1)
    scales = floats(_WHERE, "scales", scales)
    k, n = codes.shape
    if scales.ndim != 2 or scales.shape[1] != n:
        raise CheckpointError(f"{_WHERE}: scales must have shape (groups, N={n}), got {scales.shape}")
    groups = scales.shape[0]
    expect_shape(_WHERE, "qzeros", stored[:, ::16], (groups, -(-n // 16)))
    zeros = ((stored[:, :n] + (version == 1)) & 3).astype(scales.dtype)
    order = _checked_order(g_idx, k, groups)
    if order is None:
        return quant_tensor(_WHERE, codes, scales, zeros, requantize)
    sizes = np.bincount(np.asarray(g_idx), minlength=groups)
    if reorder and (sizes == sizes[0]).all():
        return quant_tensor(_WHERE, codes[order], scales, zeros, requantize)
    why = (
        f"its groups have {sizes.min()} to {sizes.max()} rows each"
        if reorder
        else "act-order scatters the rows of a group over K; reorder=True sorts them (exact, but x must be "
        "reordered by gptq_order(g_idx) too)"
    )

    def weight():
        g = np.asarray(g_idx)
        return scales.astype(np.float32)[g] * (codes.astype(np.float32) - zeros.astype(np.float32)[g])

    return inexact(_WHERE, why, weight, requantize)


def gptq_order(g_idx: Any) -> np.ndarray:
    """The order of rows, int [K], that puts each group's together: stable, groups ascending."""
    return np.argsort(np.asarray(g_idx), kind="stable")


def _checked_order(g_idx: Any, k: int, groups: int) -> np.ndarray | None:
    """gptq_order, or None when the rows lie in equal groups one after another already."""
    if g_idx is None:
        return None
    g_idx = integers(_WHERE, "g_idx", g_idx, ("int32", "int64"), ndim=1)
    expect_shape(_WHERE, "g_idx", g_idx, (k,))
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{_WHERE}: g_idx must be in 0 .. {groups - 1} (scales have {groups} rows), got "
            f"{g_idx.min()} .. {g_idx.max()}"
        )
    if k % groups == 0 and (g_idx == np.arange(k) // (k // groups)).all():
        return None
    return gptq_order(g_idx)
