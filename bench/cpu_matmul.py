"""Time jax_trirun.matmul on the CPU beside jnp.dot, and write one CSV row a case.

    python bench/cpu_matmul.py                      # the default cases, to bench/results/cpu_matmul.csv
    python bench/cpu_matmul.py --k 8192 --n 28672 --m 1,8 --isa avx2 --output -

Each case and its dense counterpart take turns, a few calls each, so that both meet the same clocks and the
same neighbours; a ratio compares their medians in that one run. Times are those of whole jitted calls, as
a user sees them. The 2-bit weights rotate over copies that together exceed the last-level cache, because
the layers of a model follow each other; the dense weights exceed it alone at the default size. (Strictly
alternating calls would be slower at M = 1: each then finds sleeping threads and the other's data.)
"""

import argparse
import csv
import datetime
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, costs

RESULTS = Path(__file__).parent / "results" / "cpu_matmul.csv"
CACHE_BYTES = 64 << 20  # of packed weights, over all copies
BUDGET_S = 2.0  # of measuring, for one case and its dense counterpart
TURN = 6  # calls


def device_name() -> str:
    """The processor as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_gb_s(threads: int) -> float:
    """Bytes a second of only reading an array beyond the caches: the limit of any matmul with few rows."""
    chunks = np.ones((threads, CACHE_BYTES // 8), np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(np.sum, chunks))
            times.append(time.perf_counter() - start)
    return chunks.nbytes / statistics.median(times) / 1e9


def copies_of(weight: Any) -> Iterator[Any]:
    """Endlessly, one after the other, copies of a weight that are not all in the cache."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    count = max(1, -(-CACHE_BYTES // size))
    return itertools.cycle([jax.tree.map(jnp.array, weight) for _ in range(count)])


def timed(call: Callable[[Any], Any], weight: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(weight))
    return time.perf_counter() - start


def take_turns(
    calls: list[Callable[[Any], Any]], weights: list[Iterator[Any]], repeats: int
) -> list[list[float]]:
    """Seconds of each call of each of ``calls``, which take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call, weight in zip(calls, weights, strict=True):
        timed(call, next(weight))  # compiles
        timed(call, next(weight))
    started = time.perf_counter()
    while not times[0] or (len(times[0]) < repeats and time.perf_counter() - started < BUDGET_S):
        for call, weight, row in zip(calls, weights, times, strict=True):
            row.extend(timed(call, next(weight)) for _ in range(TURN))
    return times


def measure(problem: MatmulProblem, isas: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """The rows of one problem: jnp.dot in x's dtype, and jax_trirun on each instruction set."""
    x, qt = jnp.asarray(problem.x()), problem.quant_tensor()
    dense = jax_trirun.dequantize(qt, dtype=x.dtype)
    dot = jax.jit(lambda w: jnp.dot(x, w))
    matmul = jax.jit(lambda w: jax_trirun.matmul(x, w))

    def on_isa(isa: str) -> Callable[[Any], Any]:
        def call(w: Any) -> Any:
            _ffi.cpu_module.set_isa(isa)
            return matmul(w)

        return call

    dense_copies, packed_copies = copies_of(dense), copies_of(qt)
    calls = [dot, *(on_isa(isa) for isa in isas)]
    times = take_turns(calls, [dense_copies, *(packed_copies for _ in isas)], repeats)
    dense_median = statistics.median(times[0])
    names = [("jnp.dot", ""), *(("jax_trirun.matmul", isa) for isa in isas)]
    for (implementation, isa), seconds in zip(names, times, strict=True):
        weight = dense if implementation == "jnp.dot" else qt
        cost = costs(problem.m, problem.k, problem.n, x.dtype, weight)
        median = statistics.median(seconds)
        low, high = np.percentile(seconds, [10, 90])
        yield {
            "k": problem.k,
            "n": problem.n,
            "m": problem.m,
            "group_size": problem.group_size,
            "zeros": int(problem.with_zeros),
            "x_dtype": problem.x_dtype,
            "scale_dtype": problem.scale_dtype,
            "implementation": implementation,
            "isa": isa,
            "repeats": len(seconds),
            "median_ms": f"{median * 1e3:.3f}",
            "min_ms": f"{min(seconds) * 1e3:.3f}",
            "p10_ms": f"{low * 1e3:.3f}",
            "p90_ms": f"{high * 1e3:.3f}",
            "weight_mb": f"{cost.weight_bytes / 1e6:.2f}",
            "gb_s": f"{(cost.weight_bytes + cost.activation_bytes) / median / 1e9:.2f}",
            "gflop_s": f"{cost.flops / median / 1e9:.1f}",
            "speedup_over_dot": f"{dense_median / median:.2f}",
        }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=14336)
    parser.add_argument("--m", type=numbers, default=[1, 2, 4, 8, 16, 64, 256], help="1,8,256")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--x-dtype", default="float32,bfloat16", help="float32,bfloat16,float16")
    parser.add_argument("--scale-dtype", default="bfloat16")
    parser.add_argument("--zeros", action="store_true", help="weights with zeros")
    parser.add_argument("--isa", default=",".join(_ffi.cpu_module.available_isas()), help="avx512,avx2")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", default=str(RESULTS), help="CSV file, or - for none")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    isas = args.isa.split(",")
    unknown = set(isas) - set(_ffi.cpu_module.available_isas())
    if unknown:
        sys.exit(f"--isa: this machine has {_ffi.cpu_module.available_isas()}, got {sorted(unknown)}")
    cores = len(os.sched_getaffinity(0))
    run = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "device": device_name(),
        "cores": cores,
        "read_gb_s": f"{read_gb_s(cores):.1f}",
        "jax_trirun": jax_trirun.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in run.items()))
    base = MatmulProblem(
        1, args.k, args.n, args.group_size, scale_dtype=args.scale_dtype, with_zeros=args.zeros
    )
    rows = []
    for x_dtype, m in itertools.product(args.x_dtype.split(","), args.m):
        for row in measure(replace(base, m=m, x_dtype=x_dtype), isas, args.repeats):
            rows.append(run | row)
            print(
                f"{x_dtype:>8} M={m:<4} {row['implementation']:>17} {row['isa']:8} {row['median_ms']:>9} ms "
                f"({row['p10_ms']} - {row['p90_ms']}) {row['gb_s']:>6} GB/s {row['gflop_s']:>6} GFLOP/s "
                f"{row['speedup_over_dot']:>6} x dot",
                flush=True,
            )
    if args.output != "-":
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
