"""compressed-tensors (vLLM, llm-compressor), format pack-quantized with 2 bits.

    weight_packed      int32 [out, ceil(in / 16)]   word c of a row holds k = 16 c + i in bits 2 i, 2 i + 1
    weight_scale       float [out, groups]          groups = 1: one scale an output
    weight_zero_point  int8 [out, groups], or int32 [ceil(out / 16), groups] packed along out, or nothing
    weight_g_idx       int32 [in], or nothing       the group of each input (act-order)
    weight_shape       [out, in]

A field is the value, -2 .. 1, plus 2; W = scale * (value - zero_point).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import Requantize, dense, expect_shape, fields, floats, inexact, integers, quant_tensor
from .errors import CheckpointError

_WHERE = "from_compressed_tensors"


def from_compressed_tensors(
    weight_packed: Any,
    weight_scale: Any,
    weight_shape: Any,
    weight_zero_point: Any = None,
    weight_g_idx: Any = None,
    *,
    requantize: Requantize = None,
) -> QuantTensor:
    """A 2-bit pack-quantized layer as a QuantTensor of W [in, out].

    Without zero points, scale * {-2, -1, 0, 1} becomes -scale * {2, 1, 0, -1}: no zeros are needed.

    Raises:
      CheckpointError: shapes or dtypes that do not fit each other, or a weight that cannot be
        represented exactly and requantize (arguments of jax_trirun.quantize) is None.
    """
    shape = np.asarray(weight_shape).reshape(-1).tolist()
    if len(shape) != 2:
        raise CheckpointError(f"{_WHERE}: weight_shape must be (out, in), got {shape}")
    n, k = (int(d) for d in shape)
    packed = integers(_WHERE, "weight_packed", weight_packed, ("int32", "uint32"))
    expect_shape(_WHERE, "weight_packed", packed, (n, -(-k // 16)))
    codes = fields(packed, axis=1)[:, :k].T
    scales = floats(_WHERE, "weight_scale", weight_scale)
    if scales.ndim != 2 or scales.shape[0] != n:
        raise CheckpointError(f"{_WHERE}: weight_scale must have shape (out={n}, groups), got {scales.shape}")
    groups = scales.shape[1]
    if weight_zero_point is None:
        codes, scales, zeros = 3 - codes, -scales.T, None
    else:
        scales, zeros = scales.T, _zeros(weight_zero_point, n, groups).T.astype(scales.dtype)
    if weight_g_idx is not None and not _in_order(weight_g_idx, k, groups):
        g = np.asarray(weight_g_idx)

        def weight():
            return dense(codes, scales[g], None if zeros is None else zeros[g])

        return inexact(_WHERE, "weight_g_idx (act-order) scatters the inputs of a group", weight, requantize)
    return quant_tensor(_WHERE, codes, scales, zeros, requantize)


def _zeros(zero_point: Any, n: int, groups: int) -> np.ndarray:
    """The code of zero, [out, groups]: 2 plus the stored value."""
    stored = integers(_WHERE, "weight_zero_point", zero_point, ("int8", "int32"))
    if stored.dtype == np.int8:
        expect_shape(_WHERE, "weight_zero_point", stored, (n, groups))
        return stored.astype(np.int32) + 2
    expect_shape(_WHERE, "weight_zero_point", stored, (-(-n // 16), groups))
    return fields(stored, axis=0)[:n].astype(np.int32)


def _in_order(g_idx: Any, k: int, groups: int) -> bool:
    g = integers(_WHERE, "weight_g_idx", g_idx, ("int32", "int64"), ndim=1)
    expect_shape(_WHERE, "weight_g_idx", g, (k,))
    if (g == -1).all():  # how an unused g_idx is stored
        return True
    if g.min() < 0 or g.max() >= groups:
        raise CheckpointError(
            f"{_WHERE}: weight_g_idx must be in 0 .. {groups - 1}, got {g.min()} .. {g.max()}"
        )
    return k % groups == 0 and bool((g == np.arange(k) // (k // groups)).all())
