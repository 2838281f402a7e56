"""Products whose weight is made dense first: gradients, and what no kernel takes. On a GPU a kernel makes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.reference import Dense, dequantize_to, matmul_reference
from jax_trirun.testing import (
    ERROR_FACTOR,
    MatmulProblem,
    Reference,
    assert_close,
    matmul_float64,
    weight_float64,
)

FLOATS = ("float32", "bfloat16", "float16")
GROUP_SIZES = (32, 64, 128, -1)
TENSOR_CORES = Dense(tensor_cores=True)


def bits(array):
    array = np.asarray(array)
    return array.view(np.uint32 if array.dtype.itemsize == 4 else np.uint16)


def weight_of(codes, scales, zeros, dtype):
    """W as NumPy computes it in float32, rounded once."""
    by_row = np.arange(len(codes)) // (len(codes) // len(scales))
    zero = 1.0 if zeros is None else np.asarray(zeros, np.float32)[by_row]
    with np.errstate(over="ignore", invalid="ignore"):
        w = (codes.astype(np.float32) - zero) * np.asarray(scales, np.float32)[by_row]
        return w.astype(jnp.dtype(dtype))


def product_float64(x, w, out_dtype):
    """x @ w with the bound of testing.matmul_float64, for a weight that is dense already."""
    out, eps = jnp.finfo(out_dtype), float(np.finfo(np.float32).eps)
    x = np.asarray(x).astype(np.float64)
    with np.errstate(invalid="ignore"):
        y, products = x @ w, np.abs(x) @ np.abs(w)
    bound = float(out.eps) * np.abs(y) + ERROR_FACTOR * eps * products
    return Reference(y, bound + float(out.smallest_subnormal))


# ---- What it is made of -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_zeros", [False, True])
def test_weights_are_rounded_once(dtype, with_zeros):
    problem = MatmulProblem(1, 192, 40, 64, "float32", "float16", with_zeros)
    qt = problem.quant_tensor()
    w = dequantize_to(qt.words, qt.scales, qt.zeros, 192, 2, jnp.dtype(dtype))
    want = weight_of(problem.codes(), problem.scales(), problem.zeros(), dtype)
    np.testing.assert_array_equal(bits(w), bits(want))


def on_tensor_cores(x, problem, scales, *, transpose, out_dtype="float32"):
    multiply = partial(
        matmul_reference, k=problem.k, out_dtype=out_dtype, transpose=transpose, bits=2, dense=TENSOR_CORES
    )
    return jax.jit(multiply)(x, jax_trirun.pack(problem.codes()), jnp.asarray(scales), None)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("transpose", [False, True])
def test_operands_in_16_bits_round_nothing(dtypes, transpose):
    """As CUDA has it: on a CPU the same operands, on a GPU its tensor cores."""
    problem = MatmulProblem(9, 1024, 136, 64, *dtypes, x_mean=1.0)
    x, w = problem.x(), weight_float64(problem.codes(), problem.scales())
    if transpose:
        x, w = np.random.default_rng(5).normal(size=(9, 136)).astype(x.dtype), w.T
    y = on_tensor_cores(x, problem, problem.scales(), transpose=transpose)
    assert_close(y, product_float64(x, w, "float32"))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("scale", [32752.0, 32768.0, 40000.0, 65504.0, np.inf, np.nan])
def test_weights_beyond_float16_are_not_made_in_float16(scale, transpose):
    """One scale among the others, whose double float16 does or does not hold."""
    problem = MatmulProblem(3, 256, 40, 64, "float16", "float16")
    scales = problem.scales()
    scales[1, 5] = -scale
    x, w = problem.x(), weight_float64(problem.codes(), scales)
    if transpose:
        x, w = np.random.default_rng(5).normal(size=(3, 40)).astype(x.dtype), w.T
    y = on_tensor_cores(x, problem, scales, transpose=transpose)
    assert_close(y, product_float64(x, w, "float32"))
    if np.isfinite(scale):
        assert np.isfinite(np.asarray(y)).all()


def test_either_way_of_multiplying_takes_no_memory_from_the_other():
    problem = MatmulProblem(16, 1024, 2048, 128, "float16", "float16")
    multiply = partial(
        matmul_reference, k=1024, out_dtype="float16", transpose=True, bits=2, dense=TENSOR_CORES
    )

    def temporaries(scale_dtype):
        with jax.default_device(jax.devices("cpu")[0]):
            x, words = jnp.ones((16, 2048), "float16"), jax_trirun.pack(problem.codes())
            scales = jnp.asarray(problem.scales()).astype(scale_dtype)
            program = jax.jit(multiply).lower(x, words, scales, None).compile()
        return program.memory_analysis().temp_size_in_bytes

    half = 2 * 1024 * 2048 // 2  # bytes of the float16 part, which a CPU has beside its float32
    assert temporaries("float16") <= temporaries("bfloat16") + 1.1 * half  # bfloat16 scales: float32 alone


# ---- Gradients, on every back end ----------------------------------------------------------------------


def gradient_of_x(y_bar, x, qt, backend):
    product = partial(jax_trirun.matmul, qw=qt, backend=backend)
    return jax.jit(lambda y_bar: jax.linear_transpose(product, x)(y_bar)[0])(y_bar)


@pytest.mark.parametrize("with_zeros", [False, True], ids=["plain", "zeros"])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_gradient_of_x(backend, x_dtype, scale_dtype, with_zeros):
    for m, k, n, group_size in ((1, 384, 136, 128), (9, 1024, 40, 64), (33, 77, 45, -1), (5, 96, 264, 32)):
        problem = MatmulProblem(m, k, n, group_size, x_dtype, scale_dtype, with_zeros)
        y_bar = np.random.default_rng(7).normal(size=(m, n)).astype(jnp.dtype(x_dtype))
        x_bar = gradient_of_x(jnp.asarray(y_bar), problem.x(), problem.quant_tensor(), backend)
        assert x_bar.dtype == jnp.dtype(x_dtype)
        w = weight_float64(problem.codes(), problem.scales(), problem.zeros())
        assert_close(x_bar, product_float64(y_bar, w.T, x_dtype))


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16"])
def test_gradient_of_x_with_huge_scales(backend, x_dtype):
    problem = MatmulProblem(4, 256, 64, 64, x_dtype, "float16")
    scales = problem.scales()
    scales[2, 9] = 40000
    y_bar = (np.random.default_rng(7).normal(size=(4, 64)) / 1024).astype(jnp.dtype(x_dtype))
    qt = jax_trirun.QuantTensor(
        jax_trirun.pack(problem.codes()), jnp.asarray(scales), shape=(256, 64), group_size=64
    )
    x_bar = gradient_of_x(jnp.asarray(y_bar), problem.x(), qt, backend)
    assert np.isfinite(np.asarray(x_bar).astype(np.float32)).all()
    assert_close(x_bar, product_float64(y_bar, weight_float64(problem.codes(), scales).T, x_dtype))


@pytest.mark.parametrize("with_zeros", [False, True], ids=["plain", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [64, -1])
def test_gradient_of_scales(backend, group_size, dtype, with_zeros):
    problem = MatmulProblem(9, 768, 72, group_size, dtype, dtype, with_zeros)
    y_bar = np.random.default_rng(7).normal(size=(9, 72)).astype(jnp.dtype(dtype))
    qt, x, zeros = problem.quant_tensor(), problem.x(), problem.zeros()

    def product(scales):
        return jax_trirun.matmul(x, qt.words, scales, qt.zeros, backend=backend)

    (s_bar,) = jax.jit(lambda y_bar: jax.linear_transpose(product, qt.scales)(y_bar))(jnp.asarray(y_bar))
    levels = weight_float64(problem.codes(), np.ones_like(problem.scales()), zeros)
    a, b = (v.astype(np.float64) for v in (x, y_bar))
    want, products = (
        (p * q).reshape(problem.groups, -1, 72).sum(axis=1)
        for p, q in ((a.T @ b, levels), (np.abs(a).T @ np.abs(b), np.abs(levels)))
    )
    bound = float(jnp.finfo(dtype).eps) * np.abs(want) + ERROR_FACTOR * np.finfo(np.float32).eps * products
    assert_close(s_bar, Reference(want, bound + float(jnp.finfo(dtype).smallest_subnormal)))


# ---- The kernel that makes a weight dense ----------------------------------------------------------------


def raw_call(words, scales, zeros, *, shape, dtype):
    call = jax.ffi.ffi_call(_ffi.DEQUANTIZE_TARGET, jax.ShapeDtypeStruct(shape, dtype))
    return jax.block_until_ready(call(words, scales, zeros))


def dense_by_kernel(problem, dtype):
    qt = problem.quant_tensor()
    zeros = jnp.zeros((0, problem.n), qt.scales.dtype) if qt.zeros is None else qt.zeros
    return raw_call(qt.words, qt.scales, zeros, shape=(problem.k, problem.n), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("with_zeros", [False, True], ids=["plain", "zeros"])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernel_gives_the_same_bits(dtype, scale_dtype, with_zeros):
    """Whole tiles and ragged ones, rows of whole vectors and not, every group size."""
    sizes = [(k * 128, n, g) for g in GROUP_SIZES for k, n in ((1, 256), (3, 264), (2, 1000), (3, 45))]
    sizes += [
        (96, 40, 32),
        (160, 129, 32),
        (192, 8, 64),
        (1, 1, -1),
        (77, 45, -1),
        (65, 33, -1),
        (200, 2056, -1),
    ]
    for k, n, group_size in sizes:
        problem = MatmulProblem(1, k, n, group_size, "float32", scale_dtype, with_zeros)
        want = weight_of(problem.codes(), problem.scales(), problem.zeros(), dtype)
        np.testing.assert_array_equal(
            bits(dense_by_kernel(problem, dtype)), bits(want), f"{k} x {n}, {group_size}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0**-24, 2.0**-14 * 1.5, 40000.0, 65504.0, np.inf, np.nan])
def test_the_kernel_rounds_and_overflows_as_float16_does(scale):
    codes = MatmulProblem(1, 64, 64).codes()
    scales = np.full((2, 64), scale, np.float16)
    scales[1] *= -1
    w = raw_call(
        jax_trirun.pack(codes),
        jnp.asarray(scales),
        jnp.zeros((0, 64), "float16"),
        shape=(64, 64),
        dtype="float16",
    )
    np.testing.assert_array_equal(np.asarray(w), weight_of(codes, scales, None, "float16"))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(8192, (1 << 18) + 136), (64 * 65536 + 64, 72), ((1 << 22) + 64, 1031)])
def test_more_elements_and_more_blocks_than_fit_an_int_or_a_grid(k, n):
    """The last block of K differs from the others; more than 2^31 weights, more than 65535 blocks along K."""
    lay = _ffi.cpu_module.layout(2)
    block = lay["block_k"]
    last = np.random.default_rng(0).integers(0, 4, (block, n)).astype(np.uint8)
    packed = jax_trirun.pack(last)
    words = jnp.full((k // block, *packed.shape[1:]), np.uint32(0xAAAAAAAA)).at[-1].set(packed[0])
    w = raw_call(
        words, jnp.ones((1, n), "float16"), jnp.zeros((0, n), "float16"), shape=(k, n), dtype="float16"
    )
    np.testing.assert_array_equal(np.asarray(w[-block:]), last.astype(np.float16) - 1)
    assert bool(jax.jit(lambda w: jnp.all(w[:-block] == 1))(w))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cuda", "cuda-portable", "reference"])
def test_gradients_take_the_kernel_unless_the_reference_was_asked_for(mode):
    problem = MatmulProblem(4, 256, 64, 128, "float16", "float16")
    x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax_trirun.matmul(x, qt, backend=mode).astype("float32"))))
    assert (_ffi.DEQUANTIZE_TARGET in gradient.lower(x).as_text()) == (mode != "reference")


@pytest.mark.gpu
def test_what_no_kernel_takes_is_made_dense_by_one():
    problem = MatmulProblem(4, 256, 64, 128, "float32", "float16")
    x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
    text = jax_trirun.explain(x, qt)
    assert f"the FFI call {_ffi.DEQUANTIZE_TARGET} of back end 'cuda', then a plain dot" in text, text
    reference = matmul_float64(problem.x(), problem.codes(), problem.scales())
    assert_close(jax_trirun.matmul(x, qt), reference)


@pytest.mark.gpu
def test_parts_of_any_size_give_the_same_gradient(monkeypatch):
    problem = MatmulProblem(40, 1024, 520, 64, "float16", "float16")
    x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
    y_bar = np.random.default_rng(7).normal(size=(40, 520)).astype(np.float16)
    want = product_float64(y_bar, weight_float64(problem.codes(), problem.scales()).T, "float16")
    for part_bytes in (1, 1 << 18, 1 << 30):
        monkeypatch.setattr(jax_trirun.dense, "NATIVE_PART_BYTES", part_bytes)
        jax.clear_caches()
        assert_close(gradient_of_x(jnp.asarray(y_bar), x, qt, "cuda"), want)
    jax.clear_caches()


GOOD = {
    "words": ((4, 2, 128), "uint32"),
    "scales": ((2, 64), "float16"),
    "zeros": ((0, 64), "float16"),
}
WRONG = {  # what is changed of GOOD, of the result, the sentence
    "words of other blocks": (
        {"words": ((2, 2, 128), "uint32")}, {}, "words must be uint32 [4, 2, 128], got [2, 2, 128]"
    ),
    "words of another type": ({"words": ((4, 2, 128), "int32")}, {}, "words must be uint32 [4, 2, 128]"),
    "three groups": ({"scales": ((3, 64), "float16")}, {}, "the number of groups must divide K"),
    "groups of 16": ({"scales": ((16, 64), "float16")}, {}, "group_size must be 32, 64, 128 or all of K, got 16"),
    "scales of integers": ({"scales": ((2, 64), "int32")}, {}, "scales must be float32, float16 or bfloat16"),
    "scales with three axes": (
        {"scales": ((2, 64, 1), "float16")}, {}, "w must be [K, N] and scales [groups, N], got [256, 64] and [2, 64, 1]"
    ),
    "zeros of another type": (
        {"zeros": ((2, 64), "float32")}, {}, "zeros must be of the scales' type float16, got float32"
    ),
    "zeros of another shape": ({"zeros": ((1, 64), "float16")}, {}, "zeros must have shape [2, 64], got [1, 64]"),
    "w of other columns": ({}, {"shape": (256, 32)}, "w must have shape [256, 64], got [256, 32]"),
    "w of integers": ({}, {"dtype": "int32"}, "w must be float32, float16 or bfloat16"),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRONG)
def test_the_handler_says_what_is_wrong(name):
    changes, result, message = WRONG[name]
    good = {"shape": (256, 64), "dtype": "float32"}
    arrays = {key: jnp.ones(shape, dtype) for key, (shape, dtype) in (GOOD | changes).items()}
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        raw_call(**arrays, **(good | result))
    assert f"dequantize: {message}" in str(raised.value), raised.value
    assert raw_call(**{k: jnp.ones(*v) for k, v in GOOD.items()}, **good).shape == (256, 64)
