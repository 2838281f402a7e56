"""Each quantiser keeps its promise: what it emits is what is stored, and no worse than it says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import quantize
from jax_trirun.quantizers import METHODS, absmean, mse, rtn, trilm
from jax_trirun.quantizers.grid import split_groups, squared_error, stored
from jax_trirun.quantizers.mse import candidate_size


def normal(k=256, n=48, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, size=(k, n)) * rng.lognormal(size=(1, n)) * 0.02
    return jnp.asarray(w, dtype)


def group_errors(w, qt):
    """float64 squared errors [K / G, N] of what is read back."""
    w = np.asarray(w, np.float64)
    groups = qt.scales.shape[-2]
    error = np.asarray(jax_trirun.dequantize(qt, dtype=jnp.float32), np.float64) - w
    return (error**2).reshape(groups, -1, w.shape[1]).sum(axis=1)


@pytest.mark.parametrize(
    ("bits", "dtype", "group_size"),
    [
        (2, jnp.float16, 32),
        (2, jnp.bfloat16, 64),
        (2, jnp.float32, 128),
        (2, jnp.float32, -1),
        (4, jnp.bfloat16, 32),
        (4, jnp.float32, -1),
    ],
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_weight_takes_the_best_level_of_the_stored_grid(method, bits, dtype, group_size):
    w = normal(dtype=dtype)
    qt = quantize(w, method=method, group_size=group_size, bits=bits)
    assert qt.scales.dtype == dtype and qt.shape == w.shape and qt.group_size == group_size
    zero = 1 if bits == 2 else 8
    codes = np.arange(2**bits) if method not in ("absmean", "trilm") else np.arange(zero - 1, zero + 2)
    size = w.shape[0] // qt.scales.shape[0]
    scales = np.repeat(np.asarray(qt.scales, np.float64), size, axis=0)[..., None]
    zeros = np.full_like(qt.scales, zero) if qt.zeros is None else np.asarray(qt.zeros)
    levels = codes - np.repeat(zeros.astype(np.float64), size, axis=0)[..., None]
    w64 = np.asarray(w, np.float64)
    best = np.min(np.abs(w64[..., None] - scales * levels), axis=-1)
    got = np.abs(w64 - np.asarray(jax_trirun.dequantize(qt, dtype=jnp.float32), np.float64))
    # Ties, decided in float32, may differ by its rounding.
    np.testing.assert_array_less(got, best + 4e-6 * np.abs(scales[..., 0]) + 1e-30)


@pytest.mark.parametrize(
    ("group_size", "scale_dtype"),
    [(32, jnp.float16), (64, jnp.bfloat16), (128, jnp.float32), (-1, jnp.float16)],
)
def test_mse_is_never_worse_than_round_to_nearest(group_size, scale_dtype):
    w = normal()
    ours = group_errors(w, quantize(w, group_size=group_size, scale_dtype=scale_dtype))
    theirs = group_errors(w, quantize(w, method="rtn", group_size=group_size, scale_dtype=scale_dtype))
    assert np.all(ours <= theirs * (1 + 1e-5))
    assert ours.sum() < 0.9 * theirs.sum()


@pytest.mark.parametrize("scale_dtype", (jnp.float16, jnp.float32))
def test_mse_is_optimal_over_the_grids_it_searches(scale_dtype):
    w = normal(k=128, n=8)
    candidates = 7
    grouped = split_groups(w, 32)
    sizes = [
        np.asarray(candidate_size(grouped, i, candidates, (-1, 2)), np.float64) for i in range(candidates)
    ]
    tried = [sign * size for size, sign in itertools.product(sizes, (1, -1))]
    tried.append(np.asarray(rtn(w, 32, jnp.dtype(scale_dtype))[1], np.float64))
    w64 = np.asarray(w, np.float64).reshape(4, 32, 8)
    brute = []
    for scale in tried:
        scale = scale.astype(scale_dtype).astype(np.float64)[:, None, :]
        levels = scale[..., None] * np.arange(-1, 3)
        brute.append((np.abs(w64[..., None] - levels).min(axis=-1) ** 2).sum(axis=1))
    best = np.min(brute, axis=0)
    found = group_errors(
        w, quantize(w, group_size=32, scale_dtype=scale_dtype, candidates=candidates, refine=0)
    )
    np.testing.assert_allclose(found, best, rtol=1e-4)
    polished = group_errors(
        w, quantize(w, group_size=32, scale_dtype=scale_dtype, candidates=candidates, refine=3)
    )
    assert np.all(polished <= best * (1 + 1e-5)) and polished.sum() < 0.999 * best.sum()


@pytest.mark.parametrize(
    ("group_size", "dtype"), [(32, jnp.float16), (64, jnp.bfloat16), (128, jnp.float32), (-1, jnp.float32)]
)
@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("method", ("mse", "rtn"))
def test_weights_on_the_grid_come_back_exactly(method, turned, group_size, dtype):
    rng = np.random.default_rng(3)
    levels = rng.integers(-1, 3, size=(256, 40))
    size = 256 if group_size == -1 else group_size
    scales = rng.uniform(0.01, 1, size=(256 // size, 40)) * (-1 if turned else 1)
    scales = np.asarray(jnp.asarray(scales, dtype), np.float32)
    w = jnp.asarray(levels * np.repeat(scales, size, axis=0), dtype)
    qt = quantize(w, method=method, group_size=group_size)
    np.testing.assert_array_equal(np.asarray(jax_trirun.dequantize(qt, dtype=dtype)), np.asarray(w))


def test_a_negative_scale_is_used_where_the_grid_must_be_turned():
    w = jnp.tile(jnp.array([[-2.0, 2.0], [-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]), (32, 1))
    qt = quantize(w, group_size=128)
    np.testing.assert_array_equal(np.sign(qt.scales), [[-1, 1]])
    np.testing.assert_array_equal(jax_trirun.unpack(qt.words, (128, 2))[:4, 0], [3, 2, 1, 0])


@pytest.mark.parametrize("method", ("mse", "rtn"))
@pytest.mark.parametrize("value", (0.0, 0.375, -5.0))
def test_constant_groups_are_exact(method, value):
    w = jnp.full((64, 3), value)
    np.testing.assert_array_equal(jax_trirun.dequantize(quantize(w, method=method, group_size=32)), w)


def test_zero_groups_beside_others_stay_zero_and_finite():
    w = normal(128, 5).at[32:64].set(0)
    for method in METHODS:
        back = jax_trirun.dequantize(quantize(w, method=method, group_size=32))
        assert np.all(np.isfinite(back)) and not np.any(back[32:64])


def test_round_to_nearest_takes_the_better_of_the_covering_and_the_clipping_grid():
    w = normal()
    qt = quantize(w, method="rtn", group_size=64)
    grouped = np.asarray(w, np.float64).reshape(4, 64, -1)
    top, bottom = grouped.max(axis=1), grouped.min(axis=1)
    upright, turned = np.maximum(top / 2, -bottom), np.maximum(top, -bottom / 2)
    covering = np.where(upright <= turned, upright, -turned)
    clipping = np.where(top >= -bottom, top, bottom) / 2
    errors = []
    for scale in (covering, clipping):
        scale = scale[:, None]
        errors.append(((grouped - scale * np.clip(np.round(grouped / scale), -1, 2)) ** 2).sum(axis=1))
    np.testing.assert_allclose(group_errors(w, qt), np.minimum(*errors), rtol=1e-4)
    better = errors[1] < errors[0]
    np.testing.assert_allclose(qt.scales, np.where(better, clipping, covering), rtol=1e-6)
    assert 0.7 < better.mean() < 1  # a grid that must cover all weights is mostly the worse one


@pytest.mark.parametrize(("bits", "far"), ((2, 2), (4, -8)))
def test_round_to_nearest_keeps_the_largest_weight_of_a_clipping_grid(bits, far):
    w = jnp.asarray([[-8.0], [4.5], *[[v / 8] for v in range(-15, 15)]])
    _, scales, _ = rtn(w, 32, jnp.dtype("float32"), bits=bits)
    np.testing.assert_array_equal(scales, [[-8 / far]])
    assert float(jax_trirun.dequantize(quantize(w, method="rtn", group_size=32, bits=bits))[0, 0]) == -8


def test_absmean_is_bitnets_formula():
    w = normal()
    scale = np.mean(np.abs(np.asarray(w, np.float64)))
    want = np.clip(np.round(np.asarray(w, np.float64) / scale), -1, 1)
    codes, scales, zeros = absmean(w, 64, jnp.dtype("float32"), per="tensor")
    assert zeros is None
    np.testing.assert_array_equal(np.asarray(codes, int) - 1, want)
    np.testing.assert_allclose(scales, scale, rtol=1e-6)
    by_group = np.mean(np.abs(np.asarray(w, np.float64)).reshape(4, 64, -1), axis=1)
    np.testing.assert_allclose(absmean(w, 64, jnp.dtype("float32"))[1], by_group, rtol=1e-5)


def test_trilm_has_one_scale_a_shard():
    w = normal(n=48)
    codes, scales, _ = trilm(w, 64, jnp.dtype("float32"), shards=3)
    for shard in range(3):
        part = np.asarray(w, np.float64)[:, 16 * shard : 16 * (shard + 1)]
        scale = 1e-5 + np.mean(np.abs(part))
        np.testing.assert_allclose(scales[:, 16 * shard : 16 * (shard + 1)], scale, rtol=1e-5)
        want = np.clip(np.round(part / scale), -1, 1)
        np.testing.assert_array_equal(np.asarray(codes, int)[:, 16 * shard : 16 * (shard + 1)] - 1, want)


def test_hqq_iterations_improve_on_the_minmax_grid_for_skewed_weights():
    w = jnp.exp(normal() * 20)
    errors = []
    for iterations in (0, 20):
        qt = quantize(w, method="hqq", group_size=64, iterations=iterations)
        errors.append(np.abs(np.asarray(jax_trirun.dequantize(qt) - w)).reshape(4, 64, -1).mean(axis=1))
    assert np.all(errors[1] <= errors[0] * (1 + 1e-5)) and np.mean(errors[1] / errors[0]) < 0.95
    constant = jnp.full((64, 3), 0.375).at[:, 1].set(0)
    np.testing.assert_array_equal(
        jax_trirun.dequantize(quantize(constant, method="hqq", group_size=32)), constant
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_leading_axes_jit_and_vmap_agree_with_one_at_a_time(method):
    w = jnp.stack([normal(seed=seed) for seed in range(3)])
    stacked = quantize(w, method=method, group_size=64)
    mapped = jax.jit(jax.vmap(lambda a: quantize(a, method=method, group_size=64)))(w)
    assert stacked.batch_shape == mapped.batch_shape == (3,)
    for i in range(3):
        one = quantize(w[i], method=method, group_size=64)
        for name in ("words", "scales"):
            np.testing.assert_array_equal(getattr(stacked, name)[i], getattr(one, name))
            np.testing.assert_array_equal(getattr(mapped, name)[i], getattr(one, name))


def test_peak_memory_is_a_few_copies_of_the_weight():
    w = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
    memory = mse.lower(w, 128, jnp.dtype("float32")).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2.5 * 4 * 2048 * 1024


def test_scales_take_the_weights_dtype_unless_told():
    assert quantize(normal(), scale_dtype="bfloat16").scales.dtype == jnp.bfloat16
    assert quantize(np.asarray(normal(), np.float64)).scales.dtype == jnp.float32


def test_small_groups_keep_float16s_subnormal_scales():
    w = jnp.concatenate([jnp.full((32, 1), 0.5), jnp.full((32, 1), 2e-5)])
    qt = quantize(w, group_size=32, scale_dtype="float16")
    np.testing.assert_allclose(jax_trirun.dequantize(qt, dtype=jnp.float32)[32:], 2e-5, rtol=3e-3)


def test_stored_keeps_the_rounding_that_xla_would_drop():
    x = jnp.array([0.1, 1.2345e-6, 300.17])
    for dtype in (jnp.float16, jnp.bfloat16):
        want = np.asarray(x).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(jax.jit(stored, static_argnums=1)(x, dtype), want)


def test_squared_error_is_that_of_the_nearest_levels():
    grouped = jnp.array([[[0.9], [-1.2], [2.6], [0.4]]])
    np.testing.assert_allclose(
        squared_error(grouped, jnp.ones((1, 1)), (-1, 2)), [[0.1**2 + 0.2**2 + 0.6**2 + 0.4**2]], rtol=1e-5
    )


W = np.ones((576, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "w", "options", "message"),
    [
        (ValueError, W, {}, r"group_size must divide K, got group_size=128, K=576; use 32 or 64 .*or pad"),
        (ValueError, np.ones((70, 4), np.float32), {"group_size": 64}, r"use -1, or pad"),
        (ValueError, W, {"group_size": 48}, r"group_size must be 32, 64, 128 or -1 .*got 48"),
        (ValueError, W, {"method": "best"}, r"method must be one of 'mse', 'rtn', .*got 'best'"),
        (
            TypeError,
            W,
            {"group_size": 64, "candidate": 3},
            r"'mse' has no option candidate; .*candidates, refine",
        ),
        (
            TypeError,
            W,
            {"group_size": 64, "method": "rtn", "refine": 3},
            r"'rtn' has no option refine; .*none",
        ),
        (
            ValueError,
            W,
            {"group_size": 64, "candidates": -1},
            r"candidates and refine must be >= 0, got -1 and 2",
        ),
        (ValueError, W, {"group_size": 64, "method": "absmean", "per": "row"}, r"per must be .*got \'row\'"),
        (
            ValueError,
            W,
            {"group_size": 64, "method": "trilm", "shards": 3},
            r"shards must divide N, got shards=3, N=4",
        ),
        (ValueError, W, {"group_size": 64, "method": "hqq", "p": 2.0}, r"0 < p <= 1, .*got p=2.0"),
        (TypeError, W, {"group_size": 64, "scale_dtype": "int8"}, r"scale_dtype must be float16.*got 'int8'"),
        (TypeError, W, {"group_size": 64, "scale_dtype": "float12"}, r"scale_dtype must be .*got 'float12'"),
        (ValueError, W, {"group_size": 64, "bits": 3}, r"bits must be 2 or 4, got 3"),
        (
            TypeError,
            W.astype(np.int32),
            {"group_size": 64},
            r"w must be a float array, got int32; codes .*pack",
        ),
        (ValueError, W[:, 0], {"group_size": 64}, r"w must have shape \[\.\.\., K, N\].*got \(576,\)"),
        (ValueError, W[:, :0], {"group_size": 64}, r"no empty axis, got \(576, 0\)"),
        (
            ValueError,
            W * [1, np.nan, np.inf, 1],
            {"group_size": 64},
            r"w must be finite, got 1152 NaN or Inf",
        ),
        (
            ValueError,
            W * 1e6,
            {"group_size": 64, "scale_dtype": "float16"},
            r"scales overflow float16 \(largest 65504",
        ),
        (
            ValueError,
            W * 1e-6,
            {"group_size": 64, "scale_dtype": "float16"},
            r"scales vanish in float16 .*1e-06",
        ),
    ],
)
def test_messages(error, w, options, message):
    with pytest.raises(error, match=message):
        quantize(w, **options)
