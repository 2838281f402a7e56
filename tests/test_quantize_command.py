"""The layer-by-layer driver and `quantize`: what it writes, what it says, and that it survives being killed."""

import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import cli
from jax_trirun.checkpoints import load, open_model
from jax_trirun.commands.quantize_run import Run
from jax_trirun.quantizers.recipe import Recipe, Recipes, parse_override

pytest.importorskip("flax", reason="Flax is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")

from flax_layers.llama import compile_losses
from flax_layers.load import load_llama
from flax_layers.quant_dense import QuantDense
from flax_layers.quantize_llama import (
    STAGES,
    Calibration,
    make_batches,
    make_block,
    quantize_block,
    quantize_llama,
)

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 257, n).tolist() for n in (5, 90, 33, 128, 300, 1, 64)]
LINEAR = [name for stage in STAGES for name in stage]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return open_model(tiny_llama()[0])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Calibration text in two files, one of them with several documents."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("A text of some length, for the first document. " * 12, encoding="utf-8")
    lines = [json.dumps({"text": f"Document {i}: " + "naïve words " * (3 * i + 1)}) for i in range(9)]
    (folder / "b.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return [str(folder / "a.txt"), str(folder / "b.jsonl")]


def block_weights(model, i):
    prefix = f"layers.{i}."
    return {p.removeprefix(prefix): model.read(p) for p in model.shapes if p.startswith(prefix)}


# Batches and Hessians


def test_batches_hold_every_token_once_in_few_shapes():
    batches = make_batches(DOCUMENTS, window=100, batch_tokens=256)
    pieces = [d[i : i + 100] for d in DOCUMENTS for i in range(0, len(d), 100)]
    found = [row[mask].tolist() for tokens, real in batches for row, mask in zip(tokens, real, strict=True)]
    assert sorted(filter(None, found)) == sorted(pieces)
    widths = {tokens.shape for tokens, _ in batches}
    assert {w for _, w in widths} == {16, 32, 64, 100} and len(widths) == 4
    for message, arguments in {
        "window must be positive": ([[1]], 0),
        "hold no tokens": ([[]], 8),
    }.items():
        with pytest.raises(ValueError, match=message):
            make_batches(arguments[0], window=arguments[1])


def test_hessians_are_those_of_each_document_alone(model):
    """Against the block run on one unpadded document after another, its inputs caught outside of jit."""
    from flax_layers.llama import LlamaConfig

    config = LlamaConfig(**model.config)
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]]
    block = make_block(config, block_weights(model, 0))
    embedding = model.read("embed.embedding")
    calibration = Calibration(config, make_batches(documents, window=128, batch_tokens=256), embedding)
    hidden = jnp.asarray(embedding)
    wanted = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"), 0.0)
    out = []
    frequencies = config.rope_theta ** (-np.arange(8) / 8)
    for document in documents:
        x = hidden[jnp.asarray(document)][None]
        positions = jnp.arange(len(document))[None]
        normed = block.input_norm(x)
        seen = {"self_attn.q_proj": normed}
        o_proj, block.self_attn.o_proj = block.self_attn.o_proj, lambda v: v
        seen["self_attn.o_proj"] = block.self_attn(normed, positions[..., None] * frequencies, positions)[0]
        block.self_attn.o_proj = o_proj
        x = x + o_proj(seen["self_attn.o_proj"])
        seen["mlp.up_proj"] = block.mlp_norm(x)
        gate, up = block.mlp.gate_proj(seen["mlp.up_proj"]), block.mlp.up_proj(seen["mlp.up_proj"])
        seen["mlp.down_proj"] = jax.nn.silu(gate) * up
        out.append(np.asarray(x + block.mlp.down_proj(seen["mlp.down_proj"]))[0])
        for name, value in seen.items():
            value = np.asarray(value[0], np.float64)
            wanted[name] = wanted[name] + value.T @ value
    for name, hessian in wanted.items():
        got = np.asarray(calibration.hessian(block, name))
        np.testing.assert_allclose(got, hessian, rtol=1e-4, atol=1e-4 * np.abs(hessian).max(), err_msg=name)
    calibration.advance(block)
    rows = [r for b in calibration.batches for r in np.asarray(b.x)[np.asarray(b.real).any(1)]]
    masks = [m for b in calibration.batches for m in np.asarray(b.real) if m.any()]
    got = sorted((row[mask] for row, mask in zip(rows, masks, strict=True)), key=lambda a: a[0, 0])
    for a, b in zip(got, sorted(out, key=lambda a: a[0, 0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_later_layers_are_calibrated_on_quantised_ones(model):
    """down_proj's Hessian must be that of the quantised gate and up, not of the float ones."""
    from flax_layers.llama import LlamaConfig

    config = LlamaConfig(**model.config)
    batches = make_batches(DOCUMENTS, window=128)
    block = make_block(config, block_weights(model, 0))
    calibration = Calibration(config, batches, model.read("embed.embedding"))
    before = np.asarray(calibration.hessian(block, "mlp.down_proj"))
    packed, _ = quantize_block(block, "layers.0.", Recipes(Recipe("rtn", group_size=32)), calibration)
    again = Calibration(config, batches, model.read("embed.embedding"))
    after = np.asarray(again.hessian(block, "mlp.down_proj"))
    assert np.abs(before - after).max() > 0.01 * np.abs(before).max()
    for name, weight in packed.items():
        kernel = dict(self_attn=block.self_attn, mlp=block.mlp)[name.split(".")[0]]
        np.testing.assert_array_equal(
            getattr(kernel, name.split(".")[1]).kernel[...], jax_trirun.dequantize(weight, dtype=jnp.float32)
        )


# In memory


def outputs_error(model, documents, recipes):
    """Relative change of the logits over documents, and the reports."""
    tokens = np.stack([np.asarray(d[:64]) for d in documents])
    decoder = load_llama(model)
    before = np.asarray(decoder(tokens))
    reports = quantize_llama(decoder, documents, recipes)
    after = np.asarray(decoder(tokens))
    assert all(
        isinstance(m, QuantDense) for m in (decoder.layers[1].mlp.up_proj, decoder.layers[0].self_attn.q_proj)
    )
    return np.linalg.norm(after - before) / np.linalg.norm(before), reports


def test_gptq_changes_the_logits_less_than_rounding(model):
    rng = np.random.default_rng(1)
    # Inputs that lie in few directions, as a language model's do: that is what GPTQ makes use of.
    documents = [(rng.integers(0, 12, 64) * 7 % 257).tolist() for _ in range(40)]
    errors = {}
    for method in ("gptq", "gptq-ternary", "rtn"):
        errors[method], reports = outputs_error(model, documents, Recipe(method, group_size=32))
        assert [r.name for r in reports] == [f"layers.{i}.{name}" for i in range(2) for name in LINEAR]
        for report in reports:
            assert (
                abs(sum(report.codes) - 1) < 1e-4 and 0 < report.output_error < 1 and report.method == method
            )
            assert (report.damping is not None) == method.startswith("gptq")
            assert (report.codes[3] == 0) == (method == "gptq-ternary")
    assert errors["gptq"] < errors["gptq-ternary"] < errors["rtn"]


def test_every_method_quantises_without_text_or_says_that_it_cannot(model):
    for method in ("rtn", "mse", "absmean", "hqq", "trilm"):
        decoder = load_llama(model)
        reports = quantize_llama(decoder, None, Recipe(method, group_size=-1))
        assert len(reports) == 14 and all(r.output_error is None for r in reports)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: method 'gptq' needs calibration text"
    ):
        quantize_llama(load_llama(model), None)


def test_an_untied_head_is_quantised_only_when_named(tiny_llama):
    path, _ = tiny_llama(tied=False)
    decoder = load_llama(path)
    assert "lm_head" not in {r.name for r in quantize_llama(decoder, DOCUMENTS)}
    decoder = load_llama(path)
    recipes = Recipes(Recipe("mse"), overrides=[("lm_head", {"method": "gptq"})])
    reports = quantize_llama(decoder, DOCUMENTS, recipes)
    assert reports[-1].name == "lm_head" and reports[-1].method == "gptq" and reports[0].method == "mse"
    assert isinstance(decoder.lm_head, QuantDense)


def test_every_piece_begins_with_bos(model):
    recipe = Recipes(Recipe("gptq", group_size=32))
    common = {"window": 9, "batch_tokens": 64, "float_dtype": "float32"}
    pieces = []
    for tokens, real in Run(model, recipe, DOCUMENTS, bos=256, **common).batches:
        assert tokens.shape[1] == 9 and np.all(tokens[real.any(axis=1), 0] == 256)
        pieces += [row[mask][1:].tolist() for row, mask in zip(tokens, real, strict=True) if mask.any()]
    assert sorted(t for piece in pieces for t in piece) == sorted(t for d in DOCUMENTS for t in d)
    assert all(d[:8] in pieces and d[(len(d) - 1) // 8 * 8 :] in pieces for d in DOCUMENTS)
    with pytest.raises(ValueError, match="--bos: wanted a window of 2 tokens or more, got 1"):
        Run(model, recipe, DOCUMENTS, bos=256, **common | {"window": 1})


# Recipes


def test_overrides_and_skips():
    recipes = Recipes(
        Recipe("gptq", options={"damping": 0.2}),
        overrides=[
            parse_override("down=method=hqq,group_size=32,p=0.5"),
            parse_override("down=method=rtn"),
            parse_override(r"1\.self_attn\.(?=q)q_proj=signed=false,scale_dtype=bfloat16"),
            parse_override("lm_head=method=mse"),
        ],
        skip=[r"layers\.0\..*v_proj"],
    )
    assert recipes.of("layers.0.mlp.up_proj") == Recipe("gptq", options={"damping": 0.2})
    assert recipes.of("layers.0.mlp.down_proj") == Recipe("rtn")  # the last that fits
    changed = Recipe("gptq", scale_dtype="bfloat16", options={"damping": 0.2, "signed": False})
    assert recipes.of("layers.1.self_attn.q_proj") == changed
    assert (
        recipes.of("layers.0.self_attn.v_proj") is None
        and recipes.of("layers.1.self_attn.v_proj") is not None
    )
    assert recipes.of("embed") is None and recipes.of("layers.0.input_norm") is None
    assert recipes.of("lm_head") == Recipe("mse", options={}) and Recipes().of("lm_head") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("down_proj", "must look like 'regex=method=rtn,group_size=32', got 'down_proj'"),
        ("down=method=magic", "override of 'down': method must be one of .*gptq-ternary, got 'magic'"),
        ("down=magic=1", "method 'gptq' has no option 'magic'; its options: act_order, block_size"),
        ("down=group_size=48", r"group_size must be 32, 64, 128 or -1 \(all of K\), got 48"),
        ("(=method=rtn", r"'\(' is not a regular expression"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        Recipes(overrides=[parse_override(override)])


# The command


def run(capsys, *arguments):
    status = cli.main(["quantize", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_quantize_writes_a_model_that_runs(capsys, model, text, tmp_path):
    out = tmp_path / "packed"
    arguments = (
        model.path,
        "--out",
        out,
        "--group-size",
        32,
        "--calibration",
        *text,
        "--skip",
        r"layers\.0\.mlp",
    )
    status, printed, err = run(capsys, *arguments, "--override", "o_proj=method=absmean,group_size=64")
    assert status == 0, err
    stated = printed.index("memory     at most about")
    assert stated < printed.index("layers.0.self_attn.q_proj")
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert re.search(
            r"gptq g=32  output error 0\.\d+  weight error 0\.\d+  damping 0\.1  codes( +\d+){4} %  [\d.]+ s",
            line,
        )
    report = json.loads((out / "quantize.json").read_text())
    assert (
        report["complete"]
        and len(report["modules"]) == 11
        and report["settings"]["calibration"]["documents"] == 10
    )
    assert {m["name"]: m["method"] for m in report["modules"]}["layers.1.self_attn.o_proj"] == "absmean"
    assert report["bits_a_weight"] == 8 * report["bytes_after"] / report["weights_quantised"]
    assert report["memory_stated"] > 0

    packed = open_model(out)
    assert packed.format == "jax_trirun" and packed.config == model.config
    kinds = {name: type(packed.read(name)).__name__ for name in packed.shapes}
    assert kinds["layers.0.mlp.up_proj.kernel"] == "ndarray" == kinds["embed.embedding"]
    assert kinds["layers.1.mlp.up_proj.kernel"] == "QuantTensor" == kinds["layers.0.self_attn.q_proj.kernel"]
    float16 = packed.read("layers.0.mlp.up_proj.kernel")
    np.testing.assert_array_equal(float16, model.read("layers.0.mlp.up_proj.kernel").astype(np.float16))
    assert set(load(out)) == set(packed.shapes)

    # What was written is what the in-memory driver makes, of the same float16 weights.
    losses = compile_losses(load_llama(out))(np.asarray(DOCUMENTS[3][:64])[None])
    assert np.isfinite(losses).all()
    assert packed.tokenizer().decode(packed.tokenizer().encode("naïve text")) == "naïve text"

    status, _, err = run(capsys, *arguments)
    assert status == 2 and "is not empty" in err and "--resume" in err
    status, printed, _ = run(capsys, *arguments, "--resume")
    assert status == 0 and "is complete" in printed


def test_quantize_and_the_driver_in_memory_agree(capsys, model, text, tmp_path):
    from jax_trirun.commands.quantize import tokenize

    out = tmp_path / "packed"
    common = ("--method", "gptq", "--calibration", *text, "--float-dtype", "float32")
    assert run(capsys, model.path, "--out", out, *common)[0] == 0
    decoder = load_llama(model)
    quantize_llama(decoder, tokenize(model, text, 131072), Recipe("gptq"))
    for i, block in enumerate(decoder.layers):
        for name in LINEAR:
            part, leaf = name.split(".")
            wanted = getattr(getattr(block, part), leaf).weight
            got = open_model(out).read(f"layers.{i}.{name}.kernel")
            np.testing.assert_array_equal(wanted.words, got.words)
            np.testing.assert_array_equal(wanted.scales, got.scales)


KILLED = """
import os, signal, sys
from jax_trirun import cli
from jax_trirun.checkpoints import safetensors

write, count = safetensors.write, int(sys.argv[1])

def write_then_die(path, tensors, metadata):
    global count
    count -= 1
    if count < 0:  # half of the file under its temporary name, then no more
        with open(path.parent / f".{path.name}.abc.part", "wb") as file:
            file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors, metadata)

safetensors.write = write_then_die
cli.main(sys.argv[2:])
"""


def files(folder):
    """Every weight file's bytes; the reports' times differ."""
    return {
        name: (folder / name).read_bytes() if name.endswith(".json") else load(folder / name)
        for name in sorted(os.listdir(folder))
        if name != "quantize.json"
    }


def test_a_killed_run_resumes_to_the_same_model(capsys, model, text, tmp_path):
    """SIGKILL after nothing, the embedding and one layer; and at a random moment."""
    arguments = ["quantize", str(model.path), "--group-size", "32", "--calibration", *text]
    whole = tmp_path / "whole"
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    for written in (0, 2):
        out = tmp_path / f"killed{written}"
        program = [sys.executable, "-P", "-c", KILLED, str(written), *arguments, "--out", str(out)]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list(out.glob("model-*.safetensors"))) == written and list(out.glob(".*.part"))
        with pytest.raises(FileNotFoundError):
            open_model(out)  # half a model is none
        with pytest.raises(FileNotFoundError):
            load(out)
        capsys.readouterr()
        assert cli.main([*arguments, "--out", str(out)]) == 2
        assert "--resume" in capsys.readouterr().err
        other = [*arguments, "--damping", "0.2", "--out", str(out), "--resume"]
        assert cli.main(other) == 2
        assert "the run to resume had recipe=" in capsys.readouterr().err
        assert cli.main([*arguments, "--out", str(out), "--resume"]) == 0
        same(files(whole), files(out))
        assert not list(out.glob(".*.part"))
        names = [row["name"] for row in json.loads((out / "quantize.json").read_text())["modules"]]
        assert names == [f"layers.{i}.{name}" for i in range(2) for name in LINEAR]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], bytes):
            assert a[name] == b[name], name
        else:
            for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)


def test_overwrite_deletes_only_what_a_run_wrote(capsys, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model-00001-of-00002.safetensors").write_bytes(b"someone's")
    status, _, err = run(capsys, model.path, "--out", other, "--method", "mse", "--overwrite")
    assert status == 2 and "has no quantize.json, so nothing in it is deleted" in err
    assert os.listdir(other) == ["model-00001-of-00002.safetensors"]
    out = tmp_path / "out"
    assert run(capsys, model.path, "--out", out, "--method", "mse")[0] == 0
    (out / "mine.txt").write_text("stays")
    assert run(capsys, model.path, "--out", out, "--method", "rtn", "--overwrite")[0] == 0
    assert (out / "mine.txt").exists() and open_model(out).format == "jax_trirun"
    assert json.loads((out / "quantize.json").read_text())["settings"]["recipe"]["method"] == "rtn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "method 'gptq' needs calibration text; give --calibration FILE"),
        (("--calibration", "nowhere.txt"), "No such file"),
        (
            ("--method", "mse", "--group-size", "128"),
            "layers.0.self_attn.q_proj: quantize: .*got group_size=128, K=64",
        ),
        (("--method", "mse", "--skip", "."), "no module is left to quantise; change --skip or --override"),
        (("--method", "mse", "--skip", "("), r"'\(' is not a regular expression"),
        (("--method", "mse", "--damping", "1"), "method 'mse' has no option 'damping'"),
        (("--method", "mse", "--batch-tokens", "0"), "--batch-tokens must be positive, got 0"),
        (("--calibration", __file__, "--bos"), "--bos: the tokenizer of .* has no BOS token"),
        (
            ("--calibration", __file__, "--damping", "-1"),
            "layers.0.self_attn.q_proj: gptq: damping must be > 0, .*got damping=-1.0",
        ),
        (
            ("--method", "mse", "--override", r"layers\.1\..*down=method=hqq,p=7"),
            "layers.1.mlp.down_proj: quantize: 0 < p <= 1.* are wanted, got p=7",
        ),
        (
            ("--method", "mse", "--override", r"layers\.1\..*up=bits=3"),
            "layers.1.mlp.up_proj: .*bits.*got 3",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(capsys, model, tmp_path, arguments, message):
    out = tmp_path / "out"
    status, _, err = run(capsys, model.path, "--out", out, *arguments)
    assert status == 2 and err.startswith("error: ") and re.search(message, err), err
    assert not out.exists()


def test_patterns_that_fit_nothing_are_named(capsys, model, tmp_path):
    options = ("--method", "rtn", "--skip", "down", "--skip", "q_porj", "--override", "k_porj=bits=4")
    status, _, err = run(capsys, model.path, "--out", tmp_path / "out", *options)
    assert status == 0
    assert [line for line in err.splitlines() if line.startswith("warning")] == [
        f"warning: {pattern!r} of --skip or --override fits no module" for pattern in ("q_porj", "k_porj")
    ]


def test_wrong_text(capsys, model, tmp_path):
    for name, content, message in (
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8 text"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"txt": "x"}',
            'a.jsonl, line 2: wanted a JSON object with the key "text"',
        ),
        ("empty.txt", b"", "--calibration: no text in"),
    ):
        (tmp_path / name).write_bytes(content)
        status, _, err = run(capsys, model.path, "--out", tmp_path / "out", "--calibration", tmp_path / name)
        assert status == 2 and message in err


def test_numbers_that_the_float_dtype_cannot_hold(capsys, tiny_llama, tmp_path):
    from safetensors.numpy import save_file

    path, weights = tiny_llama(seed=3)
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, str(path / "model.safetensors"))
    status, _, err = run(capsys, path, "--out", tmp_path / "out", "--method", "mse")
    assert status == 2 and "norm.scale: its largest number, 100000, is not finite in float16" in err
    assert run(capsys, path, "--out", tmp_path / "b", "--method", "mse", "--float-dtype", "bfloat16")[0] == 0


def test_memory_stays_at_one_layer(capsys, tiny_llama, tmp_path, monkeypatch):
    """Arrays that live while a layer is worked on: no more with eight layers than with two."""
    from flax_layers import quantize_llama as driver

    held = []
    quantize_linear = driver.quantize_linear

    def spy(*arguments):
        held.append(sum(a.nbytes for a in jax.live_arrays()))
        return quantize_linear(*arguments)

    monkeypatch.setattr(driver, "quantize_linear", spy)
    peaks = {}
    for layers in (2, 8):
        path, _ = tiny_llama(layers=layers, hidden=128, mlp=384)
        held.clear()
        before = sum(a.nbytes for a in jax.live_arrays())
        out = tmp_path / str(layers)
        assert run(capsys, path, "--out", out, "--method", "mse")[0] == 0
        peaks[layers] = max(held) - before
        stated = json.loads((out / "quantize.json").read_text())["memory_stated"]
        assert peaks[layers] <= stated
    one_layer = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
    assert peaks[8] - peaks[2] < 0.1 * one_layer and peaks[8] < 3 * one_layer


# The real model


def test_a_layer_of_the_real_model(smollm2):
    """GPTQ on one early layer costs the real model a fraction of what rounding it does."""
    from jax_trirun.evaluate import perplexity, sample_text

    real = open_model(smollm2.path)
    tokens = real.tokenizer().encode(sample_text())
    lost = {}
    for method in (None, "gptq", "rtn"):
        decoder = load_llama(real)
        if method is not None:
            recipes = Recipes(Recipe(method), skip=[r"layers\.(?!1\.)"])
            assert (
                len(quantize_llama(decoder, [tokens[:300], tokens[300:400], tokens[400:768]], recipes)) == 7
            )
        lost[method] = np.log(perplexity(compile_losses(decoder), [tokens[768:]], window=256).value)
    assert 3.5 < lost[None] < lost["gptq"] < lost[None] + 0.2 * (lost["rtn"] - lost[None]), lost
