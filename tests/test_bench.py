"""python -m jax_trirun bench: its rows, that every product is made, and its messages."""

import csv
import pathlib

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


_MULTI = pathlib.Path(__file__).parents[1] / "bench" / "multi_gpu.py"


def test_several_devices_beside_one(tmp_path, run_python):
    """bench/multi_gpu.py, on CPUs: its rows, and that its programs keep their numbers finite."""
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    sizes = "--k 256 --n 256 --devices 1,2 --m 1,3 --layers 2 --calls 2".split()
    path = tmp_path / "rows.csv"
    printed = run_python(
        program, _MULTI, *sizes, "--output", path, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2"
    )
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
