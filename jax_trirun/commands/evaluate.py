"""Perplexity of a language model over text files, in float32 and with layers in 2 bits.

Token-weighted over all files, and of each file. Without --text it reads the passage that comes with
the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import model as shared

HELP = "perplexity over text, float32 against 2 bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_arguments(parser)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text files, each a document")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens scored a window; fewer give every token more context and take longer (default: window - 1)",
    )
    parser.add_argument("--max-tokens", type=int, help="read no more of each file")


def run(arguments: argparse.Namespace) -> None:
    shared.check(arguments)
    if arguments.max_tokens is not None and arguments.max_tokens < 2:
        raise ValueError(f"--max-tokens must be at least 2, got {arguments.max_tokens}")
    texts = {name: _read(Path(name)) for name in arguments.text or ()} or {
        "forests.txt": shared.sample_text()
    }
    lm = shared.load(arguments)
    documents = [lm.tokenizer.encode(text, special=False)[: arguments.max_tokens] for text in texts.values()]
    for name, document in zip(texts, documents, strict=True):
        if len(document) < 2:
            raise ValueError(f"{name}: has {len(document)} tokens, at least 2 are needed")
    columns = {"float32": shared.measure(lm, documents, arguments.window, arguments.stride)}
    if shared.quantise(lm, arguments):
        columns["2-bit"] = shared.measure(lm, documents, arguments.window, arguments.stride)
    width = max(10, *map(len, texts))
    print(f"{'perplexity':<{width}} {'tokens':>8}" + "".join(f" {kind:>10}" for kind in columns))
    for i, name in enumerate(texts):
        values = "".join(f" {result.documents[i]:10.2f}" for result in columns.values())
        print(f"{name:<{width}} {len(documents[i]) - 1:8d}{values}")
    if len(texts) > 1:
        values = "".join(f" {result.value:10.2f}" for result in columns.values())
        print(f"{'all':<{width}} {sum(map(len, documents)) - len(documents):8d}{values}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
