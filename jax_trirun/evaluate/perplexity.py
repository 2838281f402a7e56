"""Perplexity: the exponential of the mean negative log-likelihood of a text's tokens.

A document longer than the window is read in windows that start `stride` tokens apart:

    |-========|              window = 10, stride = 4; = marks the scored tokens
        |-----====|
            |-----====|

Every token is scored exactly once, but for a document's first, which has nothing before it. With
stride = window - 1 (the default) a window overlaps the one before by the one token it needs to predict
from, so that tokens see 1 to window - 1 tokens before them: the least work and the highest perplexity. A
smaller stride gives every token at least window - stride tokens of context, at window / stride times
the work.

With `bos` every window begins with that token, and a document's first token is scored too:

    |B========|              window = 10, stride = 4, bos = B
        |B----====|

Windows never reach from one document into the next. The figure over all documents weighs tokens, not
documents: exp(sum of losses / number of scored tokens).

`bench/wikipedia_perplexity.py` reads the bundled model, SmolLM2-135M-Instruct in float32, by several
protocols. Windows of 2048 that begin with BOS, over the first 16,384 tokens of gensim's Wikipedia sample
as gensim extracts it, give 20.2; windows of 512 give 22.9 on the same text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from .scoring import batches


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over the scored tokens of each document, in natural logarithms."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def value(self) -> float:
        """Token-weighted: every scored token counts the same, whatever its document."""
        return _exp(sum(self.losses) / sum(self.tokens))

    @property
    def documents(self) -> tuple[float, ...]:
        """Of each document alone."""
        return tuple(_exp(loss / count) for loss, count in zip(self.losses, self.tokens, strict=True))


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def spans(length: int, window: int, stride: int, *, bos: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window over `length` tokens; with `bos` one place is its."""
    room, scored = (window - 1, 0) if bos else (window, 1)
    first = window - 1
    while scored < length:
        end = min(length, scored + first)
        yield max(0, end - room), end, scored
        scored, first = end, stride


def perplexity(
    losses: Callable[[np.ndarray], Any],
    documents: Sequence[Sequence[int]],
    *,
    window: int = 512,
    stride: int | None = None,
    bos: int | None = None,
    batch_tokens: int = 4096,
) -> Perplexity:
    """Perplexity of token sequences.

    Args:
      losses: tokens [B, T] int32 -> the negative log-likelihood of tokens 1 .. T - 1, each given those
        before it, [B, T - 1]; `jax_trirun.evaluate.Scorer(model)` is one. Called with few shapes: T is
        `window` or a power of two below it. Padding after a short text cannot change what is before.
      documents: token ids; at least two in each, or one with `bos`.
      window: tokens the model sees at once, at least 2.
      stride: tokens scored a window, 1 .. window - 1; window - 1 when None.
      bos: a token to put before every window; None for none.
      batch_tokens: tokens computed at once; at least one window.

    Raises:
      ValueError: no documents, one that is too short, a wrong window, stride or batch_tokens.
    """
    stride = window - 1 if stride is None else stride
    if window < 2 or not 1 <= stride <= window - 1:
        raise ValueError(
            f"perplexity: wanted window >= 2 and stride in 1 .. window - 1, got window={window}, "
            f"stride={stride}"
        )
    if batch_tokens < 1:
        raise ValueError(f"perplexity: batch_tokens must be positive, got {batch_tokens}")
    if not documents:
        raise ValueError("perplexity: wanted at least one document, got none")
    needed = 2 if bos is None else 1
    for i, document in enumerate(documents):
        if len(document) < needed:
            raise ValueError(
                f"perplexity: document {i} has {len(document)} tokens; at least {needed} "
                + ("are needed, one to predict from and one to predict" if bos is None else "is needed")
            )
    prefix = [] if bos is None else [bos]
    windows, places = [], []
    for i, document in enumerate(documents):
        for start, end, scored in spans(len(document), window, stride, bos=bos is not None):
            windows.append([*prefix, *document[start:end]])
            places.append((i, scored - start + len(prefix) - 1, end - start + len(prefix) - 1))
    sums = [0.0] * len(documents)
    for chosen, tokens in batches(windows, window=window, batch_tokens=batch_tokens):
        found = np.asarray(losses(tokens))
        for row, index in zip(found, chosen, strict=False):
            i, first, last = places[index]
            sums[i] += float(np.sum(row[first:last], dtype=np.float64))
    return Perplexity(tuple(sums), tuple(len(d) + len(prefix) - 1 for d in documents))


def sample_text() -> str:
    """About 1,030 words on forests from Theodore Roosevelt's first annual message to Congress.

    3 December 1901; a work of the United States government, in the public domain.
    """
    return resources.files(__package__).joinpath("data/forests.txt").read_text(encoding="utf-8")
