"""GGUF files (llama.cpp): their tensors as [in, out] arrays, a Llama's weights by module path.

A GGUF matrix is stored [out, in], a row in blocks along `in` (ggml-common.h, `block_q4_1` and so on):

    F32, F16, BF16   one number each
    Q4_0             32 numbers: float16 d, 16 bytes;               x = d (q - 8)
    Q4_1             32 numbers: float16 d, float16 m, 16 bytes;    x = d q + m
    Q8_0             32 numbers: float16 d, 32 int8;                x = d q
    TQ2_0            256 numbers: 64 bytes of 2-bit q, float16 d;   x = d (q - 1)
    TQ1_0            256 numbers: 52 bytes of base-3 digits q, float16 d;  x = d (q - 1)

Q4_0's and Q4_1's low nibbles are the block's first 16 numbers, the high ones its last 16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..types import QuantTensor
from .build import floats, quant_tensor
from .decoder import decoder_shapes
from .errors import CheckpointError, optional_import


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor: its type's name, its shape with the stored order ([out, in]), its bytes."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray  # flat uint8, mapped from the file


@dataclasses.dataclass(frozen=True)
class File:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def need(self, key: str) -> Any:
        """metadata[key], or a CheckpointError that names the file."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the GGUF metadata lack {key!r}")
        return self.metadata[key]

    def array(self, name: str) -> np.ndarray:
        """The tensor `name` in float32, matrices as [in, out]."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: the tensor {name!r} is missing")
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.type, shape=tensor.shape).T


def read(path: str | Path) -> File:
    """Opens a GGUF file; tensors are mapped, not read, until they are asked for.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: not a GGUF file, or a damaged one.
      ImportError: the package `gguf` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    gguf = optional_import("gguf", "reading a GGUF file")
    try:
        reader = gguf.GGUFReader(str(path))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not a readable GGUF file ({error}); it is damaged or cut short, fetch it again"
        ) from error
    tensors = {
        t.name: Tensor(
            t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data.reshape(-1).view(np.uint8)
        )
        for t in reader.tensors
    }
    return File(path, metadata, tensors)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _q4_0(blocks):
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks):
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q8_0(blocks):
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def tq2_0_codes(blocks: np.ndarray) -> np.ndarray:
    """[blocks, 66] bytes -> codes [blocks, 256]: each 32 bytes hold 4 runs of 32, lowest bits first."""
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return ((packed >> shifts) & 3).reshape(len(blocks), 256)


def tq1_0_codes(blocks: np.ndarray) -> np.ndarray:
    """[blocks, 54] bytes -> codes [blocks, 256].

    A byte holds 5 base-3 digits (the last 4 bytes hold 4) as a fraction of 256, rounded up: its first
    digit is floor(3 byte / 256), and multiplying by 3 modulo 256 brings the next one to the front.
    Bytes 0-31, 32-47 and 48-51 hold runs of 32, 16 and 4 numbers, one run a digit.
    """

    def digits(packed, count):
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        leading = (packed[:, None, :] * powers).astype(np.uint16)  # modulo 256, as intended
        return (leading * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)

    runs = [digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)]
    return np.concatenate(runs, axis=1)


def _tq2_0(blocks):
    return _half(blocks, 64) * (tq2_0_codes(blocks).astype(np.float32) - 1)


def _tq1_0(blocks):
    return _half(blocks, 52) * (tq1_0_codes(blocks).astype(np.float32) - 1)


@dataclasses.dataclass(frozen=True)
class _Type:
    block: int  # numbers in a block
    size: int  # bytes of a block
    decode: Callable[[np.ndarray], np.ndarray]  # [blocks, size] uint8 -> [blocks, block] float32


TYPES: Mapping[str, _Type] = {
    "F32": _Type(1, 4, lambda b: b.view(np.float32)),
    "F16": _Type(1, 2, lambda b: b.view(np.float16).astype(np.float32)),
    "BF16": _Type(1, 2, lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)),
    "Q4_0": _Type(32, 18, _q4_0),
    "Q4_1": _Type(32, 20, _q4_1),
    "Q8_0": _Type(32, 34, _q8_0),
    "TQ1_0": _Type(256, 54, _tq1_0),
    "TQ2_0": _Type(256, 66, _tq2_0),
}


def blocks_of(data: np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a tensor as [blocks, bytes a block]; CheckpointError when they do not fit."""
    if type not in TYPES:
        raise CheckpointError(f"GGUF tensors of type {type} are not supported, only {', '.join(TYPES)}")
    kind = TYPES[type]
    if shape[-1] % kind.block:
        raise CheckpointError(f"GGUF {type}: rows must be whole blocks of {kind.block}, got shape {shape}")
    wanted = int(np.prod(shape)) // kind.block * kind.size
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if data.size != wanted:
        raise CheckpointError(f"GGUF {type}: shape {shape} takes {wanted} bytes, got {data.size}")
    return data.reshape(-1, kind.size)


def dequantize(data: np.ndarray, type: str, *, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's bytes -> float32 numbers in the stored shape ([out, in] for a matrix).

    Raises:
      CheckpointError: a type that is not in TYPES, bytes that do not fit the shape.
    """
    blocks = blocks_of(data, type, shape)
    return TYPES[type].decode(blocks).reshape(shape)


def from_gguf(data: Any, type: str, shape: tuple[int, int]) -> QuantTensor | np.ndarray:
    """A stored matrix as W [in, out]: ternary types as a QuantTensor, the others as float32.

    A block's scale serves 256 inputs, two groups of 128. Q4_1 and the like have more levels than 2 bits:
    quantise them with jax_trirun.quantize.

    Args:
      data: the tensor's bytes.
      type: a key of TYPES.
      shape: (out, in).

    Raises:
      CheckpointError: a type that is not in TYPES, bytes that do not fit the shape.
    """
    codes_of = {"TQ1_0": tq1_0_codes, "TQ2_0": tq2_0_codes}.get(type)
    if codes_of is None:
        return dequantize(data, type, shape=shape).T
    fan_out, fan_in = shape
    blocks = blocks_of(np.asarray(data), type, shape)
    codes = codes_of(blocks).reshape(fan_out, fan_in).T
    scales = blocks[:, -2:].copy().view(np.float16).reshape(fan_out, fan_in // 256).T
    return quant_tensor("from_gguf", codes, floats("from_gguf", "block scales", scales), None, None)


def llama_config(file: File) -> dict[str, Any]:
    """The fields of a `flax_layers.llama.LlamaConfig` from a GGUF file's metadata."""
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: only the architecture 'llama' can be loaded, this file has {architecture!r}"
        )
    heads = file.need("llama.attention.head_count")
    config = {
        "vocab_size": len(file.need("tokenizer.ggml.tokens")),
        "hidden_size": file.need("llama.embedding_length"),
        "intermediate_size": file.need("llama.feed_forward_length"),
        "num_layers": file.need("llama.block_count"),
        "num_heads": heads,
        "num_kv_heads": file.metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": file.metadata.get("llama.attention.key_length", 0),
        "max_positions": file.need("llama.context_length"),
        "rope_theta": float(file.metadata.get("llama.rope.freq_base", 10000.0)),
        "rms_eps": float(file.need("llama.attention.layer_norm_rms_epsilon")),
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    if "rope_freqs.weight" in file.tensors:
        config["rope_factors"] = tuple(file.array("rope_freqs.weight").tolist())
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{file.path}: rotary scaling {scaling!r} is not supported")
    return config


def halves_from_interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation of q and k. w: [in, heads * D].

    llama.cpp rotates neighbours (2 i, 2 i + 1), the decoder i and i + D / 2, so its converter stored
    feature i + h D / 2 of every head at 2 i + h.
    """
    fan_in, fan_out = w.shape
    pairs = w.reshape(fan_in, heads, fan_out // heads // 2, 2)
    return pairs.swapaxes(2, 3).reshape(fan_in, fan_out)


_BLOCK_NAMES = {
    "self_attn.q_proj.kernel": "attn_q",
    "self_attn.k_proj.kernel": "attn_k",
    "self_attn.v_proj.kernel": "attn_v",
    "self_attn.o_proj.kernel": "attn_output",
    "mlp.gate_proj.kernel": "ffn_gate",
    "mlp.up_proj.kernel": "ffn_up",
    "mlp.down_proj.kernel": "ffn_down",
    "input_norm.scale": "attn_norm",
    "mlp_norm.scale": "ffn_norm",
}
_OUTER_NAMES = {
    "embed.embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "lm_head.kernel": "output.weight",
}


def llama_tensor(path: str) -> str:
    """The file's name of a decoder's weight: layers.3.mlp.up_proj.kernel is blk.3.ffn_up.weight."""
    if path in _OUTER_NAMES:
        return _OUTER_NAMES[path]
    _, layer, inner = path.split(".", 2)
    return f"blk.{layer}.{_BLOCK_NAMES[inner]}.weight"


def llama_weight(file: File, config: Mapping[str, Any], path: str) -> np.ndarray:
    """One weight of a `flax_layers.llama.Llama` by module path, float32, matrices [in, out]."""
    w = file.array(llama_tensor(path))
    if path == "embed.embedding":
        return w.T  # [vocab, hidden], the one not turned
    if heads := llama_heads(config, path):
        return halves_from_interleaved(w, heads)
    return w


def llama_heads(config: Mapping[str, Any], path: str) -> int:
    """How many heads' columns llama.cpp permuted in a weight; 0 for most."""
    name = path.split(".")[-2]
    return {"q_proj": config["num_heads"], "k_proj": config["num_kv_heads"]}.get(name, 0)


def llama_weights(file: File) -> dict[str, np.ndarray]:
    """The weights of a `flax_layers.llama.Llama` by module path, float32, matrices [in, out]."""
    config = llama_config(file)
    return {path: llama_weight(file, config, path) for path in decoder_shapes(config)}
