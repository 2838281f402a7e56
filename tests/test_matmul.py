"""The contract of every back end: each element within its float64 bound, on every kind of input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_trirun
from jax_trirun.testing import (
    MatmulProblem,
    assert_close,
    check_problem,
    matmul_float64,
)

FLOATS = ("float32", "bfloat16", "float16")
GROUP_SIZES = (32, 64, 128, -1)


def product(x, codes, scales, zeros=None, *, backend, group_size=None, out_dtype=None):
    """matmul and its float64 reference for literal arrays."""
    y = jax_trirun.matmul(
        jnp.asarray(x), jax_trirun.pack(codes), jnp.asarray(scales), None if zeros is None else jnp.asarray(zeros),
        out_dtype=out_dtype, backend=backend,
    )  # fmt: skip
    return y, matmul_float64(x, codes, scales, zeros, out_dtype=out_dtype)


# ---- Shapes, group sizes, dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["plain", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 13, 16, 33, 70])
def test_group_sizes_and_dtypes(backend, m, dtype, with_zeros, group_size):
    problem = MatmulProblem(m, 384, 160, group_size, dtype, dtype, with_zeros)
    check_problem(problem, backend=backend)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_every_mix_of_dtypes(backend, x_dtype, scale_dtype, out_dtype):
    for with_zeros in (False, True):
        problem = MatmulProblem(4, 256, 96, 64, x_dtype, scale_dtype, with_zeros)
        y = check_problem(problem, backend=backend, out_dtype=out_dtype)
        assert y.dtype == jnp.dtype(out_dtype)


@pytest.mark.parametrize("zero_dtype", FLOATS)
def test_zeros_of_another_dtype_than_scales(backend, zero_dtype):
    problem = MatmulProblem(3, 128, 64, 32, "float32", "float32", True)
    zeros = problem.zeros().astype(jnp.dtype(zero_dtype))
    assert_close(*product(problem.x(), problem.codes(), problem.scales(), zeros, backend=backend))


@given(
    m=st.integers(1, 40),
    groups=st.integers(1, 5),
    n=st.integers(1, 200),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(FLOATS),
    with_zeros=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape_with_groups(backend, m, groups, n, group_size, dtype, with_zeros, seed):
    check_problem(
        MatmulProblem(m, groups * group_size, n, group_size, dtype, dtype, with_zeros, seed=seed),
        backend=backend,
    )


@given(
    m=st.integers(1, 20),
    k=st.integers(1, 300),
    n=st.integers(1, 100),
    dtype=st.sampled_from(FLOATS),
    zeros=st.booleans(),
)
def test_any_k_with_one_group(backend, m, k, n, dtype, zeros):
    check_problem(MatmulProblem(m, k, n, -1, dtype, dtype, zeros), backend=backend)


@pytest.mark.parametrize(
    ("k", "n", "group_size"),
    [(576, 192, 64), (576, 1536, 64), (1536, 576, 64), (2048, 2112, 128), (8192, 64, 128), (32768, 32, 128)],
)
@pytest.mark.parametrize("m", [1, 7, 64])
def test_shapes_of_models(backend, m, k, n, group_size):
    for dtype in FLOATS:
        check_problem(MatmulProblem(m, k, n, group_size, dtype, "bfloat16"), backend=backend)


def test_leading_axes_of_x(backend):
    problem = MatmulProblem(24, 128, 64, 32)
    flat = jax_trirun.matmul(problem.x(), problem.quant_tensor(), backend=backend)
    for shape in [(2, 3, 4), (24, 1)]:
        y = jax_trirun.matmul(problem.x().reshape(*shape, 128), problem.quant_tensor(), backend=backend)
        np.testing.assert_array_equal(y, flat.reshape(*shape, 64))
    one = jax_trirun.matmul(problem.x()[0], problem.quant_tensor(), backend=backend)
    assert one.shape == (64,)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 128, 64), (3, 128, 0), (0, 128, 0), (3, 0, 5)])
def test_empty_sizes(backend, m, k, n):
    qt = jax_trirun.QuantTensor(
        jax_trirun.pack(np.zeros((k, n), np.uint8)), jnp.ones((1, n)), shape=(k, n), group_size=-1
    )
    y = jax_trirun.matmul(jnp.ones((m, k)), qt, backend=backend)
    assert y.shape == (m, n)
    assert (y == 0).all()


# ---- Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_identity_gives_the_weights_exactly(backend, dtype):
    """All four codes in every row and column, scales that float16 and bfloat16 hold: no rounding at all."""
    k, n = 128, 96
    codes = ((np.arange(k)[:, None] + np.arange(n)[None, :]) % 4).astype(np.uint8)
    scales = np.where(np.arange(4 * n).reshape(4, n) % 2, 0.5, -1.25).astype(jnp.dtype(dtype))
    y, reference = product(np.eye(k, dtype=jnp.dtype(dtype)), codes, scales, backend=backend)
    np.testing.assert_array_equal(np.asarray(y).astype(np.float64), reference.y)


@pytest.mark.parametrize("code", range(4))
def test_each_code_alone(backend, code):
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    codes = np.full((96, 64), code, np.uint8)
    assert_close(*product(x, codes, np.full((3, 64), 0.3, np.float32), backend=backend))
    zeros = np.full((3, 64), 1.5, np.float32)
    assert_close(*product(x, codes, np.full((3, 64), 0.3, np.float32), zeros, backend=backend))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mean", [1.0, 100.0])
def test_activations_with_a_large_mean(backend, dtype, mean):
    for m in (1, 9, 40):
        check_problem(MatmulProblem(m, 4096, 64, 128, dtype, dtype, x_mean=mean), backend=backend)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("zero", 0.0),
        ("negative", -0.7),
        ("float16 subnormal", 2.0**-24),
        ("float32 subnormal", 1e-40),
        ("huge", 1e30),
    ],
)
def test_extreme_scales(backend, name, scale):
    dtype = "float16" if name == "float16 subnormal" else "float32"
    problem = MatmulProblem(5, 128, 64, 32)
    scales = np.full((4, 64), scale, dtype)
    scales[1] *= -1
    assert_close(*product(problem.x(), problem.codes(), scales, backend=backend))


def test_negative_scales_give_the_other_grid(backend):
    codes = np.tile(np.arange(4, dtype=np.uint8), (64, 8))
    y, reference = product(
        np.eye(64, dtype=np.float32), codes, np.full((1, 32), -1, np.float32), backend=backend
    )
    assert set(np.asarray(y).ravel()) == {-2.0, -1.0, 0.0, 1.0}
    assert_close(y, reference)


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16"])
def test_sums_that_pass_through_more_than_float16_holds(backend, x_dtype):
    """Partial sums reach 8 x 65504 before they cancel: summing in float16 would give NaN or infinity."""
    k = 256
    x = np.full((2, k), 2048, jnp.dtype(x_dtype))
    codes = np.full((k, 64), 3, np.uint8)
    codes[k // 2 :] = 0
    codes[k // 2 : k // 2 + 64] = 1
    scales = np.ones((k // 32, 64), jnp.dtype(x_dtype))
    scales[k // 64 :] = 2
    assert_close(*product(x, codes, scales, backend=backend))


def test_a_sum_beyond_float16_is_infinite(backend):
    x = np.full((1, 64), 2048, np.float16)
    y, reference = product(x, np.full((64, 32), 3, np.uint8), np.ones((1, 32), np.float16), backend=backend)
    assert np.isposinf(np.asarray(y)).all()
    assert_close(y, reference)
    y, reference = product(
        x, np.full((64, 32), 3, np.uint8), np.ones((1, 32), np.float16), backend=backend, out_dtype="float32"
    )
    assert_close(y, reference)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 4, 20])
def test_not_a_number_stays_in_its_row(backend, value, m):
    for dtype in FLOATS:
        problem = MatmulProblem(m, 70, 40, -1, dtype, "float32")
        x = problem.x()
        x[m // 2, 3] = value
        y, reference = product(x, problem.codes(), problem.scales(), backend=backend)
        rows = np.isfinite(np.asarray(y).astype(np.float32)).all(axis=1)
        assert not rows[m // 2] and rows[np.arange(m) != m // 2].all()
        assert_close(y, reference)


def test_padding_contributes_nothing_even_to_infinity(backend):
    """K = 65 leaves 63 padded rows: x has no values there, and 0 * Inf must not come from them."""
    codes = np.full((65, 33), 2, np.uint8)
    x = np.ones((3, 65), np.float32)
    x[1, 64] = np.inf
    y, _ = product(x, codes, np.ones((1, 33), np.float32), backend=backend)
    np.testing.assert_array_equal(np.asarray(y)[[0, 2]], 65.0)
    assert np.isposinf(np.asarray(y)[1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_scale_stays_in_its_column(backend, value):
    problem = MatmulProblem(4, 128, 64, 32)
    scales = problem.scales()
    scales[2, 5] = value
    y = np.asarray(product(problem.x(), problem.codes(), scales, backend=backend)[0])
    assert not np.isfinite(y[:, 5]).any()
    assert np.isfinite(np.delete(y, 5, axis=1)).all()


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=16), min_size=32, max_size=32),
    scale=st.floats(-100, 100, width=16),
    zero=st.floats(-4, 8, width=16),
    code=st.integers(0, 3),
)
def test_any_values(backend, values, scale, zero, code):
    x = np.array([values], np.float16)
    codes = (np.arange(32 * 3).reshape(32, 3) * 7 + code).astype(np.uint8) % 4
    scales, zeros = np.full((1, 3), scale, np.float16), np.full((1, 3), zero, np.float16)
    assert_close(*product(x, codes, scales, zeros, backend=backend, out_dtype="float32"))


# ---- Same input, same bits --------------------------------------------------------------------------


def test_repeating_gives_the_same_bits(backend):
    problem = MatmulProblem(37, 1024, 320, 128, "bfloat16", "float16")
    x, qt = problem.x(), problem.quant_tensor()
    first = np.asarray(jax_trirun.matmul(x, qt, backend=backend, out_dtype="float32"))
    for _ in range(5):
        again = jax_trirun.matmul(x, qt, backend=backend, out_dtype="float32")
        np.testing.assert_array_equal(np.asarray(again), first)


_THREADS_SCRIPT = """
import hashlib, json
import numpy as np
from jax_trirun import _ffi, matmul
from jax_trirun.testing import MatmulProblem
digests = []
for m in (1, 7, 40):
    for dtype in ("float32", "bfloat16"):
        p = MatmulProblem(m, 1024, 1000, 128, dtype)
        for threads in (0, 1, 2, 3):
            _ffi.cpu_module.set_max_threads(threads)
            y = matmul(p.x(), p.quant_tensor(), out_dtype="float32", backend="cpu")
            digests.append((m, dtype, hashlib.sha256(np.asarray(y).tobytes()).hexdigest()))
print(json.dumps(digests))
"""


def test_the_number_of_threads_changes_no_bit(run_python):
    """In processes of their own, as XLA's pool keeps its size: NPROC sets it."""

    def digests(threads):
        printed = run_python(_THREADS_SCRIPT, NPROC=str(threads), JAX_PLATFORMS="cpu")
        return {tuple(row) for row in json.loads(printed)}

    one = digests(1)
    assert len(one) == 6  # one digest for each m and dtype, whatever the limit
    assert digests(4) == one


@pytest.mark.parametrize("isa", jax_trirun._ffi.cpu_module.available_isas())
def test_every_instruction_set_of_this_machine(isa):
    module = jax_trirun._ffi.cpu_module
    before = module.current_isa()
    assert module.set_isa(isa)
    try:
        assert module.current_isa() == isa
        with jax.default_device(jax.devices("cpu")[0]):
            for m in (1, 3, 8, 21):
                for dtype in FLOATS:
                    for zeros in (False, True):
                        check_problem(MatmulProblem(m, 384, 100, 64, dtype, dtype, zeros), backend="cpu")
                        check_problem(MatmulProblem(m, 77, 45, -1, dtype, "float16", zeros), backend="cpu")
    finally:
        assert module.set_isa(before)


def test_an_unknown_instruction_set_changes_nothing():
    module = jax_trirun._ffi.cpu_module
    before = module.current_isa()
    assert not module.set_isa("abacus")
    assert module.current_isa() == before


# ---- The bound itself -------------------------------------------------------------------------------


def test_the_bound_catches_one_wrong_code():
    problem = MatmulProblem(8, 1024, 64, 128, "bfloat16", "bfloat16")
    codes = problem.codes()
    codes[5, 7] = (codes[5, 7] + 1) % 4
    y = jax_trirun.matmul(
        problem.x(), jax_trirun.pack(codes), jnp.asarray(problem.scales()), out_dtype="float32"
    )
    reference = matmul_float64(problem.x(), problem.codes(), problem.scales(), out_dtype="float32")
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_close(y, reference)


def test_the_bound_catches_a_sum_in_float16():
    problem = MatmulProblem(2, 4096, 32, 128, "float16", "float16")
    x, codes = problem.x(), problem.codes()
    w = (codes.astype(np.float16) - np.float16(1)) * np.repeat(problem.scales(), 128, axis=0)
    with pytest.raises(AssertionError, match="out of bounds"):
        total = np.zeros((2, 32), np.float16)
        for k in range(4096):
            total += x[:, k : k + 1] * w[k : k + 1]
        assert_close(total, matmul_float64(x, codes, problem.scales()))
