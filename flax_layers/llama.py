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

    decoder = Decoder(model, max_length=512)      # compiled prefill and decode step
    logits, cache = decoder.prefill(tokens)       # [B, vocab], of the last token
    logits, cache = decoder.step(next_token, cache)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Decoder", "KVCache", "Llama", "LlamaConfig", "compile_losses", "sample", "token_losses"]


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
    """Keys and values of every layer, [B, S, num_kv_heads, D] each, and how many slots are filled.

    Slots at and after `lengths` [B] (int32) hold leftovers: they are masked until they are written.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, slots: int, dtype=jnp.float32) -> KVCache:
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.keys[0].shape[1]


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
      k, v: [B, S, H_kv, D]; slot s holds position s. Slots past a query's position are masked.
    Returns: [B, T, H * D].
    """
    batch, tokens, heads, width = q.shape
    q = q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[1]) <= positions[..., None]  # [B, T, S]
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, v, preferred_element_type=jnp.float32)
    return mixed.astype(v.dtype).reshape(batch, tokens, heads * width)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        def linear(fan_in, fan_out):
            return nnx.Linear(
                fan_in, fan_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.head_dim = config.head_dim
        q_width, kv_width = (h * config.head_dim for h in (config.num_heads, config.num_kv_heads))
        self.q_proj = linear(config.hidden_size, q_width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(q_width, config.hidden_size)

    def __call__(self, x, angles, positions, layer_cache=None):
        """x [B, T, hidden] -> ([B, T, hidden], the layer's keys and values)."""
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(split), angles)
        k = rotate(self.k_proj(x).reshape(split), angles)
        v = self.v_proj(x).reshape(split)
        if layer_cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            k, v = (
                old.at[rows, positions].set(new.astype(old.dtype), mode="drop")
                for old, new in zip(layer_cache, (k, v), strict=True)
            )
        return self.o_proj(attend(q, k, v, positions)), (k, v)


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        def linear(fan_in, fan_out):
            return nnx.Linear(
                fan_in, fan_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = dict(epsilon=config.rms_eps, use_fast_variance=False, **kinds)
        self.input_norm = nnx.RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, **kinds)
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kinds)

    def __call__(self, x, angles, positions, layer_cache=None):
        mixed, kv = self.self_attn(self.input_norm(x), angles, positions, layer_cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kv


class Llama(nnx.Module):
    """The decoder. `dtype` is that of the activations, `param_dtype` that of the weights.

    Module paths: embed, layers.<i>.self_attn.{q,k,v,o}_proj, layers.<i>.mlp.{gate,up,down}_proj,
    layers.<i>.{input_norm,mlp_norm}, norm and, when the embedding is not tied, lm_head.

    Set the attribute `remat` to True for training in less memory: the backward pass then computes each
    block again, from its input, instead of keeping what is inside.
    """

    def __init__(self, config: LlamaConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.remat = False
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.layers = nnx.List([Block(config, **kinds) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_eps, use_fast_variance=False, **kinds)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **kinds)

    @classmethod
    def from_weights(
        cls, config: LlamaConfig, weights: Mapping[str, Any], *, dtype=jnp.float32, param_dtype=jnp.float32
    ) -> Llama:
        """A decoder with given weights; none are drawn first.

        Args:
          config: its sizes.
          weights: arrays by parameter path, "layers.0.mlp.up_proj.kernel" and so on; matrices are
            [in, out], the embedding is [vocab, hidden].
        Raises:
          ValueError: a weight is missing, unknown, or of another shape.
        """
        model = nnx.eval_shape(lambda: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
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
            (path, leaf.replace(jnp.asarray(weights[".".join(map(str, path))], param_dtype)))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(filled))

    def hidden(self, tokens, cache: KVCache | None = None):
        """tokens [B, T] -> (last hidden states [B, T, hidden], the cache with T tokens more or None).

        Without a cache the tokens are at positions 0 .. T - 1; with one they follow `cache.lengths`.
        Tokens that no longer fit are not stored: see that lengths + T <= slots.
        """
        start = jnp.zeros((tokens.shape[0],), jnp.int32) if cache is None else cache.lengths
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        x, stored = self.embed(tokens), []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x, kv = run(block, x, angles, positions, layer_cache)
            stored.append(kv)
        if cache is not None:
            keys, values = zip(*stored, strict=True)
            cache = KVCache(keys, values, cache.lengths + tokens.shape[1])
        return self.norm(x), cache

    def logits(self, hidden):
        """hidden [..., hidden_size] -> float32 scores of the next token [..., vocab_size]."""
        scores = self.embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return scores.astype(jnp.float32)

    def __call__(self, tokens, cache: KVCache | None = None):
        """tokens [B, T] int -> logits [B, T, vocab] float32, and the new cache if one was given."""
        hidden, new_cache = self.hidden(tokens, cache)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, new_cache)


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """Tokens [B] drawn from logits [B, vocab]; temperature 0 takes the likeliest."""
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


@jax.jit
def _sample_nth(logits, key, i, temperature):
    return sample(logits, jax.random.fold_in(key, i), temperature)


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

    Both donate the cache they are given: it is updated in place and must not be used again.

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
        self.config, self.dtype = model.config, model.dtype
        self.max_length, self.batch = max_length, batch

        def rebuild(weights) -> Llama:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))

        def prefill(weights, cache, tokens, lengths):
            model = rebuild(weights)
            hidden, cache = model.hidden(tokens, cache)
            last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
            return model.logits(last), dataclasses.replace(cache, lengths=lengths)

        def step(weights, cache, tokens):
            model = rebuild(weights)
            hidden, cache = model.hidden(tokens[:, None], cache)
            return model.logits(hidden[:, 0]), cache

        self._prefill = jax.jit(prefill, donate_argnums=1)
        self._step = jax.jit(step, donate_argnums=1)

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
        cache = KVCache.empty(self.config, self.batch, self.max_length, self.dtype)
        return self._prefill(self._weights, cache, padded, np.asarray(lengths, np.int32))

    def step(self, tokens: Any, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token [B] for every sequence -> logits [B, vocab] of the next one, and the cache.

        The caller sees to it that no sequence outgrows max_length: looking would wait for the device.
        """
        return self._step(self._weights, cache, tokens)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Container[int] = (),
    ) -> Iterator[int]:
        """Yields new tokens one by one until max_new_tokens or one of `stop`, which is not yielded.

        The next step is started before a token is yielded: the device works while the caller prints.

        Args:
          prompt: token ids; len(prompt) + max_new_tokens must fit max_length.
          temperature: 0 always takes the likeliest token; else what divides the logits.
          seed: of the random numbers; the same seed gives the same text on the same device.
        Raises:
          ValueError: it does not fit, or the decoder was made for more than one sequence.
        """
        if self.batch != 1:
            raise ValueError(f"generate: wanted a Decoder with batch=1, got batch={self.batch}")
        if max_new_tokens < 1:
            raise ValueError(f"generate: max_new_tokens must be positive, got {max_new_tokens}")
        if temperature < 0:
            raise ValueError(f"generate: temperature must be 0 or more, got {temperature}")
        if len(prompt) + max_new_tokens > self.max_length:
            raise ValueError(
                f"generate: a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} do not "
                f"fit max_length={self.max_length}"
            )
        return self._generate(prompt, max_new_tokens, np.float32(temperature), jax.random.key(seed), stop)

    def _generate(self, prompt, count, temperature, key, stop) -> Iterator[int]:
        logits, cache = self.prefill([prompt])
        token = _sample_nth(logits, key, 0, temperature)
        for i in range(1, count + 1):
            current = token
            if i < count:
                logits, cache = self.step(current, cache)
                token = _sample_nth(logits, key, i, temperature)
            if (value := int(current[0])) in stop:
                return
            yield value

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
