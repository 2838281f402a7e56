"""Perplexity over text, and lm-eval tasks, of a packed model against a float one.

    python -m jax_trirun eval smollm2-2bit --text a.txt b.txt --compare smollm2
    python -m jax_trirun eval smollm2-2bit --corpus wikipedia --max-tokens 1024 --window 1024 --compare smollm2
    python -m jax_trirun eval smollm2-2bit --tasks trirun_logiqa,trirun_wikipedia --limit 50

Perplexity is given for each document and for all of them, every token counting the same. A float MODEL
alone is read twice, as it is and with --layers in 2 bits. Without --text and --corpus the text is the
passage that comes with the package. Tasks need the extra [eval]; those named trirun_... need no hub.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from ..checkpoints.safetensors import whole_file
from ..evaluate import Perplexity, texts
from . import model as shared
from .quantize import read_documents

HELP = "perplexity over text and lm-eval tasks, packed against float"
CORPORA = {"wikipedia": texts.wikipedia, "sotu": texts.speeches}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=shared.MODEL_HELP)
    parser.add_argument("--compare", metavar="MODEL", help="another model, read the same way: the float one")
    shared.add_arguments(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text: a document a file, or a .jsonl file with one document a line under the key text",
    )
    parser.add_argument(
        "--corpus", choices=CORPORA, help="95 Wikipedia articles, or 249 State of the Union messages"
    )
    parser.add_argument("--documents", type=int, help="read no more documents than this")
    parser.add_argument("--max-tokens", type=int, help="read no more of each document")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens scored a window; fewer give every token more context and take longer (default: window - 1)",
    )
    parser.add_argument("--bos", action="store_true", help="begin every window with the tokenizer's BOS")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="tokens computed at once (default: 4096)"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,..",
        help="lm-eval tasks instead of perplexity; 'list' names the offline ones",
    )
    parser.add_argument("--limit", type=int, help="of a task's items, the first so many")
    parser.add_argument("--num-fewshot", type=int, help="examples before a task's item (default: the task's)")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")


def run(arguments: argparse.Namespace) -> None:
    shared.check(arguments)
    for name in ("max_tokens", "documents", "batch_tokens", "limit"):
        least = 2 if name == "max_tokens" else 1
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}"
            )
    work = _tasks(arguments) if arguments.tasks else _Perplexity(arguments)
    if work is not None:
        _columns(arguments, work)


def _columns(arguments: argparse.Namespace, work: Any) -> None:
    """Measures one model after the other, the float one first, and prints the table."""
    columns: dict[str, Any] = {}

    def measure(lm: shared.LanguageModel) -> None:
        kind = shared.kind(lm.decoder)
        started = time.perf_counter()
        columns[kind if kind not in columns else f"{kind} ({lm.name})"] = work.measure(lm)
        print(f"measured   {kind}, in {time.perf_counter() - started:.1f} s", flush=True)

    if arguments.compare is not None:
        measure(shared.load(arguments.compare))
    lm = shared.load(arguments.model)
    if shared.packed_layers(lm.decoder):
        shared.quantise(lm, arguments)  # nothing to do: it says so, and what memory the weights take
        measure(lm)
    else:
        measure(lm)
        if arguments.compare is None and shared.quantise(lm, arguments):
            measure(lm)
    print()
    work.table(columns)
    if arguments.out:
        with whole_file(Path(arguments.out)) as file:
            file.write(json.dumps(work.record(columns), indent=1).encode())


class _Perplexity:
    def __init__(self, arguments: argparse.Namespace):
        self.names, self.texts = zip(*_read(arguments), strict=True)
        self.limit, self.bos = arguments.max_tokens, arguments.bos
        names = ("window", "stride", "batch_tokens")
        self.protocol = {name: getattr(arguments, name) for name in names}

    def measure(self, lm: shared.LanguageModel) -> Perplexity:
        documents = [lm.tokenizer.encode(text, special=False)[: self.limit] for text in self.texts]
        for name, document in zip(self.names, documents, strict=True):
            if len(document) < 2:
                raise ValueError(f"{name}: has {len(document)} tokens, at least 2 are needed")
        if self.bos and lm.tokenizer.bos is None:
            raise ValueError(f"--bos: the tokenizer of {lm.name} has no BOS token")
        if self.protocol["window"] > lm.decoder.config.max_positions:
            raise ValueError(
                f"--window {self.protocol['window']}: {lm.name} reads {lm.decoder.config.max_positions} tokens"
            )
        return shared.measure(lm, documents, bos=lm.tokenizer.bos if self.bos else None, **self.protocol)

    def table(self, columns: dict[str, Perplexity]) -> None:
        first = next(iter(columns.values()))
        width = max(10, *map(len, self.names))
        heads = "".join(f" {kind:>10}" for kind in columns) + ("      ratio" if len(columns) > 1 else "")
        print(f"{'perplexity':<{width}} {'tokens':>8}{heads}")
        for i, name in enumerate(self.names):
            self._row(name, width, first.tokens[i], [result.documents[i] for result in columns.values()])
        if len(self.names) > 1:
            self._row("all", width, sum(first.tokens), [result.value for result in columns.values()])
        bos = "BOS before each" if self.bos else "no BOS"
        stride = self.protocol["stride"] or self.protocol["window"] - 1
        print(f"windows of {self.protocol['window']} tokens, {stride} scored in each, {bos}")

    @staticmethod
    def _row(name: str, width: int, tokens: int, values: list[float]) -> None:
        ratio = f" {values[-1] / values[0]:10.3f}" if len(values) > 1 else ""
        print(f"{name:<{width}} {tokens:8d}" + "".join(f" {value:10.2f}" for value in values) + ratio)

    def record(self, columns: dict[str, Perplexity]) -> dict[str, Any]:
        return {
            "protocol": self.protocol | {"bos": self.bos, "max_tokens": self.limit},
            "perplexity": {
                kind: {
                    "all": result.value,
                    "tokens": sum(result.tokens),
                    "documents": dict(zip(self.names, result.documents, strict=True)),
                }
                for kind, result in columns.items()
            },
        }


def _read(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, text) of every document. Raises ValueError or OSError, with the file's name."""
    if arguments.text and arguments.corpus:
        raise ValueError("--text and --corpus are two ways to name the text; give one")
    if arguments.corpus:
        found = [(d["title"], d["text"]) for d in CORPORA[arguments.corpus]()]
    elif not arguments.text:
        found = [("forests.txt", shared.sample_text())]
    else:
        found = []
        for file in arguments.text:
            documents = list(read_documents([file]))
            one = not file.endswith(".jsonl")
            found += [(file if one else f"{file}:{i}", text) for i, text in enumerate(documents, 1)]
    if not found:
        raise ValueError(f"--text: no text in {', '.join(arguments.text)}")
    return found[: arguments.documents]


class _Tasks:
    def __init__(self, arguments: argparse.Namespace):
        from ..evaluate.lm_eval import DecoderLM, evaluate, load_tasks

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for writers of tasks
        self.adapter, self.evaluate = DecoderLM, evaluate
        self.options = {"limit": arguments.limit, "num_fewshot": arguments.num_fewshot}
        self.batch_tokens = arguments.batch_tokens
        # Loading them finds unknown names and missing data before a model is read.
        self.tasks = load_tasks(arguments.tasks.split(","))

    def measure(self, lm: shared.LanguageModel) -> dict[str, Any]:
        adapter = self.adapter(lm.decoder, lm.tokenizer, batch_tokens=self.batch_tokens)
        with contextlib.redirect_stdout(sys.stderr):
            return self.evaluate(adapter, self.tasks, **self.options)

    def table(self, columns: dict[str, Any]) -> None:
        rows = {
            (task, metric): [results[task].get(metric, (float("nan"), None)) for results in columns.values()]
            for results in columns.values()
            for task in results
            for metric in results[task]
        }
        width = max(len(f"{task} {metric}") for task, metric in rows)
        print(f"{'task and metric':<{width}}" + "".join(f" {kind:>20}" for kind in columns))
        for (task, metric), values in rows.items():
            cells = [f"{v:.4f}" + (f" ± {e:.4f}" if e is not None else "") for v, e in values]
            print(f"{f'{task} {metric}':<{width}}" + "".join(f" {cell:>20}" for cell in cells))

    def record(self, columns: dict[str, Any]) -> dict[str, Any]:
        return {
            "options": self.options,
            "tasks": {
                kind: {
                    task: {name: {"value": v, "stderr": e} for name, (v, e) in metrics.items()}
                    for task, metrics in results.items()
                }
                for kind, results in columns.items()
            },
        }


def _tasks(arguments: argparse.Namespace) -> _Tasks | None:
    if arguments.tasks == "list":
        from ..evaluate.tasks import OFFLINE

        print("\n".join(f"{name:<24} {what}" for name, what in OFFLINE.items()))
        return None
    return _Tasks(arguments)
