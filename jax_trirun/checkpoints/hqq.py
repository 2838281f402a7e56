"""HQQ, 2 bits: W = (code - zero) * scale, both of them floats.

The weight [out, in] is reshaped to rows of group_size (axis=1: a group is consecutive inputs of one
output) or to group_size rows (axis=0), quantised, and its rows packed 4 to a byte: the first quarter of
the rows in the highest bits, the last in the lowest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import Requantize, expect_shape, floats, inexact, integers, quant_tensor
from .errors import CheckpointError

_WHERE = "from_hqq"


def from_hqq(
    W_q: Any,
    scale: Any,
    zero: Any,
    *,
    shape: tuple[int, int],
    group_size: int | None,
    requantize: Requantize = None,
) -> QuantTensor:
    """A 2-bit HQQ layer as a QuantTensor of W [in, out], with zeros.

    Args:
      W_q: uint8, a quarter of the reshaped weight's rows.
      scale, zero: float [out * in / group_size, 1] (axis=1), or [1, ..] (axis=0, which cannot be
        represented exactly).
      shape: (out, in).
      group_size: weights in a group, 32, 64 or a multiple of 128; None means one group an output.
      requantize: arguments of jax_trirun.quantize, used when W cannot be represented exactly.

    Raises:
      CheckpointError: shapes or dtypes that do not fit each other, or a weight that cannot be
        represented exactly and requantize is None.
    """
    packed = integers(_WHERE, "W_q", W_q, ("uint8",))
    scale, zero = floats(_WHERE, "scale", scale), floats(_WHERE, "zero", zero)
    n, k = (int(d) for d in shape)
    size = k if group_size is None else group_size
    if size < 1 or n * k % size:
        raise CheckpointError(f"{_WHERE}: group_size must divide out * in = {n * k}, got {group_size}")
    groups = n * k // size
    by_input = scale.shape != (1, groups) or groups == 1
    expect_shape(_WHERE, "scale", scale, (groups, 1) if by_input else (1, groups))
    expect_shape(_WHERE, "zero", zero, scale.shape)
    rows, columns = (groups, size) if by_input else (size, groups)
    expect_shape(_WHERE, "W_q", packed, (-(-rows // 4), columns))
    codes = np.concatenate([packed >> shift & 3 for shift in (6, 4, 2, 0)])[:rows]
    if by_input and k % size == 0:
        return quant_tensor(
            _WHERE,
            codes.reshape(n, k).T,
            scale.reshape(n, k // size).T,
            zero.reshape(n, k // size).T,
            requantize,
        )

    def weight():
        floats32 = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
        return floats32.reshape(n, k).T

    why = (
        f"group_size={size} does not divide in={k}, so that groups cross from one output to the next"
        if by_input
        else "axis=0 groups weights across outputs, not along the inputs"
    )
    return inexact(_WHERE, why, weight, requantize)
