"""How each linear layer of a model is to be quantised: a method with its options, chosen by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..types import GROUP_SIZES, QuantTensor
from . import METHODS, gptq, gptq_and_damping, quantize

# Methods that need the inputs a layer sees, with the options that make them what they are.
CALIBRATED: Mapping[str, Mapping[str, Any]] = {"gptq": {}, "gptq-ternary": {"ternary": True}}
ALL_METHODS = (*METHODS, *CALIBRATED)
# Embeddings are looked up, norms are vectors, and the head decides every token: 2 bits cost most there.
DEFAULT_SKIP = (r"embed", r"norm", r"(^|\.)lm_head($|\.)")


@dataclass(frozen=True)
class Recipe:
    """A method and its options.

    Attributes:
        method: one of ALL_METHODS.
        bits, group_size, scale_dtype: as ``jax_trirun.quantize``.
        options: further keyword arguments of the method.

    Raises:
        ValueError: an unknown method, option or group size.
    """

    method: str = "gptq"
    bits: int = 2
    group_size: int = 64
    scale_dtype: str = "float16"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in ALL_METHODS:
            raise ValueError(f"method must be one of {', '.join(ALL_METHODS)}, got {self.method!r}")
        if self.group_size not in (*GROUP_SIZES, -1):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size must be {sizes} or -1 (all of K), got {self.group_size!r}")
        function = gptq if self.calibrated else METHODS[self.method]
        known = _options(function).keys() - CALIBRATED.get(self.method, {}).keys()
        if unknown := sorted(self.options.keys() - known):
            takes = ", ".join(sorted(known)) or "none"
            raise ValueError(f"method {self.method!r} has no option {unknown[0]!r}; its options: {takes}")

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a Hessian."""
        return self.method in CALIBRATED

    def __call__(self, w: jax.Array, hessian: jax.Array | None) -> tuple[QuantTensor, float | None]:
        """w [K, N] quantised, and the damping that was used (None where the method has none).

        Raises:
            ValueError, TypeError: as ``quantize`` and ``gptq``; a calibrated method without a Hessian.
        """
        common: dict[str, Any] = {
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
            "bits": self.bits,
        }
        if not self.calibrated:
            return quantize(w, method=self.method, **common, **self.options), None
        if hessian is None:
            raise ValueError(f"method {self.method!r} needs calibration text")
        options = {**_options(gptq), **CALIBRATED[self.method], **self.options}
        weight, damping = gptq_and_damping(w, hessian, **common, **options)
        return weight, None if isinstance(damping, jax.core.Tracer) else float(damping)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises what quantising weights of this shape [K, N] would, whatever their values: it traces only.

        Raises:
            ValueError, TypeError: as ``quantize`` and ``gptq``.
        """
        hessian = jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32) if self.calibrated else None
        jax.eval_shape(lambda w, h: self(w, h)[0], jax.ShapeDtypeStruct(shape, jnp.float32), hessian)

    def changed(self, **changes: Any) -> Recipe:
        """With other values; names that are no attribute are the method's options.

        A new method keeps none of the old one's options.
        """
        named = {k: v for k, v in changes.items() if k in ("method", "bits", "group_size", "scale_dtype")}
        options = {k: v for k, v in changes.items() if k not in named}
        kept = {} if named.get("method", self.method) != self.method else self.options
        return replace(self, **named, options={**kept, **options})


@dataclass(frozen=True)
class Recipes:
    """Which recipe each module has. Patterns are regular expressions searched for in its path.

    Attributes:
        default: of every module that nothing else fits.
        overrides: (pattern, changes of the default) pairs; the last that fits counts, and wins over
            ``default_skip``.
        skip: patterns of modules left as they are; they win over everything.
        default_skip: the same, unless an override names the module: embeddings, norms, the head.

    Raises:
        ValueError: a pattern is no regular expression, an override is not valid.
    """

    default: Recipe = field(default_factory=Recipe)
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = ()
    skip: Sequence[str] = ()
    default_skip: Sequence[str] = DEFAULT_SKIP

    def __post_init__(self) -> None:
        for pattern in (*self.skip, *self.default_skip, *(pattern for pattern, _ in self.overrides)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
        for pattern, changes in self.overrides:
            try:
                self.default.changed(**changes)
            except ValueError as error:
                raise ValueError(f"override of {pattern!r}: {error}") from error

    def of(self, name: str) -> Recipe | None:
        """The recipe of the module ``name``, None when it is skipped."""
        if any(re.search(pattern, name) for pattern in self.skip):
            return None
        for pattern, changes in reversed(self.overrides):
            if re.search(pattern, name):
                return self.default.changed(**changes)
        if any(re.search(pattern, name) for pattern in self.default_skip):
            return None
        return self.default

    def unused(self, names: Sequence[str]) -> list[str]:
        """Patterns of ``skip`` and ``overrides`` that fit none of these modules."""
        patterns = dict.fromkeys((*self.skip, *(pattern for pattern, _ in self.overrides)))
        return [p for p in patterns if not any(re.search(p, name) for name in names)]


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """'regex=method=rtn,group_size=32' -> (regex, {"method": "rtn", "group_size": 32}).

    Raises:
        ValueError: it does not look like that.
    """
    found = re.fullmatch(r"(.+?)=(\w+=[^=,]+(?:,\w+=[^=,]+)*)", text)
    if not found:
        raise ValueError(f"an override must look like 'regex=method=rtn,group_size=32', got {text!r}")
    pairs = (pair.split("=") for pair in found[2].split(","))
    return found[1], {name: _value(value) for name, value in pairs}


def _value(text: str) -> Any:
    """text as a bool, an int or a float where it is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """A method's keyword arguments that are not a recipe's own, with their defaults."""
    keywords = (p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
    return {p.name: p.default for p in keywords if p.name not in ("bits", "group_size", "scale_dtype")}
