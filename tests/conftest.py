"""Back ends as a fixture, eight CPU devices, and how far hypothesis looks.

Every test that takes ``backend`` runs once for "reference" and for each back end that is installed and
has a device; those on a GPU carry the marker ``gpu``, and whatever carries it is skipped without one.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from jax_trirun import _ffi

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what is not sharded runs on the first

_QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=30, derandomize=True, **_QUIET)
settings.register_profile("explore", max_examples=500, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [_param(name) for name in _ffi.usable_backends()])


def _param(name):
    on_gpu = name in _ffi.BACKENDS and _ffi.BACKENDS[name].platform == "cuda"
    return pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else [])


def pytest_collection_modifyitems(items):
    if "cuda" in _ffi.usable_backends():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and the CUDA module (_cuda)"))


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a process of its own, away from the checkout; returns what it prints."""

    def run(program, *arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def _on_the_backends_platform(request):
    """Tests of the CPU back end run on the CPU also where there is a GPU."""
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if name in _ffi.BACKENDS:
        with jax.default_device(jax.devices(_ffi.BACKENDS[name].platform)[0]):
            yield
    else:
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Write a random float decoder as Hugging Face does, its vocabulary the bytes: directory, weights [out, in]."""

    def write(*, layers=2, hidden=64, mlp=128, tied=True, dtype=np.float32, seed=0, quantization=None):
        from safetensors.numpy import save_file
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        path = tmp_path_factory.mktemp("tiny")
        vocabulary = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.save(str(path / "tokenizer.json"))
        config = {
            "model_type": "llama",
            "vocab_size": len(vocabulary),
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
        }
        (path / "config.json").write_text(
            json.dumps(config | ({"quantization_config": quantization} if quantization else {}))
        )
        rng = np.random.default_rng(seed)
        shapes = {"model.embed_tokens": (len(vocabulary), hidden), "model.norm": (hidden,)}
        if not tied:
            shapes["lm_head"] = (len(vocabulary), hidden)
        for i in range(layers):
            block = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (hidden // 2, hidden),
                "self_attn.v_proj": (hidden // 2, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        weights = {
            f"{name}.weight": (
                rng.standard_normal(shape) / np.sqrt(shape[-1]) * 2 + (len(shape) == 1)
            ).astype(dtype)
            for name, shape in shapes.items()
        }
        save_file(weights, str(path / "model.safetensors"))
        return path, weights

    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    return write


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of the real model."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from jax_trirun.checkpoints import CheckpointError, gguf
    from jax_trirun.checkpoints import smollm2 as source

    try:
        return gguf.read(source.fetch())
    except CheckpointError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"SmolLM2 cannot be had: {error}")
