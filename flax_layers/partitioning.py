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

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.core import spmd
from jax.sharding import NamedSharding, PartitionSpec

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


def _whole_unless_fits(name: Any, axis: str, size: int, unit: int, mesh: Any, rules: Any, where: str) -> Any:
    count = shards(name, mesh, rules)
    if count == 1 or size % (count * unit) == 0:
        return name
    most = next(c for c in range(min(count, size // unit) or 1, 0, -1) if size % (c * unit) == 0)
    warnings.warn(
        f"{where}: {axis}={size} is not cut into {count} parts along {name!r}, as each must be a multiple of "
        f"{unit} (whole blocks and groups of packed codes); every device holds all of {axis}. At most {most} "
        "parts would do.",
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
