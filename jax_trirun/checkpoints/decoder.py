"""A Llama decoder's weights by module path, and Hugging Face's config.json as its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

# Architectures that compute what flax_layers.llama does, biases apart (those are refused by name).
ARCHITECTURES = ("llama", "mistral")

# Fields of flax_layers.llama.LlamaConfig by their names in config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}


def decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every weight, in the order of use: embedding, layers, norm and head.

    Args:
      config: the fields of a `flax_layers.llama.LlamaConfig`. Matrices are [in, out], the embedding is
        [vocab, hidden]; the head is left out when it is tied to the embedding.
    """
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_heads"]
    width = config.get("head_dim") or hidden // heads
    q, kv = heads * width, config["num_kv_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"embed.embedding": (config["vocab_size"], hidden)}
    for i in range(config["num_layers"]):
        block = {
            "input_norm.scale": (hidden,),
            "self_attn.q_proj.kernel": (hidden, q),
            "self_attn.k_proj.kernel": (hidden, kv),
            "self_attn.v_proj.kernel": (hidden, kv),
            "self_attn.o_proj.kernel": (q, hidden),
            "mlp_norm.scale": (hidden,),
            "mlp.gate_proj.kernel": (hidden, mlp),
            "mlp.up_proj.kernel": (hidden, mlp),
            "mlp.down_proj.kernel": (mlp, hidden),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["norm.scale"] = (hidden,)
    if not config["tie_embeddings"]:
        shapes["lm_head.kernel"] = (hidden, config["vocab_size"])
    return shapes


def config_from_json(where: str, json: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `flax_layers.llama.LlamaConfig` from config.json's.

    Raises:
      CheckpointError: another architecture, or one of its options that the decoder has not.
    """
    kind = json.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: model_type must be {' or '.join(map(repr, ARCHITECTURES))}, got {kind!r}"
        )
    for option, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if json.get(option, wanted) != wanted:
            raise CheckpointError(f"{where}: {option} must be {wanted!r}, got {json[option]!r}")
    missing = [name for name in _FIELDS if name not in json]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]!r} is missing")
    config: dict[str, Any] = {field: int(json[name]) for name, field in _FIELDS.items()}
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    config |= {
        "num_kv_heads": int(json.get("num_key_value_heads") or config["num_heads"]),
        "head_dim": int(json.get("head_dim") or config["hidden_size"] // config["num_heads"]),
        "max_positions": int(json.get("max_position_embeddings", 2048)),
        "rope_theta": float(json.get("rope_theta", rope.get("rope_theta", 10000.0))),
        "rms_eps": float(json.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(json.get("tie_word_embeddings", False)),
    }
    window = json.get("sliding_window")
    if window and window < config["max_positions"]:
        config["max_positions"] = int(window)  # as far as full attention is the same
    factors = json.get("rope_factors") or _rope_factors(where, rope, config)
    if factors:
        config["rope_factors"] = tuple(float(f) for f in factors)
    return config


def config_to_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `config_from_json`; "rope_factors" is a key of our own."""
    json: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
    }
    json |= {name: config[field] for name, field in _FIELDS.items()}
    json |= {
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_heads"],
        "max_position_embeddings": config["max_positions"],
        "rope_theta": config["rope_theta"],
        "rms_norm_eps": config["rms_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
    }
    if config.get("rope_factors"):
        json["rope_factors"] = list(config["rope_factors"])
    return json


def _rope_factors(where: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> list[float] | None:
    """What divides the rotary frequencies: Llama 3.1's smooth step from 1 to `factor`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    half = config["head_dim"] // 2
    if kind == "linear":
        return [float(rope["factor"])] * half
    if kind != "llama3":
        raise CheckpointError(f"{where}: rotary scaling {kind!r} is not supported")
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    factors = []
    for i in range(half):
        turns = rope["original_max_position_embeddings"] * config["rope_theta"] ** (-i / half) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
