"""Time a decoder's step with random weights: dense, packed, and packed with its projections fused.

    python bench/decode_step.py                                                       # of SmolLM2-135M's sizes
    python bench/decode_step.py --sizes llama-3-8b --layers 8 --dtype bfloat16 --batch 1,8

A step is everything between a token and the next, as a caller of `Decoder.decode` meets it: embedding, attention over
the cache, the linear layers, the head, which stays dense (`flax_layers.llama`), the choice of the likeliest, and its
way to the host. "fused" is the packed model after `Llama.fuse_projections`. A turn is ``steps`` steps in a row, after
two that are not timed; models take turns. Times are milliseconds a step, the median of the turns. ``linear_mb`` are the
arrays of the linear layers of all blocks.
"""

import argparse
import csv
import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from flax import nnx

from flax_layers import quantize_module
from flax_layers.llama import Decoder, Llama, LlamaConfig

SIZES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
    ),
    "llama-3-70b": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
    "tiny": LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1
    ),
}
TURNS = 11
WARM_UP = 2  # steps of a turn before its clock starts: the memory of another model's step lies elsewhere


class Timed:
    """A model's decoder after a prompt, which goes on step by step."""

    def __init__(self, name: str, model: Llama, batch: int, steps: int):
        blocks = [nnx.state(layer) for block in model.layers for layer in (block.self_attn, block.mlp)]
        self.linear_bytes = sum(a.nbytes for a in jax.tree.leaves(blocks))
        prompts = [[1, 2, 3]] * batch
        decoder = Decoder(model, max_length=3 + steps, batch=batch)
        _, cache = decoder.prefill(prompts)
        logits, _ = decoder.step(np.full(batch, 4, np.int32), cache)
        if not np.isfinite(np.asarray(logits)).all():
            raise AssertionError(f"{name} has infinities or NaN among a step's logits")
        self.tokens = decoder.decode(prompts, max_new_tokens=steps)

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            next(self.tokens)

    def turn(self, steps: int) -> float:
        """Milliseconds a step."""
        self.go_on(WARM_UP)
        start = time.perf_counter()
        self.go_on(steps)
        return (time.perf_counter() - start) * 1e3 / steps


def models(config: LlamaConfig, dtype: str, group_size: int) -> dict[str, Llama]:
    model = Llama(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    dense = nnx.clone(model)
    quantize_module(model, group_size=group_size, method="rtn", progress=False)
    packed = nnx.clone(model)
    if not model.fuse_projections():
        raise AssertionError("no projections were fused")
    return {"dense": dense, "packed": packed, "fused": model}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config = SIZES[options.sizes]
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    steps = TURNS * (WARM_UP + options.steps) + 1  # always one more, which runs while the last is read
    by_name = models(config, options.dtype, options.group_size)
    for batch in options.batch:
        timed = {name: Timed(name, model, batch, steps) for name, model in by_name.items()}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(TURNS):
            for name, one in timed.items():
                times[name].append(one.turn(options.steps))
        dense = statistics.median(times["dense"])
        for name, one in timed.items():
            low, median, high = statistics.quantiles(times[name], n=4)
            yield {
                "date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
                "jax": jax.__version__, "jaxlib": jaxlib.__version__, "sizes": options.sizes,
                "layers": config.num_layers, "batch": batch, "dtype": options.dtype,
                "group_size": options.group_size, "model": name, "ms_per_step": f"{median:.3f}",
                "spread_ms": f"{high - low:.3f}", "speedup_over_dense": f"{dense / median:.2f}",
                "linear_mb": f"{one.linear_bytes / 1e6:.1f}",
            }  # fmt: skip


def main() -> None:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, default="smollm2-135m", help="of whose layers; %(default)s")
    parser.add_argument("--layers", type=int, help="blocks; default: as many as the model has")
    parser.add_argument("--batch", type=integers, default=[1], help="sequences side by side, as 1,8")
    parser.add_argument("--dtype", default="float32", help="of activations and dense weights; %(default)s")
    parser.add_argument("--group-size", type=int, default=64, help="rows that share a scale; %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="in a turn; %(default)s")
    parser.add_argument("--output", type=Path, default=Path("decode_step.csv"), help="CSV; %(default)s")
    options = parser.parse_args()
    with options.output.open("w", newline="", buffering=1) as file:
        writer = None
        for row in measure(options):
            if writer is None:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            print(
                f"batch {row['batch']}, {row['model']}: {row['ms_per_step']} ms a step, "
                f"{row['speedup_over_dense']} x dense, linear layers {row['linear_mb']} MB",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
