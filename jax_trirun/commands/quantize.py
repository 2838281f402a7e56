"""Quantise a model to 2 bits, layer by layer, into a directory of packed safetensors.

    python -m jax_trirun quantize smollm2 --calibration text.txt --out smollm2-2bit
    python -m jax_trirun generate --model smollm2-2bit

MODEL is a GGUF file, a directory of Hugging Face's (config.json and safetensors), or smollm2, the small
model of the demo. One layer at a time is read, calibrated on what the layers before it (quantised
already) give it, quantised and written. A run that was stopped, even killed, goes on with --resume.

The directory holds the weights (model-*.safetensors and their index), config.json, the tokenizer, and
quantize.json: settings, memory, and for every module its errors, damping, time and share of each code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import open_model
from ..checkpoints.models import Model
from ..checkpoints.packed import INDEX
from ..quantizers.recipe import ALL_METHODS, DEFAULT_SKIP, Recipe, Recipes, parse_override
from ..types import FLOATS, GROUP_SIZES
from .model import find
from .output import check_apart, check_free

HELP = "quantise a model layer by layer, with calibration text (GPTQ) or without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, a directory, or smollm2")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the packed model goes")
    parser.add_argument("--method", default="gptq", choices=ALL_METHODS, help="default: gptq")
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4), help="default: 2")
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        choices=(*GROUP_SIZES, -1),
        help="weights that share a scale, -1 for all of a column (default: 64)",
    )
    parser.add_argument(
        "--scale-dtype", default="float16", choices=FLOATS, help="of the scales (default: float16)"
    )
    parser.add_argument("--damping", type=float, help="GPTQ's first damping (default: 0.1)")
    parser.add_argument("--act-order", action="store_true", help="GPTQ: largest activations first")
    parser.add_argument("--unsigned", action="store_true", help="GPTQ: no negative scales")
    parser.add_argument(
        "--rotate", action="store_true", help="fold QuaRot's rotations R1 and R2 into the weights first"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rotations (default: 0)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="REGEX=NAME=VALUE,..",
        help="other settings for modules whose path the regular expression is found in, as in "
        "'down_proj=method=hqq,group_size=32'; the last that fits counts",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="REGEX",
        help=f"leave these modules in float; always so, unless overridden: {', '.join(DEFAULT_SKIP)}",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text: a document a file, or a .jsonl file with one document a line under the key text",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=131072, help="read no more than these (default: 131072)"
    )
    parser.add_argument(
        "--window", type=int, help="longest piece of a document (default: 2048, or the model's limit)"
    )
    parser.add_argument(
        "--bos", action="store_true", help="begin every piece with the tokenizer's BOS, as eval --bos does"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="tokens computed at once (default: 4096)"
    )
    parser.add_argument(
        "--float-dtype",
        default="float16",
        choices=FLOATS,
        help="of the weights that stay float (default: float16)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in DIR")


def run(arguments: argparse.Namespace) -> None:
    from ..quantizers.rotation import RotatedModel
    from .quantize_run import REPORT, Run

    recipes = recipes_of(arguments)
    for name in ("calibration_tokens", "batch_tokens", "window"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    out = Path(arguments.out)
    if arguments.resume and (out / INDEX).is_file():
        print(f"{out} is complete: there is nothing to resume")
        return
    if not arguments.resume:
        check_free(out, REPORT, overwrite=arguments.overwrite, instead="go on with --resume, ")
    model: Model = open_model(find(arguments.model))
    check_apart(out, model)
    if arguments.rotate:
        model = RotatedModel(model, seed=arguments.seed)
        print(f"rotation   {model.description}")
    documents = bos = None
    if arguments.bos:
        bos = model.tokenizer().bos
        if bos is None:
            raise ValueError(f"--bos: the tokenizer of {model.name} has no BOS token")
    if arguments.calibration:
        documents = tokenize(model, arguments.calibration, arguments.calibration_tokens)
    work = Run(
        model,
        recipes,
        documents,
        window=arguments.window,
        batch_tokens=arguments.batch_tokens,
        float_dtype=arguments.float_dtype,
        bos=bos,
    )
    work.state_memory()
    work.go(out, overwrite=arguments.overwrite)


def recipes_of(arguments: argparse.Namespace) -> Recipes:
    """The recipes that the arguments describe. Raises ValueError."""
    options: dict[str, Any] = {}
    if arguments.damping is not None:
        options["damping"] = arguments.damping
    if arguments.act_order:
        options["act_order"] = True
    if arguments.unsigned:
        options["signed"] = False
    default = Recipe(
        arguments.method, arguments.bits, arguments.group_size, arguments.scale_dtype, options=options
    )
    overrides = [parse_override(text) for text in arguments.override]
    return Recipes(default, overrides, tuple(arguments.skip))


def read_documents(files: Sequence[str]) -> Iterator[str]:
    """The texts of calibration files, in order. Raises ValueError or OSError, with the file's name."""
    for name in files:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 text ({error})") from error
        if not name.endswith(".jsonl"):
            yield text
            continue
        for i, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{name}, line {i}: wanted a JSON object with the key "text"') from error


def tokenize(model: Model, files: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of the first ``limit`` tokens of the files' documents. Raises as ``read_documents``."""
    tokenizer, documents, left = model.tokenizer(), [], limit
    for text in read_documents(files):
        if tokens := tokenizer.encode(text, special=False)[:left]:
            documents.append(tokens)
        left -= len(tokens)
        if not left:
            break
    if not documents:
        raise ValueError(f"--calibration: no text in {', '.join(files)}")
    return documents
