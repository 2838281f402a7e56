"""Time matmul on this machine's back ends beside a dense dot of the same dtype.

    python -m jax_trirun bench
    python -m jax_trirun bench --shape 4096x4096 --shape 14336x4096 --tokens 1,8,64 --dtype bfloat16
    python -m jax_trirun bench --backend cuda,cuda-portable,reference --csv bench.csv
    python -m jax_trirun bench --backward --tokens 64,512,4096

A time is that of one product inside a jitted function that makes several, each with another copy of the
weight, so that the copies together exceed the caches: the layers of a model follow each other as well. The
dense dot and the back ends take turns, so that they meet the same clocks and the same neighbours; a speed-up
compares medians of one run. Bytes are what a product must read and write at least: the weight, x and y.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.safetensors import whole_file

if TYPE_CHECKING:
    import jax

    from ..testing import MatmulProblem

HELP = "time matmul beside a dense dot, on given shapes and back ends"
FLOATS = ("float32", "bfloat16", "float16")
DENSE = "dense dot"

CACHE_BYTES = 256 << 20  # of weights, over all copies: more than the caches of today's processors and GPUs
MAX_COPIES = 64
SAMPLE_S = 0.02  # a sample is that long at least: long against the clock and the launch of a function
MIN_SAMPLES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="KxN",
        help="[in, out] of a weight; may be given several times (default: 4096x14336)",
    )
    parser.add_argument("--tokens", default="1,8,64", metavar="M,..", help="rows of x (default: %(default)s)")
    parser.add_argument(
        "--backward",
        action="store_true",
        help="time the gradient with respect to x instead, y_bar [M, N] @ W.T [N, K]",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, help="32, 64, 128, or -1 for one group (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        help="of x, y and the dense weight (default: float32 on CPU, else bfloat16)",
    )
    parser.add_argument(
        "--scale-dtype", choices=FLOATS, default="bfloat16", help="of scales and zeros (default: %(default)s)"
    )
    parser.add_argument("--zeros", action="store_true", help="weights with zeros")
    parser.add_argument(
        "--backend", metavar="NAME,..", help="reference, cpu, cuda, cuda-portable (default: the best here)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="to spend on each product (default: %(default)s)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every row to FILE, too")


def run(arguments: argparse.Namespace) -> None:
    from ..testing import MatmulProblem

    shapes = [parse_shape(text) for text in arguments.shape or ["4096x14336"]]
    tokens = parse_tokens(arguments.tokens)
    check_group_size(arguments.group_size, shapes)
    if arguments.csv and not arguments.csv.absolute().parent.is_dir():
        raise ValueError(f"--csv: there is no directory {arguments.csv.absolute().parent}; make it first")
    backends = parse_backends(arguments.backend)
    device = device_of(backends)
    dtype = arguments.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    about = versions(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{dtype} x, group size {arguments.group_size}, {arguments.scale_dtype} scales"
        + (" and zeros" if arguments.zeros else "")
        + (", gradients with respect to x" if arguments.backward else "")
    )
    print(HEADER)
    rows: list[dict[str, Any]] = []
    for k, n in shapes:
        base = MatmulProblem(
            1, k, n, arguments.group_size, dtype, arguments.scale_dtype, with_zeros=arguments.zeros
        )
        weights = Weights(base, device)
        for m in tokens:
            problem = replace(base, m=m)
            for row in measure(problem, weights, backends, device, arguments.seconds, arguments.backward):
                rows.append(about | row)
                print(table_line(row), flush=True)
        print("".join(f"{note}\n" for note in weights.notes), end="")
    if arguments.csv:
        write_csv(arguments.csv, rows)
        print(f"wrote {arguments.csv}")


# ---- Arguments --------------------------------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, int]:
    k, x, n = text.lower().partition("x")
    if not (x and k.isdecimal() and n.isdecimal() and int(k) > 0 and int(n) > 0):
        raise ValueError(f"--shape must be KxN with K, N > 0, such as 4096x14336, got {text!r}")
    return int(k), int(n)


def parse_tokens(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens must be numbers of rows > 0, such as 1,8,64, got {text!r}")
    return [int(part) for part in parts]


def check_group_size(group_size: int, shapes: Sequence[tuple[int, int]]) -> None:
    if group_size not in (32, 64, 128, -1):
        raise ValueError(f"--group-size must be 32, 64, 128 or -1, got {group_size}")
    for k, n in shapes:
        if group_size != -1 and k % group_size:
            raise ValueError(
                f"--group-size must divide K, got --group-size {group_size} and --shape {k}x{n}; "
                "use a smaller group size, or -1"
            )


def parse_backends(text: str | None) -> list[str]:
    """The names asked for, all usable on one platform here; without any, the best one."""
    from .. import _ffi

    if text is None:
        best = _ffi.default_platform()
        return [best if best in _ffi.BACKENDS else "reference"]
    names = [name.strip() for name in text.split(",")]
    usable = _ffi.usable_backends()
    for name in names:
        if error := _ffi.backend_error(name):
            raise ValueError(f"--backend: {error}")
        if name not in usable:
            raise ValueError(f"--backend: {name!r} has no device here; usable: {', '.join(usable)}")
    platforms = {_ffi.BACKENDS[name].platform for name in names if name != "reference"}
    if len(platforms) > 1:
        raise ValueError(f"--backend: one platform at a time, got {' and '.join(sorted(platforms))}")
    return names


def device_of(backends: Sequence[str]) -> jax.Device:
    import jax

    from .. import _ffi

    native = [name for name in backends if name != "reference"]
    return jax.devices(_ffi.BACKENDS[native[0]].platform if native else None)[0]


# ---- What is measured -------------------------------------------------------------------------------


class Weights:
    """Copies of one problem's weight on a device, packed and dense, enough of each to exceed the caches."""

    def __init__(self, problem: MatmulProblem, device: jax.Device) -> None:
        import jax

        from .. import dequantize

        self.notes: list[str] = []
        with jax.default_device(device):
            packed = jax.device_put(problem.quant_tensor(), device)
            self.packed = self._copies("packed", packed)
            self.dense = self._copies("dense", dequantize(packed, dtype=problem.x_dtype))

    def _copies(self, name: str, weight: Any) -> list[Any]:
        import jax
        import jax.numpy as jnp

        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
        count = min(max(-(-CACHE_BYTES // size), 1), MAX_COPIES)
        if count * size < CACHE_BYTES:
            self.notes.append(
                f"note: {count} {name} copies of this weight are {count * size / 1e6:.1f} MB; a cache may hold them"
            )
        return [jax.tree.map(jnp.array, weight) for _ in range(count)]


def repeated(product: Callable[[Any, Any], Any]) -> jax.stages.Wrapped:
    """A jitted function of x and weights that makes one product with each weight.

    No two products have the same operands, so that XLA cannot merge them, and all of every product is
    computed, because XLA does not look through the barrier.
    """
    import jax
    import jax.numpy as jnp

    def step(x: Any, weights: list[Any]) -> Any:
        results = jax.lax.optimization_barrier([product(x, weight) for weight in weights])
        return sum(y[0, 0].astype(jnp.float32) for y in results)

    return jax.jit(step)


class Case(NamedTuple):
    """One implementation's jitted function and its arguments."""

    name: str
    step: jax.stages.Wrapped
    x: Any
    weights: list[Any]

    def sample(self, launches: int) -> float:
        """Seconds a product, over ``launches`` of the function in a row."""
        import jax

        start = time.perf_counter()
        for _ in range(launches):
            result = self.step(self.x, self.weights)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / (launches * len(self.weights))


def take_turns(cases: Sequence[Case], seconds: float) -> list[list[float]]:
    """Samples of each case, in seconds a product; about ``seconds`` are spent on each case."""
    for case in cases:
        case.sample(1)  # compiles
    launches = []
    for case in cases:
        once = case.sample(1) * len(case.weights)
        launches.append(max(1, round(SAMPLE_S / once)))
    samples: list[list[float]] = [[] for _ in cases]
    started = time.perf_counter()
    while len(samples[0]) < MIN_SAMPLES or time.perf_counter() - started < seconds * len(cases):
        for case, count, row in zip(cases, launches, samples, strict=True):
            row.append(case.sample(count))
    return samples


def measure(
    problem: MatmulProblem,
    weights: Weights,
    backends: Sequence[str],
    device: jax.Device,
    seconds: float,
    backward: bool,
) -> list[dict[str, Any]]:
    """A row for the dense dot and one for each back end, of the product or of its gradient."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from .. import _ffi, matmul
    from ..testing import costs

    x = jax.device_put(problem.x(), device)
    given = x
    if backward:
        y_bar = np.random.default_rng(0).standard_normal((problem.m, problem.n))
        given = jax.device_put(y_bar.astype(x.dtype), device)

    def of(product: Callable[[Any, Any], Any]) -> jax.stages.Wrapped:
        def gradient(y_bar: Any, weight: Any) -> Any:
            return jax.linear_transpose(lambda x: product(x, weight), x)(y_bar)[0]

        return repeated(gradient if backward else product)

    cases = [Case(DENSE, of(jnp.dot), given, weights.dense)]
    cases += [Case(name, of(partial(matmul, backend=name)), given, weights.packed) for name in backends]
    runs = [implementation(case) for case in cases]
    samples = take_turns(cases, seconds)
    dense_median = statistics.median(samples[0])
    rows = []
    for case, runs_as, row in zip(cases, runs, samples, strict=True):
        cost = costs(problem.m, problem.k, problem.n, x.dtype, case.weights[0])
        moved = cost.weight_bytes + cost.activation_bytes
        median = statistics.median(row)
        low, high = np.percentile(row, [10, 90])
        rows.append(
            {
                "k": problem.k,
                "n": problem.n,
                "m": problem.m,
                "gradient": int(backward),
                "group_size": problem.group_size,
                "zeros": int(problem.with_zeros),
                "x_dtype": problem.x_dtype,
                "scale_dtype": problem.scale_dtype,
                "backend": case.name,
                "isa": _ffi.cpu_module.current_isa() if case.name == "cpu" else "",
                "runs": runs_as,
                "copies": len(case.weights),
                "samples": len(row),
                "median_us": round(median * 1e6, 2),
                "p10_us": round(low * 1e6, 2),
                "p90_us": round(high * 1e6, 2),
                "bytes": moved,
                "gb_s": round(moved / median / 1e9, 2),
                "gflop_s": round(cost.flops / median / 1e9, 1),
                "speedup_over_dense": round(dense_median / median, 2),
            }
        )
    return rows


def implementation(case: Case) -> str:
    """What the case's function was lowered to.

    "kernel", the FFI call; "XLA", plain operations; or "kernel and XLA", a plain dot of a weight that an FFI call has
    made dense.
    """
    from .. import _ffi

    text = case.step.lower(case.x, case.weights[:1]).as_text()
    if _ffi.MATMUL_TARGET in text:
        return "kernel"
    return "kernel and XLA" if _ffi.DEQUANTIZE_TARGET in text else "XLA"


# ---- What is printed --------------------------------------------------------------------------------


def versions(device: jax.Device) -> dict[str, str]:
    import jax
    import jaxlib

    from .. import __version__

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "jax_trirun": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def device_name(device: jax.Device) -> str:
    """A device's kind; of a CPU, its name as the operating system has it."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


HEADER = (
    f"{'K x N':>14} {'tokens':>6}  {'back end':<16} {'runs':<6} {'median us':>10} {'10 % - 90 %':>19} "
    f"{'MB':>8} {'GB/s':>8} {'x dense':>8}"
)


def table_line(row: dict[str, Any]) -> str:
    name = row["backend"] + (f" ({row['isa']})" if row["isa"] else "")
    spread = f"{row['p10_us']:.1f} - {row['p90_us']:.1f}"
    shape = f"{row['k']} x {row['n']}"
    return (
        f"{shape:>14} {row['m']:>6}  {name:<16} {row['runs']:<6} {row['median_us']:>10.1f} {spread:>19} "
        f"{row['bytes'] / 1e6:>8.2f} {row['gb_s']:>8.1f} {row['speedup_over_dense']:>8.2f}"
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
