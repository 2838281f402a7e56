"""What the CUDA kernels for many tokens must do: "cuda", on a Hopper GPU (csrc/cuda/gemm.cuh), and "cuda-portable", on
every GPU (csrc/cuda/portable_gemm.cuh).

Which of them runs follows from the sizes and the types (gemm_plan.h and portable_gemm_plan.h there). Hopper's: scales
on the sums of 16, 32, 48 or 64 tokens, the same with zeros for 48, scales on the weights for 96 or 128; tiles of 256
or 384 features or, for small layers, 128. The portable ones: scales on the sums of 16, 32 or 64 tokens, the same with
zeros for 32 or 64, scales on the weights for 128; tiles of 128 features or, for the last, 256.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, Reference, assert_close, check_problem, matmul_float64


def _is_hopper() -> bool:
    if "cuda" not in _ffi.usable_backends():
        return False
    capability = getattr(jax.local_devices(backend="cuda")[0], "compute_capability", "")
    return str(capability).startswith("9.")


pytestmark = pytest.mark.gpu

needs_hopper = pytest.mark.skipif("not _is_hopper()", reason="needs an NVIDIA Hopper GPU")
both_modes = pytest.mark.parametrize("mode", [pytest.param("cuda", marks=needs_hopper), "cuda-portable"])
HALVES = ("float16", "bfloat16")
both_halves = pytest.mark.parametrize("dtype", HALVES)
# Rows of x that each kernel gets.
ROWS_OF_KERNELS = {"cuda": (20, 40, 50, 150), "cuda-portable": (12, 20, 50, 150)}


def check(problem, mode, **options):
    """The problem is within its bound, and it is a kernel that computes it."""
    x = jax.ShapeDtypeStruct((problem.m, problem.k), problem.x_dtype)
    text = jax_trirun.explain(x, problem.quant_tensor(), backend=mode)
    assert f"the FFI call {_ffi.MATMUL_TARGET}" in text, text
    return check_problem(problem, backend=mode, **options)


# fmt: off
ROWS = (
    9, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96,
    97, 127, 128, 129, 192, 255, 256, 257, 300, 1000,
)
# fmt: on


@both_modes
@both_halves
@pytest.mark.parametrize("m", ROWS)
def test_rows_around_the_tiles(m, dtype, mode):
    for with_zeros in (False, True):
        check(MatmulProblem(m, 512, 328, 128, dtype, dtype, with_zeros), mode)


@both_modes
@both_halves
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_kernel_with_every_type(group_size, scale_dtype, dtype, mode):
    kinds = itertools.product(ROWS_OF_KERNELS[mode], (False, True), (None, "float32"))
    for m, with_zeros, out_dtype in kinds:
        problem = MatmulProblem(m, 768, 200, group_size, dtype, scale_dtype, with_zeros)
        assert check(problem, mode, out_dtype=out_dtype).dtype == jnp.dtype(out_dtype or dtype)


# M, K, N, dtype of the scales, zeros, what explain says: every kernel with whole tiles, with tiles that are cut,
# and with clusters.
SHARES = [
    (9, 512, 41048, "", False, "16 tokens x 384 features, 0 of them cut"),
    (9, 6144, 18504, "", False, "16 tokens x 384 features, 49 of them cut"),
    (9, 2048, 51408, "", False, "16 tokens x 384 features, 2 of them cut"),
    (12, 1536, 25000, "", False, "16 tokens x 384 features, a cluster of 2"),
    (9, 256, 51408, "", False, "16 tokens x 256 features, 0 of them cut"),
    (12, 3072, 17160, "", False, "16 tokens x 256 features, 68 of them cut"),
    (9, 3072, 16456, "", False, "16 tokens x 256 features, a cluster of 2"),
    (16, 1536, 8776, "", False, "16 tokens x 256 features, a cluster of 3"),
    (12, 3072, 36936, "", False, "16 tokens x 256 features, 13 of them cut"),
    (12, 256, 5640, "", False, "16 tokens x 128 features, 0 of them cut"),
    (9, 1024, 8200, "", False, "16 tokens x 128 features, a cluster of 2"),
    (12, 2048, 3080, "", False, "16 tokens x 128 features, a cluster of 4"),
    (20, 1024, 36936, "", False, "32 tokens x 384 features, 0 of them cut"),
    (20, 2048, 51408, "", False, "32 tokens x 384 features, 2 of them cut"),
    (20, 2048, 25000, "", False, "32 tokens x 384 features, a cluster of 2"),
    (20, 512, 51408, "", False, "32 tokens x 256 features, 0 of them cut"),
    (20, 2048, 36936, "", False, "32 tokens x 256 features, 13 of them cut"),
    (20, 4096, 11528, "", False, "32 tokens x 256 features, 46 of them cut"),
    (20, 3072, 8776, "", False, "32 tokens x 256 features, a cluster of 3"),
    (20, 256, 72, "", False, "32 tokens x 128 features, 0 of them cut"),
    (20, 2048, 18504, "", False, "32 tokens x 128 features, 13 of them cut"),
    (20, 3072, 72, "", False, "32 tokens x 128 features, 1 of them cut"),
    (20, 1024, 72, "", False, "32 tokens x 128 features, a cluster of 4"),
    (20, 3072, 2056, "", False, "32 tokens x 128 features, a cluster of 6"),
    (40, 768, 51408, "", False, "48 tokens x 256 features, 0 of them cut"),
    (33, 2048, 41048, "", False, "48 tokens x 256 features, 29 of them cut"),
    (33, 8192, 12296, "", False, "48 tokens x 256 features, 49 of them cut"),
    (40, 10240, 16456, "", False, "48 tokens x 256 features, a cluster of 2"),
    (40, 256, 72, "", False, "48 tokens x 128 features, 0 of them cut"),
    (48, 1536, 18504, "", False, "48 tokens x 128 features, 13 of them cut"),
    (40, 3072, 72, "", False, "48 tokens x 128 features, 1 of them cut"),
    (40, 1024, 72, "", False, "48 tokens x 128 features, a cluster of 4"),
    (33, 3072, 2056, "", False, "48 tokens x 128 features, a cluster of 6"),
    (520, 1024, 2056, "float32", False, "64 tokens x 256 features, 0 of them cut"),
    (52, 1536, 38152, "", False, "64 tokens x 256 features, 18 of them cut"),
    (52, 6144, 13064, "", False, "64 tokens x 256 features, 52 of them cut"),
    (52, 8192, 14600, "", False, "64 tokens x 256 features, a cluster of 2"),
    (56, 256, 72, "", False, "64 tokens x 128 features, 0 of them cut"),
    (56, 1536, 18504, "", False, "64 tokens x 128 features, 13 of them cut"),
    (56, 3072, 72, "", False, "64 tokens x 128 features, 1 of them cut"),
    (56, 1024, 72, "", False, "64 tokens x 128 features, a cluster of 4"),
    (56, 3072, 2056, "", False, "64 tokens x 128 features, a cluster of 6"),
    (200, 2048, 8776, "float32", False, "64 tokens x 128 features, 12 of them cut"),
    (200, 256, 72, "", True, "48 tokens x 256 features, 0 of them cut"),
    (520, 1024, 3080, "", True, "48 tokens x 256 features, 11 of them cut"),
    (20, 1536, 72, "", True, "48 tokens x 256 features, 1 of them cut"),
    (200, 768, 72, "", True, "48 tokens x 256 features, a cluster of 6"),
    (70, 512, 18504, "", False, "80 tokens x 256 features, 0 of them cut"),
    (70, 6144, 8776, "", False, "80 tokens x 256 features, 35 of them cut"),
    (70, 2048, 36936, "", False, "80 tokens x 256 features, 13 of them cut"),
    (70, 6144, 16456, "", False, "80 tokens x 256 features, a cluster of 2"),
    (70, 256, 72, "", False, "80 tokens x 128 features, 0 of them cut"),
    (70, 1536, 18504, "", False, "80 tokens x 128 features, 13 of them cut"),
    (70, 3072, 72, "", False, "80 tokens x 128 features, 1 of them cut"),
    (100, 3072, 1032, "", False, "80 tokens x 128 features, a cluster of 5"),
    (70, 1024, 72, "", False, "80 tokens x 128 features, a cluster of 8"),
    (90, 768, 18504, "", False, "96 tokens x 256 features, 0 of them cut"),
    (90, 6144, 10312, "", False, "96 tokens x 256 features, 41 of them cut"),
    (90, 2048, 36936, "", False, "96 tokens x 256 features, 13 of them cut"),
    (90, 6144, 16456, "", False, "96 tokens x 256 features, a cluster of 2"),
    (90, 256, 8776, "", False, "96 tokens x 128 features, 0 of them cut"),
    (90, 1536, 18504, "", False, "96 tokens x 128 features, 13 of them cut"),
    (170, 4096, 136, "", False, "96 tokens x 128 features, 4 of them cut"),
    (90, 2048, 1032, "", False, "96 tokens x 128 features, a cluster of 8"),
    (100, 768, 18504, "", False, "112 tokens x 256 features, 0 of them cut"),
    (100, 6144, 12296, "", False, "112 tokens x 256 features, 49 of them cut"),
    (100, 2048, 36936, "", False, "112 tokens x 256 features, 13 of them cut"),
    (100, 6144, 16456, "", False, "112 tokens x 256 features, a cluster of 2"),
    (100, 256, 8776, "", False, "112 tokens x 128 features, 0 of them cut"),
    (100, 3072, 8776, "", False, "112 tokens x 128 features, 69 of them cut"),
    (100, 1536, 18504, "", False, "112 tokens x 128 features, 13 of them cut"),
    (100, 2048, 2056, "", False, "112 tokens x 128 features, a cluster of 6"),
    (120, 768, 18504, "", False, "128 tokens x 256 features, 0 of them cut"),
    (120, 8192, 10312, "", False, "128 tokens x 256 features, 41 of them cut"),
    (120, 2048, 41048, "", False, "128 tokens x 256 features, 29 of them cut"),
    (120, 8192, 16456, "", False, "128 tokens x 256 features, a cluster of 2"),
    (120, 256, 8776, "", False, "128 tokens x 128 features, 0 of them cut"),
    (120, 3072, 8776, "", False, "128 tokens x 128 features, 69 of them cut"),
    (120, 1536, 18504, "", False, "128 tokens x 128 features, 13 of them cut"),
    (120, 3072, 2056, "", False, "128 tokens x 128 features, a cluster of 6"),
    (129, 1024, 51408, "", False, "144 tokens x 256 features, 0 of them cut"),
    (280, 1536, 51408, "", False, "144 tokens x 256 features, 6 of them cut"),
    (129, 256, 8776, "", False, "144 tokens x 128 features, 0 of them cut"),
    (129, 3072, 8776, "", False, "144 tokens x 128 features, 69 of them cut"),
    (129, 1536, 18504, "", False, "144 tokens x 128 features, 13 of them cut"),
    (129, 3072, 3080, "", False, "144 tokens x 128 features, a cluster of 4"),
    (150, 256, 8776, "", False, "160 tokens x 128 features, 0 of them cut"),
    (150, 3072, 8776, "", False, "160 tokens x 128 features, 69 of them cut"),
    (150, 1536, 18504, "", False, "160 tokens x 128 features, 13 of them cut"),
    (300, 4096, 2056, "", False, "160 tokens x 128 features, a cluster of 3"),
    (170, 256, 12296, "", False, "176 tokens x 128 features, 0 of them cut"),
    (170, 3072, 8776, "", False, "176 tokens x 128 features, 69 of them cut"),
    (170, 1536, 18504, "", False, "176 tokens x 128 features, 13 of them cut"),
    (170, 3072, 5640, "", False, "176 tokens x 128 features, a cluster of 2"),
    (
        2250,
        384,
        3336,
        "",
        False,
        "128 tokens x 512 features, 0 of them cut along K, words read 18 times, by pairs",
    ),
    (
        2049,
        256,
        9224,
        "",
        False,
        "128 tokens x 512 features, 0 of them cut along K, words read 17 times, by pairs",
    ),
    (257, 1536, 3848, "float32", False, "; then, for the last 1 rows, mma.sync, activations as int8 digits"),
    (400, 1536, 5384, "float32", False, "; then, for the last 16 rows, wgmma"),
    (260, 2048, 4104, "float32", False, "; then, for the last 4 rows, mma.sync, 16-bit floats"),
]


# The same of the portable kernels, without clusters.
PORTABLE_SHARES = [
    (5, 24576, 136, "", False, "16 tokens x 128 features, 2 of them cut"),
    (12, 256, 34056, "", False, "16 tokens x 128 features, 0 of them cut"),
    (12, 4096, 1032, "", False, "16 tokens x 128 features, 9 of them cut"),
    (16, 1024, 70408, "", False, "16 tokens x 128 features, 23 of them cut"),
    (20, 256, 34056, "", False, "32 tokens x 128 features, 0 of them cut"),
    (20, 1536, 72, "", False, "32 tokens x 128 features, 1 of them cut"),
    (32, 2048, 55304, "", False, "32 tokens x 128 features, 37 of them cut"),
    (48, 512, 16904, "", False, "64 tokens x 128 features, 0 of them cut"),
    (48, 4096, 1032, "", False, "64 tokens x 128 features, 9 of them cut"),
    (380, 1536, 6152, "float32", False, "64 tokens x 128 features, 30 of them cut"),
    (300, 8192, 392, "float32", False, "64 tokens x 128 features, 20 of them cut"),
    (20, 512, 16904, "", True, "32 tokens x 128 features, 0 of them cut"),
    (20, 4096, 1032, "", True, "32 tokens x 128 features, 9 of them cut"),
    (32, 2048, 40968, "", True, "32 tokens x 128 features, 57 of them cut"),
    (257, 2048, 6152, "", True, "64 tokens x 128 features, 0 of them cut"),
    (520, 2048, 1032, "", True, "64 tokens x 128 features, 81 of them cut"),
    (300, 2048, 8200, "", False, "128 tokens x 256 features, 0 of them cut"),
    (300, 6144, 4104, "", False, "128 tokens x 256 features, 51 of them cut"),
    (380, 2048, 12296, "", False, "128 tokens x 256 features, 15 of them cut"),
    (1000, 1024, 4104, "", False, "128 tokens x 128 features, 0 of them cut"),
    (90, 1536, 72, "", False, "128 tokens x 128 features, 1 of them cut"),
    (129, 2048, 4104, "", False, "; then, for the last 1 rows, portable mma.sync, 16-bit floats"),
    (150, 2048, 12296, "", False, "; then, for the last 22 rows, portable mma.sync, scales on the sums"),
    (321, 1024, 12296, "float32", False, "; then, for the last 1 rows, portable mma.sync, 16-bit floats"),
]


@pytest.mark.parametrize(
    ("mode", "m", "k", "n", "scale_dtype", "with_zeros", "says"),
    [pytest.param("cuda", *shares, marks=needs_hopper) for shares in SHARES]
    + [("cuda-portable", *shares) for shares in PORTABLE_SHARES],
)
def test_every_way_of_sharing_tiles_out(mode, m, k, n, scale_dtype, with_zeros, says):
    for dtype, group_size in (("float16", 128), ("bfloat16", 32)):
        problem = MatmulProblem(m, k, n, group_size, dtype, scale_dtype or dtype, with_zeros)
        x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
        if getattr(jax.local_devices(backend="cuda")[0], "core_count", None) == 132:
            assert says in jax_trirun.explain(x, qt, backend=mode)
        y = check(problem, mode)
        again = jax.jit(lambda x, qt: jax_trirun.matmul(x, qt, backend=mode))(x, qt)
        assert bool(jnp.array_equal(jnp.asarray(y).view(jnp.uint16), again.view(jnp.uint16)))


@both_modes
@pytest.mark.parametrize(
    ("k", "group_size"),
    [
        *((k, -1) for k in (8, 72, 77, 100, 136, 200, 1000, 4104)),
        *((32, 32), (96, 32), (160, 32), (64, 64), (192, 64), (320, 64), (128, 128), (384, 128), (8576, 128)),
    ],
)
def test_k_that_fills_no_tile(k, group_size, mode):
    for m, with_zeros in itertools.product(ROWS_OF_KERNELS[mode], (False, True)):
        check(MatmulProblem(m, k, 104, group_size, "bfloat16", "bfloat16", with_zeros), mode)


@both_modes
@pytest.mark.parametrize("n", [1, 8, 33, 40, 136, 384, 392, 1000, 4224 + 8])
def test_columns_that_fill_no_tile(n, mode):
    for m in ROWS_OF_KERNELS[mode]:
        check(MatmulProblem(m, 384, n, 64, "float16", "float16"), mode)


@needs_hopper
@both_halves
@pytest.mark.parametrize(("k", "group_size"), [(200, -1), (320, 64)])
def test_pairs_of_thread_blocks_where_k_fills_no_tile(k, group_size, dtype):
    problem = MatmulProblem(2056, k, 9224, group_size, dtype, dtype)
    x = jax.ShapeDtypeStruct((problem.m, problem.k), problem.x_dtype)
    if jax.local_devices(backend="cuda")[0].core_count == 132:
        assert "by pairs" in jax_trirun.explain(x, problem.quant_tensor(), backend="cuda")
    check(problem, "cuda")


@both_modes
@both_halves
@pytest.mark.parametrize(
    ("m", "k", "n"), [(20, 8192, 4096), (64, 14336, 1024), (300, 4096, 4096), (2000, 640, 3000)]
)
def test_tiles_in_rounds_and_in_parts(m, k, n, dtype, mode):
    """Whole rounds of the grid, tiles cut along K by two thread blocks and by many; the same bits every time."""
    problem = MatmulProblem(m, k, n, 128, dtype, dtype)
    x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
    y = check(problem, mode)
    again = jax.jit(lambda x, qt: jax_trirun.matmul(x, qt, backend=mode))(x, qt)
    assert bool(jnp.array_equal(jnp.asarray(y).view(jnp.uint16), again.view(jnp.uint16)))


@both_modes
@both_halves
@pytest.mark.parametrize("mean", [1.0, -100.0])
def test_activations_with_a_large_mean(mean, dtype, mode):
    kinds = itertools.product(ROWS_OF_KERNELS[mode], (False, True), (None, "float32"))
    for m, with_zeros, out_dtype in kinds:
        problem = MatmulProblem(m, 8192, 64, 128, dtype, dtype, with_zeros, x_mean=mean)
        check(problem, mode, out_dtype=out_dtype)


@both_modes
@both_halves
def test_a_row_is_the_same_in_any_company(dtype, mode):
    problem = MatmulProblem(300, 512, 72, 64, dtype, dtype)
    x, qt = problem.x(), problem.quant_tensor()
    reference = matmul_float64(x, problem.codes(), problem.scales())
    for rows in (range(299, -1, -1), range(40), [5] * 130, range(100, 120)):
        rows = list(rows)
        y = jax_trirun.matmul(jnp.asarray(x[rows]), qt, backend=mode)
        assert_close(y, Reference(reference.y[rows], reference.bound[rows]))


@both_modes
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_infinite_activations_stay_in_their_row(value, mode):
    for m, with_zeros in itertools.product(ROWS_OF_KERNELS[mode], (False, True)):
        problem = MatmulProblem(m, 200, 104, -1, "float16", "float16", with_zeros)
        x, qt = problem.x(), problem.quant_tensor()
        x[7, 199] = value
        y = np.asarray(jax_trirun.matmul(jnp.asarray(x), qt, backend=mode))
        others = np.arange(m) != 7
        assert np.isfinite(y[others]).all()
        assert not np.isfinite(y[7]).any()


@both_modes
def test_every_code_and_scales_of_either_sign_are_exact(mode):
    """Small integers throughout: any misplaced code, scale or row shows."""
    rng = np.random.default_rng(0)
    shapes = ((32, 256, 264), (128, 512, 520), (-1, 320, 136))
    for m, (group_size, k, n) in itertools.product(ROWS_OF_KERNELS[mode], shapes):
        codes = rng.integers(0, 4, (k, n)).astype(np.uint8)
        groups = 1 if group_size == -1 else k // group_size
        scales = rng.integers(-2, 3, (groups, n)).astype(np.float16)
        x = rng.integers(-3, 4, (m, k)).astype(np.float16)
        qt = jax_trirun.QuantTensor(
            jax_trirun.pack(codes), jnp.asarray(scales), None, shape=(k, n), group_size=group_size
        )
        y = jax_trirun.matmul(jnp.asarray(x), qt, out_dtype="float32", backend=mode)
        np.testing.assert_array_equal(np.asarray(y), matmul_float64(x, codes, scales).y)
