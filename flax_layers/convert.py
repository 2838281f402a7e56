"""Quantise a whole model, one module after another: ``quantize_module`` (nnx), ``quantize_params`` (linen)."""

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jax_trirun
from jax_trirun import QuantTensor
from jax_trirun.types import check_group_size

from .general import QuantDenseGeneral, kernel_matrix
from .linen import variables_of
from .partitioning import merged_names
from .quant_dense import QuantDense, QuantParam

# Embeddings are looked up, norms are vectors, and the head decides every token: 2 bits cost most there.
DEFAULT_EXCLUDE = (
    r"embed|(^|[./])(wte|wpe)($|[./])",
    r"norm|(^|[./])ln(_\w+|\d+)?($|[./])",
    r"(^|[./])(lm_head|output_head|head)($|[./])",
)
AUTO_GROUP_SIZES = (128, 64, 32)

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Row:
    """One quantised module."""

    name: str
    shape: tuple[int, ...]  # of the float kernel
    group_size: int
    bits: int
    error: float  # |W - W_quantised| / |W|, Frobenius norms; NaN where only shapes are known (nnx.eval_shape)
    bytes_before: int  # of the kernel
    bytes_after: int  # of words, scales and zeros
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was quantised, at what cost; what was not, and why. ``print(report)`` draws a table."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        head = ("module", "shape", "bits", "group", "rel. error", "before", "after")
        body = [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                str(row.bits),
                "all" if row.group_size == -1 else str(row.group_size),
                f"{row.error:.4f}",
                _bytes(row.bytes_before),
                _bytes(row.bytes_after),
            )
            for row in self.rows
        ]
        total = (f"{len(body)} modules", "", "", "", "", _bytes(self.bytes_before), _bytes(self.bytes_after))
        table = [head, *body, total]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(line.rstrip() for line in lines)


def quantize_module(
    model: nnx.Module,
    *,
    include: Patterns | None = None,
    exclude: Patterns = DEFAULT_EXCLUDE,
    method: str = "mse",
    group_size: int | str = 128,
    scale_dtype: Any = None,
    bits: int = 2,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Replace the ``nnx.Linear`` layers of a model by ``QuantDense``, in place.

    And ``nnx.LinearGeneral`` (attention's) by ``QuantDenseGeneral``.

    Each float kernel is released as soon as its packed form exists, so that memory only falls (unless
    the caller holds references to kernels). Everything is checked before the first layer is touched.

    Args:
        model: any ``nnx.Module``; layers in lists, dicts and stacks (``nnx.vmap``) are found.
        include: regular expressions searched for in dotted paths ("layers.0.mlp.up"); None means all.
        exclude: the same; they win. Embeddings, norms and heads unless given.
        method, scale_dtype, bits, **options: as ``jax_trirun.quantize``.
        group_size: 32, 64, 128, -1, or "auto": the largest of 128, 64, 32 that divides a layer's K.
        progress: a line on stderr; None means only when that is a terminal.

    Returns:
        A Report; ``print`` it.

    Raises:
        ValueError: a group size does not fit a layer (named in the message), or nothing matched.
        TypeError: model is no ``nnx.Module``. Others: as ``jax_trirun.quantize``.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"quantize_module: model must be an nnx.Module, got {type(model).__name__}; "
            "parameters of linen go to quantize_params"
        )
    if isinstance(model, nnx.Linear):
        raise ValueError("quantize_module: the model is one nnx.Linear; use QuantDense.from_linear(model)")
    choose = _Chooser("quantize_module", include, exclude, group_size)
    places: dict[int, list[_Place]] = {}  # by layer, which may sit in several places
    for place in _places(model):
        places.setdefault(id(place.get()), []).append(place)
    plan = []
    for same in places.values():
        linear, name = same[0].get(), same[0].path
        reason = _unfit(linear) or next((p.unfit for p in same if p.unfit), "")
        shape = (
            () if reason else (math.prod(_tuple(linear.in_features)), math.prod(_tuple(linear.out_features)))
        )
        if (size := choose(name, shape, reason)) is not None:
            plan.append((name, same, size))
    del linear
    choose.check_any(plan)
    rows = []
    for name, same, size in _progress(plan, progress):
        start, linear = time.perf_counter(), same[0].get()
        kernel = _matrix(linear)
        quantise = (
            QuantDense.from_linear
            if isinstance(linear, nnx.Linear)
            else QuantDenseGeneral.from_linear_general
        )
        with _naming(name):
            layer = quantise(
                linear, method=method, group_size=size, scale_dtype=scale_dtype, bits=bits, **options
            )
        rows.append(_row(name, kernel, layer.weight, start))
        for place in same:
            place.set(layer)
        del linear, kernel  # the last references: the float kernel goes before the next layer comes
    return Report(rows, choose.skipped)


def quantize_params(
    params: Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns = DEFAULT_EXCLUDE,
    stacked: Patterns | None = None,
    general: Mapping[str, tuple[int, int]] | None = None,
    method: str = "mse",
    group_size: int | str = 128,
    scale_dtype: Any = None,
    bits: int = 2,
    donate: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any], Report]:
    """Quantise the kernels of linen parameters.

    Run the result with the same model, ``nn.Dense`` replaced by ``flax_layers.linen.QuantDense``, or as
    it is under ``flax_layers.linen.quantized()``.

    Example:
        >>> general = {r"(query|key|value)$": (1, 2), r"out$": (2, 1)}  # nn.MultiHeadDotProductAttention's
        >>> params, quant, report = flax_layers.quantize_params(params, general=general)

    Args:
        params: nested dicts, ``variables["params"]``; itself left as it is. A kernel in a box with axis
            names (``nn.Partitioned``) gives words and scales in such boxes.
        include: regular expressions searched for in paths ("layers_0/mlp/up"); None means all.
        exclude: the same; they win. Embeddings, norms and heads unless given.
        stacked: the same, for modules whose kernel has leading layer axes [L, K, N] (``nn.scan``). Other
            kernels with more than two axes (convolutions, say) are skipped.
        general: {regular expression: (how many input axes, how many output axes)}, the first that is found in a
            path, for ``nn.DenseGeneral``: its kernel has those axes last, and is quantised as [K, N] with K
            and N their products. Axes before them count layers. Run such models under ``quantized()``.
        method, scale_dtype, bits, **options: as ``jax_trirun.quantize``.
        group_size: 32, 64, 128, -1, or "auto": the largest of 128, 64, 32 that divides a kernel's K.
        donate: delete each float kernel's buffer once its packed form exists; ``params`` cannot be used
            afterwards.
        progress: a line on stderr; None means only when that is a terminal.

    Returns:
        (params, quant, report): what is left of the parameters, the collection "quant" (words, scales,
        zeros, bias), and a Report.

    Raises:
        ValueError: a group size does not fit a kernel (named in the message), a kernel has fewer axes than
            general says, or nothing matched.
        TypeError: params is no mapping. Others: as ``jax_trirun.quantize``.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"quantize_params: params must be nested dicts, got {type(params).__name__}; "
            "an nnx.Module goes to quantize_module"
        )
    choose = _Chooser("quantize_params", include, exclude, group_size)
    layered = _compile("quantize_params", "stacked", stacked or ())
    several = _compile_general(general or {})
    plan = []
    for path, leaves in _modules(params):
        name, kernel = "/".join(path), linen.unbox(leaves.get("kernel"))
        sides = next((axes for pattern, axes in several if pattern.search(name)), (1, 1))
        if kernel is None:
            reason = f"has {', '.join(sorted(leaves))}, but no kernel"
        elif sides == (1, 1) and kernel.ndim != 2 and not (kernel.ndim > 2 and _matches(layered, name)):
            reason = (
                f"its kernel has {kernel.ndim} axes; name it in stacked= if the leading ones count layers, in "
                "general= if it has several input or output axes"
            )
        elif sides != (1, 1) and kernel.ndim < sum(sides):
            raise ValueError(
                f"{name}: quantize_params: general says {sides[0]} input and {sides[1]} output axes, but the kernel "
                f"has shape {kernel.shape}"
            )
        else:
            reason = ""
        shape = () if reason else _merged_shape(kernel.shape, sides)
        if (size := choose(name, shape, reason)) is not None:
            plan.append((path, size, sides))
    choose.check_any(plan)
    left, rows = _copy(params), []
    quant: dict[str, Any] = {}
    for path, size, sides in _progress(plan, progress):
        start, name = time.perf_counter(), "/".join(path)
        leaves = _descend(left, path)
        boxed, bias = leaves.pop("kernel"), leaves.pop("bias", None)
        original = linen.unbox(boxed)
        boxed, bias = _merged(boxed, sides), _merged(bias, sides[1:])
        kernel = jnp.asarray(linen.unbox(boxed))
        with _naming(name):
            weight = jax_trirun.quantize(
                kernel, method=method, group_size=size, scale_dtype=scale_dtype, bits=bits, **options
            )
        rows.append(_row(name, kernel, weight, start))
        _descend(quant, path).update(variables_of(weight, bias, like=boxed))
        if donate:
            jax.block_until_ready(weight)
            for array in (kernel, original):
                if isinstance(array, jax.Array) and not array.is_deleted():
                    array.delete()
        del kernel, boxed, original
    return _prune(left), quant, Report(rows, choose.skipped)


def _compile_general(general: Mapping[str, tuple[int, int]]) -> list[tuple[re.Pattern[str], tuple[int, int]]]:
    compiled = []
    for text, axes in general.items():
        (pattern,) = _compile("quantize_params", "general", text)
        counts = tuple(axes) if isinstance(axes, Sequence) else ()
        if len(counts) != 2 or not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(
                "quantize_params: general must say (how many input axes, how many output axes), such as (1, 2), for "
                f"each regular expression, got {axes!r} for {text!r}"
            )
        compiled.append((pattern, counts))
    return compiled


def _merged_shape(shape: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
    """With the last axes merged, ``sides`` of them at a time."""
    start = len(shape) - sum(sides)
    merged = list(shape[:start])
    for count in sides:
        merged.append(math.prod(shape[start : start + count]))
        start += count
    return tuple(merged)


def _merged(array: Any, sides: Sequence[int]) -> Any:
    """The same for an array, in a box with names of its axes or not."""
    if array is None or all(count == 1 for count in sides):
        return array
    value = jnp.asarray(linen.unbox(array))
    merged = value.reshape(_merged_shape(value.shape, sides))
    if not isinstance(array, linen.Partitioned):
        return merged
    return array.replace(value=merged, names=merged_names(array.names, value.ndim, sides))


class _Chooser:
    """Decides for each module: its group size, or None and a reason in ``skipped``."""

    def __init__(self, where: str, include: Patterns | None, exclude: Patterns, group_size: int | str):
        self.where, self.group_size = where, group_size
        self.skipped: dict[str, str] = {}
        self.include = None if include is None else _compile(where, "include", include)
        self.exclude = _compile(where, "exclude", exclude)
        if isinstance(group_size, str) and group_size != "auto":
            raise ValueError(f'{where}: group_size must be 32, 64, 128, -1 or "auto", got {group_size!r}')

    def __call__(self, name: str, shape: Sequence[int], unfit: str) -> int | None:
        reason = unfit
        if not reason and self.include is not None and not _matches(self.include, name):
            reason = "not in include"
        if not reason and (pattern := _matches(self.exclude, name)):
            reason = f"excluded by {pattern!r}"
        size: int | None = None if isinstance(self.group_size, str) else self.group_size
        if not reason and size is None:  # "auto"
            size = next((g for g in AUTO_GROUP_SIZES if shape[-2] % g == 0), None)
            if size is None:
                reason = f"no group size of {', '.join(map(str, AUTO_GROUP_SIZES))} divides K={shape[-2]}"
        if reason or size is None:
            self.skipped[name] = reason
            return None
        try:
            check_group_size(self.where, shape[-2], size)
        except ValueError as error:
            raise ValueError(f'{name}: {error}; or group_size="auto"') from error
        return size

    def check_any(self, plan: Sequence[Any]) -> None:
        if plan:
            return
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:4])
        raise ValueError(
            f"{self.where}: no module is left to quantise; change include or exclude ({reasons or 'none found'})"
        )


@dataclass(frozen=True)
class _Place:
    """Where a layer hangs in the model."""

    path: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    unfit: str = ""


def _places(node: Any, path: str = "", seen: set[int] | None = None) -> Iterator[_Place]:
    """Every place below ``node`` that holds a module with arrays of its own."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    for key, child in _children(node):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(child, nnx.Module) and _owns_params(child):
            yield _place(node, key, name)
        if not isinstance(child, nnx.Linear):
            yield from _places(child, name, seen)


def modules_with_arrays(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """(dotted path, module) of every place that holds a module with arrays of its own; "" is the model."""
    if _owns_params(model):
        yield "", model
    for place in _places(model):
        yield place.path, place.get()


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, nnx.Pytree):
        return [(key, value) for key, value in vars(node).items() if not key.startswith("_pytree__")]
    return []


def _place(parent: Any, key: Any, path: str) -> _Place:
    if isinstance(parent, nnx.List | list | dict):
        return _Place(path, lambda: parent[key], lambda layer: parent.__setitem__(key, layer))
    if isinstance(parent, tuple):
        return _Place(path, lambda: parent[key], _refuse, "sits in a tuple; make it an nnx.List")
    return _Place(path, lambda: getattr(parent, key), lambda layer: setattr(parent, key, layer))


def _refuse(layer: Any) -> None:
    raise TypeError("a tuple cannot change")


def _owns_params(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param | QuantParam) for value in vars(module).values())


def _unfit(module: nnx.Module) -> str:
    """Why a module cannot become a QuantDense; empty when it can."""
    if isinstance(module, QuantDense):
        return "quantised already"
    kind = next((k for k in (nnx.Linear, nnx.LinearGeneral) if isinstance(module, k)), None)
    if kind is None:
        return f"{type(module).__name__} is not nnx.Linear"
    if type(module).__call__ is not kind.__call__:
        return f"{type(module).__name__} changes what nnx.{kind.__name__} computes"
    if getattr(module, "batch_axis", None):
        return "has batch axes"
    own = getattr(module, "dot_general", None) not in (None, jax.lax.dot_general)
    if own or getattr(module, "dot_general_cls", None):
        return "has a dot_general of its own"
    return ""


def _tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _matrix(linear: Any) -> jax.Array:
    """The kernel [.., K, N] of a layer that fits."""
    return linear.kernel[...] if isinstance(linear, nnx.Linear) else kernel_matrix(linear)


def _modules(
    params: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path, arrays) of every dict that holds arrays."""
    leaves = {key: value for key, value in params.items() if not isinstance(value, Mapping)}
    if leaves:
        yield path, leaves
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _modules(value, (*path, key))


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _descend(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        tree = tree.setdefault(key, {})
    return tree


def _prune(tree: dict[str, Any]) -> dict[str, Any]:
    """Without dicts that became empty."""
    pruned = {key: _prune(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if not (isinstance(value, dict) and not value)}


def _compile(where: str, name: str, patterns: Patterns) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{where}: {name} must be regular expressions, got {patterns!r}: {error}; escape special characters"
        ) from error


def _matches(patterns: Sequence[re.Pattern[str]], name: str) -> str:
    """The first pattern found in ``name``, or an empty string."""
    return next((p.pattern for p in patterns if p.search(name)), "")


class _naming:
    """Puts the module's name in front of what goes wrong inside."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError):
            raise type(error)(f"{self.name}: {error}") from error


def _row(name: str, kernel: jax.Array, weight: QuantTensor, start: float) -> Row:
    error = _relative_error(kernel, weight)
    return Row(
        name,
        tuple(kernel.shape),
        weight.group_size,
        weight.bits,
        math.nan if isinstance(error, jax.core.Tracer) else float(error),
        kernel.nbytes,
        weight.nbytes,
        time.perf_counter() - start,
    )


@jax.jit
def _relative_error(kernel: jax.Array, weight: QuantTensor) -> jax.Array:
    kernel = kernel.astype(jnp.float32)
    lost = jnp.linalg.norm(kernel - jax_trirun.dequantize(weight, dtype=jnp.float32))
    return lost / jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(jnp.float32).tiny)


def _progress(plan: Sequence[Any], show: bool | None) -> Iterator[Any]:
    """Pass the plan on, and draw a bar on stderr."""
    show = sys.stderr.isatty() if show is None else show
    start = time.perf_counter()
    for i, step in enumerate(plan):
        if show:
            done = 30 * i // len(plan)
            sys.stderr.write(
                f"\rquantising [{'#' * done}{'.' * (30 - done)}] {i}/{len(plan)} {step[0]!s:.40}\x1b[K"
            )
            sys.stderr.flush()
        yield step
    if show:
        sys.stderr.write(f"\rquantised {len(plan)} modules in {time.perf_counter() - start:.1f} s\x1b[K\n")


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
