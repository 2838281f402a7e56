"""Perplexity of a float model over gensim's sample of Wikipedia, by several protocols.

    python -m pip install gensim==4.4.0
    python bench/wikipedia_perplexity.py --out bench/results/wikipedia_perplexity.csv

The text is gensim's own extraction (`extract_pages`, `filter_wiki`, which leaves quotes and headings in):
articles with more than 1,000 characters, redirections left out, their tokens joined without a separator.
Protocols differ in the window, in whether BOS begins each, and in how many tokens are read; windows do not
overlap but for the token to predict from.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import datetime
import time
from pathlib import Path

import jax
import numpy as np
from gensim.corpora.wikicorpus import extract_pages, filter_wiki

from jax_trirun.checkpoints import open_model, smollm2
from jax_trirun.evaluate import Scorer, perplexity, texts

PROTOCOLS = [(2048, True), (2048, False), (1024, True), (1024, False), (512, False)]
COUNTS = (4096, 8192, 16384)


def wikipedia_tokens(tokenizer, count: int) -> np.ndarray:
    """The first `count` tokens of the sample."""
    (dump,) = texts.fetch(texts.GENSIM, texts.DUMP)
    tokens: list[int] = []
    with bz2.open(dump) as file:
        for _, markup, _ in extract_pages(file, ("0",)):
            text = "" if markup.lstrip().upper().startswith("#REDIRECT") else filter_wiki(markup)
            if len(text) > 1000:
                tokens += tokenizer.encode(text, special=False)
            if len(tokens) >= count:
                break
    return np.asarray(tokens[:count], np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=smollm2.NAME, help="GGUF file or directory (default: smollm2)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="computed at once (default: 4096)")
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    from flax_layers.load import load_llama

    model = open_model(smollm2.fetch() if arguments.model == smollm2.NAME else arguments.model)
    tokenizer, scorer = model.tokenizer(), Scorer(load_llama(model))
    tokens = wikipedia_tokens(tokenizer, max(COUNTS))
    rows = []
    for window, with_bos in PROTOCOLS:
        bos = tokenizer.bos if with_bos else None
        step = window - 1 if with_bos else window  # whole windows alone, as documents of their own
        windows = [tokens[i : i + step] for i in range(0, len(tokens), step)]
        started = time.perf_counter()
        found = perplexity(scorer, windows, window=window, bos=bos, batch_tokens=arguments.batch_tokens)
        seconds = time.perf_counter() - started
        for count in COUNTS:
            part = count // window
            value = np.exp(sum(found.losses[:part]) / sum(found.tokens[:part]))
            rows.append(
                {
                    "model": model.name,
                    "window": window,
                    "bos": "" if bos is None else tokenizer.tokens[bos],
                    "tokens": sum(found.tokens[:part]),
                    "perplexity": f"{value:.3f}",
                    "seconds_all": f"{seconds:.1f}",
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "date": datetime.date.today().isoformat(),
                }
            )
            start = "BOS" if with_bos else "no BOS"
            print(f"window {window:5d}  {start:<7} {count:6d} tokens  {value:8.3f}", flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
