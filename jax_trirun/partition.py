"""Which device computes which part of a product, on meshes with Auto and with Explicit axes.

A device's part of a weight is a packed weight itself when it holds whole blocks and whole groups; then

    rows of x sharded     every device has its rows of y             nothing to communicate
    N sharded             every device has its columns of y          nothing to communicate
    K sharded             every device has a part of every sum       one all-reduce of float32

and likewise for the product with the transposed weight, where K and N change roles, and for the gradient of
scales, which is summed over rows. :func:`place` picks the mesh axes for each of the three; what cannot be
cut that way is replicated, with a warning.

On *Explicit* axes types carry the sharding, so the parts are known while tracing, and the product is a
``jax.shard_map`` (:func:`on_explicit_mesh`). On *Auto* axes XLA decides while compiling, and calls back
(:func:`partitioned_matmul`) through ``custom_partitioning``. Inside ``jax.shard_map`` there is nothing left
to do.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import dispatch
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .layout import layout

Factors = tuple[str, ...]  # whose product is the size of an array axis, major first
Axes = tuple[str, ...]  # mesh axes that one array axis is sharded over, major first


class Weight(NamedTuple):
    """The sizes of a packed weight. Codes alone are as one group: they may be cut at any block."""

    k: int
    n: int
    groups: int
    bits: int


class Placement(NamedTuple):
    """Mesh axes for the rows of x and y, for the weight's K and for its N. No axis appears twice."""

    rows: Axes
    k: Axes
    n: Axes


# ---- What fits ----------------------------------------------------------------------------------------


def _fits_k(weight: Weight, shards: int) -> bool:
    whole_blocks = weight.k % (shards * layout(weight.bits).block_k) == 0
    return shards == 1 or (whole_blocks and (weight.groups == 1 or weight.groups % shards == 0))


def _fits_n(weight: Weight, shards: int) -> bool:
    return shards == 1 or weight.n % (shards * layout(weight.bits).block_n) == 0


def _cut(where: str, what: str, wanted: Axes, weight: Weight, sizes: dict[str, int]) -> Axes:
    """As many of the axes as leave whole blocks and groups to each device; warns when that is not all."""
    fits = _fits_k if what == "K" else _fits_n
    axes = wanted
    while not fits(weight, _count(axes, sizes)):
        axes = axes[:-1]
    if axes != wanted:
        lay = layout(weight.bits)
        if what == "K":
            units, size = f"whole blocks of {lay.block_k} rows", weight.k
            if weight.groups != 1:
                units += f" and whole groups of {weight.k // weight.groups}"
        else:
            units, size = f"whole blocks of {lay.block_n} columns", weight.n
        warnings.warn(
            f"{where}: {_count(wanted, sizes)} shards of {what}={size} do not hold {units} each, so the operands "
            f"are gathered along {what} into {_count(axes, sizes)}; the result is right, but slower and larger "
            f"than it need be. Shard over fewer devices, pad {what}, or shard the other axis of the weight",
            UserWarning,
            stacklevel=2,
        )
    return axes


def _count(axes: Axes, sizes: dict[str, int]) -> int:
    return math.prod(sizes[a] for a in axes)


def _wanted(candidates: Sequence[Axes]) -> Axes:
    """The first that says anything, or one that continues it."""
    first = next((c for c in candidates if c), ())
    return max((c for c in candidates if c[: len(first)] == first), key=len, default=first)


def _without(axes: Axes, taken: Axes) -> Axes:
    """The axes before the first that is taken."""
    stop = next((i for i, a in enumerate(axes) if a in taken), len(axes))
    return axes[:stop]


def place(
    weight: Weight,
    sizes: dict[str, int],
    x: Sequence[Axes],
    words: Sequence[Axes],
    scales: Sequence[Axes],
    result: Sequence[Axes] | None = None,
    *,
    transpose: bool = False,
) -> Placement:
    """The placement of a product, from how its operands and, where known, its result are sharded now.

    The weight stays where it is if it can. An axis that shards both x's rows and the weight gathers the
    weight, as fully sharded data parallelism wants it, unless the result's columns are wanted on it.

    Args:
        sizes: of the mesh axes.
        x, words, scales, result: for each array axis, the mesh axes that shard it. ``x`` and ``result``
            have two: [rows, K] and [rows, N], exchanged with ``transpose``.
    """
    rows, inner = x
    result_rows, outer = result if result is not None else ((), ())
    along_k, along_n = (outer, inner) if transpose else (inner, outer)
    own_k, own_n = [words[0], () if weight.groups == 1 else scales[0]], [words[1], scales[1]]
    # An axis that the weight has for N does not shard K because x is sharded so, nor the other way round.
    k = _wanted([*own_k, _without(along_k, _wanted(own_n))])
    n = _without(_wanted([*own_n, _without(along_n, k)]), k)
    if rows:
        contracted, free = (n, k) if transpose else (k, n)
        rows = _without(rows, () if not set(outer) & set(free) else free)
        contracted, free = _without(contracted, rows), _without(free, rows)
        k, n = (free, contracted) if transpose else (contracted, free)
    k = _cut("matmul", "K", k, weight, sizes)
    n = _cut("matmul", "N", n, weight, sizes)
    if not rows:
        rows = _without(result_rows, k + n)
    return Placement(rows, k, n)


def _specs(placement: Placement, groups: int, zeros: bool, transpose: bool):
    """PartitionSpecs of (x, words, scales, zeros?) and of the result, and the axes to sum over."""
    rows, k, n = (axes or None for axes in placement)
    inner, outer = (n, k) if transpose else (k, n)
    scales = PartitionSpec(None if groups == 1 else k, n)
    operands = [PartitionSpec(rows, inner), PartitionSpec(k, n, None), scales] + [scales] * zeros
    return operands, PartitionSpec(rows, outer), inner or ()


# ---- Auto axes: XLA asks while compiling ---------------------------------------------------------------
#
# XLA may shard over a part of a mesh axis. So the mesh is taken apart into axes of prime sizes, in which
# every such sharding has a name.


def _prime_factors(size: int) -> list[int]:
    factors, p = [], 2
    while size > 1:
        while size % p == 0:
            factors.append(p)
            size //= p
        p += 1
    return factors


def _starts(array: Any) -> dict[Any, list[int]]:
    """Where each device's part begins along each axis, if each axis had as many elements as there are devices.

    With that length every possible number of shards divides.
    """
    shape = (len(array.sharding.device_set),) * len(array.shape)
    index = array.sharding.devices_indices_map(shape)
    return {device: [part.start or 0 for part in parts] for device, parts in index.items()}


def _fine_mesh(array: Any) -> jax.sharding.Mesh:
    """The array's devices, in their order, as a mesh of axes of prime sizes."""
    devices = list(_starts(array))
    shape = _prime_factors(len(devices))
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), tuple(f"part{i}" for i in range(len(shape))))


def _axes_of(mesh: jax.sharding.Mesh, array: Any) -> tuple[Axes, ...]:
    """For each array axis, the axes of the fine mesh that shard it; () where they cannot be told."""
    starts = np.asarray(list(_starts(array).values()), np.int64)
    return tuple(_axes_of_starts(mesh, starts[:, i]) for i in range(len(array.shape)))


def _axes_of_starts(mesh: jax.sharding.Mesh, starts: np.ndarray) -> Axes:
    starts = starts.reshape(mesh.devices.shape)
    steps = {
        name: int(np.take(starts, 1, axis).flat[0] - np.take(starts, 0, axis).flat[0])
        for axis, name in enumerate(mesh.axis_names)
    }
    axes = tuple(sorted((a for a in steps if steps[a] > 0), key=lambda a: -steps[a]))
    index = np.indices(mesh.devices.shape)
    told = sum((index[mesh.axis_names.index(a)] * steps[a] for a in axes), np.zeros_like(starts))
    shards, regular = 1, True
    for a in axes:
        shards *= mesh.shape[a]
        regular &= steps[a] * shards == mesh.devices.size
    return axes if regular and (told == starts).all() else ()


# A psum whose lowering does not see the mesh of the context: with Explicit axes it would constrain the
# sharding of the scalars that it adds, which no all-reduce can compile.
_all_reduce_p = Primitive("jax_trirun_all_reduce")
_all_reduce_p.def_abstract_eval(lambda y, *, axes: y)


def _lower_all_reduce(ctx, y, *, axes):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return mlir.lower_fun(lambda y: jax.lax.psum(y, axes), multiple_results=False)(ctx, y)


mlir.register_lowering(_all_reduce_p, _lower_all_reduce)


class _Product(NamedTuple):
    """What the callbacks know: the call for one device's part, and the primitive's parameters."""

    call: Callable
    weight: Weight
    zeros: bool
    transpose: bool
    out_dtype: Any
    params: tuple  # the other parameters, as items

    def place(self, arrays, result):
        mesh = _fine_mesh(arrays[0])
        axes = [_axes_of(mesh, a) for a in (*arrays, result) if a.sharding is not None]
        if result.sharding is None:
            axes.append(((), ()))
        x, words, scales = axes[:3]
        return mesh, place(
            self.weight, dict(mesh.shape), x, words, scales, axes[-1], transpose=self.transpose
        )

    def whole(self, *operands):
        return self.part(operands, self.weight.k, self.out_dtype)

    def part(self, operands, k, out_dtype):
        params = dict(self.params, transpose=self.transpose, bits=self.weight.bits)
        return self.call(*operands, k=k, out_dtype=out_dtype, **params)

    def partition(self, _, arrays, result):
        mesh, placement = self.place(arrays, result)
        operands, out, summed = _specs(placement, self.weight.groups, self.zeros, self.transpose)
        k = self.weight.k // _count(placement.k, dict(mesh.shape))

        def local(*operands):
            if not summed:
                return self.part(operands, k, self.out_dtype)
            y = self.part(operands, k, np.dtype("float32"))
            return _all_reduce_p.bind(y, axes=summed).astype(self.out_dtype)

        return mesh, local, NamedSharding(mesh, out), tuple(NamedSharding(mesh, s) for s in operands)

    def infer(self, _, arrays, result):
        mesh, placement = self.place(arrays, jax.ShapeDtypeStruct(result.shape, result.dtype))
        return NamedSharding(mesh, _specs(placement, self.weight.groups, self.zeros, self.transpose)[1])

    def rule(self, *_):
        return _matmul_rule(self.weight, self.zeros, self.transpose)


def _matmul_rule(weight: Weight, zeros: bool, transpose: bool) -> SdyShardingRule:
    """How shardings spread between operands and result.

    K and N are products of factors such that a factor of one array is a factor of the others. Factors
    that cut a block or a group are among them: the partitioner is told of such wishes, and can warn.
    """
    sizes, (x_k, words_k, scales_k), (out_n, words_n) = _factors(weight)
    inner, outer = (out_n, x_k) if transpose else (x_k, out_n)
    scales = (scales_k, out_n)
    operands = [(("m",), inner), (words_k, words_n, ("w",)), scales, *[scales] * zeros]
    result = (("m",), outer)
    summed = {f for dims in operands for dim in dims for f in dim} - {"m", "w", *outer}
    return _rule(operands, result, sizes, reduction_factors=summed)


def _factors(weight: Weight):
    """Sizes of the factors; those of K in x, words and scales; those of N in y (and scales) and words."""
    lay = layout(weight.bits)
    one_group = weight.groups == 1
    sizes: dict[str, int] = {}
    along_k: tuple[Factors, Factors, Factors] = ("kx",), ("kw",), ("ks",)
    if weight.k and weight.k % lay.block_k == 0:  # else padded: no part but the whole is a packed weight
        blocks = weight.k // lay.block_k
        groups = blocks if one_group else weight.groups
        few, many = sorted((blocks, groups))
        sizes = {"k0": few, "k1": many // few, "k2": weight.k // many}
        fine: Factors = ("k0", "k1")
        coarse: Factors = ("k0",)
        along_k = (
            (*fine, "k2"),
            fine if blocks == many else coarse,
            ("ks",) if one_group else fine if groups == many else coarse,
        )
    if not weight.n or weight.n % lay.block_n:
        return sizes, along_k, (("n",), ("nw",))
    sizes |= {"n0": weight.n // lay.block_n, "n1": lay.block_n}
    return sizes, along_k, (("n0", "n1"), ("n0",))


def _rule(operands, result, sizes: dict[str, int], **kinds) -> SdyShardingRule:
    """Arrays as tuples of axes as tuples of factors; factors of size 1 are left out of products."""

    def mapping(dims):
        kept = [tuple(f for f in dim if sizes.get(f) != 1) or dim[:1] for dim in dims]
        return ArrayMapping(*(dim[0] if len(dim) == 1 else CompoundFactor(*dim) for dim in kept))

    mappings = [mapping(dims) for dims in (*operands, result)]
    whole = {dim for m in mappings for dim in m if isinstance(dim, str)}
    order = list(
        dict.fromkeys(f for m in mappings for dim in m for f in ((dim,) if isinstance(dim, str) else dim))
    )
    options: dict[str, Any] = {f: sizes[f] for f in order if f not in whole}
    for kind, factors in kinds.items():
        options[kind] = tuple(f for f in order if f in factors)
    return SdyShardingRule(tuple(mappings[:-1]), (mappings[-1],), **options)


@functools.lru_cache(maxsize=1024)
def _custom_partitioning(product: Any, whole: Callable) -> Callable:
    function = custom_partitioning(whole)
    function.def_partition(
        product.partition, product.infer, decode_shardings=False, sharding_rule=product.rule
    )
    return function


def partitioned_matmul(call: Callable, operands: Sequence[Any], *, k, transpose, bits, out_dtype, **params):
    """``call(*operands, k=..., ...)``, which XLA may partition over the Auto axes of the mesh.

    Args:
        call: the product of arrays that are on one device; takes the primitive's parameters.
        operands: x, words, scales and, if there are any, zeros; values being traced.
    """
    groups, n = operands[2].shape
    product = _Product(
        call,
        Weight(k, n, groups, bits),
        len(operands) == 4,
        transpose,
        out_dtype,
        tuple(sorted(params.items())),
    )
    return _custom_partitioning(product, product.whole)(*operands)


class _ScalesCotangent(NamedTuple):
    """a [M, K], b [M, N], words and perhaps zeros -> [groups, N], for the callbacks: K and N stay where they
    are, and rows are summed."""

    call: Callable
    weight: Weight
    zeros: bool
    backend: str | None

    def whole(self, *operands):
        return self.part(operands, self.weight.k, self.weight.groups)

    def part(self, operands, k, groups):
        return self.call(*operands, k=k, groups=groups, bits=self.weight.bits, backend=self.backend)

    def place(self, arrays):
        mesh = _fine_mesh(arrays[0])
        a, b, words, *zeros = (_axes_of(mesh, array) for array in arrays)
        scales = zeros[0] if zeros else ((), ())
        placement = place(self.weight, dict(mesh.shape), a, words, scales, b)
        specs, result, _ = _specs(placement, self.weight.groups, True, False)
        x, words_spec, scales_spec, _ = specs
        operands = [x, result, words_spec, *[scales_spec] * self.zeros]
        return mesh, placement, operands, scales_spec

    def partition(self, _, arrays, result):
        mesh, placement, operands, out = self.place(arrays)
        k_shards = _count(placement.k, dict(mesh.shape))
        one_group = self.weight.groups == 1
        groups = 1 if one_group else self.weight.groups // k_shards
        summed = placement.rows + (placement.k if one_group else ())

        def local(*operands):
            s_bar = self.part(operands, self.weight.k // k_shards, groups)
            return _all_reduce_p.bind(s_bar, axes=summed) if summed else s_bar

        return mesh, local, NamedSharding(mesh, out), tuple(NamedSharding(mesh, s) for s in operands)

    def infer(self, _, arrays, result):
        mesh, *_, out = self.place(arrays)
        return NamedSharding(mesh, out)

    def rule(self, *_):
        sizes, (x_k, words_k, scales_k), (out_n, words_n) = _factors(self.weight)
        scales = (scales_k, out_n)
        operands = [(("m",), x_k), (("m",), out_n), (words_k, words_n, ("w",)), *[scales] * self.zeros]
        summed = {f for dims in operands for dim in dims for f in dim} - {"w", *scales_k, *out_n}
        return _rule(operands, scales, sizes, reduction_factors=summed)


def partitioned_scales_cotangent(
    call: Callable, operands: Sequence[Any], *, k: int, groups: int, bits: int, backend: str | None
):
    """``call(*operands, k=..., groups=...)``, which XLA may partition over the Auto axes of the mesh."""
    weight = Weight(k, operands[1].shape[1], groups, bits)
    cotangent = _ScalesCotangent(call, weight, len(operands) == 4, backend)
    return _custom_partitioning(cotangent, cotangent.whole)(*operands)


class _Blocks(NamedTuple):
    """pack (codes [..., K, N] -> words) or unpack, for the callbacks: every block is a matter of its own."""

    call: Callable  # (array, k=, n=, bits=) -> array, on one device
    weight: Weight
    lead: int  # leading axes
    packs: bool

    def whole(self, array):
        return self.call(array, k=self.weight.k, n=self.weight.n, bits=self.weight.bits)

    def place(self, array, result):
        mesh = _fine_mesh(array)
        sizes = dict(mesh.shape)
        axes = [_axes_of(mesh, a) for a in (array, result) if a.sharding is not None]
        lead = axes[0][: self.lead]
        k, n = (_wanted([a[self.lead + i] for a in axes]) for i in (0, 1))
        for taken in lead:
            k, n = _without(k, taken), _without(n, taken)
        k, n = place_blocks("pack" if self.packs else "unpack", self.weight, sizes, k, n)
        return mesh, k, n, _block_specs([*lead, k, n], self.packs)

    def partition(self, _, arrays, result):
        mesh, k, n, (operand, out) = self.place(arrays[0], result)
        sizes = dict(mesh.shape)

        def local(array):
            sizes_here = {"k": self.weight.k // _count(k, sizes), "n": self.weight.n // _count(n, sizes)}
            return self.call(array, bits=self.weight.bits, **sizes_here)

        return mesh, local, NamedSharding(mesh, out), (NamedSharding(mesh, operand),)

    def infer(self, _, arrays, result):
        mesh, *_, (_, out) = self.place(arrays[0], jax.ShapeDtypeStruct(result.shape, result.dtype))
        return NamedSharding(mesh, out)

    def rule(self, *_):
        sizes, (_, words_k, _), (codes_n, words_n) = _factors(self.weight)
        blocks = layout(self.weight.bits)
        codes_k: Factors = ("kx",)
        if "k0" in sizes:
            sizes |= {"k0": self.weight.k // blocks.block_k, "k1": blocks.block_k}
            codes_k, words_k = ("k0", "k1"), ("k0",)
        lead = [(f"b{i}",) for i in range(self.lead)]
        words, codes = [*lead, words_k, words_n, ("w",)], [*lead, codes_k, codes_n]
        operand, result = (codes, words) if self.packs else (words, codes)
        return _rule([operand], result, sizes, need_replication_factors=("w",))


def place_blocks(where: str, weight: Weight, sizes: dict[str, int], k: Axes, n: Axes) -> tuple[Axes, Axes]:
    """The mesh axes over which K and N of a packed array can be sharded, of those that are wanted."""
    return _cut(where, "K", k, weight, sizes), _cut(where, "N", _without(n, k), weight, sizes)


def _block_specs(axes: Sequence[Axes], packs: bool):
    """PartitionSpecs of the operand and the result of pack or unpack."""
    codes = PartitionSpec(*(a or None for a in axes))
    words = PartitionSpec(*codes, None)
    return (codes, words) if packs else (words, codes)


def partitioned_blocks(call: Callable, array: Any, *, k: int, n: int, bits: int, packs: bool):
    """``call(array, k=k, n=n, bits=bits)``, pack or unpack, which XLA may partition over Auto axes."""
    blocks = _Blocks(call, Weight(k, n, 1, bits), array.ndim - (2 if packs else 3), packs)
    return _custom_partitioning(blocks, blocks.whole)(array)


def blocks_on_explicit_mesh(
    where: str, mesh: Any, local: Callable, array: Any, *, k: int, n: int, bits: int, packs: bool
) -> jax.Array:
    """``local(array, k=k, n=n)``, pack or unpack, by parts over the mesh's Explicit axes."""
    sizes = dict(mesh.shape)
    *lead, k_axes, n_axes = _array_axes(array) if packs else _array_axes(array)[:-1]
    axes = place_blocks(where, Weight(k, n, 1, bits), sizes, k_axes, n_axes)
    operand, result = _block_specs([*lead, *axes], packs)
    sizes_here = {"k": k // _count(axes[0], sizes), "n": n // _count(axes[1], sizes)}
    return _on_parts(
        mesh,
        functools.partial(local, **sizes_here),
        functools.partial(local, k=k, n=n),
        [array],
        [operand],
        result,
    )


def lower_partitioned(primitive: Primitive, call: Primitive, where: str, parts: Callable) -> None:
    """Register the lowering of ``primitive``: ``call`` for the whole, or for the parts that Auto axes cut it into.

    JAX then tells the lowering which devices it is for, which it must know to give XLA a call back.

    Args:
        parts: (call's bind, operands, **params) -> the result, partitioned.
    """

    def rule(ctx, *operands, **params):
        def partitioned(*operands):
            return parts(call.bind, operands, **params)

        function = partitioned if can_call_back(where, ctx) else functools.partial(call.bind, **params)
        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    mlir.register_lowering(primitive, rule)
    dispatch.prim_requires_devices_during_lowering.add(primitive)  # there is no public way to say so


def can_call_back(where: str, ctx: Any) -> bool:
    """Whether XLA's partitioner can ask, in what is being lowered.

    Not where an axis is manual (XLA's partitioner would end the process), nor in an exported program
    (which another process would have to answer for).
    """
    module = ctx.module_context
    if getattr(module.axis_context, "manual_axes", None):
        return False
    if not module.lowering_parameters.for_export:
        return True
    if (devices := getattr(module.axis_context, "num_devices", 1)) > 1:
        warnings.warn(
            f"{where}: an export for {devices} devices on a mesh with Auto axes cannot be partitioned, so each "
            "device gathers all of the operands. Use a mesh of Explicit axes (jax.make_mesh's default) or "
            "jax.shard_map, whose products stay sharded in exports",
            UserWarning,
            stacklevel=2,
        )
    return False


# ---- Explicit axes: types tell while tracing -----------------------------------------------------------


def explicit_mesh(where: str, *arrays: Any) -> Any | None:
    """The mesh that the arrays' types name, if it has Explicit axes; None if there is none.

    Raises:
        ValueError: arrays live on different meshes, or one was put on other devices than the mesh's.
    """
    meshes = [m for a in arrays if a is not None and not (m := jax.typeof(a).sharding.mesh).empty]
    explicit = [m for m in meshes if AxisType.Explicit in m.axis_types]
    for mesh in explicit:
        if mesh != explicit[0]:
            raise ValueError(
                f"{where}: all arrays must be on one mesh, got {explicit[0]} and {mesh}; "
                "move them with jax.device_put or jax.sharding.reshard"
            )
    if not explicit:
        return None
    there = [a for a in arrays if isinstance(a, jax.Array)]
    if any(isinstance(a, jax.core.Tracer) for a in there):
        return explicit[0]  # concrete arrays are constants then, which go where they are needed
    for array in there:
        if array.committed and array.sharding.num_devices != explicit[0].size:
            raise ValueError(
                f"{where}: all arrays must be on one mesh, got {explicit[0]} and an array {array.shape} on "
                f"{array.sharding}; move it with jax.device_put(array, NamedSharding(mesh, PartitionSpec()))"
            )
    return explicit[0]


def _array_axes(array: Any) -> tuple[Axes, ...]:
    """For each array axis, the Explicit mesh axes that shard it."""
    if array.ndim and jax.typeof(array).sharding.mesh.empty:
        return ((),) * array.ndim
    return tuple(
        () if a is None else (a,) if not isinstance(a, tuple) else a for a in jax.typeof(array).sharding.spec
    )


def on_explicit_mesh(mesh: Any, local: Callable, operands: Sequence[Any], *, k: int, bits: int) -> jax.Array:
    """``local(*operands, k=k, summed=())``, by parts, for operands sharded over Explicit axes of the mesh.

    Args:
        local: a product x [..., K] @ W whose result must be summed over the mesh axes ``summed``.
        operands: x [..., K], words, scales and, if there are any, zeros.

    Returns:
        y [..., N]; its leading axes are sharded as x's, its last as the weight's N.
    """
    x, words, scales, *zeros = operands
    *lead, inner = _array_axes(x)
    rows = tuple(a for axes in lead for a in axes)
    sizes = {a: size for a, size in mesh.shape.items()}
    weight = Weight(k, scales.shape[1], scales.shape[0], bits)
    placed = place(weight, sizes, (rows, inner), _array_axes(words), _array_axes(scales))
    (_, words_spec, scales_spec, *_), _, summed = _specs(placed, weight.groups, bool(zeros), False)
    leading = [axes or None for axes in lead]
    specs = [PartitionSpec(*leading, placed.k or None), words_spec, scales_spec, *[scales_spec] * len(zeros)]
    result = PartitionSpec(*leading, placed.n or None)
    part = functools.partial(local, k=k // _count(placed.k, sizes), summed=summed)
    whole = functools.partial(local, k=k, summed=())
    return _on_parts(mesh, part, whole, operands, specs, result)


def _on_parts(
    mesh: Any, part: Callable, whole: Callable, operands: Sequence[Any], specs: Sequence[Any], result: Any
) -> jax.Array:
    """``part`` of each device's parts of the operands; ``whole`` computes the same of whole operands."""
    explicit = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit}
    if AxisType.Auto in mesh.axis_types:
        # Inside shard_map no Auto axis could be made use of. XLA sees to both kinds.
        apart = jax.sharding.auto_axes(whole, axes=tuple(explicit), out_sharding=NamedSharding(mesh, result))
        return apart(*operands)
    operands = [jax.sharding.reshard(a, NamedSharding(mesh, s)) for a, s in zip(operands, specs, strict=True)]
    names: dict[str, Any] = {}
    if AxisType.Manual in mesh.axis_types:
        # Keep no values from the inner shard_map for the backward pass: JAX gets their shapes wrong there.
        names, part = {"axis_names": explicit}, jax.checkpoint(part)
    return jax.shard_map(part, mesh=mesh, in_specs=tuple(specs), out_specs=result, **names)(*operands)


def by_mapped_shards(rule: Callable) -> Callable:
    """A batching rule, each device's part of the mapped axis by itself where Explicit mesh axes shard that axis."""

    def batch(args, dims, **params):
        moved = [a if d is None else jax.numpy.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
        dims = [None if d is None else 0 for d in dims]
        # JAX has seen to it that all mapped operands are sharded alike.
        axes = next(_array_axes(a)[0] for a, d in zip(moved, dims, strict=True) if d is not None)
        if not axes:
            return rule(moved, dims, **params)
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            warnings.warn(
                f"jax.vmap over an axis that lies along {axes} gathers the operands along it; give matmul an x with "
                "that axis in front, or put jax.shard_map around jax.vmap, with the axis in in_specs and out_specs",
                UserWarning,
                stacklevel=2,
            )
        spec = PartitionSpec(axes)
        specs = tuple(PartitionSpec() if d is None else spec for d in dims)
        # checkpoint: as in _on_parts
        part = jax.checkpoint(lambda *args: rule(args, dims, **params)[0])
        return jax.shard_map(part, in_specs=specs, out_specs=spec, axis_names=set(axes))(*moved), 0

    return batch
