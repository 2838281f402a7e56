"""Packed models as safetensors: save and load.

A tree of dicts, lists, tuples, arrays, None and QuantTensors becomes tensors named by their path:

    layers.0.mlp.up.kernel.words     U32 [.., K / block_k, N / block_n, 128]
    layers.0.mlp.up.kernel.scales    F16, BF16 or F32 [.., K / G, N]
    layers.0.mlp.up.kernel.zeros     only when the QuantTensor has them
    norm.scale                       any other array, as it is

and a manifest, JSON under the metadata key "jax_trirun":

    {"format_version": 1,     of this structure
     "layout_version": 1,     of the words (csrc/layout.h); words of another version are refused
     "tree": node,            {"dict": [[key, node], ..]} | {"list": [node, ..]} | {"tuple": [node, ..]}
                              | {"none": true} | {"array": name}
                              | {"quant": name, "shape": [K, N], "group_size": G, "bits": 2, "zeros": bool}
     "crc32": {name: number}} of dtype, shape and bytes of every tensor

with its own CRC-32 beside it, "jax_trirun_crc32". One file holds both; a model in several files is a
directory of model-00001-of-00003.safetensors and so on, with the manifest in
model.safetensors.index.json, whose "weight_map" says which file has which tensor.

`Parts` writes such a directory a file at a time, `Packed` reads a model tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..layout import LAYOUT_VERSION
from ..types import QuantTensor
from . import safetensors
from .errors import CheckpointError

FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
_KEY, _CRC_KEY, _NOTES_KEY = "jax_trirun", "jax_trirun_crc32", "jax_trirun_notes"


def save(path: str | Path, tree: Any, *, shard_bytes: int | None = None, overwrite: bool = False) -> None:
    """Writes a tree of arrays and QuantTensors; `load` gives it back bit by bit.

    Nothing appears under `path` before all of it is written.

    Args:
      path: a file, its name ending in .safetensors; or a directory, which then holds the shards.
      tree: dicts (with keys of type str or int), lists, tuples, arrays, None, QuantTensors. From an nnx
        model: `nnx.to_pure_dict(nnx.state(model))`.
      shard_bytes: largest size of a shard, unless one tensor alone is larger; 4 GB when None. Only for
        a directory.
      overwrite: replace what is there.

    Raises:
      TypeError: the tree holds something else, or an array of a dtype that safetensors has not.
      ValueError: two leaves have the same name, or shard_bytes does not go with path.
      FileExistsError: path exists, and overwrite is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; delete it, choose another name, or pass overwrite=True")
    tensors: dict[str, Any] = {}
    manifest = _make_manifest(_flatten(tree, "", tensors), tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        if shard_bytes is not None:
            raise ValueError(f"save: shard_bytes needs a directory, got the file name {path}")
        safetensors.write(path, tensors, _sealed(manifest))
        return
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"save: shard_bytes must be positive, got {shard_bytes}")
    with _whole_directory(path) as directory:
        _write_shards(directory, tensors, manifest, 4_000_000_000 if shard_bytes is None else shard_bytes)


def load(path: str | Path) -> Any:
    """Reads what `save` wrote: the same tree, with JAX arrays (NumPy's where JAX would cut 64 bits to 32).

    Everything is checked before anything is returned: versions, names, shapes, checksums.

    Raises:
      FileNotFoundError: path, or a shard that the index names, does not exist.
      CheckpointError: not written by `save`, of another version, cut short, edited or damaged.
    """
    path = Path(path)
    if path.is_dir():
        tensors, metadata = _read_shards(path)
        path = path / INDEX
    else:
        tensors, metadata = safetensors.read(path)
    manifest = _manifest(path, metadata)
    wanted = manifest["crc32"]
    if missing := wanted.keys() - tensors.keys():
        raise CheckpointError(f"{path}: the tensor {min(missing)!r} is missing ({len(missing)} in all)")
    if unknown := tensors.keys() - wanted.keys():
        raise CheckpointError(
            f"{path}: the tensor {min(unknown)!r} is not in the manifest; it was added later"
        )
    for name, array in tensors.items():
        if _checksum(array) != wanted[name]:
            raise CheckpointError(
                f"{path}: the tensor {name!r} is damaged or was edited: its checksum is wrong"
            )
    return _unflatten(path, manifest["tree"], tensors)


class Packed:
    """A saved dict of arrays and QuantTensors, opened: they stay in the file until they are read.

    Raises:
      FileNotFoundError, CheckpointError: as `load`, but a tensor's checksum only when it is read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self._tensors, metadata = _read_shards(self.path)
        else:
            self._tensors, metadata = safetensors.read(self.path)
        manifest = _manifest(self.path, metadata)
        if "dict" not in manifest["tree"]:
            raise CheckpointError(
                f"{self.path}: wanted a saved dict of weights, got {next(iter(manifest['tree']))}"
            )
        self._crc32 = manifest["crc32"]
        self._nodes: dict[str, Any] = {str(key): node for key, node in manifest["tree"]["dict"]}
        self.notes: dict[str, Any] = json.loads(metadata.get(_NOTES_KEY, "{}"))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._nodes)

    def read(self, name: str) -> Any:
        """One entry of the dict: a JAX array, a QuantTensor, or a tree of them. Raises CheckpointError."""
        node = self._nodes[name]
        for stored in _tensor_names(node):
            if stored not in self._tensors:
                raise CheckpointError(f"{self.path}: the tensor {stored!r} is missing")
            if _checksum(self._tensors[stored]) != self._crc32[stored]:
                raise CheckpointError(
                    f"{self.path}: the tensor {stored!r} is damaged or was edited: its checksum is wrong"
                )
        return _unflatten(self.path, node, self._tensors)


class Parts:
    """A model directory written part by part, so that work that was stopped can go on.

    Each part is one shard, there whole or not at all. `load` takes the directory for a model only once
    `finish` has written its index.

    Args:
      directory: made if it does not exist.
      count: how many parts there will be, numbered from 0.
    """

    def __init__(self, directory: str | Path, count: int):
        self.directory, self.count = Path(directory), count
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, i: int) -> Path:
        return self.directory / _shard_name(i, self.count)

    def has(self, i: int) -> bool:
        return self.path(i).is_file()

    def write(self, i: int, part: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Writes one part, a dict of arrays and QuantTensors; notes, of JSON's types, stay beside it."""
        tensors: dict[str, Any] = {}
        manifest = _make_manifest(_flatten(part, "", tensors), tensors)
        safetensors.write(self.path(i), tensors, _sealed(manifest) | {_NOTES_KEY: json.dumps(notes or {})})

    def read(self, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(part, notes), checked as by `load`."""
        return load(self.path(i)), Packed(self.path(i)).notes

    def finish(self) -> None:
        """Writes the index. Raises FileNotFoundError when a part is missing."""
        nodes: list[Any] = []
        checksums: dict[str, int] = {}
        where: dict[str, str] = {}
        total = 0
        for i in range(self.count):
            tensors, metadata = safetensors.read(self.path(i))
            manifest = _manifest(self.path(i), metadata)
            nodes += manifest["tree"]["dict"]
            checksums |= manifest["crc32"]
            where |= dict.fromkeys(tensors, self.path(i).name)
            total += sum(array.nbytes for array in tensors.values())
        manifest = {
            "format_version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
            "tree": {"dict": nodes},
            "crc32": checksums,
        }
        _write_index(self.directory, manifest, where, total)


def _tensor_names(node: Mapping[str, Any]) -> list[str]:
    """The names of the tensors under a node of the manifest."""
    if "array" in node:
        return [node["array"]]
    if "quant" in node:
        parts = ("words", "scales", "zeros")[: 3 if node["zeros"] else 2]
        return [f"{node['quant']}.{part}" if node["quant"] else part for part in parts]
    children = [child for _, child in node.get("dict", ())] + node.get("list", []) + node.get("tuple", [])
    return [name for child in children for name in _tensor_names(child)]


def _make_manifest(tree: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "layout_version": LAYOUT_VERSION,
        "tree": tree,
        "crc32": {name: _checksum(array) for name, array in tensors.items()},
    }


def _flatten(node: Any, name: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Adds the leaves under `node` to tensors; the manifest's node."""

    def inside(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    def put(leaf_name: str, array: Any) -> str:
        leaf_name = leaf_name or "value"
        if leaf_name in tensors or leaf_name == "__metadata__":
            raise ValueError(
                f"save: two leaves are named {leaf_name!r}, or the name is reserved; rename a key"
            )
        safetensors.dtype_name(array.dtype)
        tensors[leaf_name] = array
        return leaf_name

    if isinstance(node, QuantTensor):
        for part in ("words", "scales", "zeros"):
            if getattr(node, part) is not None:
                put(inside(part), getattr(node, part))
        static = {"shape": list(node.shape), "group_size": node.group_size, "bits": node.bits}
        return {"quant": name, "zeros": node.zeros is not None, **static}
    if node is None:
        return {"none": True}
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"save: keys must be str or int, got {key!r} under {name or 'the root'!r}")
        return {"dict": [[key, _flatten(value, inside(key), tensors)] for key, value in node.items()]}
    if type(node) in (list, tuple):
        children = [_flatten(value, inside(i), tensors) for i, value in enumerate(node)]
        return {type(node).__name__: children}
    if not (hasattr(node, "dtype") and hasattr(node, "shape")):
        raise TypeError(
            "save: the tree may hold dicts, lists, tuples, arrays, None and QuantTensors, got "
            f"{type(node).__name__} at {name or 'the root'!r}"
        )
    return {"array": put(name, node)}


def _unflatten(path: Path, node: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    def array(name: str) -> Any:
        stored = tensors[name]
        if jax.dtypes.canonicalize_dtype(stored.dtype) != stored.dtype:
            return np.array(stored)  # 64 bits, which JAX would cut to 32
        return jnp.array(stored)  # a copy: the file may go

    if "dict" in node:
        return {key: _unflatten(path, child, tensors) for key, child in node["dict"]}
    if "list" in node:
        return [_unflatten(path, child, tensors) for child in node["list"]]
    if "tuple" in node:
        return tuple(_unflatten(path, child, tensors) for child in node["tuple"])
    if "none" in node:
        return None
    if "array" in node:
        return array(node["array"])
    name = node["quant"]
    parts = [f"{name}.{part}" if name else part for part in ("words", "scales", "zeros")]
    try:
        return QuantTensor(
            *(array(part) for part in parts[: 3 if node["zeros"] else 2]),
            shape=tuple(node["shape"]),
            group_size=node["group_size"],
            bits=node["bits"],
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {name or 'the weight'}: {error}") from error


def _checksum(array: Any) -> int:
    array = np.ascontiguousarray(np.asarray(array))
    kind = f"{safetensors.dtype_name(array.dtype)}{list(array.shape)}".encode()
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(kind))


def _sealed(manifest: Mapping[str, Any]) -> dict[str, str]:
    text = json.dumps(manifest, separators=(",", ":"))
    return {_KEY: text, _CRC_KEY: str(zlib.crc32(text.encode())), "format": _KEY}


def _manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The checked manifest in a file's metadata."""
    text = metadata.get(_KEY)
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path}: its metadata lack {_KEY!r}: it was not written by jax_trirun.checkpoints.save; models of "
            "other projects are read with the from_... functions"
        )
    if metadata.get(_CRC_KEY) != str(zlib.crc32(text.encode())):
        raise CheckpointError(f"{path}: the manifest is damaged or was edited: its checksum is wrong")
    manifest = json.loads(text)
    for key, ours in (("format_version", FORMAT_VERSION), ("layout_version", LAYOUT_VERSION)):
        theirs = manifest.get(key)
        if theirs != ours:
            raise CheckpointError(
                f"{path}: {key} is {theirs}, this jax_trirun reads {ours}; use the version that wrote it, or "
                "quantise the model again"
            )
    return manifest


def _write_shards(
    directory: Path, tensors: Mapping[str, Any], manifest: Mapping[str, Any], limit: int
) -> None:
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = _shard_name(i - 1, len(shards))
        safetensors.write(directory / file, shard, {"format": _KEY})
        where |= dict.fromkeys(shard, file)
    _write_index(directory, manifest, where, sum(array.nbytes for array in tensors.values()))


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _write_index(
    directory: Path, manifest: Mapping[str, Any], where: Mapping[str, str], total_size: int
) -> None:
    index = {"metadata": {"total_size": total_size, **_sealed(manifest)}, "weight_map": dict(where)}
    with safetensors.whole_file(directory / INDEX) as target:
        target.write(json.dumps(index, indent=1).encode())


def _read_shards(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    index_path = directory / INDEX
    if not index_path.is_file():
        raise FileNotFoundError(f"{index_path}: no such file; {directory} holds no model written by save")
    try:
        index = json.loads(index_path.read_bytes())
        where, metadata = dict(index["weight_map"]), dict(index["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index_path}: not a readable index ({error}); it is damaged") from error
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_path}: the shard {file!r} is not in the same directory")
        stored, _ = safetensors.read(directory / file)
        for name, array in stored.items():
            if where.get(name) != file:
                raise CheckpointError(
                    f"{directory / file}: the index does not place the tensor {name!r} here"
                )
            tensors[name] = array
    return tensors, metadata


@contextlib.contextmanager
def _whole_directory(path: Path):
    """A directory for writing that takes the name `path` only when the block ends well."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        directory = temporary / path.name
        directory.mkdir()
        yield directory
        if path.exists():
            os.replace(path, temporary / "old")
        os.replace(directory, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
