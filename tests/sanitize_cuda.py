"""A product from every CUDA kernel, small enough to run under compute-sanitizer; run_on_gpu.sh does.

Everything else happens on the CPU or as a copy, so what the sanitizer sees are the kernels.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, assert_close, matmul_float64, weight_float64

# (M, K, N, group_size): each kernel of csrc/cuda/plan.h, K and N that fill their last tile and that do
# not, K split over blocks, one n-block and many.
SHAPES = (
    (1, 256, 64, 128),
    (2, 2048, 72, 64),
    (3, 1024, 136, 32),
    (4, 4096, 520, 128),
    (5, 72, 40, -1),
    (8, 2048, 264, 128),
    (9, 160, 104, 32),
    (16, 4096, 72, 128),
    (33, 320, 200, 64),
)
# Enough words for every multiprocessor that M <= 4 takes the kernels of int8 digits.
LARGE_SHAPES = ((1, 8192, 8960, 128), (4, 8192, 13216, -1), (3, 256, 70024, 128))
# Rows enough for the kernels for many tokens; whole tiles, and tiles that several blocks share; the last four are
# enough for a thread block to go round its ring, and the very last for pairs of them.
GEMM_SHAPES = (
    (20, 1024, 392, 32),
    (40, 2048, 264, 64),
    (130, 1024, 520, 128),
    (70, 200, 104, -1),
    (9, 1024, 8200, 128),
    (90, 2048, 1032, 64),
    (20, 2048, 12296, 128),
    (120, 2048, 10312, 128),
    (129, 2048, 5640, 128),
    (2250, 384, 3336, 128),
)
# Weights that are made dense: rows of whole vectors and not, one thread block along N and several.
DENSE_SHAPES = ((256, 64, 128), (160, 1000, 32), (77, 45, -1), (65, 1031, -1))
TYPES = (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32"))


def on_gpu(problem: MatmulProblem) -> tuple:
    """x and the weight, made on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        qt = problem.quant_tensor()
    return jax.device_put((problem.x(), qt), jax.devices("cuda")[0])


def check(problem: MatmulProblem, mode: str, out_dtype: str | None) -> None:
    x, qt = on_gpu(problem)
    f = jax.jit(lambda x, qt: jax_trirun.matmul(x, qt, out_dtype=out_dtype, backend=mode))
    y = np.asarray(f(x, qt))
    np.testing.assert_array_equal(np.asarray(f(x, qt)), y)
    assert_close(
        y,
        matmul_float64(problem.x(), problem.codes(), problem.scales(), problem.zeros(), out_dtype=out_dtype),
    )


def check_dense(problem: MatmulProblem, dtype: str) -> None:
    _, qt = on_gpu(problem)
    zeros = np.zeros((0, problem.n), qt.scales.dtype) if qt.zeros is None else qt.zeros
    call = jax.ffi.ffi_call(
        _ffi.DEQUANTIZE_TARGET, jax.ShapeDtypeStruct((problem.k, problem.n), jnp.dtype(dtype))
    )
    w = np.asarray(jax.jit(call)(qt.words, qt.scales, zeros)).astype(np.float64)
    want = weight_float64(problem.codes(), problem.scales(), problem.zeros())
    np.testing.assert_allclose(w, want, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-7)


def replay_a_graph() -> None:
    @jax.jit
    def chain(x, qt):
        for _ in range(6):
            x = jax_trirun.matmul(x, qt, backend="cuda")
        return x

    x, qt = on_gpu(MatmulProblem(4, 512, 512, 128, "bfloat16", "bfloat16"))
    first = np.asarray(chain(x, qt))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(chain(x, qt)), first)


def main() -> int:
    done = 0
    kinds = itertools.cycle(itertools.product(TYPES, (False, True), (None, "float32")))
    for shape, mode in itertools.product(SHAPES, ("cuda", "cuda-portable")):
        for _ in range(3):
            (x_dtype, scale_dtype), zeros, out_dtype = next(kinds)
            check(MatmulProblem(*shape, x_dtype, scale_dtype, zeros), mode, out_dtype)
            done += 1
    for shape, zeros in itertools.product(LARGE_SHAPES, (False, True)):
        check(MatmulProblem(*shape, "float16", "float16", zeros), "cuda", None)
        done += 1
    for shape, (x_dtype, scale_dtype), zeros in itertools.product(GEMM_SHAPES, TYPES[1:3], (False, True)):
        check(MatmulProblem(*shape, x_dtype, scale_dtype, zeros), "cuda", None)
        done += 1
    for shape, zeros in itertools.product(GEMM_SHAPES, (False, True)):
        (x_dtype, scale_dtype), _, out_dtype = next(kinds)
        check(MatmulProblem(*shape, x_dtype, scale_dtype, zeros), "cuda-portable", out_dtype)
        done += 1
    dtypes = ("float16", "bfloat16", "float32")
    for (k, n, group_size), dtype, zeros in itertools.product(DENSE_SHAPES, dtypes, (False, True)):
        (_, scale_dtype), _, _ = next(kinds)
        check_dense(MatmulProblem(1, k, n, group_size, "float32", scale_dtype, zeros), dtype)
        done += 1
    replay_a_graph()
    print(f"{done} products and dense weights, and one graph")
    return 0


if __name__ == "__main__":
    sys.exit(main())
