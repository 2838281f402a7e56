"""The back ends of this installation: native modules, their FFI targets, their platforms.

The only file that knows platform names. A back end that was not built is quiet; one that was built and
does not load is an ImportError.

A native module offers

    ffi_api_version() -> (major, minor)     of the headers it was built with
    ffi_handlers() -> {target: capsule}     with MATMUL_TARGET among the targets; on CUDA DEQUANTIZE_TARGET too

and on CUDA, whose matmul has a uint8 scratch array as its second result if it needs any, and an int64 attribute
"portable", with dtypes by their NumPy names:

    why_unsupported(m, n, k, groups, x_dtype, scale_dtype, out_dtype, portable) -> "" or a sentence
    describe_kernel(m, n, k, groups, x_dtype, scale_dtype, out_dtype, zeros, portable) -> a few words
    scratch_bytes(m, n, k, groups, x_dtype, portable) -> int
"""

import importlib
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir

MATMUL_TARGET = "jax_trirun_matmul_v1"
DEQUANTIZE_TARGET = "jax_trirun_dequantize_v1"
PACK_TARGET = "jax_trirun_pack_v1"
UNPACK_TARGET = "jax_trirun_unpack_v1"


class Backend(NamedTuple):
    """One value of ``backend=``: a native module on a platform, with the attributes its FFI call takes."""

    name: str
    platform: str  # as JAX's lowering rules name it
    module: ModuleType
    attributes: dict[str, np.int64]


# Native module -> platform, and the back ends it serves with their FFI attributes.
_MODULES: dict[str, tuple[str, dict[str, dict[str, np.int64]]]] = {
    "_cpu": ("cpu", {"cpu": {}}),
    "_cuda": ("cuda", {"cuda": {"portable": np.int64(0)}, "cuda-portable": {"portable": np.int64(1)}}),
}
KNOWN_BACKENDS = ("reference", *(name for _, names in _MODULES.values() for name in names))


def ffi_version_error(built: tuple[int, int], runtime: tuple[int, int] | None) -> str:
    """ "" or why a module built with FFI version ``built`` must not be registered with ``runtime``.

    XLA refuses handlers built with a newer minor version than its own, and takes the whole platform
    down with them; older handlers are welcome.
    """
    if runtime is None or (built[0] == runtime[0] and built[1] <= runtime[1]):
        return ""
    return (
        f"jax_trirun was built with XLA FFI {built[0]}.{built[1]}, but the installed jaxlib has "
        f"{runtime[0]}.{runtime[1]}. Upgrade jaxlib, or rebuild with `pip install --force-reinstall "
        "--no-deps jax_trirun` from source, which builds against the oldest supported jaxlib."
    )


def runtime_ffi_version() -> tuple[int, int] | None:
    """(major, minor) of the installed jaxlib's FFI, or None when its headers are missing."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


def _load(module_name: str, platform: str, *, required: bool) -> ModuleType | None:
    full_name = f"{__package__}.{module_name}"
    if importlib.util.find_spec(full_name) is None:
        if required:
            raise ImportError(
                f"jax_trirun's native module {full_name} is missing: {pathlib.Path(__file__).parent} looks like "
                "a source tree. Install the package (pip install .), and import it from another folder or with "
                "python -P, which does not look into the current one."
            )
        return None
    module = importlib.import_module(full_name)
    if error := ffi_version_error(tuple(module.ffi_api_version()), runtime_ffi_version()):
        raise ImportError(error)
    for target, handler in module.ffi_handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module


def _load_all() -> dict[str, Backend]:
    table: dict[str, Backend] = {}
    for module_name, (platform, names) in _MODULES.items():
        module = _load(module_name, "CUDA" if platform == "cuda" else platform, required=platform == "cpu")
        if module is not None:
            table |= {name: Backend(name, platform, module, attrs) for name, attrs in names.items()}
    if "cuda" not in table:  # nothing here calls it then, but a program exported elsewhere may
        for target, handler in table["cpu"].module.missing_cuda_handlers().items():
            jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return table


BACKENDS: dict[str, Backend] = _load_all()
cpu_module: ModuleType = BACKENDS["cpu"].module


def usable_backends() -> tuple[str, ...]:
    """The back ends whose module is installed and whose platform has a device now, and "reference"."""

    def has_device(platform: str) -> bool:
        try:
            return bool(jax.devices(platform))
        except RuntimeError:  # JAX's way to say that it has no such platform
            return False

    return ("reference", *(b.name for b in BACKENDS.values() if has_device(b.platform)))


def backend_error(name: str | None) -> str:
    """ "" or why ``backend=name`` cannot be had in this installation."""
    choices = ", ".join(repr(b) for b in ("reference", *BACKENDS))
    if name is None or name == "reference" or name in BACKENDS:
        return ""
    if name in KNOWN_BACKENDS:
        return (
            f"backend={name!r} is not in this installation, which was built without it; "
            f"use None (the best there is), one of {choices}, or reinstall where nvcc is found"
        )
    return f"backend must be None or one of {choices}, got {name!r}"


def platform_error(name: str | None, platform: str) -> str:
    """ "" or why ``backend=name`` cannot run on ``platform``."""
    if name is None or name == "reference" or BACKENDS[name].platform == platform:
        return ""
    return (
        f"matmul: backend={name!r} runs on {BACKENDS[name].platform}, but this computation is being "
        f"compiled for {platform}; use backend=None, or move the arrays with jax.device_put"
    )


def lower_call(target: str, ctx: Any, operands: Sequence[Any], attributes: dict[str, Any]) -> Sequence[Any]:
    """A call of ``target`` in the module being lowered; returns its results.

    In a module for ``jax.export`` the call carries a note, which JAX prints with the call if it refuses it.
    """
    results: Any = jax.ffi.ffi_lowering(target)(ctx, *operands, **attributes)
    if ctx.module_context.lowering_parameters.for_export:
        note = "pass disabled_checks=jax_trirun.export_disabled_checks() to jax.export.export"
        call = results[0].owner
        call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(
            {"to_export": mlir.ir.StringAttr.get(note)}
        )
    return results


def default_platform() -> str:
    """The platform that JAX compiles for unless told otherwise, as lowering rules name it."""
    device = getattr(jax.config, "jax_default_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    if platform == "gpu":
        platform = "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"
    return platform
