"""The safetensors file format, read and written whole or not at all.

    8 bytes   length of the header, little-endian
    header    JSON: {"name": {"dtype": "U32", "shape": [..], "data_offsets": [begin, end]}, ..,
                     "__metadata__": {"key": "value"}}, padded with spaces to a multiple of 8
    data      the tensors' bytes, little-endian, row-major, without gaps; offsets count from here

https://huggingface.co/docs/safetensors. Files are written under a temporary name in the same directory
and renamed when they are complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from .errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # as the reference implementation


def dtype_name(dtype: Any) -> str:
    """The format's name of a dtype. Raises TypeError when it has none."""
    if np.dtype(dtype) not in _NAMES:
        raise TypeError(f"safetensors has no name for dtype {np.dtype(dtype)}; it knows {', '.join(DTYPES)}")
    return _NAMES[np.dtype(dtype)]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file for writing that appears under `path` only when the block ends well."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are their owner's alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes arrays (NumPy's or JAX's), one at a time, in the given order."""
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": dtype_name(array.dtype),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data)


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, mapped from the file; metadata).

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: the file is cut short, damaged, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise damaged(path, f"a header of {length} bytes does not fit a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"its header cannot be read ({error})") from error
    _check_offsets(path, entries, size - 8 - length)
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    arrays = {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return arrays, metadata


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or not a safetensors file: {why}; get or write it again")


def _entry(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    begin, end = (int(n) for n in entry["data_offsets"])
    return DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]), begin, end


def _check_offsets(path: Path, entries: Mapping[str, tuple], size: int) -> None:
    """Every tensor has the bytes its shape needs, and together they fill the file without gaps."""
    at = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if begin != at or end - begin != wanted or min(shape, default=0) < 0:
            raise damaged(
                path, f"tensor {name!r} of shape {shape} needs {wanted} bytes from {at}, has {begin} to {end}"
            )
        at = end
    if at != size:
        raise damaged(path, f"its tensors take {at} bytes, the file has {size}")
