"""Round to nearest: a grid from the group's largest weights, each weight takes the nearest level."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .grid import (
    codes_of,
    covering_scales,
    farthest_scales,
    levels,
    nearest_levels,
    split_groups,
    squared_error,
    stored,
)


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits"))
def rtn(w: jax.Array, group_size: int, scale_dtype: Any, *, bits: int = 2):
    """Round to nearest on the better of two grids, either of which may be turned round.

    One ends at the group's largest weight on its long side (``farthest_scales``), as GGML's; its short side
    may clip. The other is the smallest that clips nothing (``covering_scales``). A 2-bit grid is so lopsided
    that clipping is the smaller error in most groups, but ternary weights, say, want the other. Each group
    takes the grid of the smaller squared error. Cheap, and at 2 bits rarely good: see ``mse``.

    Args:
        w: float [..., K, N].
        group_size: rows that share a scale; -1 for all of K.
        scale_dtype: float dtype the scales are stored in.
        bits: of a code.

    Returns:
        codes uint8 [..., K, N], scales ``scale_dtype`` [..., K / G, N], None (no zeros).
    """
    span = levels(bits)
    grouped = split_groups(w, group_size)
    covering = stored(covering_scales(grouped, span), scale_dtype)
    clipping = stored(farthest_scales(grouped, span), scale_dtype)
    better = squared_error(grouped, clipping, span) < squared_error(grouped, covering, span)
    scales = jnp.where(better, clipping, covering)
    return codes_of(nearest_levels(grouped, scales, span), bits), scales.astype(scale_dtype), None
