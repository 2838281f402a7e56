"""Mean-absolute ternary quantisation, of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, eq. 1-3)."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .grid import codes_of, nearest_levels, split_groups, stored


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits", "per"))
def absmean(
    w: jax.Array,
    group_size: int,
    scale_dtype: Any,
    *,
    bits: int = 2,
    per: Literal["group", "tensor"] = "group",
):
    """W = scale * {-1, 0, 1}, where the scale is the mean of ``|w|``.

    Args:
        w: float [..., K, N].
        group_size: rows that share a scale; -1 for all of K.
        scale_dtype: float dtype the scales are stored in.
        bits: of a code.
        per: "group", a mean for each group and column; "tensor", one for each [K, N] matrix, as BitNet
            trains them (its value is repeated over the groups).

    Returns:
        codes uint8 [..., K, N], scales ``scale_dtype`` [..., K / G, N], None (no zeros).

    Raises:
        ValueError: ``per`` is something else.
    """
    if per not in ("group", "tensor"):
        raise ValueError(f'quantize: per must be "group" or "tensor", got {per!r}')
    grouped = split_groups(w, group_size)
    mean = jnp.mean(jnp.abs(grouped), axis=-2 if per == "group" else (-3, -2, -1), keepdims=per == "tensor")
    *lead, groups, _, n = grouped.shape
    if per == "tensor":
        mean = jnp.broadcast_to(mean[..., 0, :], (*lead, groups, n))
    scales = stored(mean, scale_dtype)
    return codes_of(nearest_levels(grouped, scales, (-1, 1)), bits), scales.astype(scale_dtype), None
