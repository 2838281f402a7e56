"""Perplexity: the exponential of the mean negative log-likelihood of a text's tokens.

A document longer than the window is read in windows that start `stride` tokens apart:

    |-========|              window = 10, stride = 4; = marks the scored tokens
        |-----====|
            |-----====|

Every token but a document's first is scored exactly once. With stride = window - 1 (the default) a
window overlaps the one before by the one token it needs to predict from, so that tokens see 1 to
window - 1 tokens before them: the least work and the highest perplexity. A smaller stride gives every
token at least window - stride tokens of context, at window / stride times the work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np


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


def spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window over `length` tokens."""
    scored = 1
    while scored < length:
        end = min(length, scored + (window - 1 if scored == 1 else stride))
        yield max(0, end - window), end, scored
        scored = end


def perplexity(
    losses: Callable[[np.ndarray], Any],
    documents: Sequence[Sequence[int]],
    *,
    window: int = 512,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of token sequences.

    Args:
      losses: tokens [1, window] int32 -> the negative log-likelihood of tokens 1 .. window - 1, each
        given those before it, [1, window - 1]; `flax_layers.llama.compile_losses(model)` is one.
        Always called with whole windows; the padding after a short text cannot change what is before.
      documents: token ids; at least two in each.
      window: tokens the model sees at once, at least 2.
      stride: tokens scored a window, 1 .. window - 1; window - 1 when None.

    Raises:
      ValueError: no documents, a document of fewer than two tokens, a wrong window or stride.
    """
    stride = window - 1 if stride is None else stride
    if window < 2 or not 1 <= stride <= window - 1:
        raise ValueError(
            f"perplexity: wanted window >= 2 and stride in 1 .. window - 1, got window={window}, "
            f"stride={stride}"
        )
    if not documents:
        raise ValueError("perplexity: wanted at least one document, got none")
    for i, document in enumerate(documents):
        if len(document) < 2:
            raise ValueError(
                f"perplexity: document {i} has {len(document)} tokens; at least two are needed, one to "
                "predict from and one to predict"
            )
    sums = [_document_loss(losses, np.asarray(d, np.int32), window, stride) for d in documents]
    return Perplexity(tuple(sums), tuple(len(d) - 1 for d in documents))


def _document_loss(losses, tokens: np.ndarray, window: int, stride: int) -> float:
    total = 0.0
    for start, end, scored in spans(len(tokens), window, stride):
        padded = np.zeros((1, window), np.int32)
        padded[0, : end - start] = tokens[start:end]
        new = np.asarray(losses(padded))[0, scored - start - 1 : end - start - 1]
        total += float(np.sum(new, dtype=np.float64))
    return total


def sample_text() -> str:
    """About 1,030 words on forests from Theodore Roosevelt's first annual message to Congress.

    3 December 1901; a work of the United States government, in the public domain.
    """
    return resources.files(__package__).joinpath("data/forests.txt").read_text(encoding="utf-8")
