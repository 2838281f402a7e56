"""QuantDense for Flax nnx: nnx.Linear with a packed, frozen weight."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

import jax_trirun
from jax_trirun import QuantTensor
from jax_trirun.layout import layout

from .partitioning import metadata_of, metadata_of_parts, put_as_named


class QuantParam(nnx.Variable):
    """An array of a quantised layer: words, scales, zeros or bias.

    Not an ``nnx.Param``, so that optimisers and ``nnx.grad`` (over Params, the default) leave it alone.
    """


def _variable(value: Any, metadata: Mapping[str, Any]) -> QuantParam:
    return QuantParam(put_as_named(value, metadata), **metadata)


def options_of(layer: "nnx.Linear | nnx.LinearGeneral | QuantDense") -> dict[str, Any]:
    """The constructor's options that a layer of Flax's has by the same names, and ours too."""
    names = ("dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type")
    return {name: getattr(layer, name) for name in names}


class QuantDense(nnx.Module):
    """``y = x @ W + bias`` with W packed to 2 bits, over the last axis of x.

    A drop-in for ``nnx.Linear`` whose arrays are ``QuantParam``s. Differentiable in x. To train scales or
    bias all the same, name them: ``nnx.grad(f, argnums=nnx.DiffState(0, nnx.PathContains("scales")))``.

    Example:
        >>> layer = QuantDense.from_linear(linear, group_size=64)
        >>> y = layer(x)

    Attributes:
        words: uint32 [K / block_k, N / block_n, 128]; K = in_features, N = out_features.
        scales: [K / group_size, N]; zeros: the same shape, or None.
        bias: [N], or None. Layers stacked by ``nnx.vmap`` have a leading axis on each array.
        lora: None, or a module x -> [..., N] whose result is added (``flax_layers.add_lora`` puts one there).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        rngs: Any = None,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        group_size: int = 128,
        bits: int = 2,
        backend: str | None = None,
        weight: QuantTensor | None = None,
    ):
        """A layer with a random weight, or with ``weight``.

        Args:
            in_features, out_features, use_bias, dtype, kernel_init, bias_init, promote_dtype,
                preferred_element_type: as ``nnx.Linear``'s.
            param_dtype: of bias and scales.
            precision: taken for the likeness; sums are float32, whatever it says.
            rngs: as ``nnx.Linear``'s; needed unless ``weight`` is given and ``bias_init`` takes no key.
            kernel_metadata: of the kernel [K, N]; its ``out_sharding`` becomes that of words, scales and
                zeros (partitioning.py says how). ``nnx.with_partitioning(kernel_init, ...)`` does as well.
            bias_metadata: of bias.
            group_size: rows of W that share a scale: 32, 64, 128 or -1 (one group).
            bits: 2 or 4.
            backend: as ``jax_trirun.matmul``'s; None is the best there is. An attribute, may be set later.
            weight: packed weight to hold; then kernel_init is not called, group_size and bits are its own.

        Raises:
            ValueError: group_size does not divide in_features; weight is not [in_features, out_features].
            TypeError: no rngs where a random weight is wanted.
        """
        if weight is None:
            if rngs is None:
                raise TypeError(
                    "QuantDense: rngs must be given to draw a weight; pass nnx.Rngs(0), or weight="
                )
            kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
            if isinstance(kernel, nnx.VariableMetadata):
                kernel_metadata = {**kernel_metadata, **kernel.metadata}
                kernel = kernel.raw_value
            weight = jax_trirun.quantize(kernel, group_size=group_size, bits=bits)
        if weight.shape != (in_features, out_features):
            raise ValueError(
                f"QuantDense: weight must have shape (in_features, out_features) = {(in_features, out_features)}, "
                f"got {weight.shape}; weights are [in, out], transpose those that are [out, in]"
            )
        metadata = metadata_of_parts(kernel_metadata, weight)
        self.words = _variable(weight.words, metadata["words"])
        self.scales = _variable(weight.scales, metadata["scales"])
        self.zeros = nnx.data(None if weight.zeros is None else _variable(weight.zeros, metadata["zeros"]))
        bias = None
        if use_bias:
            key = rngs.params() if rngs is not None else None
            bias = _variable(bias_init(key, (out_features,), param_dtype), bias_metadata)
        self.bias = nnx.data(bias)
        self.lora: nnx.Module | None = nnx.data(None)

        self.in_features = in_features
        self.out_features = out_features
        self.group_size = weight.group_size
        self.bits = weight.bits
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.backend = backend

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, *, group_size: int = 128, bits: int = 2, **options: Any
    ) -> "QuantDense":
        """Quantise an ``nnx.Linear``; layers stacked along leading axes stay stacked.

        Args:
            linear: is left as it is. Metadata of its kernel and bias, shardings first of all, carry over.
            group_size, bits, **options: as ``jax_trirun.quantize`` (method, scale_dtype, ...).

        Raises:
            TypeError: not an ``nnx.Linear``. ValueError, TypeError: as ``jax_trirun.quantize``.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"from_linear: linear must be an nnx.Linear, got {type(linear).__name__}")
        weight = jax_trirun.quantize(linear.kernel[...], group_size=group_size, bits=bits, **options)
        bias = None if linear.bias is None else linear.bias[...]
        return cls.from_weight(
            weight,
            bias,
            **options_of(linear),
            kernel_metadata=metadata_of(linear.kernel),
            bias_metadata=metadata_of(linear.bias),
        )

    @classmethod
    def from_weight(cls, weight: QuantTensor, bias: jax.Array | None = None, **options: Any) -> "QuantDense":
        """A layer around a packed weight (from a checkpoint, say); options as the constructor's."""
        k, n = weight.shape
        options = {"param_dtype": weight.scales.dtype} | options
        return cls(
            k, n, use_bias=bias is not None, bias_init=lambda *_: bias, weight=weight, rngs=None, **options
        )

    @classmethod
    def concatenate(cls, layers: Sequence["QuantDense"]) -> "QuantDense":
        """One layer whose outputs are those of several, side by side, over the same inputs.

        One product with a wide weight takes less time than several with narrow ones. The layers are left as they
        are; shardings of theirs do not carry over.

        Raises:
            ValueError: they differ in what a layer has once, one has a low-rank term, or one but the last has an
                out_features that ends inside a block of the packed layout.
        """
        if why := why_apart(layers):
            raise ValueError(f"QuantDense.concatenate: {why}")
        first, weights = layers[0], [layer.weight for layer in layers]

        def beside(arrays: Sequence[Any], axis: int) -> jax.Array | None:
            return None if arrays[0] is None else jnp.concatenate(arrays, axis)

        weight = QuantTensor(
            beside([w.words for w in weights], -2),
            beside([w.scales for w in weights], -1),
            beside([w.zeros for w in weights], -1),
            shape=(first.in_features, sum(layer.out_features for layer in layers)),
            group_size=first.group_size,
            bits=first.bits,
        )
        bias = beside([None if layer.bias is None else layer.bias[...] for layer in layers], -1)
        return cls.from_weight(weight, bias, **options_of(first), backend=first.backend)

    @property
    def weight(self) -> QuantTensor:
        """The packed weight."""
        return QuantTensor(
            self.words[...],
            self.scales[...],
            None if self.zeros is None else self.zeros[...],
            shape=(self.in_features, self.out_features),
            group_size=self.group_size,
            bits=self.bits,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """inputs [..., in_features] -> [..., out_features], in the dtype ``nnx.Linear`` would give.

        Raises:
            ValueError: the last axis of inputs is not in_features.
        """
        bias = None if self.bias is None else self.bias[...]
        # Scales take part in the promotion, as the kernel would, but are never rounded by it.
        promoted, _, bias = self.promote_dtype((inputs, self.scales[...], bias), dtype=self.dtype)
        y = jax_trirun.matmul(
            promoted, self.weight, out_dtype=self.preferred_element_type, backend=self.backend
        )
        if bias is not None:
            y += bias
        if self.lora is not None:
            y += self.lora(inputs).astype(y.dtype)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def why_apart(layers: Sequence[QuantDense]) -> str:
    """ "" or why ``QuantDense.concatenate`` does not take these layers."""
    if not layers:
        return "there must be one layer at least"

    def kind(layer: QuantDense) -> dict[str, Any]:
        names = ("in_features", "group_size", "bits", "use_bias")
        kind = {name: getattr(layer, name) for name in names}
        kind |= options_of(layer) | {"backend": layer.backend}
        kind["dtype of scales"] = layer.scales.dtype
        kind["dtype of zeros"] = None if layer.zeros is None else layer.zeros.dtype
        return kind

    first = kind(layers[0])
    for layer in layers:
        if layer.lora is not None:
            return (
                "a layer has a low-rank term, of its own outputs only; take it off (layer.lora = None) first"
            )
        for name, value in kind(layer).items():
            if value != first[name]:
                return f"the layers must agree in {name}, got {first[name]} and {value}"
    block = layout(layers[0].bits).block_n
    if ragged := [layer.out_features for layer in layers[:-1] if layer.out_features % block]:
        return f"out_features must be multiples of {block} (but the last), got {ragged[0]}"
    return ""
