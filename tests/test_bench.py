"""python -m jax_trirun bench: its rows, that every product is made, and its messages."""

import csv
import importlib.util
import pathlib
import stat

import jax
import jax.numpy as jnp
import pytest

import jax_trirun
from jax_trirun import _ffi, cli
from jax_trirun.commands import bench
from jax_trirun.testing import MatmulProblem, costs

QUICK = ["--seconds", "0.01", "--group-size", "64", "--dtype", "float32"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_the_dense_dot_and_each_back_end(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    command = [
        "bench",
        "--shape",
        "256x96",
        "--tokens",
        "1,3",
        "--backend",
        "cpu,reference",
        "--csv",
        str(path),
    ]
    assert cli.main(command + QUICK) == 0
    rows = rows_of(path)
    assert [(row["m"], row["backend"], row["runs"]) for row in rows] == [
        (m, *case) for m in "13" for case in [("dense dot", "XLA"), ("cpu", "kernel"), ("reference", "XLA")]
    ]
    for row in rows:
        assert 0 < float(row["p10_us"]) <= float(row["median_us"]) <= float(row["p90_us"])
        assert int(row["samples"]) >= bench.MIN_SAMPLES
        assert (row["device"], row["jax"]) == (bench.device_name(jax.devices("cpu")[0]), jax.__version__)
    dense, packed = rows[0], rows[1]
    assert dense["speedup_over_dense"] == "1.0"
    ratio = float(dense["median_us"]) / float(packed["median_us"])
    assert float(packed["speedup_over_dense"]) == pytest.approx(ratio, rel=0.01, abs=0.01)
    problem = MatmulProblem(1, 256, 96, 64, scale_dtype="bfloat16")
    cost = costs(1, 256, 96, "float32", problem.quant_tensor())
    assert int(packed["bytes"]) == cost.weight_bytes + cost.activation_bytes
    printed = capsys.readouterr().out
    assert f"cpu ({_ffi.cpu_module.current_isa()})" in printed
    assert "a cache may hold them" in printed


def test_gradients_instead_of_products(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    sizes = ["--backward", "--shape", "256x96", "--tokens", "3", "--backend", "cpu", "--csv", str(path)]
    assert cli.main(["bench", *sizes, *QUICK]) == 0
    dense, packed = rows_of(path)
    # There is no kernel for it: XLA's operations, whatever the back end.
    assert [(row["gradient"], row["backend"], row["runs"]) for row in (dense, packed)] == [
        ("1", "dense dot", "XLA"),
        ("1", "cpu", "XLA"),
    ]
    assert float(packed["median_us"]) > 0
    assert "gradients with respect to x" in capsys.readouterr().out


def test_every_product_is_made():
    problem = MatmulProblem(2, 128, 64, 64)
    with jax.default_device(jax.devices("cpu")[0]):
        qt = problem.quant_tensor()
        copies = [jax.tree.map(jnp.array, qt) for _ in range(5)]
        packed = bench.repeated(lambda x, w: jax_trirun.matmul(x, w, backend="cpu"))
        compiled = packed.lower(problem.x(), copies).compile().as_text()
        assert compiled.count(f'custom_call_target="{_ffi.MATMUL_TARGET}"') == 5
        dense = bench.repeated(jnp.dot)
        compiled = dense.lower(problem.x(), [jnp.zeros((128, 64))] * 5).compile().as_text()
        assert compiled.count("f32[2,64]") >= 5  # all columns of each, though only one number is returned


def test_copies_exceed_the_cache(monkeypatch):
    problem = MatmulProblem(1, 256, 256, 128, "bfloat16", "bfloat16")
    monkeypatch.setattr(bench, "CACHE_BYTES", 200_000)
    weights = bench.Weights(problem, jax.devices("cpu")[0])
    assert weights.dense[0].dtype == jnp.bfloat16
    assert len(weights.dense) == 2  # of 131072 bytes
    assert len(weights.packed) == 12  # of 16384 + 1024 bytes
    pointers = {w.words.unsafe_buffer_pointer() for w in weights.packed}
    assert len(pointers) == 12
    assert not weights.notes


def test_the_best_back_end_is_the_default():
    best = _ffi.default_platform()
    assert bench.parse_backends(None) == [best if best in _ffi.BACKENDS else "reference"]


BENCH = pathlib.Path(__file__).parents[1] / "bench"
_MULTI = BENCH / "multi_gpu.py"
# Runs the script that is its first argument, with the rest as the script's own.
_RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_several_devices_beside_one(tmp_path, run_python):
    """bench/multi_gpu.py, on CPUs: its rows, and that its programs keep their numbers finite."""
    sizes = "--k 256 --n 256 --devices 1,2 --m 1,3 --layers 2 --calls 2".split()
    path = tmp_path / "rows.csv"
    printed = run_python(_RUN, _MULTI, *sizes, "--output", path, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")
    rows = rows_of(path)
    names = ["columns", "rows", "matmuls", "block"]
    cases = [("1", m, name) for m in "13" for name in names]
    cases += [("2", m, name) for m in "13" for name in [*names, "all-reduce"]]
    assert [(row["devices"], row["m"], row["program"]) for row in rows] == cases
    for row in rows:
        assert 0 < float(row["host_us"]) <= float(row["us_per_block"])
        assert (row["speedup"] == "") == (row["program"] == "all-reduce")
    assert {row["speedup"] for row in rows if row["devices"] == "1"} == {"1.00"}
    # 2 bits and a bfloat16 for 128 of them; of 256 x 512 and 256 x 256, and of half of each
    whole = 256 * 256 * 3 * (1 / 4 + 2 / 128)
    of_a_block = [float(row["weight_mb_per_device"]) for row in rows if row["program"] == "block"]
    assert of_a_block == [round(whole / 1e6, 1)] * 2 + [round(whole / 2e6, 1)] * 2
    assert len(printed.splitlines()) == 5  # a head, and a line for each number of devices and of rows


def test_a_decoder_dense_packed_and_fused(tmp_path, run_python):
    """bench/decode_step.py: its rows, and that packed weights are a sixteenth of float32 ones and their scales."""
    sizes = "--sizes tiny --group-size 32 --batch 1,2 --steps 1".split()
    path = tmp_path / "rows.csv"
    run_python(_RUN, BENCH / "decode_step.py", *sizes, "--output", path, JAX_PLATFORMS="cpu")
    rows = rows_of(path)
    names = ["dense", "packed", "fused"]
    assert [(row["batch"], row["model"]) for row in rows] == [
        (batch, name) for batch in "12" for name in names
    ]
    weights = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128)
    megabytes = {
        name: round(bits * weights / 8e6, 1) for name, bits in (("dense", 32), ("packed", 3), ("fused", 3))
    }
    for row in rows:
        assert float(row["ms_per_step"]) > 0 and float(row["linear_mb"]) == megabytes[row["model"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "--shape must be KxN with K, N > 0, such as 4096x14336, got '4096'"),
        (["--shape", "0x32"], "--shape must be KxN with K, N > 0"),
        (["--tokens", "1,-2"], "--tokens must be numbers of rows > 0, such as 1,8,64, got '1,-2'"),
        (["--group-size", "48"], "--group-size must be 32, 64, 128 or -1, got 48"),
        (["--shape", "96x32"], "--group-size must divide K, got --group-size 128 and --shape 96x32"),
        (["--backend", "abacus"], "backend must be None or one of"),
        (["--csv", "no-such-directory/x.csv"], "there is no directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.fixture(scope="module")
def peers():
    """bench/peers.py, which imports PyTorch and the peers only when it times."""
    spec = importlib.util.spec_from_file_location("peers", BENCH / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HINTED = """
    "   createpolicy.fractional.L2::evict_first.b64 p, 1.0;"
    "   cp.async.cg.shared.global.L2::cache_hint [%0], [%1], %2, p;\\n"
    "   @p cp.async.cg.shared.global [%1], [%2], %3;\\n"
"""


def test_a_peer_is_built_without_cache_hints(peers, tmp_path, monkeypatch):
    """What the compiler is given, for a compiler that only keeps it."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != -o ]; do shift; done\n'
        'output=$2; shift 2; echo "$@" > "$output"; cat "$1" >> "$output"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    source = tmp_path / "trirun_cuda_kernel.cu"
    source.write_text(HINTED)
    assert peers.main(["build", str(tmp_path / "libraries"), "--trirun", str(source)]) == 0
    built = (tmp_path / "libraries" / "libtrirun.so").read_text()
    assert '"   cp.async.cg.shared.global [%0], [%1], %2;' in built
    assert '"   @p cp.async.cg.shared.global [%1], [%2], %3;' in built  # had none
    assert "cache_hint" not in built and "createpolicy" not in built
    assert 'extern "C" int bench_trirun' in built
    kernels = (tmp_path / "libraries" / "libjax_trirun.so").read_text().splitlines()[0].split()
    assert {pathlib.Path(name).name for name in kernels} >= {"cuda_library.cu", "matmul.cu", "gemm_f16.cu"}
    with pytest.raises(ValueError, match=r"--trirun must name trirun_cuda_kernel\.cu.*found none"):
        peers.without_cache_hints(built)


def test_what_peers_are_compared_by(peers):
    row = {"K": 4096, "N": 256, "M": 8, "floor_us": 2.0, "cublas_us": 9.0, "cuda_us": 4.0, "trirun_us": 3.0}
    row |= {"humming_us": None, "cuda-portable_us": 6.0}
    assert peers.ratios(row) == {
        "cuda_over_floor": "2.000",
        "cublas_over_cuda": "2.250",
        "trirun_over_cuda": "0.750",
        "humming_over_cuda": "",
        "trirun_over_portable": "0.500",
    }
    assert peers.where_peers_win([row]) == ["trirun takes 3.00 us and cuda 4.00 at 4096 x 256, M=8"]
    for weight_bytes in (4_456_448, 124_780_544, 939_524_096):
        copies = peers.rotation(weight_bytes)
        assert copies >= 2 and copies * weight_bytes > peers.ROTATION_BYTES
        assert peers.launches_of(copies, 12) % copies == 0 and peers.launches_of(copies, 12) >= 12


@pytest.mark.parametrize("wrong", [["--shape", "4096"], ["--shape", "4096x100"], ["--m", "0"], ["--m", "x"]])
def test_mistakes_are_told_before_peers_are_timed(peers, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers.main(["time", ".", *wrong])
    assert stopped.value.code == 2
    assert (
        "--shape must be KxN with K in multiples of 128 and N in multiples of 256" in capsys.readouterr().err
    )


QUOTIENTS = {
    "cuda_matmul": {"time_over_floor": ("us", "floor_us"), "speedup": ("cublas_us", "us")},
    "peers": {"cuda_over_floor": ("cuda_us", "floor_us"), "humming_over_cuda": ("humming_us", "cuda_us")},
}


@pytest.mark.parametrize("program", QUOTIENTS)
def test_results_of_the_cuda_benchmarks_agree_with_themselves(program):
    """Every file says where it comes from, its ratios are those of its times, and nothing beats reading."""
    files = sorted((BENCH / "results").glob(f"{program}_h200_*.csv"))
    assert files
    for file in files:
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# NVIDIA H200")
        assert any(f"bench/{program}." in line for line in lines if line.startswith("#"))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        assert len(rows) > 20
        for row in rows:
            for ratio, (above, below) in QUOTIENTS[program].items():
                if row[ratio]:
                    assert float(row[ratio]) == pytest.approx(float(row[above]) / float(row[below]), rel=0.01)
            if row.get("us") or row.get("cuda_us"):
                assert float(row.get("us") or row.get("cuda_us")) > 0.98 * float(row["floor_us"])
