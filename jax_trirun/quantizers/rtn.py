"""Round to nearest: the grid covers every weight of the group, each weight takes the nearest level."""

from functools import partial
from typing import Any

import jax

from .grid import codes_of, covering_scales, levels, nearest_levels, split_groups, stored


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits"))
def rtn(w: jax.Array, group_size: int, scale_dtype: Any, *, bits: int = 2):
    """Round to nearest on the smallest grid, of either sign, that clips nothing.

    No weight moves by more than half of its scale (up to the rounding of the scale itself). Cheap, and
    at 2 bits rarely good: one large weight widens the grid of its whole group. See ``mse``.

    Args:
        w: float [..., K, N].
        group_size: rows that share a scale; -1 for all of K.
        scale_dtype: float dtype the scales are stored in.
        bits: of a code.

    Returns:
        codes uint8 [..., K, N], scales ``scale_dtype`` [..., K / G, N], None (no zeros).
    """
    grouped = split_groups(w, group_size)
    scales = stored(covering_scales(grouped, levels(bits)), scale_dtype)
    return codes_of(nearest_levels(grouped, scales, levels(bits)), bits), scales.astype(scale_dtype), None
