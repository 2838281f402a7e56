"""Time the feed-forward products of a 70B-like decoder on 1, 2, 4, ... devices, with their all-reduce shown apart.

    python bench/multi_gpu.py                                   # 8192 -> 57344, 28672 -> 8192, M = 1, 8, 16, 32
    python bench/multi_gpu.py --k 256 --n 512 --devices 1,2 --m 1 --layers 2 --steps 2       # a trial on CPU

A block is a column-parallel product x [M, K] @ [K, 2 N], tanh of the sum of neighbouring pairs of columns in the
place of the gated activation, and a row-parallel product [M, N] @ [N, K], after which one all-reduce sums the float32
parts. Five programs are timed on every number of devices:

    columns      only the column-parallel products, all of one x
    rows         only the row-parallel products, likewise
    matmuls      blocks without the all-reduce: every device goes on with its own part
    block        blocks, partitioned from the sharding of their arrays (Explicit mesh axes)
    all-reduce   only the all-reduces (and a factor that keeps their sums finite), one after the other

In the last three each step needs the one before, as in a decoder. "columns + rows" is what the products take by
themselves, "matmuls" has the small kernel between them as well. Times are microseconds a block, the median of
several turns. A program goes through ``layers`` blocks with weights of their own (far more than the L2 cache holds)
``steps`` times, in a loop, as a decoder generates token after token. A turn is ``calls`` of it in a row, each with
the result of the last, whose buffer it is given (donated); so the host prepares one call while the devices do
another. ``host_us`` is the time until the host had prepared them all: where it is near the whole, the host was the
limit. (One step a call makes it that on four devices: JAX hands every weight to every device in each call.) The
speed-up of n devices is the time of one over the time of n.

On a GPU whatever lies between two all-reduces is one CUDA graph, in which kernels follow each other; XLA by
itself would make graphs of five kernels and more only, and a block has three between all-reduces (a decoder's
has more). ``--all-reduces-in-graphs`` puts those into the graph too, which XLA does not do by itself either.
"""

import argparse
import csv
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
GAIN = 8  # of tanh: over thousands of blocks no state dies out, or grows out of its type
TURNS = 9
COLUMNS, ROWS = (P(None, "d", None), P(None, "d")), (P("d", None, None), P("d", None))
CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"  # as XLA's default


@functools.cache
def weight_maker(k: int, n: int, mesh: Mesh, specs: tuple) -> Callable[[jax.Array], tuple]:
    """key -> words and scales of a random [k, n] weight that keeps the magnitude of what it multiplies, in shards."""

    def make(key):
        words = jax.random.bits(key, layout(2).words_shape(k, n), "uint32")
        signs = jax.random.rademacher(key, (k // GROUP_SIZE, n), "bfloat16")
        # codes minus the zero point have mean square 1.5; pairs are summed
        return words, signs * (3 * k) ** -0.5

    return jax.jit(make, out_shardings=tuple(NamedSharding(mesh, s) for s in specs))


def random_blocks(count: int, k: int, n: int, mesh: Mesh, seed: int) -> list[tuple]:
    """(words, scales) of the column-parallel, then of the row-parallel weight, for each block."""
    up, down = weight_maker(k, 2 * n, mesh, COLUMNS), weight_maker(n, k, mesh, ROWS)
    keys = jax.random.split(jax.random.key(seed), (count, 2))
    return [(*up(a), *down(b)) for a, b in keys]


def block(x: jax.Array, weight: tuple) -> jax.Array:
    up_words, up_scales, down_words, down_scales = weight
    h = jax_trirun.matmul(x, up_words, up_scales)
    h = h.reshape(h.shape[0], -1, 2)
    h = jnp.tanh((h[..., 0] + h[..., 1]) * np.asarray(GAIN, h.dtype))
    return jax_trirun.matmul(h, down_words, down_scales)


def blocks(x: jax.Array, weights: list[tuple]) -> jax.Array:
    for weight in weights:
        x = block(x, weight)
    return x


def all_reduces(x: jax.Array, weights: list[tuple], *, devices: int) -> jax.Array:
    for _ in weights:
        x = jax.lax.psum(x, "d") * np.float32(1 / devices)
    return x


def products(total: jax.Array, weights: list[tuple], x: jax.Array, *, which: slice) -> jax.Array:
    """x times each weight. XLA does not look through the barriers: all of every product is computed, each time."""
    x, total = jax.lax.optimization_barrier((x, total))
    results = jax.lax.optimization_barrier([jax_trirun.matmul(x, *weight[which]) for weight in weights])
    return total + sum(y[0, 0].astype(jnp.float32) for y in results)


class Program:
    """``steps`` times a function state, weights, *rest -> state of the same shape, compiled. The state is donated."""

    def __init__(
        self, name: str, steps: int, function: Any, state: jax.Array, weights: list[tuple], *rest: jax.Array
    ):
        def loop(state, *rest):
            return jax.lax.fori_loop(0, steps, lambda _, state: function(state, *rest), state)

        self.name, self.state, self.rest = name, state, (weights, *rest)
        self.lowered = jax.jit(loop, donate_argnums=0).lower(state, *self.rest)

    def compile(self, options: dict[str, Any]) -> "Program":
        self.compiled = self.lowered.compile(options)
        return self

    def run(self, calls: int) -> tuple[float, float]:
        """Seconds a call, and seconds until the host had prepared it, of ``calls`` in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            self.state = self.compiled(self.state, *self.rest)
        prepared = time.perf_counter() - start
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / calls, prepared / calls

    def check(self) -> None:
        state = np.asarray(self.state, np.float32)
        if not (np.isfinite(state).all() and state.any()):
            raise AssertionError(f"{self.name} ended in zeros, infinities or NaN")


def programs(mesh: Mesh, weights: list[tuple], m: int, k: int, n: int, steps: int) -> Iterator[Program]:
    devices = mesh.devices.size
    spec_x, spec_weights = P(None, None), [(*COLUMNS, *ROWS)] * len(weights)

    def on_each_device(body, *specs):
        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(specs[0], spec_weights, *specs[1:]),
            out_specs=specs[0],
            check_vma=False,
        )

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    def random(size):
        return jax.random.normal(jax.random.key(2), (m, size), jnp.bfloat16)

    def new_x():  # of its own for each program, as it is donated
        return put(random(k), spec_x)

    total = np.zeros(devices, np.float32)
    for name, which, x, spec in (
        ("columns", slice(0, 2), random(k), spec_x),
        ("rows", slice(2, 4), random(n), P(None, "d")),
    ):
        body = on_each_device(partial(products, which=which), P("d"), spec)
        yield Program(name, steps, body, put(total, P("d")), weights, put(x, spec))
    alone = on_each_device(blocks, spec_x)
    yield Program("matmuls", steps, alone, new_x(), weights)
    yield Program("block", steps, blocks, new_x(), weights)
    if devices > 1:
        body = on_each_device(partial(all_reduces, devices=devices), spec_x)
        yield Program("all-reduce", steps, body, new_x().astype(jnp.float32), weights)


def check(mesh: Mesh, k: int) -> None:
    """The block's result is that of one device, for a small weight."""
    alone = jax.make_mesh((1,), ("d",), devices=mesh.devices.ravel()[:1])
    results = []
    for m in (alone, mesh):
        (weight,) = random_blocks(1, k, 2 * k, m, seed=1)
        x = jax.device_put(np.linspace(-1, 1, 4 * k, dtype=np.float32).reshape(4, k), NamedSharding(m, P()))
        results.append(np.asarray(jax.jit(block)(x.astype(jnp.bfloat16), weight), np.float32))
    error = np.abs(results[1] - results[0]).max() / np.abs(results[0]).max()
    if not error < 0.02:  # two roundings to bfloat16 apart
        raise AssertionError(f"{mesh.devices.size} devices are {error:.3g} away from one")


def compiler_options(in_graphs: bool) -> dict[str, Any]:
    if jax.default_backend() != "gpu":
        return {}
    return {
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
        "xla_gpu_enable_command_buffer": CAPTURED + ",COLLECTIVES" * in_graphs,
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    alone: dict[tuple, float] = {}
    compiling = compiler_options(options.all_reduces_in_graphs)
    for devices in options.devices:
        mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
        check(mesh, max(GROUP_SIZE * devices, 512))
        weights = random_blocks(options.layers, options.k, options.n, mesh, seed=0)
        up, down = (sum(a.nbytes for a in weights[0][part]) / devices for part in (slice(0, 2), slice(2, 4)))
        read = {"columns": up, "rows": down, "matmuls": up + down, "block": up + down}
        with ThreadPoolExecutor() as pool:
            todo = [
                (m, pool.submit(program.compile, compiling))
                for m in options.m
                for program in programs(mesh, weights, m, options.k, options.n, options.steps)
            ]
        for m, program in ((m, future.result()) for m, future in todo):
            for _ in range(3):
                program.run(1)
            times, prepared = zip(*(program.run(options.calls) for _ in range(TURNS)), strict=True)
            program.check()
            low, _, high = statistics.quantiles(times, n=4)
            a_block = 1e6 / (options.layers * options.steps)
            median = statistics.median(times) * a_block
            alone.setdefault((m, program.name), median)
            bytes_here = read.get(program.name)
            row = {
                "date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
                "jax": jax.__version__, "jaxlib": jaxlib.__version__, "k": options.k, "n": options.n,
                "group_size": GROUP_SIZE, "layers": options.layers, "steps": options.steps, "calls": options.calls,
                "graphs": "all-reduces too" if options.all_reduces_in_graphs else "between all-reduces",
                "devices": devices, "m": m, "program": program.name, "us_per_block": f"{median:.2f}",
                "spread_us": f"{(high - low) * a_block:.2f}",
                "host_us": f"{statistics.median(prepared) * a_block:.2f}",
                "speedup": f"{alone[m, program.name] / median:.2f}" if bytes_here else "",
                "weight_mb_per_device": f"{bytes_here / 1e6:.1f}" if bytes_here else "",
                "weight_gb_s_per_device": f"{bytes_here / median / 1e3:.0f}" if bytes_here else "",
            }  # fmt: skip
            print(
                f"{devices} devices, M={m}, {program.name}: {median:.2f} us a block",
                file=sys.stderr,
                flush=True,
            )
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every number of devices and of rows: microseconds a block, and speed-ups over one device."""
    time_of = {(r["devices"], r["m"], r["program"]): float(r["us_per_block"]) for r in rows}
    first = rows[0]["devices"]
    lines = [
        "devices   M   columns     rows  speed-up   matmuls  speed-up     block  speed-up   all-reduce   (us a block)"
    ]
    for d, m in dict.fromkeys((r["devices"], r["m"]) for r in rows):

        def of(*names, devices=d, m=m):
            return sum(time_of[devices, m, name] for name in names)

        def faster(*names, d=d, m=m):
            return sum(time_of[first, m, name] for name in names) / sum(time_of[d, m, name] for name in names)

        lines.append(
            f"{d:7}{m:4}{of('columns'):10.2f}{of('rows'):9.2f}{faster('columns', 'rows'):9.2f}x"
            f"{of('matmuls'):10.2f}{faster('matmuls'):9.2f}x{of('block'):10.2f}{faster('block'):9.2f}x"
            + (f"{of('all-reduce'):13.2f}" if d > 1 else f"{'-':>13}")
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
    parser.add_argument(
        "--layers", type=int, default=80, help="blocks with own weights; 80 as a model of 70B"
    )
    parser.add_argument("--steps", type=int, default=10, help="times that a program goes through its blocks")
    parser.add_argument("--calls", type=int, default=3, help="of a program in a row")
    parser.add_argument("--all-reduces-in-graphs", action="store_true", help="capture them in CUDA graphs")
    parser.add_argument("--output", type=Path, default=Path("multi_gpu.csv"), help="CSV; %(default)s")
    options = parser.parse_args()
    there = len(jax.devices())
    options.devices = options.devices or [2**i for i in range(there.bit_length()) if 2**i <= there]
    if max(options.devices) > there:
        parser.error(f"--devices must be {there} at most, as many as JAX finds, got {max(options.devices)}")
    rows: list[dict[str, Any]] = []
    # Line by line: what is measured stays, whatever comes.
    with options.output.open("w", newline="", buffering=1) as file:
        for row in measure(options):
            if not rows:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
