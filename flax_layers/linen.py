"""QuantDense for Flax linen: nn.Dense with a packed, frozen weight in a collection of its own."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init

import jax_trirun
from jax_trirun import QuantTensor

COLLECTION = "quant"


class QuantDense(nn.Module):
    """``y = x @ W + bias`` with W packed to 2 bits, over the last axis of x.

    words, scales, zeros (when asked for) and bias live in the collection "quant", outside "params", so
    that optimisers never see them. ``nn.scan`` and ``nn.vmap`` need ``variable_axes={"quant": 0}``.

    Example:
        >>> layer, quant = QuantDense.from_dense(dense, params, group_size=64)
        >>> y = layer.apply({"quant": quant}, x)

    Attributes:
        features, use_bias, dtype, kernel_init, bias_init, promote_dtype: as ``nn.Dense``'s.
        param_dtype: of bias and scales.
        precision: taken for the likeness; sums are float32, whatever it says.
        group_size: rows of W that share a scale: 32, 64, 128 or -1 (one group).
        bits: 2 or 4.
        zeros: whether W = scales * (codes - zeros) has zeros of its own; ``init`` sets them to the
            format's zero point.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    group_size: int = 128
    bits: int = 2
    zeros: bool = False

    @classmethod
    def from_dense(
        cls,
        dense: nn.Dense,
        params: Mapping[str, Any],
        *,
        group_size: int = 128,
        bits: int = 2,
        **options: Any,
    ) -> tuple["QuantDense", dict[str, jax.Array]]:
        """Quantise an ``nn.Dense``.

        Args:
            dense: the module.
            params: its parameters, {"kernel": [..., K, N], "bias": [..., N]}.
            group_size, bits, **options: as ``jax_trirun.quantize`` (method, scale_dtype, ...).

        Returns:
            The module, and its variables of the collection "quant".

        Raises:
            TypeError: not an ``nn.Dense``. ValueError: params have no kernel. Others: as ``jax_trirun.quantize``.
        """
        if not isinstance(dense, nn.Dense):
            raise TypeError(f"from_dense: dense must be an nn.Dense, got {type(dense).__name__}")
        if "kernel" not in params:
            raise ValueError(
                f"from_dense: params must hold this module's 'kernel', got {sorted(params)}; "
                "pass variables['params'][...] down to the module"
            )
        weight = jax_trirun.quantize(params["kernel"], group_size=group_size, bits=bits, **options)
        same = ("features", "use_bias", "dtype", "param_dtype", "precision", "promote_dtype", "name")
        module = cls(
            **{name: getattr(dense, name) for name in same},
            group_size=group_size,
            bits=bits,
            zeros=weight.zeros is not None,
        )
        return module, variables_of(weight, params.get("bias"))

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., K] -> [..., features], in the dtype ``nn.Dense`` would give.

        Raises:
            ValueError: K is not that of the weight, group_size does not divide it, or the collection
                "quant" was not passed to ``apply``.
        """
        k = jnp.shape(inputs)[-1]
        initial = self._initial(k)
        arrays = {name: self.variable(COLLECTION, name, initial.get, name).value for name in self._names()}
        weight = QuantTensor(
            arrays["words"],
            arrays["scales"],
            arrays.get("zeros"),
            shape=(k, self.features),
            group_size=self.group_size,
            bits=self.bits,
        )
        return _apply(inputs, weight, arrays.get("bias"), self.dtype, self.promote_dtype)

    def _names(self) -> list[str]:
        return ["words", "scales"] + ["zeros"] * self.zeros + ["bias"] * self.use_bias

    def _initial(self, k: int) -> dict[str, jax.Array]:
        """Variables drawn at random, where there are none yet."""
        missing = [name for name in self._names() if not self.has_variable(COLLECTION, name)]
        if not missing:
            return {}
        if not self.is_mutable_collection(COLLECTION):
            where = "/".join(self.path) or "QuantDense"
            raise ValueError(
                f"{where}: the collection {COLLECTION!r} has no {', '.join(missing)}; pass "
                f'{{"params": ..., "{COLLECTION}": ...}} to apply, as quantize_params or init returned them'
            )
        key, bias_key = jax.random.split(self.make_rng("params"))
        kernel = self.kernel_init(key, (k, self.features), self.param_dtype)
        weight = jax_trirun.quantize(kernel, group_size=self.group_size, bits=self.bits)
        variables = variables_of(weight, self.bias_init(bias_key, (self.features,), self.param_dtype))
        variables["zeros"] = jnp.full_like(weight.scales, 1 if self.bits == 2 else 8)
        return variables


def variables_of(weight: QuantTensor, bias: jax.Array | None = None) -> dict[str, jax.Array]:
    """What a QuantDense holds in the collection "quant": words, scales, and zeros and bias if there are."""
    arrays = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
    return {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}


@contextlib.contextmanager
def quantized(*, bits: int = 2) -> Iterator[None]:
    """Within this context every ``nn.Dense`` that has variables in "quant" uses them, not its kernel.

    So a model written with ``nn.Dense`` runs on the result of ``quantize_params`` as it is.

    Example:
        >>> params, quant, report = flax_layers.quantize_params(params)
        >>> with flax_layers.linen.quantized():
        ...     y = model.apply({"params": params, "quant": quant}, x)
    """

    def intercept(next_function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense):
            return next_function(*args, **kwargs)
        if module.scope is None or not module.has_variable(COLLECTION, "words"):
            return next_function(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        names = ("words", "scales", "zeros", "bias")
        arrays: dict[str, Any] = {name: module.get_variable(COLLECTION, name) for name in names}
        k, groups = inputs.shape[-1], arrays["scales"].shape[-2]
        weight = QuantTensor(
            arrays["words"],
            arrays["scales"],
            arrays["zeros"],
            shape=(k, module.features),
            group_size=-1 if groups == 1 else k // groups,
            bits=bits,
        )
        return _apply(inputs, weight, arrays["bias"], module.dtype, module.promote_dtype)

    with nn.intercept_methods(intercept):
        yield


def _apply(inputs: Any, weight: QuantTensor, bias: Any, dtype: Any, promote: Any) -> jax.Array:
    # Scales take part in the promotion, as the kernel would, but are never rounded by it.
    inputs, _, bias = promote(inputs, weight.scales, bias, dtype=dtype)
    y = jax_trirun.matmul(inputs, weight)
    return y if bias is None else y + bias
