"""Turn a 2-bit checkpoint of another project into a directory of packed safetensors, exactly.

    python -m jax_trirun convert MODEL --out DIR
    python -m jax_trirun generate --model DIR

MODEL is a directory with config.json and safetensors: GPTQ (v1 and v2), BitNet b1.58, compressed-tensors,
HQQ, TriRun, or TriLM (float files whose weights are ternary); or a GGUF file with TQ1_0 or TQ2_0 tensors.
The format is read from config.json or from the file. Every weight that comes out is, number for number,
the one that went in. What 2 bits with groups cannot hold exactly is refused, by name, with the reason;
--requantize METHOD quantises it again instead, which costs accuracy. Weights that are float stay so.

The directory also holds convert.json: for every tensor its kind, shape, memory and bits a weight.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import from_trilm, open_model
from ..checkpoints.errors import CheckpointError, InexactError, optional_import
from ..checkpoints.models import PACKED, Model, write_config
from ..checkpoints.packed import Parts
from ..quantizers import METHODS, quantize
from ..types import FLOATS, GROUP_SIZES, QuantTensor
from .model import find, megabytes
from .output import check_apart, check_free, clear, copy_tokenizer, write_json

HELP = "pack a 2-bit checkpoint of another project (GPTQ, BitNet, HQQ, ...)"
REPORT = "convert.json"
# Their linear layers are float: ternary ones (TriLM) are packed exactly, others are no 2-bit weights.
_FLOAT_FORMATS = ("float", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, a GGUF file, or smollm2")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the packed model goes")
    parser.add_argument(
        "--requantize",
        choices=METHODS,
        metavar="METHOD",
        help=f"quantise again what cannot be packed exactly: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        choices=(*GROUP_SIZES, -1),
        help="of what is quantised again (default: 64)",
    )
    parser.add_argument(
        "--scale-dtype",
        default="float16",
        choices=FLOATS,
        help="of what is quantised again (default: float16)",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in DIR")


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    again = None
    if arguments.requantize:
        again = {
            "method": arguments.requantize,
            "group_size": arguments.group_size,
            "scale_dtype": arguments.scale_dtype,
        }
    out = Path(arguments.out)
    check_free(out, REPORT, overwrite=arguments.overwrite)
    model = open_model(find(arguments.model))
    if model.format == PACKED:
        raise ValueError(f"{model.path} is packed already")
    check_apart(out, model)
    print(f"model      {model.name}: {model.path}\nformat     {model.format}", flush=True)
    if arguments.overwrite and out.exists():
        clear(out, REPORT)
    tensors = _convert(model, out, again)
    if why := copy_tokenizer(model, out):
        print(f"tokenizer  left out: {why}", file=sys.stderr)
    write_config(out, model.config, {"bits": 2, "converted_from": model.format})
    summary = summarise(tensors)
    write_json(
        out / REPORT,
        {
            "complete": True,
            "model": model.name,
            "format": model.format,
            "requantize": again,
            **summary,
            "tensors": tensors,
        },
    )
    Parts(out, model.config["num_layers"] + 2).finish()
    print(table(tensors))
    print(
        f"packed     {summary['weights_packed']:,} weights in {megabytes(summary['bytes_packed'])}, "
        f"{summary['bits_a_weight']:.3f} bits a weight with scales; {summary['requantised']} tensors quantised again\n"
        f"memory     {megabytes(summary['bytes'])} in all; {time.perf_counter() - started:.1f} s\n"
        f"written    {out}"
    )


def _convert(model: Model, out: Path, again: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Writes every weight, a layer at a time; a description of each. Nothing is written before the
    first layer is known to be representable."""
    layers = model.config["num_layers"]
    bar = optional_import("tqdm", "showing progress").tqdm(
        total=len(model.shapes), unit="tensor", disable=None, file=sys.stderr
    )
    tensors: list[dict[str, Any]] = []
    packed = 0
    parts = None
    with bar:
        # Layers first: embeddings and heads are float in every format, and say nothing.
        for i in [*range(1, layers + 1), 0, layers + 1]:
            part = {}
            for path in _paths(model, i, layers):
                part[path], kind = convert_weight(model, path, again)
                tensors.append(describe(path, part[path], kind))
                packed += kind != "float"
                bar.update()
            if parts is None:
                parts = Parts(out, layers + 2)
                write_json(out / REPORT, {"complete": False, "model": model.name, "format": model.format})
            parts.write(i, part)
    if not packed:
        raise CheckpointError(f"{model.path}: there is no 2-bit weight in it; use the command quantize")
    order = list(model.shapes)
    return sorted(tensors, key=lambda t: order.index(t["name"]))


def _paths(model: Model, i: int, layers: int) -> list[str]:
    if i == 0:
        return ["embed.embedding"]
    if i <= layers:
        return [path for path in model.shapes if path.startswith(f"layers.{i - 1}.")]
    return [path for path in ("norm.scale", "lm_head.kernel") if path in model.shapes]


def convert_weight(
    model: Model, path: str, again: dict[str, Any] | None
) -> tuple[QuantTensor | np.ndarray, str]:
    """One weight, and what it is: "packed", "requantised" or "float".

    Raises:
      CheckpointError: it cannot be represented exactly, and `again`, arguments of `quantize`, is None.
    """
    try:
        value = model.read(path)
        if not isinstance(value, QuantTensor) and _must_be_ternary(model, path):
            value = from_trilm(value.T)
    except InexactError as error:
        if again is None:
            hint = (
                ""
                if model.format not in _FLOAT_FORMATS
                else "; float models are quantised with the command quantize"
            )
            raise CheckpointError(
                f"{model.path}: {path} cannot be represented exactly: {error.why}. Add --requantize METHOD to "
                f"quantise such weights again, which costs accuracy{hint}"
            ) from error
        try:
            return quantize(error.weight(), **again), "requantised"
        except ValueError as wrong:
            raise ValueError(f"{path}: {wrong}") from wrong
    return value, "packed" if isinstance(value, QuantTensor) else "float"


def _must_be_ternary(model: Model, path: str) -> bool:
    """Whether a float weight is a linear layer of a float file: its embeddings, norms and head stay."""
    return model.format in _FLOAT_FORMATS and re.fullmatch(r"layers\..*\.kernel", path) is not None


def describe(name: str, value: Any, kind: str) -> dict[str, Any]:
    """One tensor of the report."""
    row: dict[str, Any] = {"name": name, "kind": kind, "shape": list(value.shape)}
    if isinstance(value, QuantTensor):
        row |= {
            "dtype": str(value.scales.dtype),
            "group_size": value.group_size,
            "zeros": value.zeros is not None,
        }
    else:
        row["dtype"] = str(value.dtype)
    return row | {"bytes": value.nbytes, "bits_a_weight": 8 * value.nbytes / math.prod(value.shape)}


def summarise(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of the report."""
    two_bit = [t for t in tensors if t["kind"] != "float"]
    weights, memory = sum(math.prod(t["shape"]) for t in two_bit), sum(t["bytes"] for t in two_bit)
    return {
        "weights_packed": weights,
        "bytes_packed": memory,
        "bits_a_weight": 8 * memory / weights,
        "bytes": sum(t["bytes"] for t in tensors),
        "requantised": sum(t["kind"] == "requantised" for t in tensors),
    }


def table(tensors: Sequence[Mapping[str, Any]], *, every: bool = False) -> str:
    """Memory by tensor; unless `every`, those of all layers that are alike in one line."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for t in tensors:
        name = t["name"] if every else re.sub(r"^layers\.\d+", "layers.*", t["name"])
        key = name, t["kind"], tuple(t["shape"]), t["dtype"], t.get("group_size"), t.get("zeros")
        alike.setdefault(key, []).append(t)
    lines = [
        f"{'tensor':<34} {'count':>5} {'shape':>14} {'kind':<12} {'scales':<9} {'group':>5} {'memory':>11} bits"
    ]
    for (name, kind, shape, dtype, group, zeros), same in alike.items():
        size = "" if group is None else "all" if group == -1 else str(group)
        memory = sum(t["bytes"] for t in same)
        lines.append(
            f"{name:<34} {len(same):>5} {' x '.join(map(str, shape)):>14} {kind:<12} {dtype:<9} {size:>5} "
            f"{megabytes(memory):>11} {same[0]['bits_a_weight']:.3f}" + (", zeros" if zeros else "")
        )
    return "\n".join(lines)
