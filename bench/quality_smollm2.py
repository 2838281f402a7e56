"""Perplexity of SmolLM2-135M-Instruct quantised in every way `quantize` knows, over Wikipedia text.

    python bench/quality_smollm2.py --out bench/results/quality_smollm2.csv

The text is the sample of Wikipedia in gensim's test data (jax_trirun.evaluate.texts). Two in three of its
articles calibrate, with their first 2,048 tokens each; the others, which calibration never sees, are read
for perplexity. Every model goes the way a user's does: `quantize` into a directory, which is loaded and read.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jax

from flax_layers.load import load_llama
from jax_trirun import cli
from jax_trirun.checkpoints import open_model, smollm2
from jax_trirun.evaluate import Scorer, perplexity
from jax_trirun.evaluate.texts import wikipedia

CONFIGURATIONS = {
    "round to nearest": "--method rtn",
    "least squared error (mse)": "--method mse",
    "HQQ": "--method hqq",
    "ternary, mean absolute": "--method absmean",
    "ternary GPTQ": "--method gptq-ternary",
    "GPTQ, positive scales": "--method gptq --unsigned",
    "GPTQ": "--method gptq",
    "GPTQ, activation order": "--method gptq --act-order",
    "GPTQ, g=32": "--method gptq --group-size 32",
    "GPTQ, rotated": "--method gptq --rotate",
    "GPTQ, MLP only": "--method gptq --skip self_attn",
    "GPTQ, MLP only, rotated": "--method gptq --skip self_attn --rotate",
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
    "evaluated_tokens",
    "window",
    "device",
    "jax",
    "date",
)


def measure(path: Path, documents: list[list[int]], window: int) -> float:
    return perplexity(Scorer(load_llama(path)), documents, window=window).value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression for configurations to measure")
    parser.add_argument("--calibration-tokens", type=int, default=131072, help="at most (default: 131072)")
    parser.add_argument("--tokens", type=int, default=32768, help="to evaluate, at most (default: 32768)")
    parser.add_argument("--document-tokens", type=int, default=1024, help="of each article (default: 1024)")
    parser.add_argument("--window", type=int, default=512, help="of perplexity (default: 512)")
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    path = smollm2.fetch()
    tokenizer = open_model(path).tokenizer()
    texts = [article["text"] for article in wikipedia()]
    held_out = [tokenizer.encode(t, special=False)[: arguments.document_tokens] for t in texts[2::3]]
    while sum(map(len, held_out)) > arguments.tokens:
        held_out.pop()
    with tempfile.TemporaryDirectory() as temporary:
        calibration = Path(temporary) / "calibration.jsonl"
        others = [text for i, text in enumerate(texts) if i % 3 != 2]
        starts = [tokenizer.decode(tokenizer.encode(t, special=False)[:2048]) for t in others]
        calibration.write_text("".join(json.dumps({"text": t}) + "\n" for t in starts), encoding="utf-8")
        print(
            f"{len(texts)} articles; {sum(map(len, held_out))} tokens of {len(held_out)} to evaluate",
            flush=True,
        )
        rows = []
        common = {
            "evaluated_tokens": sum(map(len, held_out)) - len(held_out),
            "window": arguments.window,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        if re.search(arguments.only, "float"):
            value = measure(path, held_out, arguments.window)
            rows.append({"configuration": "float", "perplexity": f"{value:.2f}", **common})
            print(f"{'float':<28} {value:10.2f}", flush=True)
        for name, options in CONFIGURATIONS.items():
            if not re.search(arguments.only, name):
                continue
            started, out = time.perf_counter(), Path(temporary) / "out"
            command = ["quantize", "smollm2", "--out", str(out), "--overwrite", *options.split()]
            command += [
                "--calibration",
                str(calibration),
                "--calibration-tokens",
                str(arguments.calibration_tokens),
            ]
            with contextlib.redirect_stdout(io.StringIO()):
                if cli.main(command):
                    sys.exit(f"quantize failed: {command}")
            report = json.loads((out / "quantize.json").read_text())
            value = measure(out, held_out, arguments.window)
            errors = [module["output_error"] for module in report["modules"]]
            rows.append(
                {
                    "configuration": name,
                    "perplexity": f"{value:.2f}",
                    "bits_a_weight": f"{report['bits_a_weight']:.3f}",
                    "mean_output_error": f"{sum(errors) / len(errors):.4f}",
                    "weights_quantised": report["weights_quantised"],
                    "quantize_seconds": f"{report['seconds']:.1f}",
                    "command": f"quantize smollm2 {options}",
                    "calibration_tokens": report["settings"]["calibration"]["tokens"],
                    **common,
                }
            )
            print(f"{name:<28} {value:10.2f}   ({time.perf_counter() - started:.1f} s)", flush=True)
            if arguments.out:  # after every one: a run may be stopped
                with arguments.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
