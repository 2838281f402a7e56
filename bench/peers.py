"""Time this library beside its peers: TriRun's CUDA kernel, Humming and cuBLAS, in one process on one GPU.

    python bench/peers.py build DIRECTORY --trirun trirun_cuda_kernel.cu     # with nvcc; needs no GPU
    python bench/peers.py warm DIRECTORY                                     # Humming compiles its kernels as it runs
    python bench/peers.py time DIRECTORY --csv peers.csv                     # needs PyTorch and a GPU

None of the peers is part of this repository. ``--trirun`` names TriRun's ``trirun/trirun_cuda_kernel.cu``; as published
it does not run on Hopper, where ``cp.async`` with an L2 cache hint is refused, so it is built without these hints.
Humming (``humming-kernels`` on PyPI) is timed when it can be imported. What is absent keeps its column empty.

All weights have 2 bits in groups of 128 with float16 scales, x and y are float16. A time is the median of seven
launches of a captured graph over rotating weights of more than 300 MB, after the clocks have settled, in microseconds.
cuBLAS is ``torch.mm`` with the weight as [K, N] or [N, K], the faster of them; ``floor_us`` is a kernel that only reads
the library's words and scales. Before anything is timed every kernel is tried on 4096 x 4096: the product with the
identity gives its weight, which must hold all four codes, each about as often, and every other product must be x
times that weight.
"""

import argparse
import csv
import ctypes
import datetime
import importlib.metadata
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
SHAPES = "8192x57344,28672x8192,4096x28672,4096x4096"  # K x N
TOKENS = "1,4,8,16,32,64,128,256,512,1024,4096"
GROUP_SIZE = 128
ROTATION_BYTES = 300 << 20
REPEATS = 7
CHECKED = (4096, 4096)
COLUMNS = "K N M floor_us cublas_us cuda_us cuda-portable_us trirun_us humming_us".split()
RATIOS = {
    "cuda_over_floor": ("cuda_us", "floor_us"),
    "cublas_over_cuda": ("cublas_us", "cuda_us"),
    "trirun_over_cuda": ("trirun_us", "cuda_us"),
    "humming_over_cuda": ("humming_us", "cuda_us"),
    "trirun_over_portable": ("trirun_us", "cuda-portable_us"),
}

# ---- Building -------------------------------------------------------------------------------------------------

TRIRUN_C_NAME = """
extern "C" int bench_trirun(const void* a, const void* b, void* c, void* s, int m, int n, int k, void* workspace,
                            int group_size, cudaStream_t stream) {
  int device;
  cudaGetDevice(&device);
  const int refused = trirun_cuda(a, b, c, s, m, n, k, workspace, group_size, device, stream);
  return refused ? refused : 1000 * cudaGetLastError();
}
"""


def without_cache_hints(source: str) -> str:
    """CUDA source whose ``cp.async`` carry no L2 cache hint. Raises ValueError where there was none to remove."""
    plain, hints = re.subn(r"\.L2::cache_hint( \[%\d\], \[%\d\], %\d), p;", r"\1;", source)
    if not hints:
        raise ValueError(
            "--trirun must name trirun_cuda_kernel.cu, whose cp.async have L2 cache hints; found none"
        )
    return re.sub(r"createpolicy\.[\w.:]+ p, 1\.0;", "", plain)


def nvcc(output: Path, sources: Sequence[Path], architecture: str) -> None:
    options = "-std=c++17 -O3 --expt-relaxed-constexpr --threads 0 -shared -Xcompiler -fPIC".split()
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    subprocess.run(["nvcc", *options, target, "-o", output, *sources], check=True)


def build(directory: Path, trirun: Path | None, architecture: str) -> None:
    """Shared libraries of this library's kernels, and of TriRun's, in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    if trirun is not None:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "trirun.cu"
            source.write_text(without_cache_hints(trirun.read_text()) + TRIRUN_C_NAME)
            nvcc(directory / "libtrirun.so", [source], architecture)
    kernels = sorted((HERE.parent / "csrc" / "cuda").glob("*.cu"))
    nvcc(directory / "libjax_trirun.so", [HERE / "cuda_library.cu", *kernels], architecture)


# ---- Who is timed ---------------------------------------------------------------------------------------------


class Contender(Protocol):
    """A kernel for y [M, N] = x [M, K] @ W, and how its weights look."""

    name: str

    def covers(self, m: int, n: int, k: int) -> bool: ...

    def weight(self, k: int, n: int, scale: float | None) -> Any:
        """Random codes; random scales, or all the same."""

    def launch(self, x: Any, weight: Any, y: Any) -> None:
        """Onto PyTorch's current stream."""


def random_scales(rows: int, columns: int, scale: float | None) -> Any:
    import torch

    if scale is not None:
        return torch.full((rows, columns), scale, dtype=torch.float16, device="cuda")
    return torch.rand((rows, columns), dtype=torch.float16, device="cuda") * 0.02 + 0.01


def random_words(*shape: int) -> Any:
    import torch

    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def stream_pointer() -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def pointer(tensor: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Library:
    """This library's kernels: what ``backend="cuda"`` or ``backend="cuda-portable"`` runs."""

    def __init__(self, directory: Path, portable: bool):
        import torch

        self.name = "cuda-portable" if portable else "cuda"
        self.portable = ctypes.c_bool(portable)
        major, minor = torch.cuda.get_device_capability()
        self.capability = major * 10 + minor
        self.library = ctypes.CDLL(str(directory / "libjax_trirun.so"))
        self.library.bench_why_unsupported.restype = ctypes.c_char_p
        self.library.bench_scratch_bytes.restype = ctypes.c_int64
        self.library.bench_matmul.restype = ctypes.c_char_p
        self.scratch = torch.empty(0, dtype=torch.uint8, device="cuda")

    def sizes(self, m: int, n: int, k: int) -> tuple:
        return (*map(ctypes.c_int64, (m, n, k, k // GROUP_SIZE)), self.portable)

    def covers(self, m: int, n: int, k: int) -> bool:
        return not self.library.bench_why_unsupported(*self.sizes(m, n, k), self.capability)

    def reserve(self, m: int, n: int, k: int) -> None:
        """Scratch for such a product, before it is captured."""
        import torch

        wanted = self.library.bench_scratch_bytes(*self.sizes(m, n, k))
        if wanted > self.scratch.numel():
            self.scratch = torch.empty(wanted, dtype=torch.uint8, device="cuda")

    def weight(self, k: int, n: int, scale: float | None) -> Any:
        """Words, then scales, as bytes."""
        import torch

        words = random_words(k * n // 16)
        scales = random_scales(k // GROUP_SIZE, n, scale)
        return torch.cat([words.view(torch.uint8), scales.view(torch.uint8).flatten()])

    def launch(self, x: Any, weight: Any, y: Any) -> None:
        (m, k), n = x.shape, y.shape[1]
        scales = ctypes.c_void_p(weight.data_ptr() + k * n // 4)
        operands = (pointer(x), pointer(weight), scales, pointer(y), pointer(self.scratch))
        error = self.library.bench_matmul(*self.sizes(m, n, k), *operands, stream_pointer())
        if error:
            raise RuntimeError(error.decode())

    def read(self, weight: Any, out: Any, blocks: int) -> None:
        self.library.bench_read_only(
            pointer(weight), ctypes.c_int64(weight.numel()), pointer(out), blocks, stream_pointer()
        )


class TriRun:
    name = "trirun"
    MOST_PARALLEL = 16  # tiles of 64 rows in one launch, as its Python says

    def __init__(self, directory: Path):
        import torch

        self.library = ctypes.CDLL(str(directory / "libtrirun.so"))
        self.workspace = torch.zeros(57344 // 128 * self.MOST_PARALLEL, dtype=torch.int32, device="cuda")

    def covers(self, m: int, n: int, k: int) -> bool:
        return k % 128 == 0 and n % 256 == 0 and n // 128 * self.MOST_PARALLEL <= self.workspace.numel()

    def weight(self, k: int, n: int, scale: float | None) -> Any:
        return random_words(k // 16, n), random_scales(k // GROUP_SIZE, n, scale)

    def launch(self, x: Any, weight: Any, y: Any) -> None:
        (m, k), n = x.shape, y.shape[1]
        words, scales = weight
        operands = (pointer(x), pointer(words), pointer(y), pointer(scales))
        refused = self.library.bench_trirun(
            *operands, m, n, k, pointer(self.workspace), GROUP_SIZE, stream_pointer()
        )
        if refused:
            raise RuntimeError(
                f"TriRun refused M={m}, N={n}, K={k}: {refused} (from 1000: 1000 * a CUDA error)"
            )


class Humming:
    """INT2 layers of humming-kernels, as its ``HummingLayer`` packs and its heuristics for the device launch them."""

    name = "humming"

    def __init__(self):
        from humming.forward import humming_forward

        self.forward = humming_forward
        self.layers: dict[tuple[int, int], Any] = {}
        self.tuned: dict[tuple[int, int, int], str] = {}
        self.scaled: set[tuple[int, int]] = set()  # whose scales are random

    def covers(self, m: int, n: int, k: int) -> bool:
        return True

    def layer(self, k: int, n: int, scale: float | None = None) -> Any:
        import torch
        from humming.layer import HummingLayer

        config = {"dtype": "int2", "group_size": GROUP_SIZE}
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
        scales = random_scales(n, k // GROUP_SIZE, scale)
        layer.load_from_tensors({"weight": random_words(n, k // 16), "weight_scale": scales})
        layer.transform()
        return layer

    def weight(self, k: int, n: int, scale: float | None) -> Any:
        import torch

        if scale is None and (k, n) in self.scaled:  # all bits are codes: no need to pack again
            like = self.layers[k, n]
            words = random_words(*like.weight.shape)
            return words, like.weight_scale.data.clone()
        self.layers[k, n] = layer = self.layer(k, n, scale)
        if layer.weight.dtype != torch.int32:
            raise RuntimeError(f"Humming packed {layer.weight.dtype}, expected int32 words")
        (self.scaled.discard if scale else self.scaled.add)((k, n))
        return layer.weight.data, layer.weight_scale.data

    def tuning(self, m: int, n: int, k: int) -> str:
        from humming.tune import get_heuristics_config

        if (m, n, k) not in self.tuned:
            config = get_heuristics_config(self.layers[k, n].humming_config, shape_m=m)
            self.tuned[m, n, k] = json.dumps(config)
        return self.tuned[m, n, k]

    def compile(self, m: int, n: int, k: int) -> None:
        from humming.kernel.humming import HummingKernel

        HummingKernel.prepare_kernels(self.layers[k, n].humming_config.to_str(), None, self.tuning(m, n, k))

    def launch(self, x: Any, weight: Any, y: Any) -> None:
        (m, k), n = x.shape, y.shape[1]
        layer = self.layers[k, n]
        words, scales = weight
        self.forward(
            layer.humming_config,
            inputs=x,
            weight=words,
            weight_scale=scales,
            outputs=y,
            locks=layer.locks,
            tuning_config=self.tuning(m, n, k),
        )


class Cublas:
    """float16 weights, as [K, N] or transposed views of [N, K]."""

    name = "cublas"

    def covers(self, m: int, n: int, k: int) -> bool:
        return True

    def weight(self, k: int, n: int, scale: float | None) -> Any:
        import torch

        return torch.randn((k, n), dtype=torch.float16, device="cuda").mul_(scale or 0.02)

    def launch(self, x: Any, weight: Any, y: Any) -> None:
        import torch

        torch.mm(x, weight, out=y)


# ---- Timing ---------------------------------------------------------------------------------------------------


def graph_time_us(launch: Callable[[int], None], launches: int, settle_ms: float) -> float:
    """Microseconds of ``launch(i)``, for i below ``launches``, in a captured graph: the median over its replays."""
    import torch

    launch(0)  # loads what is loaded at first use
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for i in range(launches):
            launch(i)
        graph.capture_end()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay_ms() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        settled = 0.0
        while settled < settle_ms:
            settled += replay_ms()
        replay_ms()
        times = [replay_ms() for _ in range(REPEATS)]
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3 / launches


def rotation(weight_bytes: int) -> int:
    """How many weights of this size exceed the cache together."""
    return max(2, ROTATION_BYTES // weight_bytes + 1)


def launches_of(copies: int, least: int) -> int:
    """A multiple of the copies, so that a replay begins with the copy that was read longest ago."""
    return -(-least // copies) * copies


def settle_ms(operations: float) -> float:
    """How long the clocks take to settle under such products: the more power they draw, the slower they become."""
    return 200 if operations > 1e11 else 80 if operations > 8e9 else 10


def time_contender(contender: Contender, weights: Sequence[Any], m: int, n: int, k: int) -> float | None:
    import torch

    if not contender.covers(m, n, k):
        return None
    if isinstance(contender, Library):
        contender.reserve(m, n, k)
    x = torch.randn((m, k), dtype=torch.float16, device="cuda")
    y = torch.empty((m, n), dtype=torch.float16, device="cuda")
    launches = launches_of(len(weights), 2 if 2 * m * n * k > 8e11 else 12)
    return graph_time_us(
        lambda i: contender.launch(x, weights[i % len(weights)], y), launches, settle_ms(2 * m * n * k)
    )


def read_floor_us(library: Library, weights: Sequence[Any]) -> float:
    import torch

    out = torch.empty(1024, dtype=torch.int32, device="cuda")
    launches = launches_of(len(weights), 12)

    def time(blocks: int) -> float:
        return graph_time_us(lambda i: library.read(weights[i % len(weights)], out, blocks), launches, 2)

    return min(time(blocks) for blocks in (132, 264, 396, 528, 792, 1056))


def check(contender: Contender, tokens: Iterable[int]) -> str:
    """One line on how far products are from x times the kernel's own weight. Raises RuntimeError if that is far."""
    import torch

    k, n = CHECKED
    scale = 2.0**-6
    weight = contender.weight(k, n, scale)

    def product(x: Any) -> Any:
        m = x.shape[0]
        if isinstance(contender, Library):
            contender.reserve(m, n, k)
        y = torch.full((m, n), torch.nan, dtype=torch.float16, device="cuda")
        contender.launch(x, weight, y)
        torch.cuda.synchronize()
        return y

    identity = torch.eye(k, dtype=torch.float16, device="cuda")
    w = torch.cat([product(rows.contiguous()) for rows in identity.split(64)]).float()
    values, counts = torch.unique(w / scale, return_counts=True)
    shares = (counts / w.numel()).tolist()
    if values.diff().tolist() != [1, 1, 1] or not all(0.2 < share < 0.3 for share in shares):
        raise RuntimeError(
            f"{contender.name}: codes {values.tolist()[:8]} with shares {shares[:8]} are no 2-bit weight"
        )
    worst = 0.0
    for m in tokens:
        if not contender.covers(m, n, k):
            continue
        x = torch.randn((m, k), dtype=torch.float16, device="cuda")
        expected = x.float() @ w
        error = ((product(x).float() - expected).norm() / expected.norm()).item()
        worst = max(worst, error)
        if not error < 2e-3:
            raise RuntimeError(f"{contender.name}: M={m} is {error} away from x times its weight")
    return f"{contender.name}: codes {values.tolist()}, products within {worst:.1e}"


def ratios(row: dict[str, Any]) -> dict[str, str]:
    """Quotients of a row's times, empty where one is."""
    return {
        name: f"{row[above] / row[below]:.3f}" if row.get(above) and row.get(below) else ""
        for name, (above, below) in RATIOS.items()
    }


def where_peers_win(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every time of a peer that is below the library's."""
    return [
        f"{peer.removesuffix('_us')} takes {row[peer]:.2f} us and cuda {row['cuda_us']:.2f} at "
        f"{row['K']} x {row['N']}, M={row['M']}"
        for row in rows
        for peer in ("cublas_us", "trirun_us", "humming_us")
        if row.get(peer) and row.get("cuda_us") and row[peer] < row["cuda_us"]
    ]


# ---- The command ----------------------------------------------------------------------------------------------


def contenders(directory: Path) -> list[Contender]:
    found: list[Contender] = [Library(directory, False), Library(directory, True)]
    if (directory / "libtrirun.so").exists():
        found.append(TriRun(directory))
    try:
        found.append(Humming())
    except ImportError as missing:
        print(f"# without Humming: {missing}")
    return found


def compile_humming(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> None:
    """Its kernels, several at a time; they stay in its cache."""
    humming = Humming()
    for k, n in shapes:
        humming.layers[k, n] = humming.layer(k, n)
    cases = {(humming.tuning(m, n, k), k, n): (m, n, k) for (k, n), m in itertools.product(shapes, tokens)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda case: humming.compile(*case), cases.values()))
    print(f"# Humming compiled {len(cases)} kernels")


def weights_of(contender: Contender, k: int, n: int) -> list[Any]:
    """As many as exceed the cache together."""
    weight_bytes = 2 * k * n if isinstance(contender, Cublas) else k * n // 4 + 2 * k * n // GROUP_SIZE
    return [contender.weight(k, n, None) for _ in range(rotation(weight_bytes))]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in row.items()}


def time_all(
    directory: Path, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], output: Path
) -> list[dict[str, Any]]:
    import torch

    packed = contenders(directory)
    library = packed[0]
    assert isinstance(library, Library)
    for contender in list(packed):
        try:
            print("# " + check(contender, tokens), flush=True)
        except Exception as error:
            if isinstance(contender, Library):
                raise
            print(f"# without {contender.name}: {error}", flush=True)
            packed.remove(contender)
    versions = [f"PyTorch {torch.__version__}"]
    if any(isinstance(contender, Humming) for contender in packed):
        versions.append(f"Humming {importlib.metadata.version('humming-kernels')}")
    if any(isinstance(contender, TriRun) for contender in packed):
        versions.append("TriRun without its cache hints")
    sizes = ",".join(f"{k}x{n}" for k, n in shapes), ",".join(map(str, tokens))
    rows: list[dict[str, Any]] = []
    with output.open("w", newline="") as file:
        made = ", ".join([torch.cuda.get_device_name(), *versions, datetime.date.today().isoformat()])
        file.write(f"# {made}\n# bench/peers.py time --shape {sizes[0]} --m {sizes[1]}\n")
        writer = csv.DictWriter(file, [*COLUMNS, *RATIOS], extrasaction="ignore")
        writer.writeheader()
        weights = {
            (contender.name, k, n): weights_of(contender, k, n) for contender in packed for k, n in shapes
        }
        for k, n in shapes:  # both layouts of cuBLAS are of the same numbers
            weights["cublas", k, n] = weights_of(Cublas(), k, n)
        floors = {(k, n): read_floor_us(library, weights[library.name, k, n]) for k, n in shapes}
        # Large products slow the card's clocks for a while, so they come last.
        cases = ((m, k, n) for (k, n), m in itertools.product(shapes, tokens))
        for m, k, n in sorted(cases, key=math.prod):
            row: dict[str, Any] = {"K": k, "N": n, "M": m, "floor_us": floors[k, n]}
            for contender in packed:
                row[f"{contender.name}_us"] = time_contender(
                    contender, weights[contender.name, k, n], m, n, k
                )
            dense = weights["cublas", k, n]
            layouts = dense, [w.view(n, k).t() for w in dense]
            row["cublas_us"] = min(
                time_contender(Cublas(), layout, m, n, k) or math.inf for layout in layouts
            )
            rows.append(row)
            print(" ".join(f"{name}={shown(row)[name]}" for name in COLUMNS if row.get(name)), flush=True)
        rows.sort(key=lambda row: (shapes.index((row["K"], row["N"])), row["M"]))
        writer.writerows(shown(row) | ratios(row) for row in rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["build", "warm", "time"])
    parser.add_argument("directory", type=Path, help="of the shared libraries that build makes")
    parser.add_argument("--trirun", type=Path, metavar="FILE", help="TriRun's trirun_cuda_kernel.cu")
    parser.add_argument("--arch", default="90a", help="of the GPU, as in sm_90a (%(default)s)")
    parser.add_argument("--shape", default=SHAPES, help="K x N, several with commas (%(default)s)")
    parser.add_argument("--m", default=TOKENS, help="rows of x (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("peers.csv"), help="the results (%(default)s)")
    args = parser.parse_args(argv)
    try:
        shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shape.split(","))]
        tokens = [int(m) for m in args.m.split(",")]
        if any(k < 1 or k % 128 or n < 1 or n % 256 for k, n in shapes) or min(tokens) < 1:
            raise ValueError
    except ValueError:
        parser.error(
            "--shape must be KxN with K in multiples of 128 and N in multiples of 256, --m positive; "
            f"got --shape {args.shape} --m {args.m}"
        )
    if args.command == "build":
        build(args.directory, args.trirun, args.arch)
    elif args.command == "warm":
        compile_humming(shapes, tokens)
    else:
        rows = time_all(args.directory, shapes, tokens, args.csv)
        print("\n".join(f"# {sentence}" for sentence in where_peers_win(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
