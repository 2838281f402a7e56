"""TriRun's own B and s tensors (a 2-bit Marlin layout), for its codes 0 .. 3 with W = s (code - 1).

B is int32 [K / 16, N]. Row r holds k = 16 r .. 16 r + 15; its words come in runs of 64, one for every
64 columns. In a run, words 2 lane and 2 lane + 1 (32 lanes, t = lane % 4, g = lane / 4) hold the
operands of tensor-core tiles of 16 columns, tiles 0, 1 and 2, 3. Field f = 0 .. 15 of such a word:

    tile    2 (word % 2) + f % 2
    k       2 t + f / 8 + 8 (f / 2 % 2)
    n       16 tile + g + 8 (f / 4 % 2)

s is float16 [groups, N] with permuted columns. With several groups, columns 8 i + j and i + 8 j of every
64 changed places; with one, column 8 i + 2 j + h of every 32 holds that of 2 i + 8 j + h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import Requantize, fields, floats, integers, quant_tensor
from .errors import CheckpointError

_WHERE = "from_trirun"


def from_trirun(B: Any, s: Any, *, requantize: Requantize = None) -> QuantTensor:
    """A TriRun layer's buffers as a QuantTensor of W [in, out].

    Args:
      B: int32 [K / 16, N], N a multiple of 64.
      s: float16 [groups, N].
      requantize: arguments of jax_trirun.quantize, used when the group size cannot be packed.

    Raises:
      CheckpointError: shapes or dtypes that do not fit.
    """
    words = integers(_WHERE, "B", B, ("int32", "uint32"))
    s = floats(_WHERE, "s", s)
    k, n = 16 * words.shape[0], words.shape[1]
    if n % 64:
        raise CheckpointError(f"{_WHERE}: B must have a multiple of 64 columns, got {words.shape}")
    if s.ndim != 2 or s.shape[1] != n:
        raise CheckpointError(f"{_WHERE}: s must have shape (groups, N={n}), got {s.shape}")
    # Axes of the stored codes, slowest first: k's tile, 64 columns, g, t, pair of tiles, then the bits of
    # a field's number: h, b, u and the tile of the pair.
    axes = fields(words, axis=1).reshape(k // 16, n // 64, 8, 4, 2, 2, 2, 2, 2)
    tile, run, g, t, pair, h, b, u, odd = range(9)
    codes = axes.transpose(tile, u, t, h, run, pair, odd, b, g).reshape(k, n)
    return quant_tensor(_WHERE, codes, _plain_scales(s), None, requantize)


def _plain_scales(s: np.ndarray) -> np.ndarray:
    groups, n = s.shape
    if groups > 1:
        return s.reshape(groups, n // 64, 8, 8).swapaxes(2, 3).reshape(groups, n)
    return s.reshape(1, n // 32, 4, 4, 2).swapaxes(2, 3).reshape(1, n)
