"""GPTQ: outputs beat rounding, what it emits is what is stored, and hard Hessians are met."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun.quantizers import add_to_hessian, gptq, mse, output_error, quantize

K, N = 192, 24


def problem(k=K, n=N, seed=0, tokens=512):
    """Weights, and correlated inputs with their Hessian."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(k, k)) * np.geomspace(1, 0.02, k)
    x = jnp.asarray(rng.normal(size=(tokens, k)) @ mix.T, jnp.float32)
    w = jnp.asarray(rng.normal(size=(k, n)) * 0.02, jnp.float32)
    return w, x, add_to_hessian(jnp.zeros((k, k)), x)


def lost(w, qt, hessian):
    return float(output_error(w, jax_trirun.dequantize(qt, dtype=jnp.float32), hessian))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32},
        {"group_size": -1},
        {"act_order": True},
        {"scale_dtype": "float16"},
        {"bits": 4},
        {"group_size": 32, "block_size": 96},
    ],
    ids=str,
)
def test_outputs_beat_rounding(options):
    w, _, hessian = problem()
    options = {"group_size": 64} | options
    rounding = {name: options[name] for name in ("group_size", "bits", "scale_dtype") if name in options}
    assert lost(w, gptq(w, hessian, **options), hessian) < 0.5 * lost(w, quantize(w, **rounding), hessian)


def test_output_error_is_the_error_of_the_outputs():
    w, x, hessian = problem()
    qt = quantize(w, group_size=64)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    change = x64 @ (np.asarray(jax_trirun.dequantize(qt), np.float64) - w64)
    np.testing.assert_allclose(lost(w, qt, hessian), (change**2).sum() / ((x64 @ w64) ** 2).sum(), rtol=1e-3)


def test_the_solution_follows_the_papers_recursion():
    """Against a plain float64 loop over rows, with the inverse Hessian updated by elimination."""
    w, _, hessian = problem(k=64, n=6)
    qt = gptq(w, hessian, group_size=-1, damping=0.1)
    scale = np.asarray(qt.scales, np.float64)[0]
    rest = np.asarray(w, np.float64).copy()
    h = np.asarray(hessian, np.float64)
    inverse = np.linalg.inv(h + 0.1 * np.mean(np.diag(h)) * np.eye(64))
    fixed = np.zeros_like(rest)
    for row in range(64):
        fixed[row] = scale * np.clip(np.round(rest[row] / scale), -1, 2)
        error = (rest[row] - fixed[row]) / inverse[row, row]
        rest -= inverse[:, row, None] * error
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    same = np.isclose(np.asarray(jax_trirun.dequantize(qt)), fixed, atol=1e-6)
    assert same.all(axis=0).mean() >= 5 / 6  # one float32 tie may send a column another way


def test_with_uncorrelated_inputs_it_is_the_scale_search():
    w, _, _ = problem()
    ours = gptq(w, jnp.eye(K), group_size=64)
    codes, scales, _ = mse(w, 64, jnp.dtype("float32"))
    np.testing.assert_array_equal(jax_trirun.unpack(ours.words, (K, N)), codes)
    np.testing.assert_allclose(ours.scales, scales, rtol=1e-6)


@pytest.mark.parametrize("turned", (False, True))
def test_every_code_is_stored_as_emitted(turned):
    """Weights already on a grid come back exactly, each of the four levels, with either sign."""
    _, _, hessian = problem()
    level = np.random.default_rng(1).permuted(np.tile([-1, 0, 1, 2], (N, K // 4)), axis=1).T
    w = jnp.asarray(level * (-0.25 if turned else 0.25), jnp.float32)
    qt = gptq(w, hessian, group_size=64)
    np.testing.assert_array_equal(jax_trirun.dequantize(qt), w)
    assert set(np.unique(jax_trirun.unpack(qt.words, (K, N)))) == {0, 1, 2, 3}
    assert np.all(np.sign(qt.scales) == (-1 if turned else 1))
    np.testing.assert_allclose(jax_trirun.matmul(jnp.eye(K), qt), w, atol=1e-6)


def test_signed_scales_beat_unsigned_ones_and_four_levels_beat_three():
    w, _, hessian = problem(n=128)
    errors = [
        lost(w, gptq(w, hessian, group_size=64, **options), hessian)
        for options in ({}, {"signed": False}, {"ternary": True})
    ]
    assert errors[0] < errors[1] < errors[2]
    unsigned = gptq(w, hessian, group_size=64, signed=False)
    assert np.all(unsigned.scales >= 0)
    codes = jax_trirun.unpack(gptq(w, hessian, group_size=64, ternary=True).words, w.shape)
    assert set(np.unique(codes)) == {0, 1, 2}


def test_grids_are_fitted_on_compensated_weights():
    w, _, hessian = problem()
    qt = gptq(w, hessian, group_size=64, candidates=24)
    before = mse(w, 64, jnp.dtype("float32"))[1]
    assert not np.allclose(qt.scales[1:], before[1:], rtol=1e-3)


def test_dead_inputs_are_rounded_and_do_not_disturb_the_others():
    w, x, _ = problem()
    x = x.at[:, 10:20].set(0)
    hessian = add_to_hessian(jnp.zeros((K, K)), x)
    qt = gptq(w, hessian, group_size=64)
    back = np.asarray(jax_trirun.dequantize(qt))
    scale = np.asarray(qt.scales)[0]
    nearest = scale * np.clip(np.round(np.asarray(w)[10:20] / scale), -1, 2)
    np.testing.assert_allclose(back[10:20], nearest, atol=1e-6)
    assert lost(w, qt, hessian) < 0.5 * lost(w, quantize(w, group_size=64), hessian)
    assert np.all(np.isfinite(jax_trirun.dequantize(gptq(w, jnp.zeros((K, K)), group_size=64))))


def test_activation_order_keeps_groups_and_rows_in_place():
    w, _, hessian = problem()
    order = np.random.default_rng(2).permutation(K)
    strong = jnp.asarray(np.where(np.arange(K) % 7 == 0, 30.0, 1.0), jnp.float32)
    hessian = hessian * strong[:, None] * strong[None, :]
    assert lost(w, gptq(w, hessian, group_size=64, act_order=True), hessian) < 0.5 * lost(
        w, quantize(w, group_size=64), hessian
    )
    # One group has no places to lose: permuting rows permutes the result.
    one = jax_trirun.dequantize(gptq(w, hessian, group_size=-1, act_order=True))
    other = jax_trirun.dequantize(gptq(w[order], hessian[order][:, order], group_size=-1, act_order=True))
    assert np.mean(np.isclose(one[order], other, atol=1e-6)) > 0.95


def test_damping_rises_until_the_factorisation_succeeds():
    w, _, hessian = problem()
    indefinite = hessian - 2 * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(K) * (jnp.arange(K) == 5)
    scaled = indefinite * 1e-3
    qt = gptq(w, scaled, group_size=64, damping=0.01)
    assert np.all(np.isfinite(jax_trirun.dequantize(qt)))
    low_rank = add_to_hessian(jnp.zeros((K, K)), jnp.ones((3, K)))
    assert np.all(np.isfinite(jax_trirun.dequantize(gptq(w, low_rank, group_size=64, damping=1e-9))))


def test_the_hessian_sums_over_documents_of_any_length():
    _, x, hessian = problem()
    pieces = jnp.zeros((K, K))
    for first, last in itertools.pairwise((0, 1, 130, 512)):
        pieces = add_to_hessian(pieces, x[None, first:last])
    np.testing.assert_allclose(pieces, hessian, rtol=1e-4, atol=1e-3)
    w = problem()[0]
    qt, scaled = gptq(w, hessian, group_size=64), gptq(w, 4 * hessian, group_size=64)
    np.testing.assert_array_equal(qt.words, scaled.words)


def test_sizes_that_fill_no_block():
    w, _, hessian = problem(k=160, n=5)
    qt = gptq(w, hessian, group_size=32)
    assert qt.scales.shape == (5, 5)
    assert lost(w, qt, hessian) < 0.5 * lost(w, quantize(w, group_size=32), hessian)
    w, _, hessian = problem(k=70, n=3)
    assert lost(w, gptq(w, hessian, group_size=-1), hessian) < lost(w, quantize(w, group_size=-1), hessian)


def test_works_while_traced():
    w, _, hessian = problem()
    traced = jax.jit(lambda w, h: gptq(w, h, group_size=64))(w, hessian)
    assert lost(w, traced, hessian) < 0.5 * lost(w, quantize(w, group_size=64), hessian)


W, H = np.ones((64, 4), np.float32), np.eye(64, dtype=np.float32)


@pytest.mark.parametrize(
    ("error", "w", "hessian", "options", "message"),
    [
        (
            ValueError,
            W,
            np.eye(4, dtype=np.float32),
            {},
            r"hessian must be \[K, K\] for w \[K, N\], got \(4, 4\)",
        ),
        (TypeError, W, H.astype(int), {}, r"gptq: hessian must be a float array, got int64"),
        (ValueError, W, H, {"group_size": 128}, r"gptq: group_size must divide K, got group_size=128, K=64"),
        (ValueError, W, H, {"block_size": 96}, r"block_size must be a multiple of group_size=64, got 96"),
        (ValueError, W, H, {"damping": 0.0}, r"damping must be > 0, .*got damping=0.0"),
        (ValueError, W, H * np.nan, {}, r"hessian must be finite, got 4096 NaN or Inf"),
        (ValueError, W * np.inf, H, {}, r"gptq: w must be finite"),
        (
            ValueError,
            W,
            H - 1e6 * (1 - H),
            {},
            r"no Cholesky factorisation, even with damping 0.1 raised six times",
        ),
        (TypeError, W, H, {"scale_dtype": "int8"}, r"gptq: scale_dtype must be"),
        (ValueError, W * 1e6, H, {"scale_dtype": "float16"}, r"gptq: scales overflow float16"),
    ],
)
def test_messages(error, w, hessian, options, message):
    with pytest.raises(error, match=message):
        gptq(w, hessian, **{"group_size": 64} | options)
