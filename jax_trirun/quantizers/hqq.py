"""Half-quadratic quantisation: affine groups whose zeros are fitted under an lp norm with p < 1.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the error W - W_q is
split into a sparse part (outliers, found by the lp norm's shrinkage) and the rest, which the zero fits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..layout import layout
from .grid import merge_groups, split_groups, stored


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits", "p", "beta", "kappa", "iterations"))
def hqq(
    w: jax.Array,
    group_size: int,
    scale_dtype: Any,
    *,
    bits: int = 2,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
):
    """W = scale * (code - zero) with float zeros.

    Scales are the groups' ranges over the number of steps. Zeros start at the groups' minima, follow the
    iterations, and the best of all of them under the mean absolute error is kept for each group.

    Args:
        w: float [..., K, N].
        group_size: rows that share a scale and a zero; -1 for all of K.
        scale_dtype: float dtype the scales and zeros are stored in.
        bits: of a code.
        p: of the norm, 0 < p <= 1.
        beta, kappa: the penalty's weight, and its growth an iteration.
        iterations: how many.

    Returns:
        codes uint8 [..., K, N], scales and zeros ``scale_dtype`` [..., K / G, N].

    Raises:
        ValueError: an option is out of its range.
    """
    if not 0 < p <= 1 or beta <= 0 or kappa < 1 or iterations < 0:
        raise ValueError(
            "quantize: 0 < p <= 1, beta > 0, kappa >= 1 and iterations >= 0 are wanted, "
            f"got p={p}, beta={beta}, kappa={kappa}, iterations={iterations}"
        )
    top = layout(bits).max_code
    grouped = split_groups(w, group_size)
    low, high = jnp.min(grouped, axis=-2), jnp.max(grouped, axis=-2)
    # A constant group is two levels apart from zero by its own value: code - zero = 1.
    scales = jnp.where(high > low, (high - low) / top, low)
    scales = stored(scales, scale_dtype)
    usable = jnp.where(scales == 0, 1.0, scales)
    ratio = grouped / usable[..., None, :]

    def codes_at(zeros):
        return jnp.clip(jnp.round(ratio + zeros[..., None, :]), 0, top)

    def error_at(zeros):
        back = (codes_at(zeros) - zeros[..., None, :]) * scales[..., None, :]
        return jnp.mean(jnp.abs(grouped - back), axis=-2)

    def iterate(i, state):
        error, best, zeros = state
        codes = codes_at(zeros)
        lost = grouped - (codes - zeros[..., None, :]) * scales[..., None, :]
        weight = beta * kappa ** jnp.asarray(i, jnp.float32)
        size = jnp.abs(lost)
        shrunk = jnp.maximum(size - jnp.maximum(size, 1e-8) ** (p - 1) / weight, 0)
        outliers = jnp.sign(lost) * shrunk
        zeros = jnp.mean(codes - (grouped - outliers) / usable[..., None, :], axis=-2)
        zeros = stored(zeros, scale_dtype)
        new = error_at(zeros)
        return jnp.where(new < error, new, error), jnp.where(new < error, zeros, best), zeros

    zeros = stored(jnp.where(high > low, -low / usable, 0.0), scale_dtype)
    _, zeros, _ = jax.lax.fori_loop(0, iterations, iterate, (error_at(zeros), zeros, zeros))
    codes = merge_groups(codes_at(zeros).astype(jnp.uint8))
    return codes, scales.astype(scale_dtype), zeros.astype(scale_dtype)
