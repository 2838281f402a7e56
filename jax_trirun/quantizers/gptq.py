"""GPTQ: round row after row, and let the rows that follow make up for each rounding error.

The squared error of a layer's outputs over calibration inputs x [T, K] is tr(E^T H E), where E = W - W_q
and H = x^T x. GPTQ (Frantar et al. 2022, arXiv:2210.17323) fixes the rows of W[K, N] in turn; rounding
row k by e moves the rows j > k that are still free by -e U[k, j] / U[k, k], the best they can do, with
H^-1 = U^T U and U upper triangular.

Here each group's grid is fitted just before its first row is fixed, on weights that carry all earlier
compensation, and under the error that row k really costs, e^2 / U[k, k]^2. A negative scale is tried
too: at 2 bits the choice between {-1, 0, 1, 2} and {-2, -1, 0, 1} is much of the quality.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..layout import layout
from .grid import levels, split_groups
from .mse import search

_RETRIES = 6  # each with _RETRY_FACTOR times the damping: 0.1 ends at 409
_RETRY_FACTOR = 4.0
_DEAD_IMPORTANCE = 1e-6  # of an input that was always zero, beside a live one's of about 1
_HIGHEST = jax.lax.Precision.HIGHEST


class Solution(NamedTuple):
    """What ``solve`` returns."""

    codes: jax.Array  # uint8 [K, N]
    scales: jax.Array  # scale_dtype [K / G, N]
    damping: jax.Array  # float32 []: the one that worked; NaN when none did


def add_to_hessian(hessian: jax.Array, x: jax.Array) -> jax.Array:
    """H + x^T x, in float32.

    Sum over batches and documents of any length: a token counts the same wherever it stands. Only the
    direction of H matters to ``solve``, so it needs no division.

    Args:
        hessian: float32 [K, K]; ``jnp.zeros((K, K))`` to begin with.
        x: float [..., K], the layer's inputs. Leave padding out, or set it to zero.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return hessian + jnp.matmul(flat.T, flat, precision=_HIGHEST)


def output_error(w: jax.Array, approximation: jax.Array, hessian: jax.Array) -> jax.Array:
    """The relative squared error of the layer's outputs, tr(E^T H E) / tr(W^T H W): float32 []."""

    def energy(a):
        return jnp.sum(a * jnp.matmul(hessian, a, precision=_HIGHEST))

    w = w.astype(jnp.float32)
    return energy(w - approximation.astype(jnp.float32)) / jnp.maximum(energy(w), jnp.finfo(jnp.float32).tiny)


@partial(
    jax.jit,
    static_argnames=(
        "group_size",
        "scale_dtype",
        "bits",
        "block_size",
        "act_order",
        "ternary",
        "signed",
        "candidates",
        "refine",
    ),
)
def solve(
    w: jax.Array,
    hessian: jax.Array,
    damping: jax.Array | float,
    *,
    group_size: int,
    scale_dtype: Any,
    bits: int,
    block_size: int,
    act_order: bool,
    ternary: bool,
    signed: bool,
    candidates: int,
    refine: int,
) -> Solution:
    """GPTQ on one matrix w [K, N]. Arguments: as ``jax_trirun.quantizers.gptq``, none optional.

    Groups keep their rows whatever the order of work. In activation order, or with one group for all of
    K, grids are fitted beforehand ("static groups"), else on compensated weights.
    """
    k, n = w.shape
    span = (-1, 1) if ternary else levels(bits)
    fit = partial(
        search, span=span, scale_dtype=scale_dtype, candidates=candidates, refine=refine, signed=signed
    )
    hessian, dead = _normalised(hessian)
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True) if act_order else jnp.arange(k)
    upper, damping = _inverse_factor(hessian[order][:, order], damping)
    importance = jnp.where(dead[order], _DEAD_IMPORTANCE, jnp.diagonal(upper) ** -2)

    static = act_order or group_size == -1
    size = k if group_size == -1 else group_size
    if static:
        grouped = split_groups(w, group_size)
        by_row = jnp.zeros(k).at[order].set(importance)
        fixed = fit(grouped, importance=by_row.reshape(-1, size, 1))

    # Whole blocks: added rows have no weight, no importance and no tie to others.
    block = block_size
    padding = -k % block
    free = jnp.pad(w.astype(jnp.float32)[order], ((0, padding), (0, 0)))
    upper = jnp.pad(upper, ((0, padding), (0, padding))) + jnp.diag(jnp.arange(k + padding) >= k)
    importance = jnp.pad(importance, (0, padding), constant_values=_DEAD_IMPORTANCE)
    group_of = jnp.pad(order // size, (0, padding), mode="edge")
    step = block if static else size  # rows between two fits

    def fix_rows(i, state, local_upper, scales, start):
        """Row start + i of the block: round, note the error, compensate inside the block."""
        rows, errors, level = state
        row = start + i
        scale = scales[i] if scales.ndim == 2 and scales.shape[0] == step else scales[0]
        usable = scale != 0
        q = jnp.where(usable, jnp.clip(jnp.round(rows[row] / jnp.where(usable, scale, 1.0)), *span), 0.0)
        error = (rows[row] - q * scale) / local_upper[row, row]
        rows = rows - local_upper[row][:, None] * error[None]
        return rows, errors.at[row].set(error), level.at[row].set(q)

    def fix_block(free, b):
        first = b * block
        local_upper = jax.lax.dynamic_slice(upper, (first, first), (block, block))
        rows = jax.lax.dynamic_slice_in_dim(free, first, block)
        state = rows, jnp.zeros_like(rows), jnp.zeros_like(rows)
        fitted = []
        for start in range(0, block, step):
            if static:
                scales = fixed[jax.lax.dynamic_slice_in_dim(group_of, first, block)]
            else:
                part = jax.lax.dynamic_slice_in_dim(importance, first + start, step)
                scales = fit(state[0][None, start : start + step], importance=part[:, None])
                fitted.append(scales)
            body = partial(fix_rows, local_upper=local_upper, scales=scales, start=start)
            state = jax.lax.fori_loop(0, step, body, state)
        _, errors, level = state
        across = jax.lax.dynamic_slice_in_dim(upper, first, block)
        # Rows fixed before are changed as well, but never read again.
        free = free - jnp.matmul(across.T, errors, precision=_HIGHEST)
        codes = (level + layout(bits).zero_point).astype(jnp.uint8)
        return free, (codes, jnp.concatenate(fitted) if fitted else jnp.zeros((0, n)))

    _, (codes, fitted) = jax.lax.scan(fix_block, free, jnp.arange((k + padding) // block))
    codes = jnp.zeros((k, n), jnp.uint8).at[order].set(codes.reshape(-1, n)[:k])
    scales = fixed if static else fitted.reshape(-1, n)[: k // size]
    return Solution(codes, scales.astype(scale_dtype), damping)


def _normalised(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H with a mean diagonal of 1, its dead rows (inputs that were always zero) made the identity's."""
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    scaled = hessian / jnp.where(mean > 0, mean, 1)
    scaled = jnp.where(dead[:, None] | dead[None, :], 0, scaled)
    return scaled + jnp.diag(dead.astype(jnp.float32)), dead


def _inverse_factor(hessian: jax.Array, damping: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(U, damping) with (H + damping I)^-1 = U^T U, U upper triangular; damping grows until that exists.

    From the end backwards H = R R^T with R upper triangular, and U = R^-1: one Cholesky factorisation
    and one triangular inverse, where inverting H first would square its condition number.
    """
    identity = jnp.eye(hessian.shape[0], dtype=jnp.float32)

    def factor(damping):
        backwards = (hessian + damping * identity)[::-1, ::-1]
        return jnp.linalg.cholesky(backwards, symmetrize_input=True)

    def failed(state):
        tries, _, lower = state
        return ~jnp.all(jnp.isfinite(lower)) & (tries < _RETRIES)

    def retry(state):
        tries, damping, _ = state
        damping = damping * _RETRY_FACTOR
        return tries + 1, damping, factor(damping)

    damping = jnp.asarray(damping, jnp.float32)
    _, damping, lower = jax.lax.while_loop(failed, retry, (0, damping, factor(damping)))
    upper = jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)
    return upper, jnp.where(jnp.all(jnp.isfinite(lower)), damping, jnp.nan)
