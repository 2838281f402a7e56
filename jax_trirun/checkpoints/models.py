"""A decoder's weights in anyone's files, read one at a time under the decoder's own names.

`open_model` takes a GGUF file, a directory of Hugging Face's (config.json and safetensors, float or in
one of the 2-bit formats), or what `quantize` and `convert` wrote. `Model.read` gives an array as stored,
matrices [in, out], or a QuantTensor where the file holds 2-bit codes.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..layout import LAYOUT_VERSION
from ..pack import pack, unpack
from ..types import QuantTensor
from . import gguf, safetensors
from .bitnet import from_bitnet
from .build import Requantize
from .compressed_tensors import from_compressed_tensors
from .decoder import config_from_json, config_to_json, decoder_shapes
from .errors import CheckpointError, InexactError
from .gptq import from_gptq
from .hqq import from_hqq
from .packed import FORMAT_VERSION, INDEX, Packed
from .tokenizer import Tokenizer
from .trirun import from_trirun

CONFIG = "config.json"
PACKED = "jax_trirun"
_SINGLE = "model.safetensors"


class Model(abc.ABC):
    """A decoder's weights in a file, opened: nothing is read before it is asked for.

    Attributes:
      path: file or directory.
      name: of the model, for people.
      format: "gguf", "float", "gptq", "gptq_v2", "bitnet", "compressed-tensors", "hqq", "trirun" or
        "jax_trirun".
      config: the fields of a `flax_layers.llama.LlamaConfig`.
    """

    path: Path
    name: str
    format: str
    config: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every weight, in the order of use."""
        return decoder_shapes(self.config)

    def read(self, path: str) -> np.ndarray | QuantTensor:
        """One weight by module path ("layers.0.mlp.up_proj.kernel").

        Raises:
          CheckpointError: it is missing, damaged, of another shape, or holds what cannot be represented.
        """
        value = self._read(path)
        wanted = self.shapes[path]
        if tuple(value.shape) != wanted:
            raise CheckpointError(f"{self.path}: {path} must have shape {wanted}, got {tuple(value.shape)}")
        return value

    @abc.abstractmethod
    def _read(self, path: str) -> np.ndarray | QuantTensor: ...

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies with the weights. Raises FileNotFoundError or CheckpointError."""


def open_model(path: str | Path, *, requantize: Requantize = None) -> Model:
    """Opens a decoder, whatever its format.

    Args:
      path: a GGUF file, or a directory with config.json and safetensors files.
      requantize: arguments of `jax_trirun.quantize`, for 2-bit weights that cannot be represented
        exactly; without them `read` raises CheckpointError there.

    Raises:
      FileNotFoundError: no such file, or files missing in the directory.
      CheckpointError: a format, an architecture or a number of bits that is not supported.
      ImportError: a package for reading the format is not installed.
    """
    path = Path(path)
    if path.is_dir():
        config = _read_json(path / CONFIG)
        method = (config.get("quantization_config") or {}).get("quant_method")
        return PackedModel(path, config) if method == PACKED else HuggingFaceModel(path, config, requantize)
    if path.exists() and path.suffix != ".gguf":
        raise CheckpointError(
            f"{path}: wanted a .gguf file, or a directory with config.json and safetensors files"
        )
    return GgufModel(path)


def write_config(directory: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a packed model's config.json; `about`, of JSON's types, describes its quantisation."""
    quantization = {
        "quant_method": PACKED,
        "format_version": FORMAT_VERSION,
        "layout_version": LAYOUT_VERSION,
        **about,
    }
    text = json.dumps(config_to_json(config) | {"quantization_config": quantization}, indent=2)
    with safetensors.whole_file(directory / CONFIG) as file:
        file.write(text.encode())


class GgufModel(Model):
    """A GGUF file: float32 arrays; TQ1_0 and TQ2_0 as QuantTensors."""

    format = "gguf"

    def __init__(self, path: Path):
        self.path, self._file = path, gguf.read(path)
        self.name = str(self._file.metadata.get("general.name", path.stem))
        self.config = gguf.llama_config(self._file)

    def _read(self, path: str) -> np.ndarray | QuantTensor:
        tensor = self._file.tensors.get(gguf.llama_tensor(path))
        if tensor is None or tensor.type not in ("TQ1_0", "TQ2_0") or path == "embed.embedding":
            return gguf.llama_weight(self._file, self.config, path)
        weight = gguf.from_gguf(tensor.data, tensor.type, (tensor.shape[0], tensor.shape[1]))
        assert isinstance(weight, QuantTensor)
        if heads := gguf.llama_heads(self.config, path):
            order = gguf.halves_from_interleaved(np.arange(weight.shape[1])[None], heads)[0]
            weight = take_columns(weight, order)
        return weight

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._file)


class PackedModel(Model):
    """A directory that `quantize` or `convert` wrote."""

    format = PACKED

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self.path, self.name = path, path.name
        self.config = config_from_json(str(path / CONFIG), config)
        self._packed = Packed(path)
        if missing := self.shapes.keys() - set(self._packed.names):
            raise CheckpointError(f"{path}: the weight {min(missing)!r} is missing ({len(missing)} in all)")

    def _read(self, path: str) -> np.ndarray | QuantTensor:
        value = self._packed.read(path)
        return value if isinstance(value, QuantTensor) else np.asarray(value)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)


_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def hugging_face_module(path: str) -> str:
    """Hugging Face's module of a decoder's weight: layers.3.mlp_norm.scale is in
    model.layers.3.post_attention_layernorm."""
    module = path.rpartition(".")[0]
    if module in _OUTER:
        return _OUTER[module]
    parent, _, leaf = module.rpartition(".")
    return f"model.{parent}.{_NORMS.get(leaf, leaf)}"


class HuggingFaceModel(Model):
    """A directory with config.json and safetensors files, float or in a 2-bit format."""

    def __init__(self, path: Path, config: Mapping[str, Any], requantize: Requantize):
        self.path, self.name = path, path.name
        self.config = config_from_json(str(path / CONFIG), config)
        self._tensors = _open_tensors(path)
        self._requantize = requantize
        self._quantization: Mapping[str, Any] = _quantization(path, config)
        self.format = self._format()

    def _format(self) -> str:
        method = self._quantization.get("quant_method")
        if method is None:
            marlin = any(name.endswith(".B") for name in self._tensors)
            return "trirun" if marlin else "float"
        where = self.path / CONFIG
        if method not in ("gptq", "bitnet", "compressed-tensors", "hqq"):
            raise CheckpointError(
                f"{where}: quant_method must be gptq, bitnet, compressed-tensors, hqq or {PACKED}, got {method!r}"
            )
        bits = _bits(method, self._quantization)
        if bits != {2}:
            raise CheckpointError(
                f"{where}: only 2-bit weights can be packed, these have bits={sorted(bits)}"
            )
        version = self._quantization.get("checkpoint_format", "gptq")
        if method == "gptq" and version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{where}: checkpoint_format must be gptq or gptq_v2, got {version!r}")
        return version if method == "gptq" else method

    def _read(self, path: str) -> np.ndarray | QuantTensor:
        module = hugging_face_module(path)
        parts = {
            name[len(module) + 1 :]: tensor
            for name, tensor in self._tensors.items()
            if name.startswith(module + ".")
        }
        if not parts:
            raise CheckpointError(f"{self.path}: {module} ({path}) is missing")
        bias = parts.pop("bias", None)
        if bias is not None and np.any(bias):
            raise CheckpointError(f"{self.path}: {module} has a bias, which the decoder has not")
        try:
            return self._weight(path, module, parts)
        except InexactError as error:
            raise InexactError(f"{self.path}: {module}: {error}", error.why, error.weight) from error
        except KeyError as error:
            raise CheckpointError(f"{self.path}: {module}.{error.args[0]} is missing") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {module}: {error}") from error

    def _weight(self, path: str, module: str, parts: Mapping[str, np.ndarray]) -> np.ndarray | QuantTensor:
        again = self._requantize
        stored = parts.get("weight")
        if stored is not None and (self.format != "bitnet" or stored.dtype != np.uint8):
            if str(stored.dtype) not in ("float16", "bfloat16", "float32"):
                raise CheckpointError(f"weight must be float, got {stored.dtype}")
            return stored.T if path.endswith(".kernel") else stored
        shape = self.shapes[path]
        if self.format in ("gptq", "gptq_v2"):
            version = 2 if self.format == "gptq_v2" else 1
            return from_gptq(
                parts["qweight"],
                parts["qzeros"],
                parts["scales"],
                parts.get("g_idx"),
                version=version,
                requantize=again,
            )
        if self.format == "bitnet":
            if "rms_norm.weight" in parts:
                raise CheckpointError("it has a norm of its own (use_rms_norm), which the decoder has not")
            kind = self._quantization.get("linear_class", "bitlinear")
            return from_bitnet(
                parts["weight"], parts["weight_scale"], linear_class=kind, out_features=shape[1]
            )
        if self.format == "compressed-tensors":
            return from_compressed_tensors(
                parts["weight_packed"],
                parts["weight_scale"],
                parts["weight_shape"],
                parts.get("weight_zero_point"),
                parts.get("weight_g_idx"),
                requantize=again,
            )
        if self.format == "hqq":
            return _read_hqq(parts, again)
        if self.format == "trirun":
            return from_trirun(parts["B"], parts["s"], requantize=again)
        raise CheckpointError(
            f"it has {', '.join(sorted(parts))}, but no weight, and config.json names no format"
        )

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)


def take_columns(weight: QuantTensor, order: np.ndarray) -> QuantTensor:
    """W[:, order], packed."""
    codes = unpack(weight.words, weight.shape, bits=weight.bits)[:, order]
    return QuantTensor(
        pack(codes, bits=weight.bits),
        jnp.asarray(weight.scales)[..., order],
        None if weight.zeros is None else jnp.asarray(weight.zeros)[..., order],
        shape=weight.shape,
        group_size=weight.group_size,
        bits=weight.bits,
    )


def _read_hqq(parts: Mapping[str, np.ndarray], requantize: Requantize) -> QuantTensor:
    """HQQLinear's state: its options are stored as tensors, text as the bytes of its characters."""

    def number(name: str, default: int | None = None) -> int:
        if name not in parts and default is not None:
            return default
        return int(np.asarray(parts[name]).reshape(-1)[0])

    packing = bytes(np.asarray(parts.get("packing", b"2bit_u8")).astype(np.uint8).tolist()).decode()
    if packing != "2bit_u8":
        raise CheckpointError(f"HQQ's packing must be 2bit_u8, got {packing!r}")
    if number("quant_scale", 0) or number("quant_zero", 0):
        raise CheckpointError("HQQ's scales or zeros are quantised themselves; save it with both off")
    words = parts["W_q"]
    if number("view_as_float", 0):
        words = words.view(np.uint8)
    fan_out, fan_in = (int(n) for n in parts["shape"])
    group_size = number("group_size", -1)
    return from_hqq(
        words,
        parts["scale"],
        parts["zero"],
        shape=(fan_out, fan_in),
        group_size=None if group_size < 1 else group_size,
        requantize=requantize,
    )


def _bits(method: str, quantization: Mapping[str, Any]) -> set[int]:
    if method == "bitnet":
        return {2}
    if method == "compressed-tensors":
        groups = (quantization.get("config_groups") or {}).values()
        formats = {group.get("format") or quantization.get("format") for group in groups}
        if formats - {"pack-quantized", None}:
            raise CheckpointError(
                f"compressed-tensors: only the format pack-quantized can be read, got {sorted(map(str, formats))}"
            )
        return {int((group.get("weights") or {}).get("num_bits", 0)) for group in groups}
    if method == "hqq":
        found = _find(quantization.get("quant_config", {}), "nbits")
        return {int(bits) for bits in found} or {2}
    return {int(quantization.get("bits", 0))}


def _find(tree: Any, key: str) -> list[Any]:
    """Every value of `key` in nested dicts."""
    if not isinstance(tree, Mapping):
        return []
    return ([tree[key]] if key in tree else []) + [v for child in tree.values() for v in _find(child, key)]


def _quantization(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's quantization_config; AutoGPTQ's older quantize_config.json instead of none."""
    found = config.get("quantization_config")
    if found is None and (path / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | _read_json(path / "quantize_config.json")
    return found or {}


def _open_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory by name, mapped from its file."""
    index = directory / INDEX
    if index.is_file():
        try:
            files = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a readable index; it is damaged") from error
        if any(Path(file).name != file for file in files):
            raise CheckpointError(f"{index}: it names files outside of its directory")
    elif (directory / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        files = sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: no safetensors files there")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= safetensors.read(directory / file)[0]
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model's directory must have it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content
