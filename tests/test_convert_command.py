"""`convert`: whole small checkpoints of every format, written here weight by weight, must come out exactly."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun import QuantTensor, cli
from jax_trirun.checkpoints import open_model

pytest.importorskip("flax", reason="Flax is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")
safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")

from flax_layers.llama import Llama, LlamaConfig  # noqa: E402
from flax_layers.load import load_llama  # noqa: E402

RNG = np.random.default_rng(0)
GROUP = 32


def fields(values):
    """0 .. 3 along the last axis -> int32 words of 16, lowest bits first."""
    rows = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % 16)])
    shifted = rows.reshape(*rows.shape[:-1], -1, 16).astype(np.uint64) << (2 * np.arange(16, dtype=np.uint64))
    return np.ascontiguousarray(shifted.sum(-1).astype(np.uint32).view(np.int32))


def random_parts(n, k):
    """Codes [out, in], and scales and zeros [out, groups]."""
    scales = (RNG.standard_normal((n, k // GROUP)) / np.sqrt(k)).astype(np.float16)
    return RNG.integers(0, 4, (n, k)), scales, RNG.integers(0, 4, scales.shape)


def spread(values):
    return np.repeat(values.astype(np.float32), GROUP, axis=1)


def gptq(n, k, version):
    codes, scales, zeros = random_parts(n, k)
    stored = (zeros - (version == 1)) % 4
    tensors = {
        "qweight": np.ascontiguousarray(fields(codes).T),
        "qzeros": fields(stored.T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(k) // GROUP).astype(np.int32),
        "bias": np.zeros(n, np.float16),  # as AutoGPTQ writes for layers that have none
    }
    return tensors, spread(scales) * (codes - spread(zeros))


def bitnet(n, k, divides):
    ternary = RNG.integers(-1, 2, (n, k))
    runs = (ternary + 1).reshape(4, n // 4, k)
    packed = (runs << (2 * np.arange(4))[:, None, None]).sum(0).astype(np.uint8)
    scale = np.float32(RNG.uniform(1, 9))
    value = np.float32(1) / scale if divides else scale
    return {"weight": packed, "weight_scale": np.asarray([scale])}, ternary * value


def compressed(n, k):
    codes, scales, _ = random_parts(n, k)
    tensors = {
        "weight_packed": fields(codes),
        "weight_scale": scales,
        "weight_shape": np.asarray([n, k], np.int64),
    }
    return tensors, spread(scales) * (codes - 2)


def text(value):
    return np.frombuffer(value.encode(), np.uint8).copy()


def hqq(n, k):
    codes, scales, zeros = random_parts(n, k)
    zeros = (zeros + RNG.uniform(-0.5, 0.5, zeros.shape)).astype(np.float16)
    quarters = codes.reshape(4, -1, GROUP)
    tensors = {
        "W_q": sum(q << s for q, s in zip(quarters, (6, 4, 2, 0), strict=True)).astype(np.uint8),
        "scale": scales.reshape(-1, 1),
        "zero": zeros.reshape(-1, 1),
        "shape": np.asarray([n, k], np.int64),
        "group_size": np.asarray(GROUP),
        "nbits": np.asarray(2),
        "axis": np.asarray(1),
        "packing": text("2bit_u8"),
        "quant_scale": np.asarray(False),
        "quant_zero": np.asarray(False),
        "view_as_float": np.asarray(False),
    }
    return tensors, spread(scales) * (codes.astype(np.float32) - spread(zeros))


def trirun(n, k):
    codes = RNG.integers(0, 4, (k, n))
    scales = (RNG.standard_normal((1, n)) / np.sqrt(k)).astype(np.float16)
    B = np.zeros((k // 16, n), np.uint32)
    # See test_importers.trirun_file for where these places come from.
    tile, run, lane, j, operand, register, parity = np.indices((k // 16, n // 64, 32, 4, 2, 2, 2)).reshape(
        7, -1
    )
    row = 16 * tile + 2 * (lane % 4) + 8 * register + parity
    column = 64 * run + 16 * j + 8 * operand + lane // 4
    shift = 16 * parity + 4 * (2 * operand + register) + 2 * (j % 2)
    code = codes[row, column].astype(np.uint32) << shift.astype(np.uint32)
    np.bitwise_or.at(B, (tile, 64 * run + 2 * lane + j // 2), code)
    s = np.empty_like(scales)
    columns = np.arange(n)
    places = columns // 32 * 32 + columns % 8 // 2 * 8 + columns % 32 // 8 * 2 + columns % 2
    s[:, places] = scales
    return {"B": B.view(np.int32), "s": s}, (np.float32(scales) * (codes - 1)).T


def trilm(n, k):
    scale = np.float16(RNG.uniform(0.01, 0.2))
    weight = RNG.integers(-1, 2, (n, k)).astype(np.float16) * scale
    return {"weight": weight}, weight.astype(np.float32)


FORMATS = {
    "gptq": (lambda n, k: gptq(n, k, 1), {"quant_method": "gptq", "bits": 2, "group_size": GROUP}),
    "gptq_v2": (
        lambda n, k: gptq(n, k, 2),
        {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
    ),
    "bitnet": (lambda n, k: bitnet(n, k, True), {"quant_method": "bitnet"}),
    "autobitlinear": (
        lambda n, k: bitnet(n, k, False),
        {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    ),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 2, "group_size": GROUP}}},
        },
    ),
    "hqq": (hqq, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2, "axis": 1}}}),
    "trirun": (trirun, None),
    "trilm": (trilm, None),
}


def write(tiny_llama, make, quantization, *, spoil=lambda name, tensors: tensors):
    """A checkpoint whose linear layers are in a format: its directory, and the float weights [out, in]."""
    path, weights = tiny_llama(hidden=128, mlp=256, dtype=np.float16, quantization=quantization)
    tensors = dict(weights)
    for name in list(weights):
        if "_proj." in name:
            module = name.removesuffix(".weight")
            parts, weights[name] = make(*weights[name].shape)
            del tensors[name]
            tensors |= {f"{module}.{part}": value for part, value in spoil(module, parts).items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.save_file(tensors, str(path / "model.safetensors"))
    return path, weights


def run(capsys, *arguments):
    status = cli.main(["convert", *map(str, arguments)])
    return status, *capsys.readouterr()


def float_decoder(path, weights):
    """The decoder of the checkpoint's float weights."""
    from jax_trirun.checkpoints.models import hugging_face_module

    model = open_model(path)
    values = {}
    for name in model.shapes:
        w = np.asarray(weights[f"{hugging_face_module(name)}.weight"], np.float32)
        values[name] = w.T if name.endswith(".kernel") else w
    return values, Llama.from_weights(LlamaConfig(**model.config), values)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_comes_out_exactly(capsys, tiny_llama, tmp_path, name):
    make, quantization = FORMATS[name]
    path, weights = write(tiny_llama, make, quantization)
    out = tmp_path / "out"
    status, printed, err = run(capsys, path, "--out", out)
    assert status == 0, err
    values, decoder = float_decoder(path, weights)
    packed = open_model(out)
    for weight_name, wanted in values.items():
        got = packed.read(weight_name)
        assert isinstance(got, QuantTensor) == ("_proj" in weight_name), weight_name
        if isinstance(got, QuantTensor):
            got = jax_trirun.dequantize(got, dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(got, np.float32), wanted, err_msg=weight_name)
    tokens = RNG.integers(0, 257, (2, 16))
    logits = np.asarray(decoder(tokens))
    np.testing.assert_allclose(load_llama(out)(tokens), logits, atol=1e-3 * np.abs(logits).max())

    report = json.loads((out / "convert.json").read_text())
    assert report["complete"] and report["requantised"] == 0
    assert report["format"] == {"autobitlinear": "bitnet", "trilm": "float"}.get(name, name)
    kinds = {t["name"]: t["kind"] for t in report["tensors"]}
    assert list(kinds) == list(packed.shapes) and sum(kind == "packed" for kind in kinds.values()) == 14
    assert report["bytes"] == sum(t["bytes"] for t in report["tensors"])
    one = next(t for t in report["tensors"] if t["name"] == "layers.1.mlp.up_proj.kernel")
    assert one["bits_a_weight"] == 8 * one["bytes"] / (128 * 256)
    assert re.search(r"layers\.\*\.mlp\.up_proj\.kernel +2 +128 x 256 packed", printed)
    assert f"{report['bits_a_weight']:.3f} bits a weight" in printed


def test_generate_and_a_second_convert_take_the_result(capsys, tiny_llama, tmp_path):
    make, quantization = FORMATS["gptq"]
    path, _ = write(tiny_llama, make, quantization)
    out = tmp_path / "out"
    assert run(capsys, path, "--out", out)[0] == 0
    arguments = ("--raw", "--prompt", "the", "--max-new-tokens", "4", "--no-perplexity")
    assert cli.main(["generate", "--model", str(out), *arguments]) == 0
    assert "14 layers are packed already" in capsys.readouterr().out
    status, _, err = run(capsys, out, "--out", tmp_path / "again")
    assert status == 2 and "is packed already" in err
    status, _, err = run(capsys, path, "--out", out)
    assert status == 2 and "is not empty" in err
    assert run(capsys, path, "--out", out, "--overwrite")[0] == 0


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
def test_gguf_ternary(capsys, tmp_path, type):
    """q and k have their rows permuted in a GGUF file, packed or not."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "ternary.gguf"
    hidden, heads = 256, 4
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    shapes = {"token_embd": (3, hidden), "output_norm": (hidden,)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (hidden,)
    linear = {"attn_q": hidden, "attn_k": hidden // 2, "attn_v": hidden // 2, "attn_output": hidden}
    linear |= {"ffn_gate": hidden, "ffn_up": hidden, "ffn_down": hidden}
    kind = gguf.GGMLQuantizationType[type]
    stored = {}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", RNG.standard_normal(shape).astype(np.float32))
    for name, out in linear.items():
        ternary = RNG.integers(-1, 2, (out, hidden)).astype(np.float32) * np.float32(np.float16(0.07))
        data = gguf.quants.quantize(ternary, kind)
        stored[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(capsys, path, "--out", tmp_path / "out")[0] == 0
    packed = open_model(tmp_path / "out")

    def wanted(name, heads):
        """Row i + D / 2 h of a head was stored at 2 i + h."""
        w = stored[name]
        return w.reshape(heads, -1, 2, hidden).swapaxes(1, 2).reshape(w.shape).T

    for name, value in {
        "self_attn.q_proj": wanted("attn_q", heads),
        "self_attn.k_proj": wanted("attn_k", heads // 2),
        "self_attn.v_proj": stored["attn_v"].T,
        "mlp.down_proj": stored["ffn_down"].T,
    }.items():
        got = packed.read(f"layers.0.{name}.kernel")
        np.testing.assert_array_equal(jax_trirun.dequantize(got, dtype=jnp.float32), value, err_msg=name)
        assert got.group_size == -1  # one block of 256 inputs


def test_what_is_inexact_is_refused_by_name_and_requantised_when_asked(capsys, tiny_llama, tmp_path):
    make, quantization = FORMATS["gptq"]
    scattered = RNG.permutation(np.repeat(np.arange(256 // GROUP), GROUP)).astype(np.int32)

    def spoil(module, tensors):
        if module.endswith("1.mlp.down_proj"):
            return tensors | {"g_idx": scattered}
        return tensors

    path, _ = write(tiny_llama, make, quantization, spoil=spoil)
    out = tmp_path / "out"
    status, _, err = run(capsys, path, "--out", out)
    assert status == 2 and re.search(
        r"layers\.1\.mlp\.down_proj\.kernel cannot be represented exactly: act-order .*Add --requantize METHOD",
        err,
    )
    with pytest.raises(FileNotFoundError):
        open_model(out)
    arguments = ("--requantize", "mse", "--group-size", 32, "--overwrite")
    status, printed, err = run(capsys, path, "--out", out, *arguments)
    assert status == 0 and "1 tensors quantised again" in printed, err
    report = json.loads((out / "convert.json").read_text())
    assert [t["name"] for t in report["tensors"] if t["kind"] == "requantised"] == [
        "layers.1.mlp.down_proj.kernel"
    ]
    weight = open_model(out).read("layers.1.mlp.down_proj.kernel")
    assert weight.zeros is None and weight.group_size == 32


def test_float_models_are_sent_to_quantize(capsys, tiny_llama, tmp_path):
    path, _ = tiny_llama()
    status, _, err = run(capsys, path, "--out", tmp_path / "out")
    assert (
        status == 2
        and "layers.0.self_attn.q_proj.kernel cannot be represented exactly: it is not ternary" in err
    )
    assert "quantised with the command quantize" in err and not (tmp_path / "out").exists()
    assert run(capsys, path, "--out", tmp_path / "out", "--requantize", "absmean")[0] == 0
    assert json.loads((tmp_path / "out" / "convert.json").read_text())["requantised"] == 14


def test_the_bundled_model_is_sent_to_quantize(capsys, smollm2, tmp_path):
    status, _, err = run(capsys, "smollm2", "--out", tmp_path / "out")
    assert status == 2 and "quantised with the command quantize" in err and not (tmp_path / "out").exists()


def test_wrong_checkpoints(capsys, tiny_llama, tmp_path):
    cases = [
        ({"quant_method": "gptq", "bits": 4}, "only 2-bit weights can be packed, these have bits=[4]"),
        (
            {"quant_method": "awq"},
            "quant_method must be gptq, bitnet, compressed-tensors, hqq or jax_trirun, got 'awq'",
        ),
        (
            {"quant_method": "gptq", "bits": 2, "checkpoint_format": "marlin"},
            "checkpoint_format must be gptq or gptq_v2",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": {}}},
            "only the format pack-quantized can be read",
        ),
    ]
    for quantization, message in cases:
        path, _ = tiny_llama(quantization=quantization)
        status, _, err = run(capsys, path, "--out", tmp_path / "out")
        assert status == 2 and message in err, err
    make, quantization = FORMATS["bitnet"]
    for spoilt, message in (
        ({"weight_scale": None}, r"q_proj\.weight_scale is missing"),
        ({"bias": np.ones(128, np.float32)}, "q_proj has a bias"),
        ({"rms_norm.weight": np.ones(128, np.float32)}, "q_proj: it has a norm of its own"),
        ({"weight": np.zeros((8, 128), np.uint8)}, r"q_proj: from_bitnet: out_features must be in 29 .. 32"),
    ):

        def spoil(module, tensors, spoilt=spoilt):
            return {name: value for name, value in (tensors | spoilt).items() if value is not None}

        path, _ = write(tiny_llama, make, quantization, spoil=spoil)
        status, _, err = run(capsys, path, "--out", tmp_path / "out")
        assert status == 2 and re.search(message, err), err
    path, _ = tiny_llama()
    config = json.loads((path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type must be 'llama' or 'mistral', got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not supported"),
    ):
        (path / "config.json").write_text(json.dumps(config | change))
        status, _, err = run(capsys, path, "--out", tmp_path / "out")
        assert status == 2 and message in err, err
    (path / "config.json").unlink()
    status, _, err = run(capsys, path, "--out", tmp_path / "out")
    assert status == 2 and "config.json: no such file" in err
    status, _, err = run(capsys, path / "tokenizer.json", "--out", tmp_path / "out")
    assert status == 2 and "wanted a .gguf file, or a directory" in err
    assert not os.path.exists(tmp_path / "out")
    path, _ = tiny_llama()
    status, _, err = run(capsys, path, "--out", path, "--overwrite")
    assert status == 2 and "has no convert.json, so nothing in it is deleted" in err


def test_llama_31_rotary_factors():
    """Against the published rule, frequency by frequency."""
    from jax_trirun.checkpoints.decoder import config_from_json, config_to_json

    json_config = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    config = config_from_json("here", json_config)
    for i, factor in enumerate(config["rope_factors"]):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            wanted = frequency
        elif wavelength > 8192 / 1:
            wanted = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted = (1 - smooth) * frequency / 8 + smooth * frequency
        np.testing.assert_allclose(frequency / factor, wanted, rtol=1e-12)
    assert config_from_json("here", config_to_json(config)) == config
