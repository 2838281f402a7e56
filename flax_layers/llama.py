"""A Llama-architecture decoder in Flax nnx, with a KV cache.

One block is

    h = x + Attention(RMSNorm(x))
    y = h + Down(silu(Gate(RMSNorm(h))) * Up(RMSNorm(h)))

with rotary position embedding and grouped-query attention (Touvron et al. 2023, arXiv:2302.13971;
Ainslie et al. 2023, arXiv:2305.13245). Every linear layer is an `nnx.Linear`, so that
`flax_layers.quantize_module` turns it into a `flax_layers.QuantDense`; the blocks are separate
modules, not one scanned stack, because layers may be quantised differently.

Shapes: B sequences, T new tokens, S slots of the cache, H heads, D = head_dim.

    model = Llama(LlamaConfig(...), rngs=nnx.Rngs(0))
    logits = model(tokens)                        # [B, T, vocab]

    model.fuse_projections()                      # packed q, k and v as one layer, gate and up as one
    decoder = Decoder(model, max_length=512)      # compiled prefill and decode step
    logits, cache = decoder.prefill(tokens)       # [B, vocab], of the last token
    logits, cache = decoder.step(next_token, cache)
    for tokens in decoder.decode(prompts, max_new_tokens=100):   # [B], the likeliest
        ...

On several devices, every array cut along the axes of a mesh (`SHARDING_RULES` says which along which):

    mesh = jax.make_mesh((2, 4), ("data", "tensor"))          # of Explicit or of Auto axes
    model = Llama.from_weights(config, weights, mesh=mesh)    # each device is given its slices only
    flax_layers.quantize_module(model)                        # words and scales lie as the kernels did
    decoder = Decoder(model, max_length=512, batch=8)         # and so does the cache
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from .partitioning import MeshRules, place, sharding_of
from .quant_dense import QuantDense, why_apart

__all__ = [
    "SHARDING_RULES",
    "Decoder",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "compile_losses",
    "draw",
    "sample",
    "token_losses",
]

# Names of array axes -> mesh axes. Attention and MLP are cut by columns, then by rows: q, k, v, gate and up
# lie "tensor" along N, o and down along K, with one all-reduce after each of these two.
SHARDING_RULES = (
    ("batch", "data"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", None),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads: as in the papers.
      num_kv_heads: key and value heads; must divide num_heads.
      head_dim: width of a head, even; hidden_size // num_heads when 0.
      max_positions: the longest sequence the model was trained for.
      rope_theta: base of the rotary frequencies.
      rope_factors: head_dim / 2 numbers that divide the rotary frequencies (Llama 3.1), or None.
      rms_eps: added to the mean square in RMSNorm.
      tie_embeddings: the head is the transposed embedding.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None
    rms_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "max_positions",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"LlamaConfig: {field} must be positive, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "LlamaConfig: num_kv_heads must divide num_heads, got "
                f"num_kv_heads={self.num_kv_heads}, num_heads={self.num_heads}"
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    "LlamaConfig: num_heads must divide hidden_size, got "
                    f"num_heads={self.num_heads}, hidden_size={self.hidden_size}; or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be even, got {self.head_dim}")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            raise ValueError(
                f"LlamaConfig: rope_factors must have head_dim / 2 = {self.head_dim // 2} numbers, "
                f"got {len(self.rope_factors)}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, num_kv_heads, S, D] each, and how many slots are filled.

    Slots at and after `lengths` [B] (int32) hold leftovers: they are masked until they are written.

    Slots lie inside heads because that is how attention's products take them: with slots outside, a GPU wrote the
    whole cache anew, transposed, in every step.
    """

    NAMES: ClassVar = ("batch", "kv_heads", None, None)  # of the axes of keys and values

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, slots: int, dtype=jnp.float32, rules: MeshRules | None = None
    ) -> KVCache:
        """Nothing stored yet; on the mesh of `rules`, by sequences and heads, when given."""
        rules = rules or MeshRules()
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        device = rules.sharding_of_shape(shape, *cls.NAMES)

        def zeros():
            return tuple(jnp.zeros(shape, dtype, device=device) for _ in range(config.num_layers))

        lengths = jnp.zeros((batch,), jnp.int32, device=rules.sharding_of_shape((batch,), "batch"))
        return cls(keys=zeros(), values=zeros(), lengths=lengths)

    def shardings(self, rules: MeshRules) -> KVCache:
        """Those of its arrays on the mesh of `rules`, in their places."""
        each: Any = tuple(rules.sharding_of_shape(a.shape, *self.NAMES) for a in self.keys)
        lengths: Any = rules.sharding_of_shape(self.lengths.shape, "batch")
        return KVCache(each, each, lengths)

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position, [D / 2] float32: theta ** (-2 i / D), divided by rope_factors."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if config.rope_factors is not None:
        frequencies = frequencies / np.asarray(config.rope_factors, np.float64)
    return frequencies.astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, H, D] by angles [B, T, D / 2], in float32.

    Element i turns with element i + D / 2 (Hugging Face's order). Files for interleaved rotation
    (GGUF, Meta) have permuted q and k rows; their loaders undo it.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal grouped-query attention; scores and sums in float32.

    Args:
      q: [B, T, H, D] at `positions` [B, T].
      k, v: [B, H_kv, S, D]; slot s holds position s. Slots past a query's position are masked.
    Returns: [B, T, H * D].
    """
    batch, tokens, heads, width = q.shape
    _, groups, slots, _ = k.shape
    # Not by einsum, which takes its operands the other way round: then values are transposed first on a CPU, and
    # scores, which softmax wants slot by slot, lie the other way.
    q = q.reshape(batch, tokens, groups, -1, width).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)
    scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, -1, tokens, slots)
    visible = jnp.arange(slots) <= positions[..., None]  # [B, T, S]
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, groups, -1, slots)
    mixed = jnp.matmul(weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
    mixed = mixed.reshape(batch, groups, -1, tokens, width).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, tokens, heads * width)


def _store(slots: jax.Array, starts: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(slots.dtype)
    if slots.dtype == jnp.bfloat16:
        # On a CPU a scatter converts all slots to float32 and back; in float32 it is the faster way.
        return jax.lax.platform_dependent(slots, starts, new, cpu=_update_each, default=_scatter)
    return _scatter(slots, starts, new)


def _update_each(slots: jax.Array, starts: jax.Array, new: jax.Array) -> jax.Array:
    fit = starts + new.shape[2] <= slots.shape[2]

    def update(i, slots):
        at = (i, 0, starts[i], 0)
        fresh = jax.lax.dynamic_index_in_dim(new, i)
        fresh = jnp.where(fit[i], fresh, jax.lax.dynamic_slice(slots, at, fresh.shape))
        return jax.lax.dynamic_update_slice(slots, fresh, at)

    return jax.lax.fori_loop(0, slots.shape[0], update, slots)


def _scatter(slots: jax.Array, starts: jax.Array, new: jax.Array) -> jax.Array:
    # Sequences and heads one after the other, not as the scatter's batch: a GPU would transpose its operand.
    batch, heads, count, width = slots.shape
    rows, tokens = batch * heads, new.shape[2]
    starts = jnp.repeat(starts, heads)
    first = jnp.arange(rows, dtype=jnp.int32) * count + starts
    first = jnp.where(starts + tokens <= count, first, rows * count)
    windows = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    new = new.reshape(rows, tokens, width)
    flat = slots.reshape(rows * count, width)
    flat = jax.lax.scatter(flat, first[:, None], new, windows, unique_indices=True, mode="drop")
    return flat.reshape(slots.shape)


def store(slots: jax.Array, starts: jax.Array, new: jax.Array, rules: MeshRules) -> jax.Array:
    """Keys or values of a layer [B, H_kv, S, D] with those of new tokens, [B, H_kv, T, D].

    Args:
      starts: [B], the slot of every sequence's first new token. Where not all T fit, none are stored.
      rules: on a mesh every device stores what is in its part, without a collective.
    """
    sharding = rules.sharding_of_shape(slots.shape, *KVCache.NAMES)
    if sharding is None:
        return _store(slots, starts, new)
    spec = sharding.spec
    return rules.on_each_device(_store, (spec, PartitionSpec(spec[0]), spec), spec)(slots, starts, new)


def _linear(rules: MeshRules, fan_in: int, fan_out: int, *names: str, **kinds: Any) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_metadata=rules.metadata(*names), **kinds)


def _fuse(module: nnx.Module, fused: str, names: Sequence[str]) -> bool:
    """Puts one layer, `fused`, in the place of those named, if they are packed and fit beside each other."""
    layers = [getattr(module, name) for name in names]
    if not all(isinstance(layer, QuantDense) for layer in layers) or why_apart(layers):
        return False
    setattr(module, fused, QuantDense.concatenate(layers))
    for name in names:
        setattr(module, name, nnx.data(None))
    return True


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs, rules: MeshRules):
        linear = functools.partial(_linear, rules, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.head_dim = config.head_dim
        q_width, kv_width = (h * config.head_dim for h in (config.num_heads, config.num_kv_heads))
        self.q_proj = linear(config.hidden_size, q_width, "embed", "heads")
        self.k_proj = linear(config.hidden_size, kv_width, "embed", "kv_heads")
        self.v_proj = linear(config.hidden_size, kv_width, "embed", "kv_heads")
        self.o_proj = linear(q_width, config.hidden_size, "heads", "embed")
        self.qkv_proj = nnx.data(None)  # in the place of q_proj, k_proj and v_proj, once they are fused
        self.qkv_ends = (q_width, q_width + kv_width)
        self.rules = rules

    def __call__(self, x, angles, positions, layer_cache=None):
        """x [B, T, hidden] -> ([B, T, hidden], the layer's keys and values [B, H_kv, S, D])."""
        if self.qkv_proj is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = jnp.split(self.qkv_proj(x), self.qkv_ends, axis=-1)
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = rotate(q.reshape(split), angles), rotate(k.reshape(split), angles), v.reshape(split)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if layer_cache is not None:
            k, v = (
                store(old, positions[:, 0], new, self.rules)
                for old, new in zip(layer_cache, (k, v), strict=True)
            )
        return self.o_proj(attend(q, k, v, positions)), (k, v)


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs, rules: MeshRules):
        linear = functools.partial(_linear, rules, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size, "embed", "mlp")
        self.up_proj = linear(config.hidden_size, config.intermediate_size, "embed", "mlp")
        self.down_proj = linear(config.intermediate_size, config.hidden_size, "mlp", "embed")
        self.gate_up_proj = nnx.data(None)  # in the place of gate_proj and up_proj, once they are fused

    def __call__(self, x):
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


def _norm(rules: MeshRules, config: LlamaConfig, **kinds: Any) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_eps,
        use_fast_variance=False,
        scale_metadata=rules.metadata("embed"),
        **kinds,
    )


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs, rules: MeshRules):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.rules = rules
        self.input_norm = _norm(rules, config, **kinds)
        self.self_attn = Attention(config, rules=rules, **kinds)
        self.mlp_norm = _norm(rules, config, **kinds)
        self.mlp = MLP(config, rules=rules, **kinds)

    def __call__(self, x, angles, positions, layer_cache=None):
        mixed, kv = self.self_attn(self.input_norm(x), angles, positions, layer_cache)
        x = self.rules.constrain(x + mixed, "batch", None, "embed")
        return self.rules.constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, "embed"), kv


def _partitioned(shardings: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """A function of a model and of arrays whose inside XLA partitions, on Explicit axes as on Auto ones.

    Args:
      shardings: (model, *arrays) -> those of the results, for their types.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(model: Llama, *arrays: Any) -> Any:
            if not model.rules.has_types:
                return function(model, *arrays)
            graph, state = nnx.split(model)
            compute = model.rules.with_auto_axes(
                lambda state, *arrays: function(nnx.merge(graph, state), *arrays),
                shardings(model, *arrays),
            )
            return compute(state, *arrays)

        return call

    return decorate


def _run_again_in_backward(block: Block, *arguments: Any) -> Any:
    graph, state = nnx.split(block)  # nnx.remat would also want to write what a block never writes
    return jax.checkpoint(lambda state, *arguments: nnx.merge(graph, state)(*arguments))(state, *arguments)


class Llama(nnx.Module):
    """The decoder. `dtype` is that of the activations, `param_dtype` that of the weights.

    Module paths: embed, layers.<i>.self_attn.{q,k,v,o}_proj, layers.<i>.mlp.{gate,up,down}_proj,
    layers.<i>.{input_norm,mlp_norm}, norm and, when the embedding is not tied, lm_head.

    `fuse_projections` puts some of these together.

    Set the attribute `remat` to True for training in less memory: the backward pass then computes each
    block again, from its input, instead of keeping what is inside.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
        sharding_rules: Sequence[tuple[str, Any]] = SHARDING_RULES,
    ):
        """A decoder with random weights, on the devices of a mesh when one is given.

        Args:
          mesh: its axes Explicit (what jax.make_mesh makes) or Auto. Of those that `sharding_rules` name it
            may lack some: a mesh of "tensor" alone is tensor parallel, one of "data" alone batch parallel.
          sharding_rules: (name of an array's axis, mesh axis or None) pairs. What the mesh does not
            divide (3 heads among 2 devices) is held whole by every device, and a warning says so.
        Raises:
          TypeError, ValueError: what is given for a mesh is none, or has Manual axes.
        """
        rules = MeshRules(mesh, tuple((name, axis) for name, axis in sharding_rules)).fitted(
            {
                "vocab": config.vocab_size,
                "heads": config.num_heads,
                "kv_heads": config.num_kv_heads,
                "mlp": config.intermediate_size,
                "embed": config.hidden_size,
            },
            "Llama",
        )
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.remat = False
        self.rules = rules
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_metadata=rules.metadata("vocab", "embed"),
            **kinds,
        )
        self.layers = nnx.List([Block(config, rules=rules, **kinds) for _ in range(config.num_layers)])
        self.norm = _norm(rules, config, **kinds)
        if not config.tie_embeddings:
            self.lm_head = _linear(rules, config.hidden_size, config.vocab_size, "embed", "vocab", **kinds)

    @classmethod
    def from_weights(
        cls,
        config: LlamaConfig,
        weights: Mapping[str, Any],
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        **on_mesh: Any,
    ) -> Llama:
        """A decoder with given weights; none are drawn first.

        Args:
          config: its sizes.
          weights: arrays by parameter path, "layers.0.mlp.up_proj.kernel" and so on; matrices are
            [in, out], the embedding is [vocab, hidden]. Of NumPy arrays, and arrays mapped from a file,
            a device is given its slices only.
          **on_mesh: mesh and sharding_rules, as the constructor's.
        Raises:
          ValueError: a weight is missing, unknown, or of another shape.
        """
        model = nnx.eval_shape(
            lambda: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **on_mesh)
        )
        graph, state = nnx.split(model)
        wanted = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        missing, unknown = wanted.keys() - weights.keys(), weights.keys() - wanted.keys()
        if missing or unknown:
            raise ValueError(
                f"Llama.from_weights: missing {sorted(missing)[:5] or 'nothing'}, "
                f"unknown {sorted(unknown)[:5] or 'nothing'}"
            )
        for path, leaf in wanted.items():
            if weights[path].shape != leaf.shape:
                raise ValueError(
                    f"Llama.from_weights: {path} must have shape {leaf.shape}, got {weights[path].shape}"
                )
        filled = [
            (path, leaf.replace(place(weights[".".join(map(str, path))], param_dtype, sharding_of(leaf))))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(filled))

    @_partitioned(
        lambda model, tokens, cache=None: (
            model.rules.sharding_of_shape((*tokens.shape, model.config.hidden_size), "batch", None, "embed"),
            None if cache is None else cache.shardings(model.rules),
        )
    )
    def hidden(self, tokens, cache: KVCache | None = None):
        """tokens [B, T] -> (last hidden states [B, T, hidden], the cache with T tokens more or None).

        Without a cache the tokens are at positions 0 .. T - 1; with one they follow `cache.lengths`.
        A sequence's tokens are not stored if they do not all fit: see that lengths + T <= slots.
        """
        start = jnp.zeros((tokens.shape[0],), jnp.int32) if cache is None else cache.lengths
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)
        run = _run_again_in_backward if self.remat else Block.__call__
        x, stored = self.rules.constrain(self.embed(tokens), "batch", None, "embed"), []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x, kv = run(block, x, angles, positions, layer_cache)
            stored.append(kv)
        if cache is not None:
            keys, values = (
                tuple(self.rules.constrain(a, *KVCache.NAMES) for a in arrays)
                for arrays in zip(*stored, strict=True)
            )
            cache = KVCache(keys, values, cache.lengths + tokens.shape[1])
        return self.norm(x), cache

    @_partitioned(lambda model, hidden: model.logits_sharding(hidden.shape[:-1]))
    def logits(self, hidden):
        """hidden [..., hidden_size] -> float32 scores of the next token [..., vocab_size]."""
        scores = self.embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return scores.astype(jnp.float32)

    def fuse_projections(self) -> tuple[str, ...]:
        """Puts layers of the same input together, for decoding: q, k and v; gate and up. In place.

        A decode step takes as long as its products, and one wide product less time than several narrow ones. Only
        packed layers are put together, if they are of one kind (group size, dtypes, backend) and have no low-rank
        term, and on a mesh none, where each is cut in its own way. Checkpoints and `add_lora` know the layers
        apart only: fuse last.

        Returns:
          The paths of the new layers: layers.<i>.self_attn.qkv_proj, layers.<i>.mlp.gate_up_proj.
        """
        if self.rules.mesh is not None:
            return ()
        fused = []
        for i, block in enumerate(self.layers):
            if _fuse(block.self_attn, "qkv_proj", ("q_proj", "k_proj", "v_proj")):
                fused.append(f"layers.{i}.self_attn.qkv_proj")
            if _fuse(block.mlp, "gate_up_proj", ("gate_proj", "up_proj")):
                fused.append(f"layers.{i}.mlp.gate_up_proj")
        return tuple(fused)

    def logits_sharding(self, rows: Sequence[int]):
        """That of logits [*rows, vocab] on the model's mesh; None without one."""
        shape = (*rows, self.config.vocab_size)
        return self.rules.sharding_of_shape(shape, "batch", *[None] * (len(rows) - 1), "vocab")

    def __call__(self, tokens, cache: KVCache | None = None):
        """tokens [B, T] int -> logits [B, T, vocab] float32, and the new cache if one was given."""
        hidden, new_cache = self.hidden(tokens, cache)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, new_cache)


def sample(logits: jax.Array, key: jax.Array | None, temperature: jax.Array | float | None) -> jax.Array:
    """Tokens [B] drawn from logits [B, vocab]; temperature 0 takes the likeliest, None without a key.

    Raises:
      ValueError: a temperature without a key.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if temperature is None:
        return likeliest
    if key is None:
        raise ValueError(f"sample: a temperature ({temperature}) needs a key, as jax.random.key gives it")
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6)).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, likeliest)


def draw(
    logits: jax.Array, key: jax.Array | None, temperature: jax.Array | float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens as `sample` draws them, and the key for those after them."""
    if temperature is None or key is None:
        return sample(logits, key, temperature), key
    key, drawn = jax.random.split(key)
    return sample(logits, drawn, temperature), key


@_partitioned(lambda model, tokens: model.rules.sharding_of_shape(tokens[:, 1:].shape, "batch", None))
def token_losses(model: Llama, tokens: Any) -> jax.Array:
    """-log p(token t | tokens before t) for t = 1 .. T - 1, float32 [B, T - 1], of tokens [B, T]."""
    logits = model(tokens)[:, :-1]
    right = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


def compile_losses(model: Llama) -> Callable[[Any], jax.Array]:
    """`token_losses` of one model, compiled, the weights an argument; later changes to it are not seen."""
    graph, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)

    @jax.jit
    def losses(weights, tokens):
        return token_losses(nnx.merge(graph, jax.tree.unflatten(tree, weights)), tokens)

    return lambda tokens: losses(weights, tokens)


class Decoder:
    """Compiled prefill and decode step of one model; the weights are arguments, not constants.

    All donate the cache they are given: it is updated in place and must not be used again.

    Args:
      model: a `Llama`, its linear layers quantised or not. Later changes to it are not seen.
      max_length: slots of the cache, prompt and generated tokens together.
      batch: sequences decoded side by side.
    """

    # A prompt is padded to the next of these powers of two, so that few lengths are compiled.
    MIN_PREFILL = 16

    def __init__(self, model: Llama, *, max_length: int, batch: int = 1):
        if not 1 <= max_length <= model.config.max_positions:
            raise ValueError(
                f"Decoder: max_length must be in 1 .. {model.config.max_positions} (the model's "
                f"max_positions), got {max_length}"
            )
        graph, state = nnx.split(model)
        # A flat list crosses jit's boundary faster than nnx's nested state.
        self._weights, tree = jax.tree.flatten(state)
        self.config, self.dtype, self.rules = model.config, model.dtype, model.rules
        self.max_length, self.batch = max_length, batch

        def rebuild(weights) -> Llama:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))

        # All of them give the cache first, as JAX gives donated memory to the first result that it fits: the cache's
        # lengths must not change places with the tokens, which are integers [B], too.
        def shardings(model, cache, tokens, *_):
            return cache.shardings(model.rules), model.logits_sharding(tokens.shape[:1])

        @_partitioned(shardings)
        def prefill(model, cache, tokens, lengths):
            hidden, cache = model.hidden(tokens, cache)
            last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
            return dataclasses.replace(cache, lengths=lengths), model.logits(last)

        @_partitioned(shardings)
        def step(model, cache, tokens):
            hidden, cache = model.hidden(tokens[:, None], cache)
            return cache, model.logits(hidden[:, 0])

        def shardings_of_next(model, cache, tokens, key, _):
            of = model.rules.sharding_of_shape
            return cache.shardings(model.rules), of(tokens.shape, "batch"), None if key is None else of(())

        @_partitioned(shardings_of_next)
        def next_tokens(model, cache, tokens, key, temperature):
            hidden, cache = model.hidden(tokens[:, None], cache)
            return cache, *draw(model.logits(hidden[:, 0]), key, temperature)

        def compiled(function, *donated):
            @functools.wraps(function)  # profiles and dumps show its name
            def program(weights, cache, out, *arrays):
                del out  # whose memory the result takes
                return function(rebuild(weights), cache, *arrays)

            return jax.jit(program, donate_argnums=(1, 2, *donated), keep_unused=True)

        self._prefill, self._step = compiled(prefill), compiled(step)
        self._next_tokens, self._draw = compiled(next_tokens, 4), jax.jit(draw)

    def prefill(self, prompts: Sequence[Sequence[int]] | np.ndarray) -> tuple[jax.Array, KVCache]:
        """Reads `batch` prompts, of any lengths, into a new cache.

        Returns: logits [B, vocab] after each prompt's last token, and the cache.
        Raises:
          ValueError: another number of prompts, an empty or too long one, a token outside the
            vocabulary.
        """
        lengths = [len(p) for p in prompts]
        self._check(prompts, lengths)
        width = self.MIN_PREFILL
        while width < max(lengths):
            width *= 2
        padded = np.zeros((self.batch, min(width, self.max_length)), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        cache = KVCache.empty(self.config, self.batch, self.max_length, self.dtype, self.rules)
        cache, logits = self._prefill(self._weights, cache, None, padded, np.asarray(lengths, np.int32))
        return logits, cache

    def step(self, tokens: Any, cache: KVCache, *, out: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """One token [B] for every sequence -> logits [B, vocab] of the next one, and the cache.

        The caller sees to it that no sequence outgrows max_length: looking would wait for the device.

        Args:
          out: logits of the last step, when they are no longer needed: donated as the cache is, and the new ones
            take their place. On a GPU a step then takes the host half as long: XLA keeps it in a CUDA graph,
            and writes most of that anew when its memory has moved.
        """
        cache, logits = self._step(self._weights, cache, out, tokens)
        return logits, cache

    def next_tokens(
        self, tokens: Any, cache: KVCache, key: jax.Array | None = None, temperature: Any = None
    ) -> tuple[jax.Array, KVCache, jax.Array | None]:
        """A step, and a token drawn from each sequence's logits, in one program: faster than `step` and `sample`.

        Args:
          tokens: [B] int32, the last ones; not donated, as the cache and the key are.
          key: of `jax.random.key`.
          temperature: None takes the likeliest and needs no key, and 0 does, whatever the key. An array of the
            device's spares the host a copy for every step.
        Returns: the next tokens [B] int32, the cache, and the next key.
        """
        if not isinstance(tokens, jax.Array):
            tokens = self._place(tokens)
        cache, tokens, key = self._next_tokens(self._weights, cache, None, tokens, key, temperature)
        return tokens, cache, key

    def _place(self, tokens: Any) -> jax.Array:
        """Tokens [B] as `next_tokens` gives them, for which it is compiled."""
        return place(tokens, jnp.int32, self.rules.sharding_of_shape((self.batch,), "batch"))

    def decode(
        self,
        prompts: Sequence[Sequence[int]] | np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        key: jax.Array | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the tokens [B] that follow `batch` prompts, max_new_tokens times.

        The next step is started before tokens are yielded: the device works while the caller looks at them.

        Args:
          prompts: as of `prefill`; the length of the longest + max_new_tokens must fit max_length.
          temperature: 0 always takes the likeliest token; else what divides the logits, and needs a key.
          key: of `jax.random.key`; the same key gives the same tokens on the same device.
        Raises:
          ValueError: it does not fit, or a temperature without a key.
        """
        if max_new_tokens < 1:
            raise ValueError(f"Decoder: max_new_tokens must be positive, got {max_new_tokens}")
        if temperature < 0:
            raise ValueError(f"Decoder: temperature must be 0 or more, got {temperature}")
        if temperature and key is None:
            raise ValueError(
                f"Decoder: a temperature ({temperature}) needs a key, as jax.random.key gives it"
            )
        if (longest := max(map(len, prompts), default=0)) + max_new_tokens > self.max_length:
            raise ValueError(
                f"Decoder: a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not "
                f"fit max_length={self.max_length}"
            )
        logits, cache = self.prefill(prompts)
        heat, key = (jnp.float32(temperature), key) if temperature else (None, None)
        tokens, key = self._draw(logits, key, heat)
        return self._decode(self._place(tokens), cache, max_new_tokens, key, heat)

    def _decode(self, tokens, cache, count, key, temperature) -> Iterator[np.ndarray]:
        for i in range(1, count + 1):
            current = tokens
            current.copy_to_host_async()  # now: on a GPU what is asked for later comes after the next step
            if i < count:
                tokens, cache, key = self.next_tokens(tokens, cache, key, temperature)
            yield np.asarray(current)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Container[int] = (),
    ) -> Iterator[int]:
        """Yields new tokens of one sequence, one by one, until max_new_tokens or one of `stop`, which is not yielded.

        Args:
          prompt: token ids; len(prompt) + max_new_tokens must fit max_length.
          temperature: as of `decode`.
          seed: of the random numbers; the same seed gives the same text on the same device.
        Raises:
          ValueError: it does not fit, or the decoder was made for more than one sequence.
        """
        if self.batch != 1:
            raise ValueError(f"generate: wanted a Decoder with batch=1, got batch={self.batch}")
        found = self.decode(
            [prompt], max_new_tokens=max_new_tokens, temperature=temperature, key=jax.random.key(seed)
        )
        return itertools.takewhile(lambda token: token not in stop, (int(tokens[0]) for tokens in found))

    def _check(self, prompts, lengths) -> None:
        if len(lengths) != self.batch:
            raise ValueError(f"prefill: wanted batch={self.batch} prompts, got {len(lengths)}")
        if min(lengths) < 1:
            raise ValueError("prefill: a prompt must have at least one token, got an empty one")
        if max(lengths) > self.max_length:
            raise ValueError(
                f"prefill: a prompt of {max(lengths)} tokens does not fit max_length="
                f"{self.max_length}; shorten it or raise max_length"
            )
        ids = np.concatenate([np.asarray(p) for p in prompts])
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"prefill: tokens must be in 0 .. {self.config.vocab_size - 1}, got "
                f"{ids.min()} .. {ids.max()}"
            )
