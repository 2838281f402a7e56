"""Quantise a decoder layer by layer, every layer on what those before it, already quantised, really give it.

For each block in turn ("true-sequential", Frantar et al. 2022):

    q, k, v share their inputs: one Hessian, quantise the three;
    o sees the attention of the quantised q, k, v; gate and up see the quantised attention; down sees
    the quantised gate and up;
    the block, quantised, turns its inputs into those of the next block.

Calibration documents keep their lengths: each is padded to the next power of two and batched with others
of that width. Attention is causal, so that no token sees the padding behind it, and padding is left out of
the Hessians.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_trirun
from jax_trirun import QuantTensor
from jax_trirun.quantizers import add_to_hessian, output_error
from jax_trirun.quantizers.recipe import Recipe, Recipes
from jax_trirun.types import check_group_size

from .llama import Block, Llama, LlamaConfig, rope_frequencies
from .load import fill, get_module, set_module
from .quant_dense import QuantDense

# Linear layers of a block that share their inputs, in the order of computation.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MIN_WIDTH = 16  # of a batch: shorter documents are padded to it
_HIGHEST = "highest"  # GPUs would round float32 products to TensorFloat-32


@dataclass(frozen=True)
class ModuleReport:
    """What became of one linear layer."""

    name: str
    shape: tuple[int, int]  # [K, N]
    method: str
    bits: int
    group_size: int
    weight_error: float  # |W - W_q| / |W|, Frobenius norms
    output_error: float | None  # |x (W - W_q)| / |x W| over the calibration tokens; None without any
    damping: float | None  # that GPTQ needed
    codes: tuple[float, ...]  # share of each code
    bytes_before: int  # in float32
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON."""
        return asdict(self) | {"shape": list(self.shape), "codes": list(self.codes)}

    def __str__(self) -> str:
        share = " ".join(f"{100 * part:2.0f}" for part in self.codes)
        out = "-" if self.output_error is None else f"{self.output_error:.4f}"
        damping = "-" if self.damping is None else f"{self.damping:g}"
        return (
            f"{self.name:<28} {self.method} g={self.group_size}  output error {out}  weight error "
            f"{self.weight_error:.4f}  damping {damping}  codes {share} %  {self.seconds:.2f} s"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Hidden states x [B, T, hidden], and which of them are a document's: real [B, T]."""

    x: jax.Array
    real: jax.Array


def make_batches(
    documents: Iterable[Sequence[int]], *, window: int, batch_tokens: int = 4096
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of documents -> (tokens int32 [B, T], real bool [B, T]) pairs, T a power of two.

    Args:
        documents: of any lengths; those longer than ``window`` are cut into pieces of it.
        window: the most tokens the model may see at once.
        batch_tokens: B T, about; batches of one width have one shape, so that few are compiled.

    Raises:
        ValueError: there is no token, or the window is smaller than one token.
    """
    if window < 1:
        raise ValueError(f"make_batches: window must be positive, got {window}")
    by_width: dict[int, list[np.ndarray]] = {}
    for document in documents:
        tokens = np.asarray(document, np.int32)
        for start in range(0, len(tokens), window):
            piece = tokens[start : start + window]
            width = min(max(MIN_WIDTH, 1 << (len(piece) - 1).bit_length()), window)
            by_width.setdefault(width, []).append(piece)
    if not by_width:
        raise ValueError("make_batches: the calibration documents hold no tokens")
    batches = []
    for width, pieces in sorted(by_width.items()):
        rows = max(1, min(batch_tokens // width, len(pieces)))
        for first in range(0, len(pieces), rows):
            tokens, real = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
            for row, piece in enumerate(pieces[first : first + rows]):
                tokens[row, : len(piece)], real[row, : len(piece)] = piece, True
            batches.append((tokens, real))
    return batches


class Calibration:
    """The hidden states of all calibration documents, between two blocks.

    Args:
        config: the decoder's.
        batches: of ``make_batches``.
        embedding: [vocab, hidden], as it will be stored.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
        embedding: np.ndarray | jax.Array,
    ):
        self._frequencies = rope_frequencies(config)
        self.batches = [
            Batch(jnp.asarray(np.asarray(embedding)[tokens], jnp.float32), jnp.asarray(real))
            for tokens, real in batches
        ]

    def hessian(self, block: Block, name: str) -> jax.Array:
        """The sum of x^T x over the inputs of the block's linear layer ``name``, float32 [K, K]."""
        graph, state = nnx.split(block)
        size = get_module(block, name).in_features
        total = jnp.zeros((size, size), jnp.float32)
        with jax.default_matmul_precision(_HIGHEST):
            for batch in self.batches:
                total = _add_inputs(total, state, batch, self._frequencies, graph=graph, name=name)
        return total

    def advance(self, block: Block) -> None:
        """Replaces the block's inputs by its outputs."""
        graph, state = nnx.split(block)
        with jax.default_matmul_precision(_HIGHEST):
            for i, batch in enumerate(self.batches):
                self.batches[i] = _outputs(batch, state, self._frequencies, graph=graph)

    def head_hessian(self, scale: np.ndarray | jax.Array, epsilon: float) -> jax.Array:
        """The same for the head, whose inputs are the last block's outputs behind an RMSNorm."""
        total = jnp.zeros((self.batches[0].x.shape[-1],) * 2, jnp.float32)
        with jax.default_matmul_precision(_HIGHEST):
            for batch in self.batches:
                total = _add_normed(total, batch, jnp.asarray(scale, jnp.float32), epsilon)
        return total


class _Recorder:
    """Stands for a linear layer while tracing, and keeps what it was given."""

    def __init__(self, linear: nnx.Linear):
        self.linear = linear
        self.seen: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen = x
        return self.linear(x)


def _run(block: Block, x: jax.Array, frequencies: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return block(x, positions[..., None].astype(jnp.float32) * frequencies, positions)[0]


@functools.partial(jax.jit, static_argnames=("graph", "name"), donate_argnums=0)
def _add_inputs(hessian, state, batch, frequencies, *, graph, name):
    # All that comes after the layer's inputs is never used, and XLA leaves it out.
    block = nnx.merge(graph, state)
    recorder = _Recorder(get_module(block, name))
    parent, _, leaf = name.rpartition(".")
    object.__setattr__(get_module(block, parent), leaf, recorder)  # past nnx's checks: it lives in this trace
    _run(block, batch.x, frequencies)
    return add_to_hessian(hessian, jnp.where(batch.real[..., None], recorder.seen, 0))


@functools.partial(jax.jit, donate_argnums=0)
def _add_normed(hessian, batch, scale, epsilon):
    mean_square = jnp.mean(batch.x * batch.x, axis=-1, keepdims=True)
    normed = batch.x * jax.lax.rsqrt(mean_square + epsilon) * scale
    return add_to_hessian(hessian, jnp.where(batch.real[..., None], normed, 0))


@functools.partial(jax.jit, static_argnames="graph", donate_argnums=0)
def _outputs(batch, state, frequencies, *, graph):
    return Batch(_run(nnx.merge(graph, state), batch.x, frequencies), batch.real)


Show = Callable[[ModuleReport], None]


def quantize_block(
    block: Block,
    prefix: str,
    recipes: Recipes,
    calibration: Calibration | None,
    show: Show = lambda report: None,
) -> tuple[dict[str, QuantTensor], list[ModuleReport]]:
    """Quantises the linear layers of one block; ``calibration.advance(block)`` then goes on to the next.

    Args:
        block: its kernels become the *dequantised* weights, float32, which is what the rest of the block
            is calibrated on.
        prefix: of the modules' names, "layers.3.".
        recipes: what to do with each.
        calibration: the block's inputs; None for methods that need none.
        show: called with each module's report.

    Returns:
        The packed weights by name (without the prefix), and the reports.

    Raises:
        ValueError, TypeError: as the quantisers, with the module's name in front.
    """
    packed: dict[str, QuantTensor] = {}
    reports = []
    for stage in STAGES:
        chosen = [(name, recipe) for name in stage if (recipe := recipes.of(prefix + name)) is not None]
        if not chosen:
            continue
        hessian = None if calibration is None else calibration.hessian(block, stage[0])
        for name, recipe in chosen:
            linear = get_module(block, name)
            weight, report = quantize_linear(prefix + name, linear.kernel[...], recipe, hessian)
            linear.kernel[...] = jax_trirun.dequantize(weight, dtype=jnp.float32)
            packed[name] = weight
            reports.append(report)
            show(report)
    return packed, reports


def quantize_linear(
    name: str, kernel: jax.Array, recipe: Recipe, hessian: jax.Array | None
) -> tuple[QuantTensor, ModuleReport]:
    """One weight [K, N] quantised, and its report. Raises as the quantisers, the name in front."""
    started = time.perf_counter()
    try:
        check_group_size("quantize", kernel.shape[0], recipe.group_size)
        weight, damping = recipe(kernel, hessian)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    by_weight, by_output, codes = _measure(kernel, weight, hessian)
    report = ModuleReport(
        name=name,
        shape=weight.shape,
        method=recipe.method,
        bits=weight.bits,
        group_size=weight.group_size,
        weight_error=float(by_weight),
        output_error=None if by_output is None else float(by_output),
        damping=damping,
        codes=tuple(round(float(share), 6) for share in codes),
        bytes_before=4 * math.prod(weight.shape),
        bytes_after=weight.nbytes,
        seconds=time.perf_counter() - started,
    )
    return weight, report


@jax.jit
def _measure(kernel, weight, hessian):
    back = jax_trirun.dequantize(weight, dtype=jnp.float32)
    kernel = kernel.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    by_weight = jnp.linalg.norm(kernel - back) / jnp.maximum(jnp.linalg.norm(kernel), tiny)
    by_output = None if hessian is None else jnp.sqrt(output_error(kernel, back, hessian))
    codes = jax_trirun.unpack(weight.words, weight.shape, bits=weight.bits)
    count = jnp.bincount(codes.reshape(-1), length=2**weight.bits)
    return by_weight, by_output, count / codes.size


def last_layer(config: LlamaConfig, recipes: Recipes) -> int:
    """The last layer whose inputs are needed: none behind it has a module to quantise."""
    if not config.tie_embeddings and recipes.of("lm_head") is not None:
        return config.num_layers
    chosen = (
        i
        for i in range(config.num_layers)
        if any(recipes.of(f"layers.{i}.{name}") is not None for stage in STAGES for name in stage)
    )
    return max(chosen, default=-1)


def make_block(config: LlamaConfig, weights: Mapping[str, Any]) -> Block:
    """A block from float32 weights by path inside it ("mlp.up_proj.kernel"); packed ones are dequantised."""
    return fill(_empty_block(config), {path: _as_float(value) for path, value in weights.items()})


@functools.cache
def _empty_block(config: LlamaConfig) -> Block:
    """A block that has shapes, but no arrays."""
    one = replace(config, num_layers=1)
    return nnx.eval_shape(lambda: Llama(one, rngs=nnx.Rngs(0))).layers[0]


def _as_float(value: Any) -> jax.Array:
    if isinstance(value, QuantTensor):
        return jax_trirun.dequantize(value, dtype=jnp.float32)
    return jnp.asarray(value, jnp.float32)


def quantize_llama(
    model: Llama,
    documents: Iterable[Sequence[int]] | None,
    recipes: Recipes | Recipe | None = None,
    *,
    window: int | None = None,
    batch_tokens: int = 4096,
    show: Show = lambda report: None,
) -> list[ModuleReport]:
    """Quantises a decoder in memory, in place: its linear layers become ``QuantDense``.

    A float weight is released as soon as its layer is done. For models that fill the memory there is
    ``python -m jax_trirun quantize``, which reads, quantises and writes one layer at a time.

    Args:
        model: is changed.
        documents: token ids of the calibration text, a sequence a document; None for methods that need none.
        recipes: how, the same for all or by name, GPTQ with groups of 64 when None; embeddings, norms and
            the head are skipped by default.
        window: the longest piece of a document, max_positions at most; that or 2048 when None.
        batch_tokens: how many tokens are computed at once.
        show: called with each module's report.

    Returns:
        A report for each module.

    Raises:
        ValueError, TypeError: a method needs documents and there are none; as the quantisers.

    Example:
        >>> reports = quantize_llama(model, documents, Recipe("gptq", group_size=64))
    """
    if not isinstance(recipes, Recipes):
        recipes = Recipes(recipes or Recipe())
    config = model.config
    calibration = None
    if documents is not None:
        batches = make_batches(
            documents, window=window or min(2048, config.max_positions), batch_tokens=batch_tokens
        )
        calibration = Calibration(config, batches, model.embed.embedding[...])
    reports: list[ModuleReport] = []
    last = last_layer(config, recipes)
    for i, block in enumerate(model.layers):
        if i > last:
            break
        packed, rows = quantize_block(block, f"layers.{i}.", recipes, calibration, show)
        if calibration is not None and i < last:
            calibration.advance(block)
        for name, weight in packed.items():
            set_module(block, name, QuantDense.from_weight(weight, dtype=model.dtype))
        gc.collect()  # nnx leaves cycles behind that hold the float weights
        reports += rows
    recipe = None if config.tie_embeddings else recipes.of("lm_head")
    if recipe is not None:
        hessian = (
            None if calibration is None else calibration.head_hessian(_scale(model.norm), config.rms_eps)
        )
        weight, report = quantize_linear("lm_head", model.lm_head.kernel[...], recipe, hessian)
        set_module(model, "lm_head", QuantDense.from_weight(weight, dtype=model.dtype))
        reports.append(report)
        show(report)
    return reports


def _scale(norm: nnx.RMSNorm) -> jax.Array:
    assert norm.scale is not None  # the decoder's norms have one
    return norm.scale[...]
