"""How the sharding of a kernel [K, N] carries over to the arrays that hold it packed.

A kernel's axis names are names of the packed arrays' axes as well, since those count blocks, groups and
columns along the same directions:

    kernel   (.., in, out)              [.., K, N]
    words    (.., in, out, None)        [.., K / block_k, N / block_n, 128]
    scales   (.., in, out)              [.., K / G, N]; (.., None, out) when one group covers all of K
    zeros    as scales
    bias     (.., out)                  [.., N]
    LoRA A   (.., in, None)             [.., K, rank]
    LoRA B   (.., None, out)            [.., rank, N]

An axis is kept whole, with a warning, where a device's part of it would cut a block or a group.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import spmd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_trirun import QuantTensor
from jax_trirun.layout import layout

Names = tuple[Any, ...]
_SPELLINGS = ("out_sharding", "sharding", "sharding_names")  # the last two are older Flax's
_NOT_OF_THE_VALUE = ("hijax", "ref", "eager_sharding")  # flags of the Variable, not of what it holds


def names_of_parts(
    names: Sequence[Any],
    weight: QuantTensor,
    *,
    mesh: Any = None,
    rules: Any = None,
    where: str = "QuantDense",
) -> dict[str, Names]:
    """Axis names of words, scales and zeros from those of the kernel.

    Args:
        names: of the kernel's axes, leading ones of a stack included; missing ones at the end are None.
        weight: the packed weight, or its shapes.
        mesh: when known, the parts' sizes are checked against blocks and groups.
        rules: (name, mesh axis) pairs for logical names.
        where: who speaks, in warnings.
    """
    stack = len(weight.scales.shape) - 2
    names = (*names, *[None] * (stack + 2 - len(names)))
    *lead, along_k, along_n = names
    block = layout(weight.bits)
    (k, n), groups = weight.shape, weight.scales.shape[-2]
    unit_k = block.block_k if groups == 1 else math.lcm(block.block_k, k // groups)
    along_k = _whole_unless_fits(along_k, "K", k, unit_k, mesh, rules, where)
    along_n = _whole_unless_fits(along_n, "N", n, block.block_n, mesh, rules, where)
    scales = (*lead, None if groups == 1 else along_k, along_n)
    return {"words": (*lead, along_k, along_n, None), "scales": scales, "zeros": scales}


def merged_names(names: Sequence[Any], ndim: int, sides: Sequence[int]) -> Names:
    """Names for an array whose last axes are merged, ``sides`` of them at a time; a merged axis is named as its
    first, as the others are inside the rows or columns that a device holds."""
    names = (*names, *[None] * (ndim - len(names)))
    start = ndim - sum(sides)
    merged = list(names[:start])
    for count in sides:
        merged.append(names[start])
        start += count
    return tuple(merged)


def _whole_unless_fits(name: Any, axis: str, size: int, unit: int, mesh: Any, rules: Any, where: str) -> Any:
    count = shards(name, mesh, rules)
    if count == 1 or size % (count * unit) == 0:
        return name
    parts = [c for c in range(2, min(count, size // unit) + 1) if size % (c * unit) == 0]
    warnings.warn(
        f"{where}: {axis}={size} is not cut into {count} parts along {name!r}, as each must be a multiple of "
        f"{unit} (whole blocks and groups of packed codes); every device holds all of {axis}. "
        + (f"{parts[-1]} parts would do." if parts else f"Pad {axis} to a multiple of {count * unit}."),
        stacklevel=2,
    )
    return None


def shards(name: Any, mesh: Any, rules: Any = None) -> int:
    """Into how many parts a mesh cuts an axis of this name; 1 when there is no mesh."""
    if name is None or mesh is None or mesh.empty:
        return 1
    (resolved,) = spmd.from_sharding_rules((name,), rules or ())
    axes = resolved if isinstance(resolved, tuple) else (resolved,)
    return math.prod(mesh.shape.get(a, 1) for a in axes if a is not None)


def metadata_of_parts(metadata: Mapping[str, Any], weight: QuantTensor) -> dict[str, dict[str, Any]]:
    """nnx metadata of words, scales and zeros from those of the kernel ``nnx.Param``."""
    common, names = _split_metadata(metadata)
    if names is None:
        return dict.fromkeys(("words", "scales", "zeros"), common)
    rules = spmd.composite_rules(spmd.get_logical_axis_rules(), common.get("sharding_rules"))
    mesh = common.get("mesh") or jax.sharding.get_abstract_mesh()
    parts = names_of_parts(names, weight, mesh=mesh, rules=rules)
    return {part: common | {"out_sharding": of_part} for part, of_part in parts.items()}


def put_as_named(array: Any, metadata: Mapping[str, Any]) -> Any:
    """The array in shards as nnx would place it, each device given its own; traced arrays as they are.

    nnx would ask the compiler for it, which takes no array that lies on one device of the mesh alone.
    """
    names, mesh = metadata.get("out_sharding"), metadata.get("mesh")
    if not names or not isinstance(array, jax.Array | np.ndarray) or isinstance(array, jax.core.Tracer):
        return array
    if mesh is None:
        with contextlib.suppress(ValueError):  # inside jit, where nnx's way works
            mesh = jax.sharding.get_mesh()
    if mesh is None or mesh.empty or not nnx.using_eager_sharding():
        return array
    rules = spmd.composite_rules(spmd.get_logical_axis_rules(), metadata.get("sharding_rules"))
    spec = PartitionSpec(*spmd.from_sharding_rules(names, rules))
    return jax.device_put(array, NamedSharding(mesh, spec))


def low_rank_metadata(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnx metadata of LoRA's A and B from those of words."""
    common, names = _split_metadata(metadata)
    if names is None:
        return common, common
    *lead, along_k, along_n, _ = names
    return (
        common | {"out_sharding": (*lead, along_k, None)},
        common | {"out_sharding": (*lead, None, along_n)},
    )


def metadata_of(variable: Any) -> dict[str, Any]:
    """What a Variable says about its value, for another Variable to take over."""
    if variable is None:
        return {}
    common, names = _split_metadata(variable.get_metadata())
    return common if names is None else common | {"out_sharding": names}


def _split_metadata(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], Names | None]:
    """(all but the sharding, the sharding as names); hooks of the dense value do not carry over."""
    common = {
        key: value
        for key, value in metadata.items()
        if key not in _NOT_OF_THE_VALUE and key not in _SPELLINGS and not key.startswith("on_")
    }
    sharding = next((metadata[key] for key in _SPELLINGS if metadata.get(key)), None)
    if isinstance(sharding, NamedSharding):
        common["mesh"], sharding = sharding.mesh, sharding.spec
    if sharding is None:
        return common, None
    if not isinstance(sharding, tuple | list | PartitionSpec):
        raise TypeError(
            "QuantDense: out_sharding must be axis names of the kernel (in, out), a PartitionSpec or a "
            f"NamedSharding, got {sharding!r}"
        )
    return common, tuple(sharding)


@dataclasses.dataclass(frozen=True)
class MeshRules:
    """Along which axes of a mesh the named axes of a model's arrays lie.

    Attributes:
        mesh: with Auto or Explicit axes; None for a model on one device, whose arrays are then left alone.
        axes: (name, mesh axis, tuple of mesh axes, or None) pairs; names that are missing lie along none,
            and so do those whose mesh axes this mesh has not.

    Raises:
        TypeError: mesh is no ``jax.sharding.Mesh``. ValueError: it has Manual axes.
    """

    mesh: jax.sharding.Mesh | None = None
    axes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.mesh is None:
            return
        if not isinstance(self.mesh, jax.sharding.Mesh):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh, which says where its devices are, got "
                f"{type(self.mesh).__name__}; make it with jax.make_mesh(sizes, names)"
            )
        if AxisType.Manual in self.mesh.axis_types:
            raise ValueError(
                f"the mesh's axes must be Auto or Explicit, got {self.mesh}; inside jax.shard_map give each "
                "device a model of its part instead"
            )

    def along(self, name: str | None) -> Any:
        """The mesh axis, or axes, of a named axis; None when it is whole on every device."""
        axes = dict(self.axes).get(name) if name else None
        if self.mesh is None or axes is None:
            return None
        there = tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a in self.mesh.shape)
        return there if len(there) > 1 else next(iter(there), None)

    def shards(self, name: str) -> int:
        """Into how many parts an axis of this name is cut."""
        return shards(self.along(name), self.mesh)

    def fitted(self, sizes: Mapping[str, int], where: str) -> "MeshRules":
        """The same without names whose number of units (heads, columns) the mesh does not divide; warns."""
        left = []
        for name, axis in self.axes:
            if sizes.get(name, 0) % self.shards(name):
                warnings.warn(
                    f"{where}: {name} ({sizes[name]}) is not divided by the {self.shards(name)} devices along "
                    f"{self.along(name)!r}; every device holds all of it",
                    stacklevel=3,
                )
                axis = None
            left.append((name, axis))
        return MeshRules(self.mesh, tuple(left))

    def sharding(self, *names: str | None) -> NamedSharding | None:
        """Of an array whose axes have these names; None without a mesh."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(self.along(name) for name in names)))

    def metadata(self, *names: str | None) -> dict[str, Any]:
        """For an ``nnx.Variable`` that holds such an array."""
        if self.mesh is None:
            return {}
        return {"out_sharding": tuple(self.along(name) for name in names), "mesh": self.mesh}

    def sharding_of_shape(self, shape: Sequence[int], *names: str | None) -> NamedSharding | None:
        """The same for a shape: an axis that the mesh does not divide is left whole, and so is one whose mesh
        axis an earlier one lies along."""
        fitting: list[str | None] = []
        for name, size in zip(names, shape, strict=True):
            taken = {axis for n in fitting for axis in self._axes_along(n)}
            fits = name is not None and size % self.shards(name) == 0
            fitting.append(name if fits and not taken & set(self._axes_along(name)) else None)
        return self.sharding(*fitting)

    def _axes_along(self, name: str | None) -> tuple[str, ...]:
        axes = self.along(name)
        return axes if isinstance(axes, tuple) else () if axes is None else (axes,)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """x, told to the compiler to lie so. An axis that the mesh does not divide is left whole."""
        sharding = self.sharding_of_shape(x.shape, *names)
        if sharding is None:
            return x
        # Where Explicit axes are taken as Auto ones, the context has them so, and the mesh has not.
        return jax.lax.with_sharding_constraint(x, sharding.spec if self._explicit() else sharding)

    @property
    def has_types(self) -> bool:
        """Whether here, where this is asked, types of arrays have Explicit axes of the mesh in them."""
        context = jax.sharding.get_abstract_mesh()
        return bool(self._explicit()) and (context.empty or AxisType.Explicit in context.axis_types)

    def with_auto_axes(self, function: Callable[..., Any], out: Any) -> Callable[..., Any]:
        """The function of arrays, in which Explicit axes are Auto ones: XLA partitions what is inside.

        Args:
            out: the ``NamedSharding`` of each result, whose types then have it.
        """
        return jax.sharding.auto_axes(function, axes=self._explicit(), out_sharding=out)

    def on_each_device(self, function: Callable[..., Any], specs: Any, out: Any) -> Callable[..., Any]:
        """The function of a device's parts of arrays, which lie as ``specs`` and ``out`` (``jax.shard_map``'s) say.

        Where Explicit axes of the mesh are taken as Auto ones, or are Auto anyway.
        """
        mesh = jax.sharding.get_abstract_mesh() if self._explicit() else self.mesh
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)

    def _explicit(self) -> tuple[str, ...]:
        if self.mesh is None:
            return ()
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return tuple(name for name, kind in types if kind == AxisType.Explicit)


def sharding_of(variable: Any) -> NamedSharding | None:
    """That an ``nnx.Variable``'s metadata name; None when they name no mesh."""
    mesh, spec = variable.get_metadata().get("mesh"), nnx.spmd.get_var_pspec(variable)
    return None if mesh is None or spec is None else NamedSharding(mesh, spec)


def place(value: Any, dtype: Any, sharding: Any) -> jax.Array:
    """``value`` as a JAX array, each device given its own slice and no other.

    Args:
        value: a NumPy array, one mapped from a file included: then only slices are read; or a JAX array.
        sharding: None for the default device.
    """
    if sharding is None:
        return jax.numpy.asarray(value, dtype)
    if isinstance(value, jax.Array):
        return jax.device_put(value.astype(dtype), sharding)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.asarray(value[index]).astype(dtype)
    )
