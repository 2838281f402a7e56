"""LoRA: a trainable low-rank term beside a packed, frozen weight.

    y = x @ W + bias + alpha / rank * (x @ A) @ B        A [K, rank], B [rank, N]

(Hu et al. 2021, arXiv:2106.09685; over a quantised W: Dettmers et al. 2023, arXiv:2305.14314). W stays
packed; only A and B, and optimiser state for them, are floats. For linen: ``flax_layers.linen``.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.lora import default_a_initializer, default_b_initializer

from .convert import modules_with_arrays
from .partitioning import low_rank_metadata
from .quant_dense import QuantDense


class LoRA(nnx.LoRA):
    """``alpha / rank * (x @ A) @ B``: ``nnx.LoRA`` with its paper's alpha, and for stacked layers too.

    Attributes:
        lora_a: ``nnx.LoRAParam`` [..., K, rank]; lora_b: [..., rank, N].
        alpha: a float.
    """

    def __init__(self, in_features: int, lora_rank: int, out_features: int, *, alpha: float, **options: Any):
        super().__init__(in_features, lora_rank, out_features, **options)
        self.alpha = alpha

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        return self.alpha / self.rank * super().__call__(x, **kwargs)


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    rngs: nnx.Rngs,
    where: str | None = None,
    alpha: float | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    a_initializer: Any = default_a_initializer,
    b_initializer: Any = default_b_initializer,
) -> tuple[str, ...]:
    """Give the ``QuantDense`` layers of a model a trainable low-rank term, in place.

    With the default initialisers B is zero: the model computes what it computed before. Train
    ``nnx.LoRAParam``; the paths and arrays of the packed weights do not change. To take the terms off
    again set ``layer.lora = None``.

    Example:
        >>> flax_layers.add_lora(model, rank=8, where=r"mlp", rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)
        >>> loss, grads = nnx.value_and_grad(f, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        >>> optimizer.update(model, grads)

    Args:
        model: any ``nnx.Module``, a single ``QuantDense`` included; layers stacked by ``nnx.vmap`` get one
            term each.
        rank: of the term; 1 or more.
        rngs: from which A is drawn (the stream "params").
        where: a regular expression searched for in dotted paths ("layers.0.mlp.up_proj"); None means all.
        alpha: the term's factor times rank; rank (a factor of 1) when None.
        dtype: the term is computed in; the layer's dtype when None, and where that is None too, what x
            and the parameters promote to. The result always has the layer's dtype.
        param_dtype: of A and B.
        a_initializer, b_initializer: as ``nnx.LoRA``'s.

    Returns:
        The paths of the layers that got a term; a layer that sits in several places counts once.

    Raises:
        TypeError: model is no ``nnx.Module``.
        ValueError: rank is not positive, where is no regular expression or finds no QuantDense, or a
            layer has a term already.
    """
    layers = _find(model, rank, where)
    for path, layer in layers.items():
        if layer.lora is not None:
            raise ValueError(
                f"add_lora: {path or 'the layer'} has a low-rank term already; exclude it with where=, or set "
                "its lora to None first"
            )
    for layer in layers.values():
        a_metadata, b_metadata = low_rank_metadata(layer.words.get_metadata())
        stack = layer.words.shape[:-3]
        layer.lora = LoRA(
            layer.in_features,
            rank,
            layer.out_features,
            alpha=float(rank if alpha is None else alpha),
            dtype=layer.dtype if dtype is None else dtype,
            param_dtype=param_dtype,
            a_initializer=_stacked(a_initializer, stack),
            b_initializer=_stacked(b_initializer, stack),
            a_metadata=a_metadata,
            b_metadata=b_metadata,
            rngs=rngs,
        )
    return tuple(layers)


def _find(model: nnx.Module, rank: int, where: str | None) -> dict[str, QuantDense]:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"add_lora: model must be an nnx.Module, got {type(model).__name__}; linen models take "
            "flax_layers.linen.quantized(lora_rank=...)"
        )
    if rank < 1:
        raise ValueError(f"add_lora: rank must be 1 or more, got {rank}")
    try:
        pattern = re.compile(where or "")
    except re.error as error:
        raise ValueError(f"add_lora: where must be a regular expression, got {where!r}: {error}") from error
    places: dict[int, tuple[QuantDense, list[str]]] = {}  # by layer, which may sit in several
    for path, module in modules_with_arrays(model):
        if isinstance(module, QuantDense):
            places.setdefault(id(module), (module, []))[1].append(path)
    fitting = [(layer, [p for p in paths if pattern.search(p)]) for layer, paths in places.values()]
    chosen = {paths[0]: layer for layer, paths in fitting if paths}
    if not chosen:
        found = [paths[0] or "the model itself" for _, paths in places.values()]
        have = ", ".join(found[:4]) or "none; quantise the model first (quantize_module)"
        raise ValueError(
            f"add_lora: where={where!r} finds no QuantDense; the model's are: {have}"
            + ("; a float nnx.Linear has nnx.LoRALinear" if found else "")
        )
    return chosen


def _stacked(initializer: Callable[..., jax.Array], stack: tuple[int, ...]) -> Callable[..., jax.Array]:
    """An initialiser of [*stack, ...] that draws every layer by itself."""
    if not stack:
        return initializer

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        one = lambda key: initializer(key, shape, dtype)  # noqa: E731
        for _ in stack:
            one = jax.vmap(one)
        return one(jax.random.split(key, stack))

    return draw
