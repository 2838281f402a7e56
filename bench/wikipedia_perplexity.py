"""Perplexity of models over gensim's sample of Wikipedia, by several protocols.

    python -m pip install gensim==4.4.0
    python bench/wikipedia_perplexity.py --out bench/results/wikipedia_perplexity.csv
    python bench/wikipedia_perplexity.py smollm2 DIR .. --windows 2048 --batch-tokens 32768

The text is gensim's own extraction (`extract_pages`, `filter_wiki`, which leaves quotes and headings in):
articles with more than 1,000 characters, redirections left out, their tokens joined without a separator.
Protocols differ in the window, in whether BOS begins each, and in how many tokens are read; windows do not
overlap. For a machine without gensim, such as one with a GPU, --write-text makes the file that --text reads.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import datetime
import itertools
import json
import math
from pathlib import Path

import jax

from jax_trirun.checkpoints import open_model, smollm2
from jax_trirun.evaluate import Scorer, perplexity, texts

COUNTS = (4096, 8192, 16384)
# More characters than the tokens that are read can have.
CHARACTERS = 8 * max(COUNTS)


def wikipedia_texts(characters: float = CHARACTERS) -> list[str]:
    """The first articles of the sample, that many characters in all or a little more."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    (dump,) = texts.fetch(texts.GENSIM, texts.DUMP)
    found: list[str] = []
    with bz2.open(dump) as file:
        for _, markup, _ in extract_pages(file, ("0",)):
            text = "" if markup.lstrip().upper().startswith("#REDIRECT") else filter_wiki(markup)
            if len(text) > 1000:
                found.append(text)
            if sum(map(len, found)) >= characters:
                break
    return found


def measure(name: str, articles: list[str], widths: list[int], batch_tokens: int) -> list[dict[str, object]]:
    """A row for each protocol."""
    from flax_layers.load import load_llama

    model = open_model(smollm2.fetch() if name == smollm2.NAME else name)
    tokenizer, scorer = model.tokenizer(), Scorer(load_llama(model))
    tokens = [t for text in articles for t in tokenizer.encode(text, special=False)][: max(COUNTS)]
    rows: list[dict[str, object]] = []
    for window, bos in itertools.product(widths, (tokenizer.bos, None)):
        step = window - (bos is not None)
        windows = [tokens[i : i + step] for i in range(0, len(tokens) - step + 1, step)]
        found = perplexity(scorer, windows, window=window, bos=bos, batch_tokens=batch_tokens)
        for count in COUNTS:
            whole = count // window
            value = math.exp(sum(found.losses[:whole]) / sum(found.tokens[:whole]))
            start = "" if bos is None else tokenizer.tokens[bos]
            rows.append(
                {
                    "model": name,
                    "window": window,
                    "bos": start,
                    "tokens": sum(found.tokens[:whole]),
                    "perplexity": f"{value:.3f}",
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "date": datetime.date.today().isoformat(),
                }
            )
            print(
                f"{name}  window {window:5d} {start or 'no BOS':<12} {count:6d} tokens {value:9.3f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", default=[smollm2.NAME], help="GGUF files, directories, or smollm2"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[2048, 1024, 512])
    parser.add_argument("--batch-tokens", type=int, default=4096, help="computed at once (default: 4096)")
    parser.add_argument("--text", type=Path, help="JSON list of articles, instead of gensim's")
    parser.add_argument("--write-text", type=Path, help="write that file, all articles, and nothing else")
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    if arguments.write_text:
        arguments.write_text.write_text(json.dumps(wikipedia_texts(math.inf)))
        return
    articles = json.loads(arguments.text.read_text()) if arguments.text else wikipedia_texts()
    rows = []
    for name in arguments.models:
        rows += measure(name, articles, arguments.windows, arguments.batch_tokens)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
