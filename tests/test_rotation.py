"""QuaRot's rotations: orthogonal, of the kind they claim, and invisible in the logits."""

import json
import re

import numpy as np
import pytest

from jax_trirun import cli
from jax_trirun.checkpoints import open_model
from jax_trirun.quantizers.rotation import RotatedModel, orthogonal

pytest.importorskip("flax", reason="Flax is not installed")

from flax_layers.llama import Llama, LlamaConfig
from flax_layers.load import load_llama


@pytest.mark.parametrize(
    ("n", "kind"),
    [
        (1, "randomised Hadamard 1"),
        (64, "randomised Hadamard 64"),
        (12, "randomised Hadamard 12 = 12 x 1"),  # 11 = 3 mod 4: Paley's first construction
        (36, "randomised Hadamard 36 = 36 x 1"),  # 17 = 1 mod 4: his second
        (576, "randomised Hadamard 576 = 36 x 16"),
        (896, "randomised Hadamard 896 = 28 x 32"),
        (3072, "randomised Hadamard 3072 = 12 x 256"),
        (100, "random orthogonal 100"),  # 99 and 49 are no primes
        (7, "random orthogonal 7"),
    ],
)
def test_the_matrices(n, kind):
    q, found = orthogonal(n, np.random.default_rng(0))
    assert found == kind and q.shape == (n, n)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    if "Hadamard" in kind:
        np.testing.assert_allclose(np.abs(q), n**-0.5, rtol=1e-12)  # every entry the same size
    if n > 1:
        again, _ = orthogonal(n, np.random.default_rng(1))
        assert np.abs(q - again).max() > 0.1 * n**-0.5


def logits(model, tokens):
    weights = {path: np.asarray(model.read(path), np.float32) for path in model.shapes}
    return np.asarray(Llama.from_weights(LlamaConfig(**model.config), weights)(tokens), np.float64)


@pytest.mark.parametrize(("tied", "hidden"), [(True, 96), (False, 96), (True, 64), (True, 104)])
def test_logits_stay_the_same(tiny_llama, tied, hidden):
    """Grouped queries, norms that are not ones, Hadamard and QR; the error is float32's."""
    model = open_model(tiny_llama(tied=tied, hidden=hidden)[0])
    rotated = RotatedModel(model, seed=1)
    assert not rotated.config["tie_embeddings"] and model.config["tie_embeddings"] == tied
    tokens = np.random.default_rng(0).integers(0, 257, (2, 40))
    before, after = logits(model, tokens), logits(rotated, tokens)
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    for path in rotated.shapes:
        changed = not path.endswith("norm.scale") and path != "lm_head.kernel"
        if changed:  # each matrix is another one, none was forgotten
            assert np.abs(rotated.read(path) - np.asarray(model.read(path), np.float32)).max() > 1e-2, path
        elif path.endswith("norm.scale"):
            np.testing.assert_array_equal(rotated.read(path), 1)


def test_outliers_are_spread(tiny_llama):
    """One channel a hundred times the others, as language models have: no weight stands out afterwards."""
    path, weights = tiny_llama()
    from safetensors.numpy import save_file

    for name, w in weights.items():
        if re.search("gate|up", name):
            w[:, 5] *= 100
    save_file(weights, str(path / "model.safetensors"))
    model = open_model(path)

    def peak(source):
        w = source.read("layers.0.mlp.up_proj.kernel")
        return np.abs(w).max() / np.sqrt(np.mean(np.square(w, dtype=np.float64)))

    assert peak(RotatedModel(model)) < 0.4 * peak(model)


def test_quantize_rotates(capsys, tiny_llama, tmp_path):
    """Every layer skipped but one: what is written is the same model, rotated and untied."""
    path, _ = tiny_llama()
    out = tmp_path / "out"
    arguments = [
        "--method",
        "mse",
        "--rotate",
        "--skip",
        r"layers\.(?!1\.mlp\.down)",
        "--float-dtype",
        "float32",
    ]
    assert cli.main(["quantize", str(path), "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "rotation   R1 randomised Hadamard 64, R2 randomised Hadamard 16 for each head, seed 0" in printed
    report = json.loads((out / "quantize.json").read_text())
    assert report["settings"]["rotation"].startswith("R1 randomised Hadamard 64")
    assert not open_model(out).config["tie_embeddings"]
    tokens = np.random.default_rng(0).integers(0, 257, (1, 40))
    before = np.asarray(load_llama(path)(tokens))
    error = np.linalg.norm(np.asarray(load_llama(out)(tokens)) - before) / np.linalg.norm(before)
    assert 1e-4 < error < 0.5  # down_proj alone is in 2 bits
