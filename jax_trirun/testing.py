"""Problems, shapes, the error bound and the counts that tests and benchmarks share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .matmul import costs as costs
from .matmul import matmul
from .pack import pack
from .types import QuantTensor

# The c of the bound eps(out) |y| + c eps(float32) (|x| @ |w|). A float32 sum of K terms of one sign,
# kept in L running sums, is off by about 0.3 sqrt(K / L) units of rounding; the matmuls here keep 16
# or more and reach K = 32768, which makes 14. Sums of mixed signs stay below 1.
ERROR_FACTOR = 16.0

# (K, N) of the weights of Llama-like decoders: attention and feed-forward, in and out.
LLAMA_SHAPES = {
    "7B attention": (4096, 4096),
    "8B up": (4096, 14336),
    "8B down": (14336, 4096),
    "70B up": (8192, 28672),
    "70B down": (28672, 8192),
}


class Reference(NamedTuple):
    """A product in float64 and, for each element, how far from it a float32 sum may be."""

    y: np.ndarray
    bound: np.ndarray


@dataclass(frozen=True)
class MatmulProblem:
    """Everything that defines one product; the same seed gives the same arrays."""

    m: int
    k: int
    n: int
    group_size: int = -1
    x_dtype: str = "float32"
    scale_dtype: str = "float32"
    with_zeros: bool = False
    x_mean: float = 0.0
    scale_magnitude: float = 0.02
    seed: int = 0

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else self.k // self.group_size

    def codes(self) -> np.ndarray:
        """uint8 [K, N], every code equally often."""
        return self._rng(0).integers(0, 4, (self.k, self.n)).astype(np.uint8)

    def scales(self) -> np.ndarray:
        """[groups, N], of both signs."""
        values = self._rng(1).normal(size=(self.groups, self.n)) * self.scale_magnitude
        return values.astype(jnp.dtype(self.scale_dtype))

    def zeros(self) -> np.ndarray | None:
        """[groups, N] around the middle of the codes, or None."""
        if not self.with_zeros:
            return None
        return self._rng(2).uniform(0, 3, (self.groups, self.n)).astype(jnp.dtype(self.scale_dtype))

    def x(self) -> np.ndarray:
        values = self._rng(3).normal(size=(self.m, self.k)) + self.x_mean
        return values.astype(jnp.dtype(self.x_dtype))

    def quant_tensor(self) -> QuantTensor:
        zeros = self.zeros()
        return QuantTensor(
            pack(self.codes()), jnp.asarray(self.scales()), None if zeros is None else jnp.asarray(zeros),
            shape=(self.k, self.n), group_size=self.group_size,
        )  # fmt: skip

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def weight_float64(codes: Any, scales: Any, zeros: Any = None, *, zero_point: float = 1.0) -> np.ndarray:
    """scales * (codes - zeros) in float64 [K, N], written down independently of the library."""
    codes, scales = np.asarray(codes, np.float64), np.asarray(scales).astype(np.float64)
    k = codes.shape[0]
    group = np.arange(k) // max(k // scales.shape[0], 1)
    zero = zero_point if zeros is None else np.asarray(zeros).astype(np.float64)[group]
    with np.errstate(invalid="ignore"):  # infinite scales
        return scales[group] * (codes - zero)


def matmul_float64(x: Any, codes: Any, scales: Any, zeros: Any = None, *, out_dtype: Any = None) -> Reference:
    """The product and its element-wise bound eps(out) |y| + c eps(float32) (|x| @ |w|).

    Below the normal numbers the bound is absolute: XLA runs CPU code with subnormal float32 flushed to
    zero, and the result's own subnormals are coarse.
    """
    x = np.asarray(x)
    out = jnp.finfo(x.dtype if out_dtype is None else out_dtype)
    x64, w = x.astype(np.float64), weight_float64(codes, scales, zeros)
    with np.errstate(invalid="ignore", over="ignore"):
        y = x64 @ w
        products = np.abs(x64) @ np.abs(w)
        levels = np.abs(x64) @ np.abs(weight_float64(codes, np.ones_like(scales), zeros))
        bound = float(out.eps) * np.abs(y) + ERROR_FACTOR * np.finfo(np.float32).eps * products
        flushed = np.finfo(np.float32).tiny * (1 + levels)
    return Reference(y, bound + flushed + float(out.smallest_subnormal))


def assert_close(y: Any, reference: Reference) -> None:
    """Assert that every element of ``y`` is within its bound.

    Where the product is beyond the result's range an infinity of its sign is right, at the edge of the
    range either; where the product is not finite, no finite value is.
    """
    limit = float(jnp.finfo(y.dtype).max)
    got = np.asarray(y).astype(np.float64)
    want, bound = reference
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    known = np.isfinite(want)
    assert not np.isfinite(got[~known]).any(), "a finite result where the product is not finite"
    with np.errstate(invalid="ignore"):
        close = np.abs(got - want) <= bound
        overflow = np.isinf(got) & (np.sign(got) == np.sign(want)) & (np.abs(want) + bound >= limit)
    bad = known & ~(close | overflow)
    if bad.any():
        where = tuple(int(i[0]) for i in np.nonzero(bad))
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements are out of bounds; the first at {where}: got {got[where]!r}, "
            f"wanted {want[where]!r} +- {bound[where]:.3g}"
        )


def check_problem(problem: MatmulProblem, *, backend: str | None = None, out_dtype: Any = None) -> jax.Array:
    """Run one problem on one back end and compare; returns y."""
    y = matmul(problem.x(), problem.quant_tensor(), out_dtype=out_dtype, backend=backend)
    assert y.dtype == jnp.dtype(out_dtype or problem.x_dtype)
    reference = matmul_float64(
        problem.x(), problem.codes(), problem.scales(), problem.zeros(), out_dtype=out_dtype
    )
    assert_close(y, reference)
    return y
