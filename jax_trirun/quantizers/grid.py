"""What every quantiser shares: groups of rows, the grid a code stands on, rounding to it.

A weight is stored as a code and a scale, W = scale * (code - zero). Without zeros, zero is the format's
own zero point (1 for 2 bits), so a code stands for the level ``code - 1`` in {-1, 0, 1, 2}. A negative
scale turns that grid round, into {-2, -1, 0, 1} times ``|scale|``.

Scales are rounded to the dtype they will be stored in *before* any code is chosen: a code is the nearest
level of the grid that will be read back, not of one that existed only while quantising.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..layout import layout


def levels(bits: int) -> tuple[int, int]:
    """The lowest and the highest level: (-1, 2) for 2 bits, (-8, 7) for 4."""
    lay = layout(bits)
    return -lay.zero_point, lay.max_code - lay.zero_point


def split_groups(w: jax.Array, group_size: int) -> jax.Array:
    """[..., K, N] -> float32 [..., K / G, G, N]; a group_size of -1 makes all of K one group."""
    *lead, k, n = w.shape
    size = k if group_size == -1 else group_size
    return w.astype(jnp.float32).reshape(*lead, k // size, size, n)


def merge_groups(grouped: jax.Array) -> jax.Array:
    """[..., K / G, G, N] -> [..., K, N], the inverse of split_groups."""
    *lead, groups, size, n = grouped.shape
    return grouped.reshape(*lead, groups * size, n)


def stored(scales: jax.Array, dtype: Any) -> jax.Array:
    """The float32 values that ``scales`` have once they are stored in ``dtype``."""
    # XLA may drop a round trip through a narrower type as excess precision; the barrier keeps it.
    # (lax.reduce_precision would do, but flushes float16's subnormals, which storing keeps.)
    return jax.lax.optimization_barrier(scales.astype(dtype)).astype(jnp.float32)


def nearest_levels(grouped: jax.Array, scales: jax.Array, span: tuple[int, int]) -> jax.Array:
    """The level nearest to each weight, as float32; a zero scale gives level 0.

    Args:
        grouped: float32 [..., groups, G, N].
        scales: float32 [..., groups, N], of either sign.
        span: the lowest and the highest level allowed: ``levels(bits)``, or (-1, 1) for ternary.
    """
    scales = scales[..., None, :]
    usable = scales != 0
    ratio = grouped / jnp.where(usable, scales, 1.0)
    return jnp.where(usable, jnp.clip(jnp.round(ratio), *span), 0.0)


def squared_error(
    grouped: jax.Array, scales: jax.Array, span: tuple[int, int], importance: jax.Array | float = 1.0
) -> jax.Array:
    """The weighted sum of squared errors of each group, rounded to nearest: float32 [..., groups, N].

    ``importance`` broadcasts against ``grouped``: [..., groups, G, 1] weighs rows.
    """
    error = grouped - nearest_levels(grouped, scales, span) * scales[..., None, :]
    return jnp.sum(importance * error * error, axis=-2)


def codes_of(level: jax.Array, bits: int) -> jax.Array:
    """Levels [..., groups, G, N] -> codes uint8 [..., K, N]."""
    return merge_groups((level + layout(bits).zero_point).astype(jnp.uint8))


def covering_scales(grouped: jax.Array, span: tuple[int, int], *, signed: bool = True) -> jax.Array:
    """The smallest scale, of either sign, whose grid clips no weight: float32 [..., groups, N]."""
    low, high = span
    top, bottom = jnp.max(grouped, axis=-2), jnp.min(grouped, axis=-2)
    upright = jnp.maximum(jnp.maximum(top / high, bottom / low), 0)
    turned = jnp.maximum(jnp.maximum(top / -low, bottom / -high), 0)
    return jnp.where(upright <= turned, upright, -turned) if signed else upright


def farthest_scales(grouped: jax.Array, span: tuple[int, int]) -> jax.Array:
    """The scale that puts the weight of largest magnitude on the level farthest from zero, 2 for 2 bits.

    GGML's convention for its symmetric types (Q4_0: the largest weight over -8). Weights of the other
    sign are clipped where they are larger than the short side of the grid: float32 [..., groups, N].
    """
    top, bottom = jnp.max(grouped, axis=-2), jnp.min(grouped, axis=-2)
    return jnp.where(top >= -bottom, top, bottom) / max(span, key=abs)
