"""QuantDenseGeneral for Flax nnx: nnx.LinearGeneral with a packed, frozen weight."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_trirun
from jax_trirun import QuantTensor

from .partitioning import merged_names, metadata_of
from .quant_dense import QuantDense, options_of


class QuantDenseGeneral(nnx.Module):
    """A ``QuantDense`` over several input axes at once, with several output axes.

    A drop-in for ``nnx.LinearGeneral`` without batch axes, such as ``nnx.MultiHeadAttention`` is made of.

    Attributes:
        dense: the ``QuantDense``, [K, N] with K the product of in_features and N that of out_features.
        in_features, out_features: tuples of sizes.
        axis: of the inputs; they are contracted.
    """

    def __init__(
        self,
        dense: QuantDense,
        in_features: tuple[int, ...],
        out_features: tuple[int, ...],
        axis: tuple[int, ...] = (-1,),
    ):
        """Raises ValueError when the sizes are not those of ``dense``, or axes and in_features differ in number."""
        sizes = math.prod(in_features), math.prod(out_features)
        if sizes != (dense.in_features, dense.out_features) or len(axis) != len(in_features):
            raise ValueError(
                f"QuantDenseGeneral: in_features={in_features}, out_features={out_features}, axis={axis} do not fit "
                f"a QuantDense of {dense.in_features} x {dense.out_features}"
            )
        self.dense = dense
        self.in_features = in_features
        self.out_features = out_features
        self.axis = axis

    @classmethod
    def from_linear_general(
        cls, linear: nnx.LinearGeneral, *, group_size: int = 128, bits: int = 2, **options: Any
    ) -> "QuantDenseGeneral":
        """Quantise an ``nnx.LinearGeneral``; layers stacked along leading axes stay stacked.

        The sharding of a kernel's first input axis becomes that of K, of its first output axis that of N;
        the others are inside the rows and columns that a device holds.

        Args:
            linear: is left as it is.
            group_size, bits, **options: as ``jax_trirun.quantize``.

        Raises:
            TypeError: not an ``nnx.LinearGeneral``. ValueError: it has batch axes. Others: as
                ``jax_trirun.quantize``.
        """
        if not isinstance(linear, nnx.LinearGeneral):
            raise TypeError(
                f"from_linear_general: linear must be an nnx.LinearGeneral, got {type(linear).__name__}"
            )
        if linear.batch_axis:
            raise ValueError(
                f"from_linear_general: batch axes are not supported, got batch_axis={dict(linear.batch_axis)}; "
                "each of them would need a weight of its own"
            )
        weight = jax_trirun.quantize(kernel_matrix(linear), group_size=group_size, bits=bits, **options)
        bias = None
        if linear.bias is not None:
            bias = linear.bias[...].reshape(*weight.batch_shape, weight.shape[1])
        n_in, n_out = len(linear.in_features), len(linear.out_features)
        dense = QuantDense.from_weight(
            weight,
            bias,
            **options_of(linear),
            kernel_metadata=_flattened(metadata_of(linear.kernel), linear.kernel.ndim, (n_in, n_out)),
            bias_metadata={}
            if linear.bias is None
            else _flattened(metadata_of(linear.bias), linear.bias.ndim, (n_out,)),
        )
        return cls(dense, linear.in_features, linear.out_features, linear.axis)

    @property
    def weight(self) -> QuantTensor:
        """The packed weight."""
        return self.dense.weight

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """inputs with in_features along axis -> the other axes, then out_features.

        Raises:
            ValueError: the inputs have other sizes along axis.
        """
        x, got = contracted_last(inputs, self.axis)
        if got != self.in_features:
            raise ValueError(
                f"QuantDenseGeneral: inputs must have sizes {self.in_features} along axes {self.axis}, got {got} "
                f"in shape {inputs.shape}"
            )
        y = self.dense(x)
        y = y.reshape(*y.shape[:-1], *self.out_features)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def contracted_last(inputs: jax.Array, axis: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """(inputs [..., K] with the axes of ``axis`` merged, in their order, to the last; the sizes they had)."""
    axes = sorted(a % inputs.ndim for a in axis)
    sizes = tuple(inputs.shape[a] for a in axes)
    x = jnp.moveaxis(inputs, axes, range(inputs.ndim - len(axes), inputs.ndim))
    return x.reshape(*x.shape[: x.ndim - len(axes)], math.prod(sizes)), sizes


def kernel_matrix(linear: nnx.LinearGeneral) -> jax.Array:
    """The kernel as [.., K, N], leading axes of a stack kept."""
    kernel = linear.kernel[...]
    lead = kernel.shape[: kernel.ndim - len(linear.in_features) - len(linear.out_features)]
    return kernel.reshape(*lead, math.prod(linear.in_features), math.prod(linear.out_features))


def _flattened(metadata: dict[str, Any], ndim: int, sides: tuple[int, ...]) -> dict[str, Any]:
    if "out_sharding" not in metadata:
        return metadata
    return metadata | {"out_sharding": merged_names(metadata["out_sharding"], ndim, sides)}
