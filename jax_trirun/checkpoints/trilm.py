"""TriLM (Spectra): float16 weights that hold only -s, 0 and s, a different s for each shard of training.

The scales were computed per model-parallel shard, so one matrix has a few of them, constant over blocks
of its rows or of its columns. They are read back from the weights themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import GROUP_SIZES, QuantTensor
from .build import Requantize, floats, inexact, quant_tensor
from .errors import CheckpointError

_WHERE = "from_trilm"


def from_trilm(w: Any, *, requantize: Requantize = None) -> QuantTensor:
    """An unpacked ternary weight as a QuantTensor of W [in, out], in w's dtype.

    The largest groups that are exact are taken: one for all of K, or 128, 64 or 32 rows.

    Args:
      w: float [out, in], as stored; in every group of a row, all non-zero magnitudes are the same.
      requantize: arguments of jax_trirun.quantize, used when they are not.

    Raises:
      CheckpointError: w is no finite float matrix, or not ternary and requantize is None.
    """
    w = floats(_WHERE, "w", w)
    if w.ndim != 2 or w.size == 0:
        raise CheckpointError(f"{_WHERE}: w must have shape (out, in), not empty, got {w.shape}")
    w = w.T
    k, n = w.shape
    for size in (k, *sorted(GROUP_SIZES, reverse=True)):
        if k % size:
            continue
        magnitudes = np.abs(w).reshape(k // size, size, n)
        scales = magnitudes.max(axis=1)
        if ((magnitudes == 0) | (magnitudes == scales[:, None])).all():
            return quant_tensor(
                _WHERE, (np.sign(w.astype(np.float32)) + 1).astype(np.uint8), scales, None, None
            )
    why = "it is not ternary: some group of 32 inputs of one output has several magnitudes"
    return inexact(_WHERE, why, lambda: w.astype(np.float32), requantize)
