"""`info` of a model, and text and figures from everything that can be opened."""

import json
import re
import sys

import pytest

from jax_trirun import cli

pytest.importorskip("flax", reason="Flax is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = cli.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def float_path(tiny_llama):
    return tiny_llama(tied=False)[0]


@pytest.fixture(scope="module")
def packed_path(float_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    assert (
        cli.main(["quantize", str(float_path), "--out", str(out), "--method", "mse", "--skip", "o_proj"]) == 0
    )
    return out


def rows(out):
    """(name, count, memory, bits) of the table's lines."""
    pattern = r"^(\S+) +(\d+) +(\d+(?: x \d+)?) .* ([\d.]+) MB ([\d.]+)"
    return {
        name: (int(count), shape, float(bits))
        for name, count, shape, _, bits in re.findall(pattern, out, re.M)
    }


def test_info_of_a_packed_model(capsys, packed_path):
    status, out, err = run(capsys, "info", packed_path)
    assert status == 0, err
    found = rows(out)
    assert found["layers.*.mlp.up_proj.kernel"][:2] == (2, "64 x 128")
    assert found["embed.embedding"] == (1, "257 x 64", 16.0)  # float16, as quantize leaves it
    assert found["layers.*.self_attn.o_proj.kernel"][2] == 16.0
    bits = json.loads((packed_path / "quantize.json").read_text())["bits_a_weight"]
    packed = re.search(r"^2-bit +(\d+) tensors, ([\d,]+) weights, .* ([\d.]+) bits a weight$", out, re.M)
    assert packed[1] == "12" and packed[2] == "65,536" and float(packed[3]) == pytest.approx(bits, abs=1e-3)
    status, out, _ = run(capsys, "info", packed_path, "--every")
    assert status == 0 and len(re.findall(r"^layers\.", out, re.M)) == 18


def test_info_of_a_float_model(capsys, float_path):
    status, out, err = run(capsys, "info", float_path)
    assert status == 0, err
    assert {bits for _, _, bits in rows(out).values()} == {32.0} and "lm_head.kernel" in out
    total = 2 * 257 * 64 + 5 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert f"all        21 tensors, {total:,} weights, {4 * total / 1e6:,.1f} MB, 32.000 bits a weight" in out
    assert f"loaded     {4 * total / 1e6:,.1f} MB" in out


@pytest.mark.usefixtures("smollm2")
def test_info_of_the_bundled_model(capsys):
    status, out, err = run(capsys, "info", "smollm2")
    assert status == 0, err
    found = rows(out)
    assert found["embed.embedding"] == (1, "49152 x 576", 8.5) and "Q8_0" in out
    assert found["layers.*.mlp.gate_proj.kernel"][2] == 5.0  # Q4_1: 4 bits, two float16 for 32 weights
    assert "format     gguf" in out and "all        272 tensors, 134,515,008 weights" in out


def test_text_and_perplexity_from_a_packed_model(capsys, packed_path):
    arguments = (
        "--model",
        packed_path,
        "--raw",
        "--prompt",
        "the",
        "--max-new-tokens",
        "4",
        "--window",
        "64",
    )
    status, out, err = run(capsys, "generate", *arguments)
    assert status == 0, err
    assert "12 layers are packed already" in out and re.search(r"decode +[\d.]+ tokens a second", out)
    assert re.search(r"perplexity [\d.]+, 2-bit, over \d+ tokens", out)


def test_no_such_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # it takes no package to see that
    for name, message in {
        "none.gguf": "none.gguf: no such file",
        "folder": "config.json: no such file; a model's directory must have it",
    }.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        status, _, err = run(capsys, "info", tmp_path / name)
        assert status == 2 and message in err
