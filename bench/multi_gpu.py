"""Time the feed-forward products of a 70B-like decoder on 1, 2, 4, ... devices, with their all-reduce shown apart.

    python bench/multi_gpu.py                                   # 8192 -> 57344, 28672 -> 8192, M = 1, 8, 16, 32
    python bench/multi_gpu.py --k 256 --n 512 --devices 1,2 --m 1 --layers 2 --calls 2       # a trial on CPU

A block is a column-parallel product x [M, K] @ [K, 2 N], the sum of neighbouring pairs of columns in the place
of the gated activation, and a row-parallel product [M, N] @ [N, K], after which one all-reduce sums the float32
parts. Three programs are timed on every number of devices:

    block        all of it, partitioned from the sharding of its arrays (Explicit mesh axes)
    matmuls      the same without the all-reduce: every device goes on with its own part
    all-reduce   only the all-reduces, one after the other

Times are microseconds a block, the median of several turns. A program has ``layers`` blocks with weights of
their own (far more than the L2 cache holds), a turn is ``calls`` of it in a row, so that the host prepares one
while the devices do another. The speed-up of n devices is the time of one over the time of n.
"""

import argparse
import csv
import datetime
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_trirun
from jax_trirun.layout import layout

GROUP_SIZE = 128
TURNS = 9
COLUMNS, ROWS = (P(None, "d", None), P(None, "d")), (P("d", None, None), P("d", None))


def random_weight(key: jax.Array, k: int, n: int, mesh: Mesh, specs: tuple) -> tuple[jax.Array, jax.Array]:
    """Words and scales of a random [k, n] weight that keeps the magnitude of what it multiplies, in shards."""

    def make(key):
        words = jax.random.bits(key, layout(2).words_shape(k, n), "uint32")
        signs = jax.random.rademacher(key, (k // GROUP_SIZE, n), "bfloat16")
        return words, signs * (
            3 * k
        ) ** -0.5  # codes minus the zero point have mean square 1.5; pairs are summed

    return jax.jit(make, out_shardings=tuple(NamedSharding(mesh, s) for s in specs))(key)


def block(x: jax.Array, weight: tuple, *, row_parallel: Any) -> jax.Array:
    """One block; ``row_parallel`` does its second product."""
    up_words, up_scales, down_words, down_scales = weight
    h = jax_trirun.matmul(x, up_words, up_scales)
    h = h.reshape(h.shape[0], -1, 2).sum(-1)
    return row_parallel(h, down_words, down_scales)


def programs(mesh: Mesh, weights: list[tuple]) -> dict[str, Any]:
    """{name: function of x}, each one compiled program on the mesh."""
    devices = mesh.devices.size

    def blocks(x, weights, *, row_parallel):
        for weight in weights:
            x = block(x, weight, row_parallel=row_parallel)
        return x

    def reduces(x, weights):
        for _ in weights:
            x = jax.lax.psum(x, "d") * np.float32(1 / devices)
        return x

    def on_each_device(body):
        specs = (P(None, None), [(*COLUMNS, *ROWS)] * len(weights))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(None, None), check_vma=False)

    result = {
        "block": partial(blocks, row_parallel=jax_trirun.matmul),
        "matmuls": on_each_device(partial(blocks, row_parallel=jax_trirun.matmul)),
    }
    if devices > 1:
        result["all-reduce"] = on_each_device(reduces)
    jitted = {name: jax.jit(f) for name, f in result.items()}
    return {name: partial(_call, f, weights, name == "all-reduce") for name, f in jitted.items()}


def _call(f: Any, weights: list[tuple], wide: bool, x: jax.Array) -> jax.Array:
    return f(x.astype(jnp.float32) if wide else x, weights)


def seconds(f: Any, x: jax.Array, calls: int) -> tuple[float, float]:
    """Median and spread (the range of the middle half) of the time of one call, of ``calls`` in a row."""
    jax.block_until_ready([f(x) for _ in range(3)])
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        jax.block_until_ready([f(x) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), high - low


def check(mesh: Mesh, k: int) -> None:
    """The block's result is that of one device, for a small weight."""
    keys = jax.random.split(jax.random.key(1), 2)
    alone = jax.make_mesh((1,), ("d",), devices=mesh.devices.ravel()[:1])
    results = []
    for m in (alone, mesh):
        weight = sum((random_weight(key, *size, m, specs) for key, size, specs in zip(
            keys, ((k, 4 * k), (2 * k, k)), (COLUMNS, ROWS), strict=True)), ())  # fmt: skip
        x = jax.device_put(np.linspace(-1, 1, 4 * k, dtype=np.float32).reshape(4, k), NamedSharding(m, P()))
        y = jax.jit(partial(block, row_parallel=jax_trirun.matmul))(x.astype(jnp.bfloat16), weight)
        results.append(np.asarray(y, np.float32))
    error = np.abs(results[1] - results[0]).max() / np.abs(results[0]).max()
    if not error < 0.02:  # two roundings to bfloat16 apart
        raise AssertionError(f"{mesh.devices.size} devices are {error:.3g} away from one")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    alone: dict[tuple, float] = {}
    for devices in options.devices:
        mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
        check(mesh, max(GROUP_SIZE * devices, 512))
        keys = jax.random.split(jax.random.key(0), (options.layers, 2))
        up, down = (options.k, 2 * options.n, mesh, COLUMNS), (options.n, options.k, mesh, ROWS)
        weights = [(*random_weight(a, *up), *random_weight(b, *down)) for a, b in keys]
        bytes_here = sum(a.nbytes for a in jax.tree.leaves(weights)) / len(weights) / devices
        for m in options.m:
            x = jax.random.normal(jax.random.key(2), (m, options.k), jnp.bfloat16)
            x = jax.device_put(x, NamedSharding(mesh, P(None, None)))
            for name, f in programs(mesh, weights).items():
                median, spread = (t / options.layers * 1e6 for t in seconds(f, x, options.calls))
                alone.setdefault((m, name), median)
                faster = "" if name == "all-reduce" else f"{alone[m, name] / median:.2f}"
                rows.append({
                    "date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__, "jaxlib": jaxlib.__version__, "k": options.k, "n": options.n,
                    "group_size": GROUP_SIZE, "layers": options.layers, "calls": options.calls,
                    "devices": devices, "m": m, "program": name, "us_per_block": f"{median:.2f}",
                    "spread_us": f"{spread:.2f}", "speedup": faster,
                    "weight_mb_per_device": f"{bytes_here / 1e6:.1f}",
                    "weight_gb_s_per_device": "" if name == "all-reduce" else f"{bytes_here / median / 1e3:.0f}",
                })  # fmt: skip
                print(
                    f"{devices} devices, M={m}, {name}: {median:.2f} us a block", file=sys.stderr, flush=True
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table a line of devices and M."""
    lines = [
        "devices   M   block us  speed-up   matmuls us  speed-up   all-reduce us   GB/s a device (matmuls)"
    ]
    for devices, m in dict.fromkeys((r["devices"], r["m"]) for r in rows):
        of = {r["program"]: r for r in rows if (r["devices"], r["m"]) == (devices, m)}
        reduce = of.get("all-reduce", {"us_per_block": "-"})
        lines.append(
            f"{devices:7}{m:4}{of['block']['us_per_block']:>11}{of['block']['speedup']:>10}"
            f"{of['matmuls']['us_per_block']:>13}{of['matmuls']['speedup']:>10}"
            f"{reduce['us_per_block']:>16}{of['matmuls']['weight_gb_s_per_device']:>12}"
        )
    return "\n".join(lines)


def main() -> None:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=8192, help="the model's width")
    parser.add_argument("--n", type=int, default=28672, help="the feed-forward width")
    parser.add_argument("--m", type=integers, default=[1, 8, 16, 32], help="rows, as 1,8,16")
    parser.add_argument(
        "--devices", type=integers, help="how many, as 1,2,4; default: all powers of two there are"
    )
    parser.add_argument("--layers", type=int, default=16, help="blocks with weights of their own")
    parser.add_argument("--calls", type=int, default=12, help="of a program in a row")
    parser.add_argument("--output", type=Path, help="CSV; default: multi_gpu.csv in $OUT, or here")
    options = parser.parse_args()
    there = len(jax.devices())
    options.devices = options.devices or [2**i for i in range(there.bit_length()) if 2**i <= there]
    rows = measure(options)
    path = options.output or Path(os.environ.get("OUT", ".")) / "multi_gpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
