"""Versions, back ends and devices of this installation: what to put into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

HELP = "versions, back ends, instruction sets, devices"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing to choose


def run(arguments: argparse.Namespace) -> None:
    del arguments
    print("\n".join(f"{name:<14} {value}" for name, value in lines()))


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
