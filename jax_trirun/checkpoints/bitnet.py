"""BitNet b1.58 as Hugging Face transformers stores it.

A weight of `out` rows is cut into 4 runs of out / 4 rows; byte [r, k] holds row r of each run, the
first in its lowest bits, as ternary value + 1. One scale serves the whole matrix: the layer class
`bitlinear` divides its output by it, `autobitlinear` multiplies (linear_class in quantization_config).
The layers also round activations to int8; that is not part of the weight and not done here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import fields, floats, integers, quant_tensor
from .errors import CheckpointError

_WHERE = "from_bitnet"


def from_bitnet(
    weight_uint8: Any, weight_scale: Any, *, linear_class: str, out_features: int | None = None
) -> QuantTensor:
    """A packed BitNet layer as a QuantTensor of W [in, out], one group, float32 scales.

    Args:
      weight_uint8: uint8 [ceil(out / 4), in].
      weight_scale: float, one number.
      linear_class: "bitlinear" (W = value / scale) or "autobitlinear" (W = value * scale).
      out_features: out, when it is not 4 times the rows.

    Raises:
      CheckpointError: another shape or dtype, a scale that is not a positive number, an unknown class.
    """
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(
            f"{_WHERE}: linear_class must be 'bitlinear' or 'autobitlinear', got {linear_class!r}"
        )
    packed = integers(_WHERE, "weight_uint8", weight_uint8, ("uint8",))
    scale = floats(_WHERE, "weight_scale", weight_scale).astype(np.float32)
    if scale.size != 1 or not scale.reshape(-1)[0] > 0:
        raise CheckpointError(f"{_WHERE}: weight_scale must be one positive number, got {scale.tolist()}")
    rows = 4 * packed.shape[0]
    out = rows if out_features is None else out_features
    if not rows - 4 < out <= rows:
        raise CheckpointError(
            f"{_WHERE}: out_features must be in {rows - 3} .. {rows} for {packed.shape[0]} packed rows, got {out}"
        )
    runs = fields(packed[:, None], axis=1)  # [out / 4, 4, in]
    codes = runs.swapaxes(0, 1).reshape(rows, -1)[:out].T
    value = scale.reshape(()) if linear_class == "autobitlinear" else np.float32(1) / scale.reshape(())
    return quant_tensor(_WHERE, codes, np.full((1, out), value, np.float32), None, None)
