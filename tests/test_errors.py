"""Every mistake gets an exception before anything runs, which says what came, what was wanted, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem
from jax_trirun.types import check_fits

PROBLEM = MatmulProblem(4, 256, 64, 128)
X, S = jnp.asarray(PROBLEM.x()), jnp.asarray(PROBLEM.scales())
WORDS = jax_trirun.pack(PROBLEM.codes())
QT = PROBLEM.quant_tensor()


def words_of(k, n):
    return jax_trirun.pack(np.zeros((k, n), np.uint8))


MATMUL_ERRORS = {
    "x of integers": (
        lambda: jax_trirun.matmul(X.astype(jnp.int32), WORDS, S),
        TypeError, "matmul: x must be float16, bfloat16 or float32, got int32; cast it",
    ),
    "x of float64": (
        lambda: jax_trirun.matmul(np.ones((4, 256)), WORDS, S),
        TypeError, "x must be float16, bfloat16 or float32, got float64; cast it",
    ),
    "x is a list": (
        lambda: jax_trirun.matmul([[1.0] * 256], WORDS, S),
        TypeError, "x must be an array of float16 or bfloat16 or float32, got list",
    ),
    "x of another K than the tensor": (
        lambda: jax_trirun.matmul(X[:, :192], QT),
        ValueError, r"x must have shape \[..., K=256\] to meet the weight, got \(4, 192\)",
    ),
    "x without axes": (
        lambda: jax_trirun.matmul(jnp.float32(1), QT),
        ValueError, r"x must have shape \[..., K=256\]",
    ),
    "x of another K than the words": (
        lambda: jax_trirun.matmul(jnp.ones((4, 128)), WORDS, S[:1]),
        ValueError, r"words of a \[K=128, N=64\] weight must have shape \(2, 2, 128\), got \(4, 2, 128\)",
    ),
    "words are codes": (
        lambda: jax_trirun.matmul(X, PROBLEM.codes(), S),
        TypeError, "words must be a uint32 array made by jax_trirun.pack, got uint8",
    ),
    "words are missing": (
        lambda: jax_trirun.matmul(X, None, S),
        TypeError, "words must be a uint32 array made by jax_trirun.pack, got NoneType",
    ),
    "no scales": (
        lambda: jax_trirun.matmul(X, WORDS),
        TypeError, "words need their scales s; pass them, or a QuantTensor as qw",
    ),
    "scales twice": (
        lambda: jax_trirun.matmul(X, QT, S),
        TypeError, "s and zeros come with the QuantTensor; do not pass them as well",
    ),
    "zeros twice": (
        lambda: jax_trirun.matmul(X, QT, None, S),
        TypeError, "s and zeros come with the QuantTensor",
    ),
    "scales of integers": (
        lambda: jax_trirun.matmul(X, WORDS, S.astype(jnp.int8)),
        TypeError, "scales must be float16, bfloat16 or float32, got int8",
    ),
    "scales of one axis": (
        lambda: jax_trirun.matmul(X, WORDS, S[0]),
        ValueError, r"scales must have shape \[K / group_size, N\], got \(64,\); scales of one group are s\[None, :\]",
    ),
    "a group size that does not exist": (
        lambda: jax_trirun.matmul(X, WORDS, jnp.ones((16, 64))),
        ValueError, r"group_size 32, 64 or 128; got scales of shape \(16, 64\) for K=256",
    ),
    "groups that do not divide K": (
        lambda: jax_trirun.matmul(X, WORDS, jnp.ones((3, 64))),
        ValueError, r"got scales of shape \(3, 64\) for K=256",
    ),
    "scales of no group": (
        lambda: jax_trirun.matmul(X, WORDS, jnp.ones((0, 64))),
        ValueError, r"scales must have 1 row, or K / group_size rows",
    ),
    "scales of another N": (
        lambda: jax_trirun.matmul(X, WORDS, jnp.ones((2, 128))),
        ValueError, r"words of a \[K=256, N=128\] weight must have shape \(4, 4, 128\), got \(4, 2, 128\)",
    ),
    "zeros of another shape": (
        lambda: jax_trirun.matmul(X, WORDS, S, S[:1]),
        ValueError, r"zeros must have the shape of scales, \(2, 64\), got \(1, 64\)",
    ),
    "zeros of integers": (
        lambda: jax_trirun.matmul(X, WORDS, S, S.astype(jnp.int32)),
        TypeError, "zeros must be float16, bfloat16 or float32, got int32",
    ),
    "a stack of weights": (
        lambda: jax_trirun.matmul(X, jnp.stack([WORDS] * 2), jnp.stack([S] * 2)),
        ValueError, r"one weight, with scales \[K / G, N\], got a stack with scales \(2, 2, 64\); use jax.vmap",
    ),
    "out_dtype of integers": (
        lambda: jax_trirun.matmul(X, QT, out_dtype="int8"),
        TypeError, "out_dtype must be float16, bfloat16 or float32, got 'int8'",
    ),
    "out_dtype that is none": (
        lambda: jax_trirun.matmul(X, QT, out_dtype="float17"),
        TypeError, "out_dtype must be float16, bfloat16 or float32, got 'float17'",
    ),
    "an unknown back end": (
        lambda: jax_trirun.matmul(X, QT, backend="gpu"),
        ValueError, "matmul: backend must be None or one of 'reference', 'cpu'.*got 'gpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATMUL_ERRORS)
def test_matmul(name):
    call, error, message = MATMUL_ERRORS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [n for n in MATMUL_ERRORS if not n.startswith("out_dtype")])
def test_explain_checks_as_matmul_does(name, monkeypatch):
    call, error, message = MATMUL_ERRORS[name]
    monkeypatch.setattr(jax_trirun, "matmul", jax_trirun.explain)
    with pytest.raises(error, match=message.replace("matmul", "explain")):
        call()


def test_matmul_under_jit_says_the_same():
    with pytest.raises(ValueError, match=r"zeros must have the shape of scales"):
        jax.jit(jax_trirun.matmul)(X, WORDS, S, S[:1])


@pytest.mark.skipif("cuda" in _ffi.BACKENDS, reason="the CUDA module is installed")
def test_a_back_end_that_was_not_built():
    with pytest.raises(
        ValueError, match=r"backend='cuda' is not in this installation.*reinstall where nvcc is found"
    ):
        jax_trirun.matmul(X, QT, backend="cuda")


def test_a_back_end_of_another_platform():
    f = jax.jit(lambda x: jax_trirun.matmul(x, QT, backend="cpu"))
    with pytest.raises(
        ValueError, match="backend='cpu' runs on cpu, but this computation is being compiled for"
    ):
        f.trace(X).lower(lowering_platforms=("tpu",))


QUANT_TENSOR_ERRORS = {
    "shape of three axes": (
        dict(shape=(2, 256, 64), group_size=128), ValueError, r"shape must be \(K, N\), got \(2, 256, 64\)",
    ),
    "group size that does not exist": (
        dict(shape=(256, 64), group_size=16), ValueError,
        r"group_size must be 32, 64, 128 or -1 \(one group for all of K\), got 16",
    ),
    "group size that does not divide K": (
        dict(shape=(192, 64), group_size=128, words=words_of(192, 64)), ValueError,
        "group_size must divide K, got group_size=128, K=192; use 32 or 64 or -1, or pad K",
    ),
    "another number of groups": (
        dict(shape=(256, 64), group_size=64), ValueError,
        r"group_size=64 cuts K=256 into 4 groups, but scales have 2 rows",
    ),
    "another N": (
        dict(shape=(256, 96), group_size=128), ValueError, r"scales must have N=96 columns, got shape \(2, 64\)",
    ),
    "another K": (
        dict(shape=(128, 64), group_size=64), ValueError, r"words of a \[K=128, N=64\] weight must have shape",
    ),
    "bits": (dict(shape=(256, 64), group_size=128, bits=3), ValueError, "bits must be 2 or 4, got 3"),
    "words of four bits": (
        dict(shape=(256, 64), group_size=128, bits=4), ValueError, r"must have shape \(8, 2, 128\), got \(4, 2, 128\)",
    ),
    "leading axes that differ": (
        dict(shape=(256, 64), group_size=128, scales=jnp.stack([S] * 3)), ValueError,
        r"must have shape \(3, 4, 2, 128\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANT_TENSOR_ERRORS)
def test_quant_tensor(name):
    options, error, message = QUANT_TENSOR_ERRORS[name]
    with pytest.raises(error, match=message):
        jax_trirun.QuantTensor(**({"words": WORDS, "scales": S} | options))


PACK_ERRORS = {
    "a code above 3": (
        lambda: jax_trirun.pack(np.array([[0, 4]])), ValueError, r"codes must lie in 0 .. 3 for bits=2, got 0 .. 4",
    ),
    "a negative code": (
        lambda: jax_trirun.pack(np.array([[-1, 2]])), ValueError, r"got -1 .. 2; codes are offsets from the zero point",
    ),
    "a code above 255": (
        lambda: jax_trirun.pack(np.array([[256, 2]])), ValueError, r"got 2 .. 256",
    ),
    "a code above 15": (
        lambda: jax_trirun.pack(jnp.array([[0, 16]]), bits=4), ValueError, r"0 .. 15 for bits=4, got 0 .. 16",
    ),
    "floats": (
        lambda: jax_trirun.pack(np.ones((2, 2))), TypeError, "codes must be integers, got float64; quantize floats",
    ),
    "booleans": (
        lambda: jax_trirun.pack(np.ones((2, 2), bool)), TypeError, "codes must be integers, got bool",
    ),
    "one axis": (
        lambda: jax_trirun.pack(np.zeros(4, np.uint8)), ValueError, r"shape \[..., K, N\], got \(4,\)",
    ),
    "bits": (lambda: jax_trirun.pack(np.zeros((2, 2), np.uint8), bits=8), ValueError, "bits must be 2 or 4, got 8"),
    "unpack codes": (
        lambda: jax_trirun.unpack(PROBLEM.codes(), (256, 64)), TypeError, "words must be a uint32 array .* got uint8",
    ),
    "unpack to another shape": (
        lambda: jax_trirun.unpack(WORDS, (256, 96)), ValueError,
        r"words of shape \(256, 96\) with bits=2 must end in axes \(4, 3, 128\), got \(4, 2, 128\)",
    ),
    "unpack to three axes": (
        lambda: jax_trirun.unpack(WORDS, (1, 256, 64)), ValueError, r"shape must be \(K, N\), got \(1, 256, 64\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACK_ERRORS)
def test_pack_and_unpack(name):
    call, error, message = PACK_ERRORS[name]
    with pytest.raises(error, match=message):
        call()


DEQUANTIZE_ERRORS = {
    "words alone": (
        lambda: jax_trirun.dequantize(WORDS), TypeError, r"words need their scales s and their shape=\(K, N\)",
    ),
    "scales twice": (lambda: jax_trirun.dequantize(QT, S), TypeError, "s, zeros and shape come with the QuantTensor"),
    "another shape": (
        lambda: jax_trirun.dequantize(WORDS, S, shape=(128, 64)), ValueError, r"words of a \[K=128, N=64\] weight",
    ),
    "beyond float16": (
        lambda: jax_trirun.dequantize(WORDS, S * 1e7, shape=(256, 64), dtype="float16"), ValueError,
        "the weight reaches .* beyond float16's largest value 65504; use bfloat16 or float32, or scale it down",
    ),
    "integers": (
        lambda: jax_trirun.dequantize(QT, dtype="int8"), TypeError, "dtype must be a floating-point dtype, got 'int8'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEQUANTIZE_ERRORS)
def test_dequantize(name):
    call, error, message = DEQUANTIZE_ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_check_fits_looks_at_finite_values_that_are_known():
    check_fits("here", "scales", np.array([65504.0, np.inf], np.float32), np.float16)
    jax.jit(lambda a: check_fits("here", "scales", a, np.float16))(jnp.ones(3) * 1e6)
    with pytest.raises(ValueError, match="here: scales reaches 70000"):
        check_fits("here", "scales", np.array([1.0, -70000.0], np.float32), np.float16)


# ---- The native module checks again, for callers that are not this package ---------------------------


def call_handler(x, words, scales, zeros, y_shape, y_dtype=jnp.float32):
    call = jax.ffi.ffi_call(_ffi.MATMUL_TARGET, jax.ShapeDtypeStruct(y_shape, y_dtype))
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.block_until_ready(call(x, words, scales, zeros))


NO_ZEROS = np.zeros((0, 64), np.float32)
HANDLER_ERRORS = {
    "groups": ((X, WORDS, jnp.ones((3, 64)), NO_ZEROS, (4, 64)), "the number of groups must divide K"),
    "group size": (
        (X, WORDS, jnp.ones((16, 64)), NO_ZEROS, (4, 64)), "group_size must be 32, 64, 128 or all of K, got 16",
    ),
    "words": ((X, WORDS[:3], S, NO_ZEROS, (4, 64)), r"words must be uint32 \[4, 2, 128\], got \[3, 2, 128\]"),
    "word dtype": ((X, WORDS.astype(jnp.int32), S, NO_ZEROS, (4, 64)), "words must be uint32"),
    "zeros": ((X, WORDS, S, S[:1], (4, 64)), r"zeros must have shape \[2, 64\], got \[1, 64\]"),
    "x dtype": ((X.astype(jnp.int32), WORDS, S, NO_ZEROS, (4, 64)), "x must be float32, float16 or bfloat16"),
    "x axes": ((X[0], WORDS, S, NO_ZEROS, (4, 64)), r"x must be \[M, K\] and scales \[groups, N\]"),
    "y shape": ((X, WORDS, S, NO_ZEROS, (4, 32)), r"y must have shape \[4, 64\], got \[4, 32\]"),
    "y dtype": ((X, WORDS, S, NO_ZEROS, (4, 64), jnp.float16), "y must be float32 or x's type, which is float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDLER_ERRORS)
def test_native_matmul(name):
    args, message = HANDLER_ERRORS[name]
    with pytest.raises(Exception, match=message):
        call_handler(*args)


PACK, UNPACK, U8, U32 = _ffi.PACK_TARGET, _ffi.UNPACK_TARGET, np.uint8, np.uint32


@pytest.mark.parametrize(
    ("target", "operand", "result", "bits", "message"),
    [
        (PACK, np.zeros((64, 32), U8), ((1, 2, 128), U32), 2, r"words must end in \[1, 1, 128\]"),
        (PACK, np.zeros((64, 32), U8), ((1, 1, 128), U32), 3, "bits must be 2 or 4, got 3"),
        (PACK, np.zeros((64, 32), np.int32), ((1, 1, 128), U32), 2, "codes must be uint8"),
        (PACK, np.zeros((2, 64, 32), U8), ((3, 1, 1, 128), U32), 2, "leading axes must be equal"),
        (UNPACK, np.zeros((1, 1, 128), U32), ((64, 33), U8), 2, r"unpack: words must end in \[1, 2, 128\]"),
    ],
)  # fmt: skip
def test_native_pack(target, operand, result, bits, message):
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(*result))
    with pytest.raises(Exception, match=message), jax.default_device(jax.devices("cpu")[0]):
        jax.block_until_ready(call(operand, bits=np.int64(bits)))


# ---- Import -----------------------------------------------------------------------------------------


def test_a_module_newer_than_the_runtime_is_refused():
    assert _ffi.ffi_version_error((0, 3), (0, 3)) == _ffi.ffi_version_error((0, 3), (0, 5)) == ""
    assert _ffi.ffi_version_error((0, 3), None) == ""
    assert "built with XLA FFI 0.5, but the installed jaxlib has 0.3. Upgrade jaxlib, or rebuild" in (
        _ffi.ffi_version_error((0, 5), (0, 3))
    )
    assert _ffi.ffi_version_error((1, 0), (0, 9))


def test_the_runtime_version_is_found():
    runtime = _ffi.runtime_ffi_version()
    assert runtime is not None and runtime >= tuple(_ffi.cpu_module.ffi_api_version())


def test_importing_needs_neither_flax_nor_cuda(run_python):
    """And starts no back end of JAX: that is the program's own decision."""
    run_python(
        "import sys; sys.modules['flax'] = None; import jax_trirun; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
