"""Search over the size and the sign of each group's scale for the least squared error."""

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


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits", "candidates", "refine"))
def mse(
    w: jax.Array, group_size: int, scale_dtype: Any, *, bits: int = 2, candidates: int = 24, refine: int = 2
):
    """The best scale of ``2 * candidates + 2``, then polished by least squares.

    The first two are those that round-to-nearest chooses from, so no group ends with a larger error than
    there. The others are ``candidate_sizes``, with both signs. Each is rounded to ``scale_dtype`` before it is
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
    scales = search(grouped, levels(bits), scale_dtype, candidates=candidates, refine=refine)
    return codes_of(nearest_levels(grouped, scales, levels(bits)), bits), scales.astype(scale_dtype), None


def search(
    grouped: jax.Array,
    span: tuple[int, int],
    scale_dtype: Any,
    *,
    candidates: int,
    refine: int,
    importance: jax.Array | float = 1.0,
    signed: bool = True,
) -> jax.Array:
    """The scales that ``mse`` describes, as stored float32 [..., groups, N].

    Args:
        grouped: float32 [..., groups, G, N].
        span: the lowest and the highest level.
        scale_dtype: float dtype the scales will be stored in.
        candidates, refine: as ``mse``'s.
        importance: of each row's squared error, broadcast against ``grouped``.
        signed: whether negative scales are tried.
    """

    def keep_better(best, scales):
        error, kept = best
        scales = stored(scales, scale_dtype)
        new = squared_error(grouped, scales, span, importance)
        better = new < error  # false for NaN: an overflowed candidate is never kept
        return jnp.where(better, new, error), jnp.where(better, scales, kept)

    def try_size(i, best):
        size = candidate_size(grouped, i, candidates, span)
        best = keep_better(best, size)
        return keep_better(best, -size) if signed else best

    def try_least_squares(_, best):
        level = nearest_levels(grouped, best[1], span)
        norm = jnp.sum(importance * level * level, axis=-2)
        fit = jnp.sum(importance * grouped * level, axis=-2) / jnp.where(norm > 0, norm, 1)
        return keep_better(best, fit if signed else jnp.abs(fit))

    first = stored(covering_scales(grouped, span, signed=signed), scale_dtype)
    best = squared_error(grouped, first, span, importance), first
    if signed:
        best = keep_better(best, farthest_scales(grouped, span))
    best = jax.lax.fori_loop(0, candidates, try_size, best)
    return jax.lax.fori_loop(0, refine, try_least_squares, best)[1]


def candidate_size(grouped: jax.Array, i: Any, candidates: int, span: tuple[int, int]) -> jax.Array:
    """The i-th size tried for each group: a geometric row from its largest weight's scale downwards.

    It ends at half of the root mean square for 2 bits: a normal distribution's best 2-bit scale is about
    its root mean square, and heavier tails want more, not less. Wider codes divide both ends alike.
    """
    largest = jnp.max(jnp.abs(grouped), axis=-2)
    rms = jnp.sqrt(jnp.mean(grouped * grouped, axis=-2))
    smallest = jnp.maximum(rms / 2, jnp.finfo(jnp.float32).tiny)
    largest = jnp.maximum(largest, smallest)
    step = jnp.asarray(i, jnp.float32) / max(candidates - 1, 1)
    return largest * (smallest / largest) ** step / max(-span[0] // 2, 1)
