"""Perplexity of SmolLM2-135M-Instruct quantised in the ways `quantize` knows, over Wikipedia text.

    python -m pip install gensim==4.4.0
    python bench/quality_smollm2.py --out bench/results/quality_smollm2.csv
    python bench/quality_smollm2.py --only "float|round" --calibration-tokens 32768 --document-tokens 512

The text is gensim's sample of Wikipedia, as gensim extracts it (wikipedia_perplexity.py: --write-text there
makes the file that --text reads on a machine without gensim). Its first 16,384 tokens, two articles, are
read for perplexity, in windows of 2048 that begin with BOS: float weights give 20.2 so. All other
articles calibrate, with the first tokens of each. Every model goes the way a user's does: `quantize` into a
directory, which is loaded and read. Rows of --out that are not measured again stay.

Perplexity beyond the size of the vocabulary, 49,152, is worse than a uniform guess: by how much says nothing
about the method, and changes by factors with the text.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from wikipedia_perplexity import wikipedia_texts

from flax_layers.load import load_llama
from jax_trirun import cli
from jax_trirun.checkpoints import open_model, smollm2
from jax_trirun.evaluate import Scorer, perplexity

WINDOW = 2048
EVALUATED = 16384  # tokens, each window's BOS among them

CONFIGURATIONS = {
    "round to nearest": "--method rtn",
    "least squared error (mse)": "--method mse",
    "HQQ": "--method hqq",
    "ternary, mean absolute": "--method absmean",
    "ternary GPTQ": "--method gptq-ternary",
    "ternary GPTQ, activation order": "--method gptq-ternary --act-order",
    "GPTQ, positive scales": "--method gptq --unsigned",
    "GPTQ": "--method gptq",
    "GPTQ, activation order": "--method gptq --act-order",
    "GPTQ, g=32": "--method gptq --group-size 32",
    "GPTQ, rotated": "--method gptq --rotate",
    "GPTQ, rotated, activation order": "--method gptq --rotate --act-order",
    "GPTQ, MLP only": "--method gptq --skip self_attn",
    "GPTQ, MLP only, activation order": "--method gptq --skip self_attn --act-order",
}
COLUMNS = (
    "configuration",
    "perplexity",
    "bits_a_weight",
    "mean_output_error",
    "weights_quantised",
    "quantize_seconds",
    "command",
    "calibration_tokens",
    "document_tokens",
    "evaluated_tokens",
    "window",
    "device",
    "jax",
    "date",
)


def split(articles: list[str], tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """The windows to evaluate, without their BOS, and the articles that none of their tokens is from."""
    tokens: list[int] = []
    used = 0
    while len(tokens) < EVALUATED:
        tokens += tokenizer.encode(articles[used], special=False)
        used += 1
    step = WINDOW - 1
    windows = [tokens[i * step : (i + 1) * step] for i in range(EVALUATED // WINDOW)]
    return windows, articles[used:]


def measure(path: Path, windows: list[list[int]], bos: int, batch_tokens: int) -> float:
    scorer = Scorer(load_llama(path))
    return perplexity(scorer, windows, window=WINDOW, bos=bos, batch_tokens=batch_tokens).value


def quantize(options: str, calibration: Path, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Runs the command, and returns its report."""
    command = ["quantize", "smollm2", "--out", str(out), "--overwrite", *options.split()]
    if "--method gptq" in options:
        command += ["--calibration", str(calibration), "--window", str(arguments.document_tokens)]
        command += ["--calibration-tokens", str(arguments.calibration_tokens)]
    with contextlib.redirect_stdout(io.StringIO()):
        if cli.main(command):
            sys.exit(f"quantize failed: {command}")
    return json.loads((out / "quantize.json").read_text())


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Rows by configuration, in the order of CONFIGURATIONS; those that `path` has and `rows` has not stay."""
    kept: dict[str, dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {row["configuration"]: row for row in csv.DictReader(file)}
    merged = kept | rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(merged[name] for name in ("float", *CONFIGURATIONS) if name in merged)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression for configurations to measure")
    parser.add_argument("--calibration-tokens", type=int, default=131072, help="at most (default: 131072)")
    parser.add_argument(
        "--document-tokens", type=int, default=2048, help="of each article that calibrates (default: 2048)"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="evaluated at once (default: 4096)")
    parser.add_argument("--text", type=Path, help="JSON list of articles, instead of gensim's")
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    articles = json.loads(arguments.text.read_text()) if arguments.text else wikipedia_texts(math.inf)
    path = smollm2.fetch()
    tokenizer = open_model(path).tokenizer()
    windows, others = split(articles, tokenizer)
    evaluated = sum(map(len, windows))
    print(f"{evaluated} tokens to evaluate; {len(others)} articles that may calibrate", flush=True)
    common = {
        "evaluated_tokens": evaluated,
        "window": WINDOW,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, model: Path, more: dict[str, Any]) -> None:
        started = time.perf_counter()
        value = measure(model, windows, tokenizer.bos, arguments.batch_tokens)
        rows[name] = {"configuration": name, "perplexity": f"{value:.2f}", **more, **common}
        print(f"{name:<28} {value:10.2f}   (read in {time.perf_counter() - started:.1f} s)", flush=True)
        if arguments.out:  # after every one: a run may be stopped
            write(arguments.out, rows)

    if re.search(arguments.only, "float"):
        add("float", path, {})
    with tempfile.TemporaryDirectory() as temporary:
        calibration, out = Path(temporary) / "calibration.jsonl", Path(temporary) / "out"
        starts = [tokenizer.encode(t, special=False)[: arguments.document_tokens] for t in others]
        lines = [json.dumps({"text": tokenizer.decode(start)}) + "\n" for start in starts]
        calibration.write_text("".join(lines), encoding="utf-8")
        for name, options in CONFIGURATIONS.items():
            if not re.search(arguments.only, name):
                continue
            report = quantize(options, calibration, arguments, out)
            errors = [m["output_error"] for m in report["modules"] if m["output_error"] is not None]
            text = report["settings"]["calibration"]["tokens"]
            add(
                name,
                out,
                {
                    "bits_a_weight": f"{report['bits_a_weight']:.3f}",
                    "mean_output_error": f"{sum(errors) / len(errors):.4f}" if errors else "",
                    "weights_quantised": report["weights_quantised"],
                    "quantize_seconds": f"{report['seconds']:.1f}",
                    "command": f"quantize smollm2 {options}",
                    "calibration_tokens": text or "",
                    "document_tokens": arguments.document_tokens if text else "",
                },
            )


if __name__ == "__main__":
    main()
