"""Versions, back ends and devices of this installation, to put into a bug report; or what a model holds.

    python -m jax_trirun info                 # this installation
    python -m jax_trirun info smollm2-2bit    # a model: memory by tensor, bits a weight

MODEL may be packed, float, 2-bit of another project, or a GGUF file. Only tensors are read, one at a time.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from ..checkpoints import gguf, open_model
from ..checkpoints.models import Model
from ..types import QuantTensor
from . import model as shared
from .convert import describe, table

HELP = "versions, back ends, devices; or a model's memory by tensor and bits a weight"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers", "lm-eval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=shared.MODEL_HELP.replace(" (default)", ""))
    parser.add_argument(
        "--every", action="store_true", help="a line for each tensor, not for each kind of layer"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        print("\n".join(f"{name:<14} {value}" for name, value in lines()))
        return
    model = open_model(shared.find(arguments.model))
    config = model.config
    print(f"model      {model.name}: {model.path}\nformat     {model.format}")
    print(
        f"           {config['num_layers']} layers, hidden {config['hidden_size']}, MLP "
        f"{config['intermediate_size']}, vocabulary {config['vocab_size']}"
    )
    tensors = list(stored_tensors(model))
    print(table(tensors, every=arguments.every))
    print(summary(tensors))


def stored_tensors(model: Model) -> Iterator[dict[str, Any]]:
    """`convert.describe` of every weight as the file has it; a GGUF tensor's kind is the file's type."""
    blocks = gguf.read(model.path).tensors if model.format == "gguf" else None
    for path, shape in model.shapes.items():
        if blocks is None:
            value = model.read(path)
            kind = f"{value.bits}-bit" if isinstance(value, QuantTensor) else "float"
            yield describe(path, value, kind)
            continue
        tensor = blocks[gguf.llama_tensor(path)]
        yield {
            "name": path,
            "kind": tensor.type,
            "shape": list(shape),
            "dtype": "",
            "bytes": tensor.data.nbytes,
            "bits_a_weight": 8 * tensor.data.nbytes / math.prod(shape),
        }


def summary(tensors: Sequence[Mapping[str, Any]]) -> str:
    """Weights, memory and bits a weight by kind, and of all; then what the commands need to hold them."""
    kinds = dict.fromkeys(t["kind"] for t in tensors)
    parts = {kind: [t for t in tensors if t["kind"] == kind] for kind in kinds} | {"all": list(tensors)}
    text = []
    for kind, some in parts.items():
        count, memory = (sum(math.prod(t["shape"]) for t in some), sum(t["bytes"] for t in some))
        text.append(
            f"{kind:<10} {len(some):,} tensors, {count:,} weights, {shared.megabytes(memory)}, "
            f"{8 * memory / count:.3f} bits a weight"
        )
    loaded = sum(t["bytes"] if "group_size" in t else 4 * math.prod(t["shape"]) for t in tensors)
    text.append(f"loaded     {shared.megabytes(loaded)}: packed weights as they are, the others in float32")
    return "\n".join(text)


def lines() -> list[tuple[str, str]]:
    """(what, value) pairs in the order they are printed."""
    import jax

    import jax_trirun
    from jax_trirun import _ffi

    found = [("jax_trirun", f"{jax_trirun.__version__}, packed layout {jax_trirun.LAYOUT_VERSION}")]
    found += [(name, _version(name)) for name in PACKAGES]
    found.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    usable = _ffi.usable_backends()
    for name in _ffi.KNOWN_BACKENDS:
        found.append((f"backend {name}", _backend(name, name in usable)))
    cpu = _ffi.cpu_module
    others = [isa for isa in cpu.available_isas() if isa != cpu.current_isa()]
    found.append(
        (
            "cpu kernels",
            f"{cpu.current_isa()} in use"
            + (f"; JAX_TRIRUN_CPU_ISA can pick {', '.join(others)}" if others else ""),
        )
    )
    for device in jax.devices():
        found.append((f"device {device.id}", f"{device.platform}: {device.device_kind}"))
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backend(name: str, usable: bool) -> str:
    from jax_trirun import _ffi

    if name == "reference":
        return "plain JAX, everywhere"
    if name not in _ffi.BACKENDS:
        return "not built into this installation"
    module = _ffi.BACKENDS[name]
    return f"built, registered for {module.platform}, " + ("usable" if usable else "no such device here")
