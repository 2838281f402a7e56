"""TriLM's ternary quantisation (Kaushal et al. 2024, arXiv:2407.12327): one scale a matrix shard."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .grid import codes_of, nearest_levels, split_groups, stored


@partial(jax.jit, static_argnames=("group_size", "scale_dtype", "bits", "shards", "epsilon"))
def trilm(
    w: jax.Array, group_size: int, scale_dtype: Any, *, bits: int = 2, shards: int = 1, epsilon: float = 1e-5
):
    """W = scale * {-1, 0, 1} with scale = epsilon + mean ``|w|`` of each shard.

    Args:
        w: float [..., K, N].
        group_size: rows that share a stored scale (the shard's value is repeated); -1 for all of K.
        scale_dtype: float dtype the scales are stored in.
        bits: of a code.
        shards: equal parts of N with a scale each: the model-parallel ranks of the training run.
        epsilon: added to the mean, as in training.

    Returns:
        codes uint8 [..., K, N], scales ``scale_dtype`` [..., K / G, N], None (no zeros).

    Raises:
        ValueError: shards does not divide N.
    """
    *lead, k, n = w.shape
    if shards < 1 or n % shards:
        raise ValueError(f"quantize: shards must divide N, got shards={shards}, N={n}")
    grouped = split_groups(w, group_size)
    parts = jnp.abs(w.astype(jnp.float32)).reshape(*lead, k, shards, n // shards)
    mean = epsilon + jnp.mean(parts, axis=(-3, -1))
    scales = jnp.broadcast_to(
        jnp.repeat(mean, n // shards, axis=-1)[..., None, :], (*lead, grouped.shape[-3], n)
    )
    scales = stored(scales, scale_dtype)
    return codes_of(nearest_levels(grouped, scales, (-1, 1)), bits), scales.astype(scale_dtype), None
