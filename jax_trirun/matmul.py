"""The public call: checks, messages, and what will run where."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _ffi
from .dense import has_kernel
from .partition import explicit_mesh, on_explicit_mesh
from .primitive import bind_matmul, describe_cuda_kernel, ffi_reason
from .types import FLOATS, QuantTensor, check_float, check_weights


def matmul(
    x: Any, qw: Any, s: Any = None, zeros: Any = None, *, out_dtype: Any = None, backend: str | None = None
) -> jax.Array:
    """y = x @ W for a packed weight W[k, n] = s[k // G, n] * (code[k, n] - zero[k // G, n]).

    Summed in float32. Differentiable in x, s and zeros, to any order; works under every JAX
    transformation. The weight itself is never unpacked in memory by the CPU and CUDA kernels.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        qw: a QuantTensor, or 2-bit words [K / block_k, N / block_n, 128] from ``pack``, which need ``s``.
        s: scales [K / G, N], G in {32, 64, 128} or all of K; any of the three floats; with words only.
        zeros: None (the zero point is 1), or [K / G, N] in units of codes; with words only.
        out_dtype: float16, bfloat16 or float32; None means x's dtype.
        backend: None, the best there is for the platform; "reference", dequantise and dot; "cpu",
            "cuda"; or "cuda-portable", the CUDA kernels that run on every GPU since sm_80.

    Returns:
        y [..., N] of ``out_dtype``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit each other, or the back end cannot be had.

    Example:
        >>> qw = jax_trirun.quantize(w, group_size=128)
        >>> y = jax.jit(jax_trirun.matmul)(x, qw)
    """
    x, words, s, zeros, params = _prepare("matmul", x, qw, s, zeros, out_dtype, backend)
    product: Callable[..., jax.Array] = partial(_product, **params)
    if (mesh := explicit_mesh("matmul", x, words, s, zeros)) is None:
        return product(x, words, s, zeros)
    operands = [a for a in (x, words, s, zeros) if a is not None]
    return on_explicit_mesh(mesh, product, operands, k=params["k"], bits=params["bits"])


def _product(x, words, s, zeros=None, *, k, out_dtype, summed=(), **params):
    """x [..., K] @ W, summed over the mesh axes ``summed`` before it is rounded."""
    *lead, _ = x.shape
    # Kernels write x's dtype or float32.
    wide = out_dtype if out_dtype in (x.dtype, jnp.float32) and not summed else np.dtype("float32")
    y = bind_matmul(x.reshape(math.prod(lead), k), words, s, zeros, k=k, out_dtype=wide, **params)
    y = y.reshape(*lead, y.shape[1])
    return (jax.lax.psum(y, summed) if summed else y).astype(out_dtype)


class Costs(NamedTuple):
    """What one product must read and write at least, and compute."""

    weight_bytes: int
    activation_bytes: int  # x and y, both in x's dtype
    flops: int


def costs(m: int, k: int, n: int, x_dtype: Any, weight_arrays: Any) -> Costs:
    """The costs of x[m, k] @ W[k, n], where ``weight_arrays`` (arrays, None, a pytree) hold W."""
    weights = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(weight_arrays))
    return Costs(weights, m * (k + n) * jnp.dtype(x_dtype).itemsize, 2 * m * k * n)


def explain(x: Any, qw: Any, s: Any = None, zeros: Any = None, *, backend: str | None = None) -> str:
    """Which implementation ``matmul(x, qw, s, zeros)`` takes here, why, and the bytes and flops it needs.

    Only shapes and dtypes are looked at: ``jax.ShapeDtypeStruct`` will do for every array.

    Raises:
        TypeError, ValueError: as ``matmul``.
    """
    x, words, s, zeros, params = _prepare("explain", x, qw, s, zeros, None, backend)
    *lead, k = x.shape
    m, (groups, n) = math.prod(lead), s.shape
    platform = _ffi.default_platform()
    name = backend or (platform if platform in _ffi.BACKENDS else "reference")
    reason = _ffi.platform_error(backend, platform) or ffi_reason(
        platform, params, jax.ShapeDtypeStruct((m, k), x.dtype), s, zeros
    )
    if reason:
        what, why = "reference (dequantise, then a plain dot)", reason
        if has_kernel(platform, backend, params["bits"]):
            what = f"the FFI call {_ffi.DEQUANTIZE_TARGET} of back end {name!r}, then a plain dot"
    else:
        what = f"the FFI call {_ffi.MATMUL_TARGET} of back end {name!r}"
        why = "asked for" if backend else f"the best for platform {platform!r}"
        if name == "cpu":
            what += f" ({_ffi.cpu_module.current_isa()})"
        elif platform == "cuda":
            x_shape = jax.ShapeDtypeStruct((m, k), x.dtype)
            what += f" ({describe_cuda_kernel(_ffi.BACKENDS[name], params, x_shape, s, zeros)})"
    cost = costs(m, k, n, x.dtype, (words, s, zeros))
    ratio = 2 * k * n / max(cost.weight_bytes, 1)
    return "\n".join(
        (
            f"matmul [{m}, {k}] {x.dtype} @ [{k}, {n}] {params['bits']}-bit, {groups} groups, scales {s.dtype}"
            + (", zeros" if zeros is not None else ""),
            f"runs: {what}",
            f"why: {why}",
            f"bytes: {cost.weight_bytes:,} of weight (1/{ratio:.2f} of 16-bit), {cost.activation_bytes:,} of x and y",
            f"flops: {cost.flops:,} ({cost.flops / max(cost.weight_bytes + cost.activation_bytes, 1):.1f} a byte)",
        )
    )


def _prepare(where: str, x: Any, qw: Any, s: Any, zeros: Any, out_dtype: Any, backend: str | None):
    """Check everything; returns x, words, scales, zeros and the primitive's parameters."""
    if error := _ffi.backend_error(backend):
        raise ValueError(f"{where}: {error}")
    check_float(where, "x", x)
    if isinstance(qw, QuantTensor):
        if s is not None or zeros is not None:
            raise TypeError(f"{where}: s and zeros come with the QuantTensor; do not pass them as well")
        words, s, zeros, bits, (k, n) = qw.words, qw.scales, qw.zeros, qw.bits, qw.shape
    else:
        if s is None:
            raise TypeError(f"{where}: words need their scales s; pass them, or a QuantTensor as qw")
        words, bits, n = qw, 2, None
        k = x.shape[-1] if x.shape else 0
    if not x.shape or x.shape[-1] != k:
        raise ValueError(f"{where}: x must have shape [..., K={k}] to meet the weight, got {tuple(x.shape)}")
    if len(getattr(s, "shape", ())) > 2:
        raise ValueError(
            f"{where}: qw must be one weight, with scales [K / G, N], got a stack with scales {tuple(s.shape)}; "
            "use jax.vmap or jax.lax.scan over its leading axes"
        )
    check_weights(where, words, s, zeros, k=k, n=n, bits=bits)
    out = np.dtype(x.dtype if out_dtype is None else _dtype(where, out_dtype))
    arrays = [
        a if a is None or isinstance(a, jax.ShapeDtypeStruct) else jnp.asarray(a)
        for a in (x, words, s, zeros)
    ]
    return *arrays, {"k": k, "out_dtype": out, "transpose": False, "bits": bits, "backend": backend}


def _dtype(where: str, dtype: Any) -> np.dtype:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or str(known) not in FLOATS:
        raise TypeError(f"{where}: out_dtype must be float16, bfloat16 or float32, got {dtype!r}")
    return known
