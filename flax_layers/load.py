"""A model file -> a decoder ready to run, its packed layers as QuantDense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_trirun import QuantTensor
from jax_trirun.checkpoints.models import Model, open_model

from .llama import Llama, LlamaConfig
from .partitioning import metadata_of, place, sharding_of
from .quant_dense import QuantDense


def load_llama(
    model: Model | str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, **on_mesh: Any
) -> Llama:
    """Reads a decoder, weight after weight; packed weights stay packed.

    On a mesh each device keeps its slices of a weight only, from the moment the weight is read.

    Args:
      model: an opened model, or a path for `jax_trirun.checkpoints.open_model`.
      dtype: of the activations.
      param_dtype: of the weights that are not packed. Packed ones keep their scales' dtype.
      **on_mesh: mesh and sharding_rules, as `Llama`'s.

    Raises:
      FileNotFoundError, CheckpointError: as `open_model` and `Model.read`.
    """
    if not isinstance(model, Model):
        model = open_model(model)
    config = LlamaConfig(**model.config)
    decoder = nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **on_mesh)
    )
    variables = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(decoder))}
    weights = {}
    for path in model.shapes:
        value, variable = model.read(path), variables[path]
        if isinstance(value, QuantTensor):
            layer = QuantDense.from_weight(value, dtype=dtype, kernel_metadata=metadata_of(variable))
            set_module(decoder, path.rpartition(".")[0], layer)
        else:
            weights[path] = place(value, param_dtype, sharding_of(variable))
    return fill(decoder, weights)


def fill(module: Any, weights: dict[str, jax.Array]) -> Any:
    """The module with its parameters, shapes so far, taken from `weights` by path."""
    graph, state = nnx.split(module)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        filled.append((path, leaf.replace(weights[name]) if name in weights else leaf))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def get_module(model: Any, path: str) -> Any:
    """The module at a dotted path ("layers.0.mlp.up_proj")."""
    for key in path.split("."):
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model


def set_module(model: Any, path: str, module: Any) -> None:
    """Puts a module at a dotted path."""
    parent, _, key = path.rpartition(".")
    setattr(get_module(model, parent) if parent else model, key, module)
