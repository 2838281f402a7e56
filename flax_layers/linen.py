"""QuantDense for Flax linen: nn.Dense with a packed, frozen weight in a collection of its own."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init
from flax.nnx.nn.lora import default_a_initializer, default_b_initializer

import jax_trirun
from jax_trirun import QuantTensor
from jax_trirun.layout import zero_point

from .general import contracted_last
from .partitioning import names_of_parts

COLLECTION = "quant"
LORA_COLLECTION = "lora"


class QuantDense(nn.Module):
    """``y = x @ W + bias`` with W packed to 2 bits, over the last axis of x.

    words, scales, zeros (when asked for) and bias live in the collection "quant", outside "params", so
    that optimisers never see them. ``nn.scan`` and ``nn.vmap`` need ``variable_axes={"quant": 0}``.

    With ``lora_rank`` a trainable term is added, ``lora_alpha / lora_rank * (x @ lora_a) @ lora_b``; its
    two float arrays live in the collection "lora", and ``init`` makes lora_b zero.

    Axis names that ``kernel_init`` gives the kernel (``nn.with_partitioning``,
    ``nn.with_logical_partitioning``) become those of the arrays; partitioning.py says how.

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
        lora_rank: of the trainable term; 0 means none.
        lora_alpha: its factor times rank; lora_rank (a factor of 1) when None.
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
    lora_rank: int = 0
    lora_alpha: float | None = None

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
            params: its parameters, {"kernel": [..., K, N], "bias": [..., N]}; in boxes with axis names
                (``nn.Partitioned``) or not, and the result likewise.
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
        kernel = nn.unbox(params["kernel"])
        weight = jax_trirun.quantize(kernel, group_size=group_size, bits=bits, **options)
        same = ("features", "use_bias", "dtype", "param_dtype", "precision", "promote_dtype", "name")
        module = cls(
            **{name: getattr(dense, name) for name in same},
            group_size=group_size,
            bits=bits,
            zeros=weight.zeros is not None,
        )
        return module, variables_of(weight, params.get("bias"), like=params["kernel"])

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
        y = _apply(inputs, weight, arrays.get("bias"), self.dtype, self.promote_dtype)
        if self.lora_rank:
            y += _lora(self, inputs, self.features, self.lora_rank, self.lora_alpha).astype(y.dtype)
        return y

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
        weight = jax_trirun.quantize(nn.unbox(kernel), group_size=self.group_size, bits=self.bits)
        if self.zeros and weight.zeros is None:
            zeros = jnp.full_like(weight.scales, zero_point(self.bits))
            weight = dataclasses.replace(weight, zeros=zeros)
        bias = self.bias_init(bias_key, (self.features,), self.param_dtype)
        return variables_of(weight, bias, like=kernel)


def variables_of(weight: QuantTensor, bias: Any = None, *, like: Any = None) -> dict[str, Any]:
    """What a QuantDense holds in the collection "quant": words, scales, and zeros and bias if there are.

    Args:
        bias: an array, in a box with axis names or not, or None.
        like: the kernel; when it is in a box (``nn.Partitioned``), words, scales and zeros get such boxes.
    """
    arrays = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros}
    if isinstance(like, nn.Partitioned):
        mesh = like.mesh if like.mesh is not None else jax.sharding.get_abstract_mesh()
        rules = getattr(like, "rules", None) or nn.get_logical_axis_rules()
        names = names_of_parts(like.names, weight, mesh=mesh, rules=rules)
        arrays = {
            name: None if array is None else like.replace(value=array, names=names[name])
            for name, array in arrays.items()
        }
    variables = {**arrays, "bias": bias}
    return {name: jax.tree.map(jnp.asarray, v) for name, v in variables.items() if v is not None}


@contextlib.contextmanager
def quantized(
    *, bits: int = 2, lora_rank: int = 0, lora_alpha: float | None = None, lora_where: str = ""
) -> Iterator[None]:
    """Within this context each ``nn.Dense`` or ``nn.DenseGeneral`` with variables in "quant" uses them, not its kernel.

    So a model written with these runs on the result of ``quantize_params`` as it is.

    Example:
        >>> params, quant, report = flax_layers.quantize_params(params)
        >>> with flax_layers.linen.quantized():
        ...     y = model.apply({"params": params, "quant": quant}, x)

    And with a trainable low-rank term, whose arrays are drawn first:
        >>> with flax_layers.linen.quantized(lora_rank=8, lora_where="mlp"):
        ...     variables = {"params": params, "quant": quant}
        ...     _, new = model.apply(variables, x, mutable="lora", rngs={"lora": jax.random.key(0)})
        ...     y = model.apply({**variables, "lora": new["lora"]}, x)

    Args:
        bits: of the codes.
        lora_rank, lora_alpha: as QuantDense's.
        lora_where: a regular expression searched for in paths ("layers_0/mlp/up") of quantised layers;
            those get the term.
    """
    where = re.compile(lora_where)

    def intercept(next_function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.DenseGeneral):
            return next_function(*args, **kwargs)
        if module.scope is None or not module.has_variable(COLLECTION, "words"):
            return next_function(*args, **kwargs)
        inputs: Any = args[0] if args else kwargs["inputs"]
        names = ("words", "scales", "zeros", "bias")
        arrays: dict[str, Any] = {name: nn.unbox(module.get_variable(COLLECTION, name)) for name in names}
        features = (module.features,) if isinstance(module.features, int) else tuple(module.features)
        axis = getattr(module, "axis", -1)
        inputs, _ = contracted_last(jnp.asarray(inputs), (axis,) if isinstance(axis, int) else axis)
        k, n, groups = inputs.shape[-1], math.prod(features), arrays["scales"].shape[-2]
        weight = QuantTensor(
            arrays["words"],
            arrays["scales"],
            arrays["zeros"],
            shape=(k, n),
            group_size=-1 if groups == 1 else k // groups,
            bits=bits,
        )
        y = _apply(inputs, weight, arrays["bias"], module.dtype, module.promote_dtype)
        if lora_rank and where.search("/".join(module.path)):
            y += _lora(module, inputs, n, lora_rank, lora_alpha).astype(y.dtype)
        return y.reshape(*y.shape[:-1], *features)

    with nn.intercept_methods(intercept):
        yield


def _apply(inputs: Any, weight: QuantTensor, bias: Any, dtype: Any, promote: Any) -> jax.Array:
    # Scales take part in the promotion, as the kernel would, but are never rounded by it.
    inputs, _, bias = promote(inputs, weight.scales, bias, dtype=dtype)
    y = jax_trirun.matmul(inputs, weight)
    return y if bias is None else y + bias


def _lora(module: Any, inputs: Any, n: int, rank: int, alpha: float | None) -> jax.Array:
    """alpha / rank * (inputs @ lora_a) @ lora_b, of variables of ``module`` that are drawn when missing."""
    k = jnp.shape(inputs)[-1]
    for name in ("lora_a", "lora_b"):
        if not (module.has_variable(LORA_COLLECTION, name) or module.is_mutable_collection(LORA_COLLECTION)):
            raise ValueError(
                f"{'/'.join(module.path) or 'QuantDense'}: the collection {LORA_COLLECTION!r} has no {name}; make "
                f'it with apply(..., mutable="{LORA_COLLECTION}", rngs={{"{LORA_COLLECTION}": key}}) and pass it on'
            )
    words: Any = module.get_variable(COLLECTION, "words")

    def draw(initializer: Any, shape: tuple[int, int], axis: int) -> Any:
        array = initializer(module.make_rng(LORA_COLLECTION), shape, jnp.float32)
        if not isinstance(words, nn.Partitioned):
            return array
        names: list[Any] = [None, None]
        names[axis] = words.names[axis]
        return words.replace(value=array, names=tuple(names))

    a = module.variable(LORA_COLLECTION, "lora_a", draw, default_a_initializer, (k, rank), 0).value
    b = module.variable(LORA_COLLECTION, "lora_b", draw, default_b_initializer, (rank, n), 1).value
    inputs, a, b = module.promote_dtype(inputs, a, b, dtype=module.dtype)
    return (rank if alpha is None else alpha) / rank * ((inputs @ a) @ b)
