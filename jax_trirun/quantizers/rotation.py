"""QuaRot's rotations R1 and R2, folded into a decoder's weights (Ashkboos et al. 2024, arXiv:2404.00456).

An orthogonal Q turns every residual vector x into x Q, which mixes outlying channels into all others, and
rounding then loses less. RMSNorm without its weight commutes with Q, so the weight goes into the linear
layers behind it first. Then (W is [in, out], x a row):

    embedding           E Q                                R1
    q, k, v, gate, up   Q^T diag(norm) W                   R1
    o, down             W Q                                R1
    head                Q^T diag(norm) W, untied
    v, o                V R, R^T O for each head           R2

and the logits stay the same up to rounding, with nothing left to do at run time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ..checkpoints.models import Model
from ..reference import dequantize
from ..types import QuantTensor

_NORM_OF = {
    "self_attn.q_proj": "input_norm",
    "self_attn.k_proj": "input_norm",
    "self_attn.v_proj": "input_norm",
    "mlp.gate_proj": "mlp_norm",
    "mlp.up_proj": "mlp_norm",
}


def orthogonal(n: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A random orthogonal [n, n] float64 matrix that mixes everything, and what it is, in words.

    A Hadamard matrix with random signs where one of order n can be built: n = 2^j m with m = 1, or m - 1
    a prime of the form 4 i + 3, or m / 2 - 1 a prime of the form 4 i + 1 (Paley 1933). Else uniformly
    random, from a QR decomposition.
    """
    for j in range((n & -n).bit_length() - 1, -1, -1):
        m = n >> j
        if (core := _paley(m)) is not None:
            hadamard = np.kron(core, scipy.linalg.hadamard(2**j)).astype(np.float64)
            signs = rng.choice([-1.0, 1.0], n)
            kind = f"{n} = {m} x {2**j}" if m > 1 else f"{n}"
            return signs[:, None] * hadamard / np.sqrt(n), f"randomised Hadamard {kind}"
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diagonal(r)), f"random orthogonal {n}"


def _paley(m: int) -> np.ndarray | None:
    """A Hadamard matrix of order m, 1 or of Paley's two constructions; None when they have none."""
    if m == 1:
        return np.ones((1, 1))
    if m % 4 == 0 and _is_prime(m - 1):  # then m - 1 = 3 mod 4: I + S with S skew
        return np.eye(m) + _conference(m - 1, symmetric=False)
    if m % 4 == 0 and _is_prime(q := m // 2 - 1) and q % 4 == 1:
        c = _conference(q, symmetric=True)
        plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(c, plus) + np.kron(np.eye(q + 1), minus)
    return None


def _conference(q: int, *, symmetric: bool) -> np.ndarray:
    """Order q + 1, zero diagonal, C C^T = q I: the residues mod q, bordered by ones."""
    squares = {i * i % q for i in range(1, q)}
    residue = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    c = np.zeros((q + 1, q + 1))
    c[1:, 1:] = residue[(np.arange(q)[:, None] - np.arange(q)) % q]
    c[0, 1:] = 1
    c[1:, 0] = 1 if symmetric else -1
    return c


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


class RotatedModel(Model):
    """A model whose weights come rotated, in float32; norms are ones, the head is not tied.

    Args:
        model: the model to rotate; quantised weights are dequantised.
        seed: of the random signs.

    Attributes:
        description: of the rotations, one line.
    """

    def __init__(self, model: Model, *, seed: int = 0):
        self._model = model
        self.path, self.name, self.format = model.path, model.name, model.format
        self.config = {**model.config, "tie_embeddings": False}
        rng = np.random.default_rng(seed)
        self._r1, kind1 = orthogonal(model.config["hidden_size"], rng)
        width = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_heads"]
        self._r2, kind2 = orthogonal(width, rng)
        self.description = f"R1 {kind1}, R2 {kind2} for each head, seed {seed}"

    def _read(self, path: str) -> np.ndarray:
        if path.endswith("norm.scale"):
            return np.ones(self.shapes[path], np.float32)
        return self._rotated(path).astype(np.float32)

    def _rotated(self, path: str) -> np.ndarray:
        if path == "embed.embedding":
            return self._embedding @ self._r1
        if path == "lm_head.kernel":
            head = self._embedding.T if self._model.config["tie_embeddings"] else self._float(path)
            return self._r1.T @ (self._float("norm.scale")[:, None] * head)
        _, layer, module = path.removesuffix(".kernel").split(".", 2)
        w = self._float(path)
        if module in _NORM_OF:
            w = self._r1.T @ (self._float(f"layers.{layer}.{_NORM_OF[module]}.scale")[:, None] * w)
        else:
            w = w @ self._r1
        if module == "self_attn.v_proj":
            heads = w.reshape(w.shape[0], -1, len(self._r2))
            w = (heads @ self._r2).reshape(w.shape)
        if module == "self_attn.o_proj":
            heads = w.reshape(-1, len(self._r2), w.shape[1])
            w = (self._r2.T @ heads).reshape(w.shape)
        return w

    @property
    def _embedding(self) -> np.ndarray:
        return self._float("embed.embedding")

    def _float(self, path: str) -> np.ndarray:
        value: Any = self._model.read(path)
        if isinstance(value, QuantTensor):
            value = dequantize(value, dtype=jnp.float32)
        return np.asarray(value).astype(np.float64)

    def tokenizer(self):
        return self._model.tokenizer()
