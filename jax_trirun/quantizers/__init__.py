"""Float weights -> QuantTensor. One file a method; each is a pure, jitted function

    method(w[..., K, N], group_size, scale_dtype, *, bits, ...) -> codes, scales, zeros or None

and ``quantize`` checks its arguments, calls one, and packs what it returns.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..layout import layout
from ..pack import pack
from ..types import FLOATS, QuantTensor, check_group_size
from .absmean import absmean as absmean
from .gptq import Solution, solve
from .gptq import add_to_hessian as add_to_hessian
from .gptq import output_error as output_error
from .hqq import hqq as hqq
from .mse import mse as mse
from .rtn import rtn as rtn
from .trilm import trilm as trilm

METHODS: dict[str, Callable[..., Any]] = {
    "mse": mse,
    "rtn": rtn,
    "absmean": absmean,
    "trilm": trilm,
    "hqq": hqq,
}


def quantize(
    w: Any,
    *,
    method: str = "mse",
    group_size: int = 128,
    scale_dtype: Any = None,
    bits: int = 2,
    **options: Any,
) -> QuantTensor:
    """Quantise float weights, and pack them.

    Args:
        w: float [..., K, N] = [..., in, out], as Flax's kernels; leading axes stack weights. float64 is
            taken as float32.
        method: "mse" (search over sizes and signs of each scale, the default), "rtn" (round to nearest),
            "absmean" (ternary, as BitNet b1.58), "trilm" (ternary, as TriLM), "hqq" (affine, with zeros).
            ``jax_trirun.quantizers.gptq``, which needs calibration data, is a function of its own.
        group_size: rows of w that share a scale: 32, 64, 128, or -1 for all of K. It must divide K.
        scale_dtype: float16, bfloat16 or float32; None keeps w's own dtype (float32 for float64).
        bits: 2 or 4.
        **options: the method's own keyword arguments, such as ``candidates=24`` of "mse".

    Returns:
        A QuantTensor with ``shape=(K, N)``.

    Raises:
        TypeError: w or scale_dtype is not of a float dtype, or the method does not know an option.
        ValueError: w is empty or has fewer than two axes, holds NaN or Inf, group_size does not divide K,
            scales overflow or vanish in scale_dtype, or an argument has an unknown value. What depends on
            values is not checked while tracing (inside ``jax.jit``).

    Example:
        >>> qw = jax_trirun.quantize(w, group_size=64)
        >>> y = jax_trirun.matmul(x, qw)
    """
    function = _method(method, options)
    w = as_weight("quantize", w)
    check_group_size("quantize", w.shape[-2], group_size)
    dtype = pick_scale_dtype("quantize", scale_dtype, w.dtype)
    layout(bits)
    check_finite("quantize", "w", w)
    codes, scales, zeros = function(w, group_size, dtype, bits=bits, **options)
    check_scales("quantize", w, scales)
    return as_quant_tensor(codes, scales, zeros, group_size=group_size, bits=bits)


def gptq(
    w: Any,
    hessian: Any,
    *,
    group_size: int = 128,
    damping: float = 0.1,
    scale_dtype: Any = None,
    bits: int = 2,
    block_size: int = 128,
    act_order: bool = False,
    ternary: bool = False,
    signed: bool = True,
    candidates: int = 24,
    refine: int = 2,
) -> QuantTensor:
    """Quantise w so that the layer's *outputs* on calibration data change least (GPTQ), and pack it.

    Args:
        w: float [K, N] = [in, out].
        hessian: [K, K], the sum of x^T x over calibration inputs x (``add_to_hessian``).
        group_size: rows of w that share a scale: 32, 64, 128, or -1 for all of K.
        damping: added to the Hessian's diagonal, relative to its mean; raised by itself, six times at
            most, when the factorisation fails.
        scale_dtype: float16, bfloat16 or float32; None keeps w's own dtype.
        bits: 2 or 4.
        block_size: rows whose compensation is applied to the rest at once: a multiple of group_size.
        act_order: fix the rows with the largest activations first; grids then do not see compensation.
        ternary: only the levels -1, 0, 1.
        signed: try negative scales too.
        candidates, refine: of the search for each scale, as method "mse".

    Returns:
        A QuantTensor with ``shape=(K, N)``. Rows whose input was always zero are rounded to nearest.

    Raises:
        TypeError: w, hessian or scale_dtype is not of a float dtype.
        ValueError: shapes do not fit, values are NaN or Inf, an argument is out of its range, or the
            Hessian has no factorisation even with damping (it is not positive semi-definite).

    Example:
        >>> hessian = add_to_hessian(jnp.zeros((K, K)), x)
        >>> qw = gptq(w, hessian, group_size=64)
    """
    return gptq_and_damping(
        w,
        hessian,
        damping=damping,
        group_size=group_size,
        scale_dtype=scale_dtype,
        bits=bits,
        block_size=block_size,
        act_order=act_order,
        ternary=ternary,
        signed=signed,
        candidates=candidates,
        refine=refine,
    )[0]


def gptq_and_damping(w: Any, hessian: Any, **options: Any) -> tuple[QuantTensor, jax.Array]:
    """What ``gptq`` returns, and the damping that was needed, a float32 scalar. Options: all of gptq's."""
    solution, w = _solve_checked(w, hessian, **options)
    check_scales("gptq", w, solution.scales)
    layout = {name: options[name] for name in ("group_size", "bits")}
    return as_quant_tensor(solution.codes, solution.scales, None, **layout), solution.damping


def _solve_checked(
    w: Any, hessian: Any, *, damping: float, scale_dtype: Any, **options: Any
) -> tuple[Solution, jax.Array]:
    w, hessian = as_weight("gptq", w), as_weight("gptq", hessian, "hessian")
    group_size, block = options["group_size"], options["block_size"]
    if w.ndim != 2 or hessian.shape != (w.shape[0],) * 2:
        raise ValueError(
            f"gptq: hessian must be [K, K] for w [K, N], got {tuple(hessian.shape)} for {tuple(w.shape)}; "
            "w is [in, out], transpose it if it is [out, in]"
        )
    check_group_size("gptq", w.shape[0], group_size)
    layout(options["bits"])
    if block < 1 or (group_size != -1 and block % group_size):
        raise ValueError(f"gptq: block_size must be a multiple of group_size={group_size}, got {block}")
    if not damping > 0 or options["candidates"] < 0 or options["refine"] < 0:
        raise ValueError(
            "gptq: damping must be > 0, candidates and refine >= 0, got "
            f"damping={damping}, candidates={options['candidates']}, refine={options['refine']}"
        )
    check_finite("gptq", "w", w)
    check_finite("gptq", "hessian", hessian)
    solution = solve(
        w, hessian, damping, scale_dtype=pick_scale_dtype("gptq", scale_dtype, w.dtype), **options
    )
    if not isinstance(solution.damping, jax.core.Tracer) and bool(jnp.isnan(solution.damping)):
        raise ValueError(
            f"gptq: hessian has no Cholesky factorisation, even with damping {damping} raised six times; "
            "is it the sum of x^T x over real inputs?"
        )
    return solution, w


def as_quant_tensor(codes: Any, scales: Any, zeros: Any, *, group_size: int, bits: int) -> QuantTensor:
    """Pack what a method returned."""
    k, n = codes.shape[-2:]
    words = pack(codes, bits=bits)
    return QuantTensor(words, scales, zeros, shape=(k, n), group_size=group_size, bits=bits)


def as_weight(where: str, w: Any, name: str = "w") -> jax.Array:
    """w as a float JAX array [..., K, N]. Raises TypeError or ValueError."""
    if not hasattr(w, "dtype"):
        w = np.asarray(w)
    if str(w.dtype) == "float64":
        w = w.astype(np.float32)
    if str(w.dtype) not in FLOATS:
        raise TypeError(
            f"{where}: {name} must be a float array, got {w.dtype}; codes that exist already go to pack"
        )
    if w.ndim < 2 or w.size == 0:
        raise ValueError(
            f"{where}: {name} must have shape [..., K, N] with no empty axis, got {tuple(w.shape)}"
        )
    return jnp.asarray(w)


def pick_scale_dtype(where: str, scale_dtype: Any, w_dtype: Any) -> np.dtype:
    """The dtype to store scales in; None is the weights' own."""
    try:
        dtype = jnp.dtype(w_dtype if scale_dtype is None else scale_dtype)
    except TypeError:
        dtype = None
    if dtype is None or str(dtype) not in FLOATS:
        raise TypeError(
            f"{where}: scale_dtype must be float16, bfloat16, float32 or None, got {scale_dtype!r}"
        )
    return dtype


def check_finite(where: str, name: str, array: jax.Array) -> None:
    """Raise ValueError when a known array holds NaN or Inf."""
    if isinstance(array, jax.core.Tracer):
        return
    bad = int(_count_bad(array))
    if bad:
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} NaN or Inf among {array.size} values; "
            "repair or drop them before quantising"
        )


def check_scales(where: str, w: jax.Array, scales: jax.Array) -> None:
    """Raise ValueError when known scales overflowed their dtype, or all of them fell below its range."""
    if isinstance(scales, jax.core.Tracer):
        return
    overflow, largest_scale, largest_weight = (float(v) for v in _scale_range(w, scales))
    info = jnp.finfo(scales.dtype)
    if overflow:
        raise ValueError(
            f"{where}: scales overflow {scales.dtype} (largest {float(info.max):g}; the largest weight is "
            f"{largest_weight:g}); use scale_dtype=bfloat16 or float32, or scale w down"
        )
    # A group far below the others may round to zero: that loses nothing. All of them may not.
    if largest_weight > 0 and largest_scale < float(info.tiny):
        raise ValueError(
            f"{where}: scales vanish in {scales.dtype} (smallest normal number {float(info.tiny):g}; the largest "
            f"weight is {largest_weight:g}); use scale_dtype=bfloat16 or float32, or scale w up"
        )


@jax.jit
def _count_bad(array):
    return jnp.sum(~jnp.isfinite(array), dtype=jnp.int32)


@jax.jit
def _scale_range(w, scales):
    return (
        jnp.any(~jnp.isfinite(scales)),
        jnp.max(jnp.abs(scales.astype(jnp.float32))),
        jnp.max(jnp.abs(w)).astype(jnp.float32),
    )


def _method(method: str, options: dict[str, Any]) -> Callable[..., Any]:
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    parameters = inspect.signature(METHODS[method]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "bits"]
    if unknown := sorted(set(options) - set(known)):
        takes = ", ".join(known) or "none"
        raise TypeError(
            f"quantize: method {method!r} has no option {', '.join(unknown)}; its options: {takes}"
        )
    return METHODS[method]
