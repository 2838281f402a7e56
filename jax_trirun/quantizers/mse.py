"""Search over the size and the sign of each group's scale for the least squared error."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .grid import codes_of, covering_scales, nearest_levels, split_groups, squared_error, stored


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits", "candidates", "refine"))
def mse(
    w: jax.Array, group_size: int, scale_dtype: Any, *, bits: int = 2, candidates: int = 24, refine: int = 2
):
    """The best scale of ``2 * candidates + 1``, then polished by least squares.

    The first candidate is round-to-nearest's own scale, so no group ends with a larger error than there.
    The others are ``candidate_sizes``, with both signs. Each is rounded to ``scale_dtype`` before it is
    tried, so what is compared is what will be stored.

    Args:
        w: float [..., K, N].
        group_size: rows that share a scale; -1 for all of K.
        scale_dtype: float dtype the scales are stored in.
        bits: of a code.
        candidates: sizes tried for each sign.
        refine: times that the least-squares scale of the current codes is tried afterwards.

    Returns:
        codes uint8 [..., K, N], scales ``scale_dtype`` [..., K / G, N], None (no zeros).

    Raises:
        ValueError: candidates or refine is negative.
    """
    if candidates < 0 or refine < 0:
        raise ValueError(f"quantize: candidates and refine must be >= 0, got {candidates} and {refine}")
    grouped = split_groups(w, group_size)

    def keep_better(best, scales):
        error, kept = best
        scales = stored(scales, scale_dtype)
        new = squared_error(grouped, scales, bits)
        better = new < error  # false for NaN: an overflowed candidate is never kept
        return jnp.where(better, new, error), jnp.where(better, scales, kept)

    first = stored(covering_scales(grouped, bits), scale_dtype)
    best = squared_error(grouped, first, bits), first

    def try_size(i, best):
        size = candidate_size(grouped, i, candidates, bits)
        return keep_better(keep_better(best, size), -size)

    def try_least_squares(_, best):
        level = nearest_levels(grouped, best[1], bits)
        norm = jnp.sum(level * level, axis=-2)
        return keep_better(best, jnp.sum(grouped * level, axis=-2) / jnp.maximum(norm, 1))

    best = jax.lax.fori_loop(0, candidates, try_size, best)
    _, scales = jax.lax.fori_loop(0, refine, try_least_squares, best)
    return codes_of(nearest_levels(grouped, scales, bits), bits), scales.astype(scale_dtype), None


def candidate_size(grouped: jax.Array, i: Any, candidates: int, bits: int) -> jax.Array:
    """The i-th size tried for each group: a geometric row from its largest weight's scale downwards.

    It ends at half of the root mean square for 2 bits: a normal distribution's best 2-bit scale is about
    its root mean square, and heavier tails want more, not less. Each further bit halves both ends.
    """
    largest = jnp.max(jnp.abs(grouped), axis=-2)
    rms = jnp.sqrt(jnp.mean(grouped * grouped, axis=-2))
    smallest = jnp.maximum(rms / 2, jnp.finfo(jnp.float32).tiny)
    largest = jnp.maximum(largest, smallest)
    step = jnp.asarray(i, jnp.float32) / max(candidates - 1, 1)
    return largest * (smallest / largest) ** step / 2 ** (bits - 2)
