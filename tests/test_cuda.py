"""What the CUDA kernels must do beyond the contract of every back end, on a GPU.

The contract's tests feed float32 too, which CUDA leaves to dequantise-and-dot; here all activations are
16-bit, so the kernels run, in both of their sets: "cuda" and, with sm_80's instructions only,
"cuda-portable".
"""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, Reference, assert_close, check_problem, matmul_float64

pytestmark = pytest.mark.gpu

MODES = ("cuda", "cuda-portable")
HALVES = ("float16", "bfloat16")
GROUP_SIZES = (32, 64, 128, -1)
PAD_WORD = 0x55555555  # sixteen codes of the zero point
LARGE_WEIGHTS = 1 << 27  # 32 MB of words, enough for csrc/cuda/plan.h to take a layer for large

both_modes = pytest.mark.parametrize("mode", MODES)
both_halves = pytest.mark.parametrize("dtype", HALVES)
every_kernel = pytest.mark.parametrize(
    ("mode", "size"), [("cuda", "small"), ("cuda", "large"), ("cuda-portable", "small")]
)


def assert_runs_the_kernel(x, qt, mode):
    text = jax_trirun.explain(x, qt, backend=mode)
    assert f"the FFI call {_ffi.MATMUL_TARGET}" in text, text


def check(problem, mode, **options):
    """The problem is within its bound, and it is a kernel that computes it."""
    x = jax.ShapeDtypeStruct((problem.m, problem.k), problem.x_dtype)
    assert_runs_the_kernel(x, problem.quant_tensor(), mode)
    return check_problem(problem, backend=mode, **options)


def product(x, codes, scales, zeros=None, *, mode, out_dtype=None, group_size=-1, size="small", copies=1):
    """matmul by a kernel, and the float64 reference, for literal arrays.

    Large layers have kernels of their own for up to 4 rows. For these, ``size="large"`` repeats the
    weight's columns, a multiple of 32 of them, until it is such a layer; ``copies`` says how often itself.
    """
    k, n = codes.shape
    if size == "large" and len(x) <= 4:
        copies = -(-LARGE_WEIGHTS // (k * n))
    wide_scales, wide_zeros = (
        None if a is None else jnp.tile(jnp.asarray(a), (1, copies)) for a in (scales, zeros)
    )
    words = jnp.tile(jax_trirun.pack(codes), (1, copies, 1))
    qt = jax_trirun.QuantTensor(words, wide_scales, wide_zeros, shape=(k, n * copies), group_size=group_size)
    assert_runs_the_kernel(x, qt, mode)
    y = jax_trirun.matmul(jnp.asarray(x), qt, out_dtype=out_dtype, backend=mode)
    reference = matmul_float64(x, codes, scales, zeros, out_dtype=out_dtype)
    return y, Reference(*(np.tile(a, (1, copies)) for a in reference))


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


# ---- Shapes and dtypes ------------------------------------------------------------------------------

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 63, 64, 65, 255, 256, 257)


@both_modes
@both_halves
@pytest.mark.parametrize("m", ROWS)
def test_rows_around_the_tiles(m, dtype, mode):
    check(MatmulProblem(m, 512, 328, 128, dtype, dtype), mode)


@both_modes
@both_halves
def test_a_row_is_the_same_in_any_company(dtype, mode):
    """Rows do not mix: each is within the bound that it has alone, wherever it stands."""
    problem = MatmulProblem(33, 512, 72, 64, dtype, dtype)
    x, qt = problem.x(), problem.quant_tensor()
    reference = matmul_float64(x, problem.codes(), problem.scales())
    for rows in ([32, 0, 7], list(range(32, -1, -1)), [5], [5] * 17):
        y = jax_trirun.matmul(jnp.asarray(x[rows]), qt, backend=mode)
        assert_close(y, Reference(reference.y[rows], reference.bound[rows]))


@both_modes
@pytest.mark.parametrize("n", [1, 7, 8, 16, 24, 33, 40, 72, 136, 1000, 4224 + 8])
def test_columns_that_fill_no_tile(n, mode):
    for m, k, group_size in ((1, 256, 128), (3, 384, 64), (20, 512, 32)):
        check(MatmulProblem(m, k, n, group_size, "float16", "float16"), mode)


@both_modes
@pytest.mark.parametrize(
    ("k", "group_size"),
    [
        *((k, -1) for k in (8, 72, 77, 100, 136, 200, 1000, 4104, 14336)),
        *((32, 32), (96, 32), (160, 32), (224, 32), (64, 64), (192, 64), (320, 64), (128, 128), (384, 128)),
    ],
)
def test_k_that_fills_no_tile(k, group_size, mode):
    for m, with_zeros in ((1, False), (4, True), (7, True), (13, False)):
        check(MatmulProblem(m, k, 104, group_size, "bfloat16", "bfloat16", with_zeros), mode)


@both_modes
@both_halves
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_kernel(group_size, scale_dtype, dtype, mode):
    rows = itertools.cycle((1, 3, 8, 14, 40))  # each kernel of plan.h meets each of these types
    for with_zeros, out_dtype in itertools.product((False, True), (None, "float32")):
        for m in (next(rows), next(rows)):
            problem = MatmulProblem(m, 768, 200, group_size, dtype, scale_dtype, with_zeros)
            y = check(problem, mode, out_dtype=out_dtype)
            assert y.dtype == jnp.dtype(out_dtype or dtype)


@both_halves
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_kernel_of_large_layers(group_size, scale_dtype, dtype):
    for m, with_zeros, k in (
        (1, False, 768),
        (2, True, 800),
        (3, False, 160),
        (4, True, 8192),
        (4, False, 96),
    ):
        k -= k % max(group_size, 1)
        p = MatmulProblem(m, k or group_size, 64, group_size, dtype, scale_dtype, with_zeros)
        y = product(
            p.x(), p.codes(), p.scales(), p.zeros(), mode="cuda", group_size=group_size, size="large",
            out_dtype="float32" if m == 3 else None,
        )  # fmt: skip
        assert_close(*y)


@both_halves
@pytest.mark.parametrize(("k", "copies"), [(512, 1500), (8192, 560), (8192, 960), (28544, 170)])
@pytest.mark.parametrize("m", [3, 4])
def test_many_blocks_for_each_thread_block(m, k, copies, dtype):
    """Lines of more n-blocks than a thread block has warps: a warp's piece lies in two or three of them."""
    p = MatmulProblem(m, k, 64, 128, dtype, dtype)
    y = product(p.x(), p.codes(), p.scales(), mode="cuda", group_size=128, copies=copies, out_dtype="float32")
    assert_close(*y)


@both_modes
@pytest.mark.parametrize("m", [1, 2, 4, 6, 16])
def test_layers_of_a_large_model(m, mode):
    """Large enough for every plan of the launch: digits and floats, K split over a cluster, many tiles."""
    for k, n, dtype in ((4096, 6144, "float16"), (14336, 1024, "bfloat16"), (8192, 8192, "float16")):
        check(MatmulProblem(m, k, n, 128, dtype, dtype), mode)


@both_modes
@pytest.mark.parametrize("zeros_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_zeros_keep_their_precision_beside_scales(scale_dtype, zeros_dtype, mode):
    """A zero that float16 holds and bfloat16 does not, and the other way round."""
    codes = np.full((64, 32), 2, np.uint8)
    value = {"float16": 1.0009765625, "bfloat16": 2.0**-40, "float32": 1.0 + 2.0**-20}[zeros_dtype]
    zeros = np.full((1, 32), value, jnp.dtype(zeros_dtype))
    scales = np.full((1, 32), 0.75, jnp.dtype(scale_dtype))
    x = normal((4, 64), "float16")
    assert_close(*product(x, codes, scales, zeros, mode=mode, out_dtype="float32"))


# ---- Values -----------------------------------------------------------------------------------------


@every_kernel
@both_halves
def test_each_row_of_the_weight_exactly(size, dtype, mode):
    codes = np.random.default_rng(0).integers(0, 4, (128, 96)).astype(np.uint8)
    ones = np.eye(128, dtype=jnp.dtype(dtype))
    for rows in ([0], [1, 127], [63, 64, 8], [9, 31, 32, 33]):
        scales = np.full((1, 96), -0.375, jnp.dtype(dtype))
        y, reference = product(ones[rows], codes, scales, mode=mode, size=size)
        np.testing.assert_array_equal(np.asarray(y).astype(np.float64), reference.y)


@both_modes
@both_halves
def test_identity_gives_the_weights_exactly(dtype, mode):
    k, n = 64, 96
    codes = np.random.default_rng(1).integers(0, 4, (k, n)).astype(np.uint8)
    for groups in (1, 2):
        scales = np.where(np.arange(groups * n).reshape(groups, n) % 2, 0.5, -1.25).astype(jnp.dtype(dtype))
        for zeros in (None, np.full((groups, n), 1.5, jnp.dtype(dtype))):
            eye = np.eye(k, dtype=jnp.dtype(dtype))
            group_size = -1 if groups == 1 else 32
            y, reference = product(eye, codes, scales, zeros, mode=mode, group_size=group_size)
            np.testing.assert_array_equal(np.asarray(y).astype(np.float64), reference.y)


@every_kernel
@both_halves
@pytest.mark.parametrize("code", range(4))
def test_each_code_alone(size, code, dtype, mode):
    codes = np.full((256, 64), code, np.uint8)
    scales = np.full((2, 64), 0.3, jnp.dtype(dtype))
    zeros = np.full((2, 64), 1.7, jnp.dtype(dtype))
    for m in (1, 4, 11):
        for z in (None, zeros):
            assert_close(
                *product(normal((m, 256), dtype), codes, scales, z, mode=mode, size=size, group_size=128)
            )


@every_kernel
@both_halves
@pytest.mark.parametrize("mean", [1.0, -100.0])
def test_activations_with_a_large_mean(mean, size, dtype, mode):
    for m in (1, 4, 9):
        for with_zeros in (False, True):
            p = MatmulProblem(m, 8192, 64, 128, dtype, dtype, with_zeros, x_mean=mean)
            y = product(
                p.x(),
                p.codes(),
                p.scales(),
                p.zeros(),
                mode=mode,
                group_size=128,
                size=size,
                out_dtype="float32",
            )
            assert_close(*y)


@every_kernel
@both_halves
def test_large_zeros_do_not_cost_the_small_differences(size, dtype, mode):
    """zeros far from the codes: the weight is about -s * z, and x's sum matters."""
    codes = MatmulProblem(1, 512, 64).codes()
    scales, zeros = normal((4, 64), dtype), (normal((4, 64), dtype, 1) * 100).astype(jnp.dtype(dtype))
    for m in (1, 3, 8):
        y = product(
            normal((m, 512), dtype),
            codes,
            scales,
            zeros,
            mode=mode,
            size=size,
            group_size=128,
            out_dtype="float32",
        )
        assert_close(*y)


@every_kernel
@both_halves
@pytest.mark.parametrize("m", [1, 3, 8, 20])
def test_sums_that_pass_65504_and_come_back(size, m, dtype, mode):
    """Partial sums of a group, of a slice of K, and of the whole reach many times 65504 and cancel."""
    k = 1024
    x = np.full((m, k), 2048, jnp.dtype(dtype))
    codes = np.full((k, 64), 3, np.uint8)
    codes[k // 2 :] = 0
    codes[k // 2 : k // 2 + 8] = 1  # leaves 32768
    scales = np.ones((k // 32, 64), jnp.dtype(dtype))
    scales[k // 64 :] = 2
    y, reference = product(x, codes, scales, mode=mode, size=size, group_size=32)
    assert np.isfinite(np.asarray(y).astype(np.float32)).all()
    assert_close(y, reference)


@every_kernel
@both_halves
@pytest.mark.parametrize(
    ("name", "scale", "scale_dtype"),
    [
        ("zero", 0.0, None),
        ("negative", -0.7, None),
        ("float16's least", 2.0**-24, "float16"),
        ("bfloat16 subnormal", 2.0**-130, "bfloat16"),
        ("float32 subnormal", 1e-40, "float32"),
        ("float16's largest", 65504.0, "float16"),
        ("huge", 1e30, "bfloat16"),
        ("huge float32", 1e36, "float32"),
    ],
)
def test_extreme_scales(size, name, scale, scale_dtype, dtype, mode):
    scale_dtype = scale_dtype or dtype
    scales = np.full((4, 64), scale, jnp.dtype(scale_dtype))
    scales[1] *= -1
    codes = MatmulProblem(1, 128, 64).codes()
    for m in (1, 4, 9):
        x = normal((m, 128), dtype)
        y = product(x, codes, scales, mode=mode, size=size, group_size=32, out_dtype="float32")
        assert_close(*y)


@every_kernel
@both_halves
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_small_activations_beside_large_ones(size, m, dtype, mode):
    """One huge activation meets weights of zero, so the tiny ones make the whole result."""
    k = 256
    x = (normal((m, k), dtype) * np.float32(2.0**-10)).astype(jnp.dtype(dtype))
    codes = MatmulProblem(1, k, 64).codes()
    x[:, 5], codes[5] = 60000, 1  # 1 is the zero point
    x[:, 200], codes[200] = -60000, 1
    assert_close(*product(x, codes, np.ones((2, 64), jnp.dtype(dtype)), mode=mode, size=size, group_size=128))


@every_kernel
@both_halves
@pytest.mark.parametrize("m", [1, 2, 4])
def test_a_few_tiny_activations_among_many(size, m, dtype, mode):
    """Only they meet weights that are not zero; K ends inside what is scaled together."""
    k = 1408
    x, codes = normal((m, k), dtype), MatmulProblem(1, k, 64).codes()
    few = np.random.default_rng(3).random(k) < 0.01
    x[:, few] = x[:, few] * np.float32(2.0**-12)
    x[:, 300::500], few[300::500] = 20000, False
    codes[~few] = 1  # the zero point
    scales = np.ones((k // 128, 64), jnp.dtype(dtype))
    assert_close(*product(x, codes, scales, mode=mode, size=size, group_size=128, out_dtype="float32"))


@every_kernel
@both_halves
@pytest.mark.parametrize("m", [1, 4, 8])
def test_activations_of_every_magnitude(size, m, dtype, mode):
    rng = np.random.default_rng(1)
    low, high = (-24, 15) if dtype == "float16" else (-100, 100)
    x = (np.ldexp(rng.choice([-1, 1], (m, 512)), rng.integers(low, high, (m, 512)))).astype(jnp.dtype(dtype))
    codes = MatmulProblem(1, 512, 64).codes()
    scales = np.ones((4, 64), jnp.dtype(dtype))
    assert_close(*product(x, codes, scales, mode=mode, size=size, group_size=128, out_dtype="float32"))


@every_kernel
def test_subnormal_activations(mode, size):
    """Of float16. Those of bfloat16 are float32's too, which XLA flushes to zero at will."""
    for m in (1, 4, 8):
        x = (np.random.default_rng(2).integers(-5, 6, (m, 256)) * 2.0**-24).astype(np.float16)
        codes, scales = MatmulProblem(1, 256, 64).codes(), np.full((2, 64), 2.0**20, np.float32)
        assert_close(*product(x, codes, scales, mode=mode, size=size, group_size=128, out_dtype="float32"))


@every_kernel
@both_halves
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 2, 4, 7, 20])
def test_not_a_number_stays_in_its_row(size, m, value, dtype, mode):
    """K = 72 leaves 56 padded rows of codes: no 0 * Inf may come from them either."""
    for with_zeros in (False, True):
        problem = MatmulProblem(m, 72, 64, -1, dtype, "float32", with_zeros)
        x = problem.x()
        x[m // 2, 3] = value
        y, reference = product(x, problem.codes(), problem.scales(), problem.zeros(), mode=mode, size=size)
        rows = np.isfinite(np.asarray(y).astype(np.float32)).all(axis=1)
        assert not rows[m // 2] and rows[np.arange(m) != m // 2].all()
        assert_close(y, reference)


@every_kernel
@both_halves
@pytest.mark.parametrize("k", [65, 72, 96, 160])
def test_padding_never_multiplies_infinity(size, k, dtype, mode):
    codes = np.full((k, 32), 2, np.uint8)
    for m in (3, 9):
        x = np.ones((m, k), jnp.dtype(dtype))
        x[1, k - 1] = np.inf
        y, _ = product(x, codes, np.ones((1, 32), jnp.dtype(dtype)), mode=mode, size=size)
        y = np.asarray(y).astype(np.float32)
        np.testing.assert_array_equal(np.delete(y, 1, axis=0), float(k))
        assert np.isposinf(y[1]).all()


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_scale_stays_in_its_column(value, mode, size):
    for m, k in ((1, 96), (4, 160), (9, 320)):
        problem = MatmulProblem(m, k, 64, 32, "float16", "float32")
        scales = problem.scales()
        scales[-1, 5] = value
        y, _ = product(problem.x(), problem.codes(), scales, mode=mode, group_size=32, size=size)
        y = np.asarray(y).astype(np.float32)
        bad = np.arange(y.shape[1]) % 64 == 5
        assert not np.isfinite(y[:, bad]).any()
        assert np.isfinite(y[:, ~bad]).all()


# ---- More elements than an int counts ---------------------------------------------------------------


def sparse_weight(k, n):
    """Words whose weights are zero but for the first and the last block of K, and the codes of those."""
    block = _ffi.cpu_module.layout(2)["block_k"]
    edge = np.random.default_rng(0).integers(0, 4, (block, n)).astype(np.uint8)
    packed = jax_trirun.pack(edge)
    words = jnp.full((k // block, *packed.shape[1:]), PAD_WORD, jnp.uint32)
    return words.at[0].set(packed[0]).at[-1].set(packed[0]), edge


def check_edges(m, k, n, groups, mode):
    words, edge = sparse_weight(k, n)
    block = edge.shape[0]
    ends = normal((m, 2 * block), "float16")
    x = jnp.ones((m, k), jnp.float16).at[:, :block].set(ends[:, :block]).at[:, -block:].set(ends[:, block:])
    scales = jnp.ones((groups, n), jnp.float16)
    y = jax_trirun.matmul(x, words, scales, backend=mode)
    codes = np.concatenate([edge, edge])
    assert_close(y, matmul_float64(ends, codes, np.ones((1, n), np.float16)))


@both_modes
@pytest.mark.parametrize("m", [1, 4, 9, 33])
def test_more_than_two_to_the_31_weights(m, mode):
    check_edges(m, 8192, (1 << 18) + 136, 64, mode)


@both_modes
@pytest.mark.parametrize("m", [1, 4, 64])
def test_a_very_long_row(m, mode):
    """K just below the kernels' limit: K * N > 2^31, and at M = 64 x has 2^31 elements, 4 GB."""
    check_edges(m, (1 << 25) - 64, 72, 1, mode)


def test_more_than_two_to_the_31_activations():
    """M * K beyond 2^31, whatever runs it."""
    check_edges(72, 1 << 25, 8, 1, None)


# ---- Repeats, graphs, streams, buffers ---------------------------------------------------------------


@both_modes
@both_halves
def test_repeating_gives_the_same_bits(dtype, mode):
    for m, k, n in ((1, 14336, 1024), (2, 4096, 4096), (4, 8192, 512), (8, 8192, 72), (33, 4096, 520)):
        problem = MatmulProblem(m, k, n, 128, dtype, dtype)
        x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
        f = jax.jit(lambda x, qt: jax_trirun.matmul(x, qt, out_dtype="float32", backend=mode))
        first = np.asarray(f(x, qt))
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(f(x, qt)), first)


LAYERS = 8  # enough calls for XLA to make a graph of them


def chain(mode):
    """LAYERS different products one after the other, with something of XLA's own between them."""

    def f(x, qts, *unused):
        outputs = []
        for qt in qts:
            y = jax_trirun.matmul(x, qt, backend=mode)
            x = jnp.tanh(y)[:, : x.shape[1]]
            outputs.append(y)
        return outputs

    return f


def chain_inputs(m, dtype, size=512):
    qts = [MatmulProblem(1, size, size, 128, dtype, dtype, seed=i).quant_tensor() for i in range(LAYERS)]
    return jnp.asarray(normal((m, size), dtype)), qts


@both_modes
@pytest.mark.parametrize("m", [1, 4, 8, 20])
def test_a_thousand_replays_over_poisoned_outputs(m, mode):
    """The outputs' buffers are donated, full of NaN, and come back with the same bits each time."""
    x, qts = chain_inputs(m, "float16")
    f = jax.jit(chain(mode), donate_argnums=2, keep_unused=True)
    poisoned = jax.jit(lambda ys: [jnp.full_like(y, jnp.nan) for y in ys], donate_argnums=0, keep_unused=True)
    count = jax.jit(lambda ys, wanted: sum(jnp.sum(y != w) for y, w in zip(ys, wanted, strict=True)))
    wanted = jax.jit(chain(mode))(x, qts)
    assert all(np.isfinite(np.asarray(y)).all() for y in wanted)
    ys, wrong = [jnp.full_like(y, jnp.nan) for y in wanted], 0
    for _ in range(1000):
        ys = f(x, qts, ys)
        wrong = wrong + count(ys, wanted)
        ys = poisoned(ys)
    assert int(wrong) == 0


@both_modes
def test_xla_captures_the_calls_in_a_graph(mode):
    """Replays do not run the handler; a call that XLA did not capture would run it every time."""
    x, qts = chain_inputs(4, "float16")
    f = jax.jit(lambda x, qts: chain(mode)(x, qts)[-1])
    module = _ffi.BACKENDS[mode].module
    for _ in range(10):
        f(x, qts).block_until_ready()
    before = module.handler_runs()
    for _ in range(100):
        f(x, qts).block_until_ready()
    runs = module.handler_runs() - before
    assert runs < 100 * LAYERS / 4, f"the handler ran {runs} times in {100 * LAYERS} calls"


@both_modes
def test_moved_buffers_give_right_results(mode):
    """Outputs are kept, so each call writes elsewhere; operands are copied to new places too."""
    x, qts = chain_inputs(3, "bfloat16")
    f = jax.jit(chain(mode))
    wanted = [np.asarray(y) for y in f(x, qts)]
    kept = []
    for i in range(50):
        if i % 5 == 0:
            x, qts = jax.tree.map(lambda a: jnp.array(a, copy=True), (x, qts))
        kept.append(f(x, qts))
    for ys in kept:
        for y, w in zip(ys, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(y), w)


@both_modes
def test_donated_activations_and_weights(mode):
    problem = MatmulProblem(4, 512, 512, 128, "float16", "float16")
    reference = matmul_float64(problem.x(), problem.codes(), problem.scales())
    f = jax.jit(lambda x, qt: jax_trirun.matmul(x, qt, backend=mode), donate_argnums=0)
    qt = problem.quant_tensor()
    for _ in range(20):  # x [4, 512] has y's shape and type: XLA may write y over it
        assert_close(f(jnp.asarray(problem.x()), qt), reference)
    update = jax.jit(
        lambda qt: jax.tree.map(lambda a: a ^ 0 if a.dtype == jnp.uint32 else -a, qt), donate_argnums=0
    )
    for i in range(20):
        qt = update(qt)
        sign = 1 if i % 2 else -1
        y = f(jnp.asarray(problem.x()), qt)
        assert_close(y, Reference(sign * reference.y, reference.bound))


@both_modes
@pytest.mark.parametrize("m", [2, 8, 20])
def test_two_streams_at_once(m, mode):
    """Two chains without a common operand, each on a stream of its own, many times."""
    compute_on = pytest.importorskip("jax.experimental.compute_on").compute_on
    (xa, qa), (xb, qb) = chain_inputs(m, "float16", 1024), chain_inputs(m + 1, "bfloat16", 1024)
    wanted = [np.asarray(jax.jit(chain(mode))(x, q)[-1]) for x, q in ((xa, qa), (xb, qb))]

    def on_stream(number):
        f, stream = (lambda x, q: chain(mode)(x, q)[-1]), f"gpu_stream:{number}"
        if "out_memory_spaces" in inspect.signature(compute_on).parameters:  # since JAX 0.11
            return compute_on(f, compute_type=stream, out_memory_spaces=jax.memory.Space.Device)
        return compute_on(stream)(jax.jit(f))

    both = jax.jit(lambda xa, qa, xb, qb: (on_stream(1)(xa, qa), on_stream(2)(xb, qb)))
    for _ in range(50):
        for y, w in zip(both(xa, qa, xb, qb), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(y), w)


def test_the_same_words_on_cpu_and_gpu():
    """Packed on the CPU, byte for byte the words of the GPU, and the same numbers within the bound."""
    cpu = jax.devices("cpu")[0]
    for m, k, n, group_size, dtype in (
        (1, 1024, 200, 128, "float16"),
        (5, 576, 96, 64, "bfloat16"),
        (20, 200, 45, -1, "float16"),
    ):
        problem = MatmulProblem(m, k, n, group_size, dtype, dtype, True)
        with jax.default_device(cpu):
            qt = problem.quant_tensor()
            on_cpu = np.asarray(jax_trirun.matmul(jnp.asarray(problem.x()), qt, backend="cpu"))
        np.testing.assert_array_equal(np.asarray(problem.quant_tensor().words), np.asarray(qt.words))
        reference = matmul_float64(problem.x(), problem.codes(), problem.scales(), problem.zeros())
        assert_close(on_cpu, reference)
        moved = jax.device_put(qt, jax.devices("cuda")[0])
        for mode in MODES:
            assert_close(jax_trirun.matmul(jnp.asarray(problem.x()), moved, backend=mode), reference)


# ---- Errors come back as sentences -------------------------------------------------------------------


def raw_call(x, words, scales, zeros, *, scratch=(1 << 20,), out="float16", portable=0):
    results = (
        jax.ShapeDtypeStruct((x.shape[0], scales.shape[1]), out),
        *(jax.ShapeDtypeStruct((size,), np.uint8) for size in scratch),
    )
    call = jax.ffi.ffi_call(_ffi.MATMUL_TARGET, results)
    return jax.block_until_ready(call(x, words, scales, zeros, portable=np.int64(portable))[0])


GOOD = {
    "x": ((4, 256), "float16"),
    "words": ((4, 2, 128), "uint32"),
    "scales": ((2, 64), "float16"),
    "zeros": ((0, 64), "float16"),
}
WRONG = {  # what is changed of GOOD, options of raw_call, the sentence
    "words of other blocks": (
        {"words": ((2, 2, 128), "uint32")}, {}, "words must be uint32 [4, 2, 128], got [2, 2, 128]"
    ),
    "words of another type": ({"words": ((4, 2, 128), "int32")}, {}, "words must be uint32 [4, 2, 128]"),
    "x with three axes": ({"x": ((4, 256, 1), "float16")}, {}, "x must be [M, K]"),
    "x of integers": ({"x": ((4, 256), "int32")}, {}, "x must be float32, float16 or bfloat16"),
    "x in float32": ({"x": ((4, 256), "float32")}, {"out": "float32"}, "x must be float16 or bfloat16, got float32"),
    "three groups": ({"scales": ((3, 64), "float16")}, {}, "the number of groups must divide K"),
    "groups of 16": ({"scales": ((16, 64), "float16")}, {}, "group_size must be 32, 64, 128 or all of K, got 16"),
    "zeros of another type": (
        {"zeros": ((2, 64), "float32")}, {}, "zeros must be of the scales' type float16, got float32"
    ),
    "zeros of another shape": ({"zeros": ((1, 64), "float16")}, {}, "zeros must have shape [2, 64], got [1, 64]"),
    "y of another type": (
        {}, {"out": "bfloat16"}, "y must be float32 or x's type, which is float16, got bfloat16"
    ),
    "three results": ({}, {"scratch": (16, 16)}, "wanted results y and scratch, got 3"),
    "scales in the other 16 bits": (
        {"scales": ((2, 64), "bfloat16"), "zeros": ((0, 64), "bfloat16")}, {},
        "scales must have x's dtype float16 or float32, got bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("scratch", [(), (0,), (1 << 20,)])
def test_the_raw_call_works(scratch):
    arrays = {name: jnp.ones(shape, dtype) for name, (shape, dtype) in GOOD.items()}
    assert raw_call(**arrays, scratch=scratch).shape == (4, 64)


@pytest.mark.parametrize("name", WRONG)
def test_the_handler_says_what_is_wrong(name):
    changes, options, message = WRONG[name]
    arrays = {key: jnp.ones(shape, dtype) for key, (shape, dtype) in (GOOD | changes).items()}
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        raw_call(**arrays, **options)
    assert message in str(raised.value), raised.value
    assert raw_call(**{k: jnp.ones(*v) for k, v in GOOD.items()}).shape == (4, 64)  # the process lives on


@pytest.mark.parametrize(("scratch", "got"), [((), 0), ((16,), 16)])
def test_too_little_scratch_is_refused(scratch, got):
    wanted = _ffi.BACKENDS["cuda"].module.scratch_bytes(4, 64, 1 << 16, 512, "float16", True)
    assert wanted > 0
    arrays = (
        jnp.ones((4, 1 << 16), "float16"),
        jnp.ones((1024, 2, 128), "uint32"),
        jnp.ones((512, 64), "float16"),
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"scratch must have at least {wanted} bytes, got {got}"
    ):
        raw_call(*arrays, jnp.ones((0, 64), "float16"), scratch=scratch, portable=1)
