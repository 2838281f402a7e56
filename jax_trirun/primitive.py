"""The matmul primitive: types, lowerings, batching, differentiation.

``matmul_p`` is what JAX transforms. Its operands are x [M, K], words, scales [groups, N] and, when the
weight has them, zeros [groups, N]; its parameters:

    k          the weight's K (words only know it rounded up)
    out_dtype  of the result
    transpose  False: x [M, K] @ W -> [M, N].  True: x [M, N] @ W.T -> [M, K]
    bits       of a code
    backend    None or a name of _ffi.KNOWN_BACKENDS

It lowers to ``_call_p``, which is one call into one back end and knows nothing of transformations, or where that has
no kernel for it a product with a dense weight (reference.py, dense.py).
Between the two is partition.py, which has each device make a call for its part.

The gradient of scales is another primitive, ``scales_cotangent_p``, made likewise; the transposes of each
are the other.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from . import _ffi
from .dense import dense_on
from .partition import (
    by_mapped_shards,
    lower_partitioned,
    partitioned_matmul,
    partitioned_scales_cotangent,
)
from .reference import HIGHEST, map_slices, matmul_reference, scales_cotangent_reference
from .types import FLOATS, check_weights

matmul_p = Primitive("jax_trirun_matmul")
_call_p = Primitive("jax_trirun_matmul_call")


def bind_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    k: int,
    out_dtype: Any,
    transpose: bool = False,
    bits: int = 2,
    backend: str | None = None,
) -> jax.Array:
    """Bind the primitive, with all operands varying over the same manual mesh axes.

    Inside ``jax.shard_map(check_vma=True)`` an operand that is the same on all devices needs its
    cotangent summed over them. pcast says so, and its transpose does the sum; without it gradients are
    silently wrong.
    """
    operands = [x, words, scales] if zeros is None else [x, words, scales, zeros]
    return matmul_p.bind(
        *_same_varying_axes(operands),
        k=k, out_dtype=np.dtype(out_dtype), transpose=transpose, bits=bits, backend=backend,
    )  # fmt: skip


def _varying_axes(array: Any) -> frozenset:
    return frozenset(jax.typeof(array).mat.varying)  # mat: the type's manual axes


def _same_varying_axes(operands: list) -> list:
    union = frozenset().union(*(_varying_axes(a) for a in operands))
    if not union:
        return operands
    missing = [tuple(sorted(union - _varying_axes(a), key=str)) for a in operands]
    return [
        jax.lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(operands, missing, strict=True)
    ]


# ---- Types ------------------------------------------------------------------------------------------


def _abstract_eval(x, words, scales, *zeros, k, out_dtype, transpose, bits, backend):
    del backend
    n, _ = check_weights("matmul", words, scales, zeros[0] if zeros else None, k=k, bits=bits)
    inner, outer = (n, k) if transpose else (k, n)
    if str(x.dtype) not in FLOATS or str(out_dtype) not in FLOATS:
        raise TypeError(
            f"matmul: x and out_dtype must be 16- or 32-bit floats, got {x.dtype} and {out_dtype}"
        )
    if x.ndim != 2 or x.shape[1] != inner:
        raise ValueError(f"matmul: x must have shape [M, {inner}], got {x.shape}")
    return x.update(
        shape=(x.shape[0], outer),
        dtype=np.dtype(out_dtype),
        weak_type=False,
        sharding=_out_sharding(x, scales, transpose),
    )


def _out_sharding(x, scales, transpose):
    """With explicit mesh axes: rows as x's rows are, columns as the weight's; else nothing to say."""
    if x.sharding.mesh.empty:
        return scales.sharding if not scales.sharding.mesh.empty else x.sharding
    rows, columns = x.sharding.spec[0], None
    if not scales.sharding.mesh.empty:
        columns = scales.sharding.spec[0 if transpose else 1]
    names = [set(a if isinstance(a, tuple) else (a,)) - {None} for a in (rows, columns)]
    if names[0] & names[1]:
        columns = None
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec(rows, columns))


# ---- Lowering ---------------------------------------------------------------------------------------


def _reference(x, words, scales, *zeros, k, out_dtype, transpose, bits, backend, dense):
    del backend
    return matmul_reference(
        x, words, scales, zeros[0] if zeros else None,
        k=k, out_dtype=out_dtype, transpose=transpose, bits=bits, dense=dense,
    )  # fmt: skip


def _lower_reference(ctx, platform, operands, params):
    dense = dense_on(platform, params["backend"], params["bits"])
    return _lower_plainly(partial(_reference, **params, dense=dense), ctx, operands)


def _lower_plainly(function, ctx, operands):
    """function(*operands) in the module being lowered, for what one device has: no mesh, no shardings."""
    avals_in, avals_out = (
        [jax.core.ShapedArray(a.shape, a.dtype) for a in avals] for avals in (ctx.avals_in, ctx.avals_out)
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        lower = mlir.lower_fun(function, multiple_results=False)
        return lower(ctx.replace(avals_in=avals_in, avals_out=avals_out), *operands)


def ffi_reason(platform: str, params: dict, x: Any, scales: Any, zeros: Any | None) -> str:
    """Why the platform's FFI call does not take this product, or "" when it does.

    ``x``, ``scales`` and ``zeros`` are asked for their shapes and dtypes only.
    """
    if params["backend"] == "reference":
        return "backend='reference' was asked for"
    backend = _ffi.BACKENDS.get(params["backend"] or platform)
    if backend is None:
        return f"this installation has no module for {platform}"
    if params["transpose"]:
        return "a product with the transposed weight has no kernel of its own"
    if params["bits"] != 2:
        return f"bits={params['bits']} has no kernel yet"
    if params["out_dtype"] not in (np.dtype(x.dtype), np.dtype("float32")):
        return "the result is neither float32 nor of x's dtype"
    return _cuda_reason(backend, params, x, scales, zeros) if platform == "cuda" else ""


def _cuda_reason(backend: _ffi.Backend, params: dict, x: Any, scales: Any, zeros: Any | None) -> str:
    if str(x.dtype) == "float32":
        return "float32 activations would lose precision in the CUDA kernels"
    if not isinstance(x.shape[0], int):
        return "a CUDA kernel's scratch needs to know M, which is symbolic"
    return backend.module.why_unsupported(
        *_cuda_sizes(x, scales, params), *_cuda_types(x, scales, zeros, params), _portable(backend)
    )


def describe_cuda_kernel(backend: _ffi.Backend, params: dict, x: Any, scales: Any, zeros: Any | None) -> str:
    """The kernel that a product takes which ``ffi_reason`` has nothing against, for people to read."""
    return backend.module.describe_kernel(
        *_cuda_sizes(x, scales, params),
        *_cuda_types(x, scales, zeros, params),
        zeros is not None,
        _portable(backend),
    )


def _cuda_types(x: Any, scales: Any, zeros: Any | None, params: dict) -> tuple[str, str, str]:
    return str(x.dtype), str(_cuda_scale_dtype(x, scales, zeros)), str(params["out_dtype"])


def _cuda_scale_dtype(x: Any, scales: Any, zeros: Any | None) -> np.dtype:
    """The kernels take scales, and zeros alike, in x's dtype or in float32, which holds any of them."""
    same = scales.dtype == x.dtype and (zeros is None or zeros.dtype == x.dtype)
    return np.dtype(x.dtype if same else "float32")


def _cuda_sizes(x: Any, scales: Any, params: dict) -> tuple[int, int, int, int]:
    """M, N, K and groups of the CUDA call: N and K as multiples of 8, as the kernels move 16 bytes of a row.

    Words are there already, in whole blocks. K is only ever rounded up when it is one group.
    """
    groups, n = scales.shape
    return x.shape[0], -(-n // 8) * 8, -(-params["k"] // 8) * 8, groups


def _portable(backend: _ffi.Backend) -> bool:
    return bool(backend.attributes["portable"])


def _lower_ffi(platform: str):
    call = _lower_cuda_call if platform == "cuda" else _lower_call

    def rule(ctx, *operands, **params):
        if error := _ffi.platform_error(params["backend"], platform):
            raise ValueError(error)
        x, _, scales, *zeros = ctx.avals_in
        if ffi_reason(platform, params, x, scales, zeros[0] if zeros else None):
            return _lower_reference(ctx, platform, operands, params)
        return call(ctx, _ffi.BACKENDS[params["backend"] or platform], operands, params)

    return rule


def _lower_call(ctx, backend, operands, params):
    del params
    values, avals = list(operands), list(ctx.avals_in)
    if len(values) == 3:  # no zeros: the handler takes an array with no rows
        none = np.zeros((0, avals[2].shape[1]), avals[2].dtype)
        values.append(mlir.ir_constant(none))
        avals.append(jax.core.ShapedArray(none.shape, none.dtype))
    ctx = ctx.replace(avals_in=avals)
    return _ffi.lower_call(_ffi.MATMUL_TARGET, ctx, values, backend.attributes)[:1]


def _lower_cuda_call(ctx, backend, operands, params):
    """The call, with the scratch it needs, and around it what brings the operands to dtypes and sizes that it takes."""
    x, words, scales, *zeros = ctx.avals_in
    m, n, k, groups = _cuda_sizes(x, scales, params)
    dtype = _cuda_scale_dtype(x, scales, zeros[0] if zeros else None)
    shapes = [(m, k), words.shape] + [(groups, n)] * (1 + len(zeros))
    dtypes = [x.dtype, words.dtype] + [dtype] * (1 + len(zeros))
    values, avals = [], []
    for value, aval, shape, dtype in zip(operands, ctx.avals_in, shapes, dtypes, strict=True):
        if aval.shape != shape or aval.dtype != dtype:
            value, aval = _apply(ctx, partial(_pad_and_cast, shape=shape, dtype=dtype), value, aval)
        values.append(value)
        avals.append(aval)
    (out,) = ctx.avals_out
    size = backend.module.scratch_bytes(m, n, k, groups, str(x.dtype), _portable(backend))
    result = jax.core.ShapedArray((m, n), out.dtype)
    scratch = [jax.core.ShapedArray((size,), np.dtype("uint8"))] if size else []
    inner = ctx.replace(avals_in=avals, avals_out=[result, *scratch])
    (y,) = _lower_call(inner, backend, values, params)
    if out.shape != result.shape:
        y, _ = _apply(ctx, lambda y: jax.lax.slice(y, (0, 0), out.shape), y, result)
    return [y]


def _pad_and_cast(array, *, shape, dtype):
    """Zeros at the end of each axis: padded codes meet x = 0, padded columns are cut off again."""
    edges = [(0, to - size, 0) for to, size in zip(shape, array.shape, strict=True)]
    return jax.lax.pad(array, np.zeros((), array.dtype), edges).astype(dtype)


def _apply(ctx, function, value, aval):
    """function(value) in the module being lowered, and its type."""
    result = jax.eval_shape(function, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    wanted = jax.core.ShapedArray(result.shape, result.dtype)
    return _lower_plainly(function, ctx.replace(avals_in=[aval], avals_out=[wanted]), [value])[0], wanted


def _lower_elsewhere(ctx, *operands, **params):
    if error := _ffi.platform_error(params["backend"], "another platform"):
        raise ValueError(error)
    return _lower_reference(ctx, None, operands, params)


mlir.register_lowering(_call_p, _lower_elsewhere)
for _platform in {b.platform for b in _ffi.BACKENDS.values()}:
    mlir.register_lowering(_call_p, _lower_ffi(_platform), platform=_platform)


lower_partitioned(matmul_p, _call_p, "matmul", partitioned_matmul)

for _p in (matmul_p, _call_p):
    _p.def_abstract_eval(_abstract_eval)
matmul_p.def_impl(lambda *operands, **params: xla.apply_primitive(matmul_p, *operands, **params))
_call_p.def_impl(lambda *operands, **params: xla.apply_primitive(_call_p, *operands, **params))


# ---- Batching ---------------------------------------------------------------------------------------


def _batch(args, dims, **params):
    """x alone is batched: its batch joins M. Anything else: one product after the other. All dims are 0 or None."""
    if dims[0] is None or any(d is not None for d in dims[1:]):
        return _one_by_one(bind_matmul, args, dims, **params)
    b, m, inner = args[0].shape
    y = bind_matmul(args[0].reshape(b * m, inner), *args[1:], **params)
    return y.reshape(b, m, y.shape[1]), 0


def _one_by_one(bind, args, dims, **params):
    """One call after the other, of the slices of what is batched."""
    return map_slices(partial(bind, **params), args, [d is not None for d in dims]), 0


batching.primitive_batchers[matmul_p] = by_mapped_shards(_batch)


# ---- Differentiation ----------------------------------------------------------------------------------
#
# With P = sum_m x[m, k] y_bar[m, n], and g the group of k:
#
#     y[m, n]      = sum_k x[m, k] s[g, n] (c[k, n] - z[g, n])      linear in x, in s, affine in z
#     x_bar[m, k]  = (y_bar @ W.T)[m, k]                            the primitive, transposed
#     s_bar[g, n]  = sum_{k in g} P[k, n] (c[k, n] - z[g, n])       scales_cotangent_p
#     y_dot (of z) = - (sum_{k in g} x[m, k]) @ (s * z_dot)
#
# All of it is again made of differentiable operations, so derivatives of any order follow. The
# transposed product is the same with the roles of x and y_bar exchanged. s_bar itself is linear in x and
# in y_bar, and its transposes are products with a weight whose scales are the cotangent of s_bar.


def _jvp(primals, tangents, **params):
    x, words, scales, *zeros = primals
    x_dot, _, scales_dot, *zeros_dot = tangents
    y = bind_matmul(*primals, **params)
    terms = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(bind_matmul(x_dot, words, scales, *zeros, **params))
    if not isinstance(scales_dot, ad.Zero):
        terms.append(bind_matmul(x, words, scales_dot, *zeros, **params))
    if zeros and not isinstance(zeros_dot[0], ad.Zero):
        terms.append(_zeros_tangent(x, scales, zeros_dot[0], **params))
    if not terms:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, sum(terms[1:], start=terms[0])


def _zeros_tangent(x, scales, zeros_dot, *, k, out_dtype, transpose, **_):
    """The product with dW = -scales * zeros_dot, which is constant along k inside a group."""
    dw = -scales.astype(jnp.float32) * zeros_dot.astype(jnp.float32)
    x = x.astype(jnp.float32)
    m, groups = x.shape[0], scales.shape[0]
    if transpose:
        per_group = jnp.matmul(x, dw.T, precision=HIGHEST)
        return jnp.repeat(per_group, k // groups, axis=1, total_repeat_length=k).astype(out_dtype)
    sums = jnp.sum(x.reshape(m, groups, k // groups), axis=2)
    return jnp.matmul(sums, dw, precision=HIGHEST).astype(out_dtype)


def _transpose(ct, x, words, scales, *zeros, k, out_dtype, transpose, bits, backend):
    results: list[Any] = [None] * (3 + len(zeros))
    if isinstance(ct, ad.Zero):
        return results
    if ad.is_undefined_primal(x):
        results[0] = bind_matmul(
            ct, words, scales, *zeros,
            k=k, out_dtype=x.aval.dtype, transpose=not transpose, bits=bits, backend=backend,
        )  # fmt: skip
    else:
        a, b = (ct, x) if transpose else (x, ct)
        s_bar = _bind_cotangent(
            a, b, words, *zeros, k=k, groups=scales.aval.shape[0], bits=bits, backend=backend
        )
        results[2] = s_bar.astype(scales.aval.dtype)
    return results


ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose


# ---- The gradient of scales ---------------------------------------------------------------------------
#
# Its operands are a [M, K], b [M, N], words and, when the weight has them, zeros.

scales_cotangent_p = Primitive("jax_trirun_scales_cotangent")
_cotangent_call_p = Primitive("jax_trirun_scales_cotangent_call")


def _bind_cotangent(*operands, **params):
    return scales_cotangent_p.bind(*_same_varying_axes(list(operands)), **params)


def _cotangent_abstract_eval(a, b, words, *zeros, k, groups, bits, backend):
    del a, words, zeros, k, bits, backend
    spec = jax.sharding.PartitionSpec(None, None)
    sharding = jax.sharding.NamedSharding(b.sharding.mesh, spec)  # on Explicit axes only parts come here
    shape = (groups, b.shape[1])
    return b.update(shape=shape, dtype=np.dtype("float32"), weak_type=False, sharding=sharding)


def _lower_cotangent_call(ctx, *operands, k, groups, bits, backend, platform=None):
    dense = dense_on(platform, backend, bits)

    def compute(a, b, words, zeros=None):
        return scales_cotangent_reference(a, b, words, zeros, k=k, groups=groups, bits=bits, dense=dense)

    return _lower_plainly(compute, ctx, operands)


def _cotangent_jvp(primals, tangents, **params):
    a, b, words, *zeros = primals
    a_dot, b_dot, _, *zeros_dot = tangents
    s_bar = _bind_cotangent(*primals, **params)
    terms = []
    if not isinstance(a_dot, ad.Zero):
        terms.append(_bind_cotangent(a_dot, b, words, *zeros, **params))
    if not isinstance(b_dot, ad.Zero):
        terms.append(_bind_cotangent(a, b_dot, words, *zeros, **params))
    if zeros and not isinstance(zeros_dot[0], ad.Zero):
        m, k = a.shape
        sums = jnp.sum(a.astype(jnp.float32).reshape(m, params["groups"], k // params["groups"]), axis=2)
        products = jnp.matmul(sums.T, b.astype(jnp.float32), precision=HIGHEST)
        terms.append(-products * zeros_dot[0].astype(jnp.float32))
    if not terms:
        return s_bar, ad.Zero(jax.typeof(s_bar).to_tangent_aval())
    return s_bar, sum(terms[1:], start=terms[0])


def _cotangent_transpose(ct, a, b, words, *zeros, k, groups, bits, backend):
    del groups
    results: list[Any] = [None] * (3 + len(zeros))
    if not isinstance(ct, ad.Zero):
        wrt_a = ad.is_undefined_primal(a)
        results[0 if wrt_a else 1] = bind_matmul(
            b if wrt_a else a, words, ct, *zeros,
            k=k, out_dtype=(a if wrt_a else b).aval.dtype, transpose=wrt_a, bits=bits, backend=backend,
        )  # fmt: skip
    return results


lower_partitioned(scales_cotangent_p, _cotangent_call_p, "matmul", partitioned_scales_cotangent)
mlir.register_lowering(_cotangent_call_p, _lower_cotangent_call)
mlir.register_lowering(_cotangent_call_p, partial(_lower_cotangent_call, platform="cuda"), platform="cuda")
for _p in (scales_cotangent_p, _cotangent_call_p):
    _p.def_abstract_eval(_cotangent_abstract_eval)
    _p.def_impl(partial(xla.apply_primitive, _p))
batching.primitive_batchers[scales_cotangent_p] = by_mapped_shards(partial(_one_by_one, _bind_cotangent))
ad.primitive_jvps[scales_cotangent_p] = _cotangent_jvp
ad.primitive_transposes[scales_cotangent_p] = _cotangent_transpose
