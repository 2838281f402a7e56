"""How likely a decoder finds given tokens: the compiled function under perplexity and lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Rows of logits that exist at a time: 256 rows of a vocabulary of 49,152 are 50 MB in float32.
HEAD_ROWS = 256
SHORTEST = 32


class Scorer:
    """Losses of tokens under one decoder, compiled once a shape for all decoders built alike.

    The head runs over `HEAD_ROWS` positions at a time, so that no [B, T, vocabulary] array of logits
    exists: for a small model it would be most of the memory.

        scorer = Scorer(model)
        scorer(tokens)            # [B, T] int32 -> losses [B, T - 1] float32: `perplexity` takes it
        scorer.score(tokens)      # the same losses, and whether each token was the likeliest

    Args:
      model: a `flax_layers.llama.Llama`, its linear layers packed or not. Later changes to it are not
        seen.
    """

    def __init__(self, model: Any):
        from flax import nnx

        self._graph, state = nnx.split(model)
        self._weights, self._tree = jax.tree.flatten(state)

    def __call__(self, tokens: Any) -> jax.Array:
        return self.score(tokens)[0]

    def score(self, tokens: Any) -> tuple[jax.Array, jax.Array]:
        """tokens [B, T] -> for tokens 1 .. T - 1, each given those before it: its negative
        log-likelihood, float32 [B, T - 1], in natural logarithms; and whether no other token was
        likelier, bool [B, T - 1].
        """
        return _score(self._graph, self._tree, self._weights, tokens)

    def score_next(self, tokens: Any, ends: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`score`, and log p(the token after the first ends[b] of row b), float32 [B, vocabulary].

        Args:
          tokens: [B, T] int32. ends: [B] int32, in 1 .. T.
        """
        return _score(self._graph, self._tree, self._weights, tokens, ends)


@partial(jax.jit, static_argnums=(0, 1))
def _score(graph, tree, weights, tokens, ends=None):
    from flax import nnx

    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
    with jax.default_matmul_precision("highest"):  # GPUs would round float32 to TensorFloat-32
        hidden, _ = model.hidden(tokens)
        found = _score_rows(model.logits, hidden[:, :-1], tokens[:, 1:])
        if ends is None:
            return found
        last = jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)[:, 0]
        return *found, jax.nn.log_softmax(model.logits(last), axis=-1)


def _score_rows(head: Any, hidden: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """head: [.., H] -> [.., V]; hidden [B, T, H]; right [B, T], the token that came. Two [B, T]."""
    count = right.size
    rows = min(HEAD_ROWS, count)
    chunks = -(-count // rows)
    pad = chunks * rows - count
    hidden = jnp.pad(hidden.reshape(count, -1), ((0, pad), (0, 0))).reshape(chunks, rows, -1)
    wanted = jnp.pad(right.reshape(count), (0, pad)).reshape(chunks, rows)

    def one(chunk):
        logits = head(chunk[0])
        of_right = jnp.take_along_axis(logits, chunk[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - of_right, of_right >= logits.max(-1)

    losses, likeliest = jax.lax.map(one, (hidden, wanted))
    return losses.reshape(-1)[:count].reshape(right.shape), likeliest.reshape(-1)[:count].reshape(right.shape)


def batches(
    rows: Sequence[Sequence[int]], *, window: int, batch_tokens: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows of tokens as few shapes: (indices of the rows in a batch, int32 [batch, width]).

    Widths are `window` and the powers of two below it; all batches of one width have the same number of
    rows, at most batch_tokens / width of them (but one at least). Padding is zeros, to the right and below.
    """
    by_width: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if len(row) > window:
            raise ValueError(f"batches: row {i} has {len(row)} tokens, more than window={window}")
        by_width.setdefault(bucket(len(row), window), []).append(i)
    for width, indices in sorted(by_width.items(), reverse=True):  # what needs most memory comes first
        most = max(1, batch_tokens // width)
        size = -(-len(indices) // -(-len(indices) // most))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            padded = np.zeros((size, width), np.int32)
            for line, i in zip(padded, chosen, strict=False):
                line[: len(rows[i])] = rows[i]
            yield chosen, padded


def bucket(length: int, limit: int) -> int:
    """The smallest power of two from `SHORTEST` on that holds `length`; `limit` when it is smaller."""
    return min(limit, max(SHORTEST, 1 << (length - 1).bit_length()))
