"""Who makes a weight dense for a product without a kernel: plain JAX, or where there is one, a native call.

The call is ``_dequantize_p``, which appears in lowerings only and knows nothing of transformations. Its operands
are words, scales [groups, N] and zeros [groups, N] of the scales' dtype, or [0, N] for none; its parameters k and the
result's dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import _ffi
from .reference import Dense

# Of a weight's rows that a backward pass makes dense at once, at most. On an H200, half of it or twice as much takes
# 3 % more or less time with 64 rows of 8192 x 57344, and 2 % less or as much with 4096.
NATIVE_PART_BYTES = 512 << 20

_dequantize_p = Primitive("jax_trirun_dequantize_call")


def has_kernel(platform: str | None, backend: str | None, bits: int) -> bool:
    """Whether a native call makes weights dense there."""
    native = _ffi.BACKENDS.get(backend or platform or "")
    return native is not None and native.platform == platform == "cuda" and bits == 2


def dense_on(platform: str | None, backend: str | None, bits: int) -> Dense:
    """How products without a kernel are made on a platform, or on one without back ends. CUDA has tensor cores."""
    if has_kernel(platform, backend, bits):
        return Dense(_dequantize_natively, NATIVE_PART_BYTES, tensor_cores=True)
    return Dense(tensor_cores=platform == "cuda")


def _dequantize_natively(
    words: jax.Array, scales: jax.Array, zeros: jax.Array | None, k: int, bits: int, dtype: Any
) -> jax.Array:
    del bits  # only has_kernel's
    if zeros is None:
        zeros = jnp.zeros((0, scales.shape[1]), scales.dtype)
    elif zeros.dtype != scales.dtype:  # float32 holds any of them
        scales, zeros = scales.astype(jnp.float32), zeros.astype(jnp.float32)
    return _dequantize_p.bind(words, scales, zeros, k=k, dtype=np.dtype(dtype))


@_dequantize_p.def_abstract_eval
def _abstract_eval(words, scales, zeros, *, k, dtype):
    del words, zeros
    return jax.core.ShapedArray((k, scales.shape[1]), dtype)


def _lower(ctx, *operands, **_):
    return _ffi.lower_call(_ffi.DEQUANTIZE_TARGET, ctx, operands, {})


mlir.register_lowering(_dequantize_p, _lower, platform="cuda")
