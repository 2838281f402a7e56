"""Layers with several input or output axes, and Flax's attention made of them, nnx and Linen, against the same
layers with the dequantised weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_layers
import jax_trirun
from flax_layers import QuantDenseGeneral, quantize_params
from flax_layers.linen import quantized

RNG = np.random.default_rng(0)
SHAPES = {  # in_features, out_features, axis, shape of the inputs
    "split": (128, (4, 16), -1, (3, 5, 128)),
    "merge": ((4, 32), 96, (-2, -1), (3, 5, 4, 32)),
    "inner axes": ((8, 16), (2, 48), (1, 2), (3, 8, 16, 5)),
}


def rounded(linear, layer):
    """The float layer with the weight that ``layer`` holds."""
    copy = nnx.clone(linear)
    dense = jax_trirun.dequantize(layer.weight, dtype=linear.kernel.dtype)
    copy.kernel[...] = dense.reshape(linear.kernel.shape)
    return copy


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_it_computes_what_linear_general_computes_with_the_stored_weight(case, use_bias):
    in_features, out_features, axis, shape = case
    linear = nnx.LinearGeneral(
        in_features,
        out_features,
        axis=axis,
        use_bias=use_bias,
        bias_init=nnx.initializers.normal(),
        rngs=nnx.Rngs(0),
    )
    layer = QuantDenseGeneral.from_linear_general(linear, group_size=32)
    x = RNG.normal(size=shape).astype(np.float32)
    wanted = rounded(linear, layer)(x)
    assert layer(x).shape == wanted.shape
    np.testing.assert_allclose(layer(x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(ValueError, match=r"inputs must have sizes .* along axes"):
        layer(np.ones((1,) * len(shape), np.float32))


def test_flax_attention_is_quantised_and_trained_around():
    model = nnx.MultiHeadAttention(
        num_heads=4, in_features=128, qkv_features=128, decode=False, rngs=nnx.Rngs(0)
    )
    reference = nnx.clone(model)
    report = flax_layers.quantize_module(model, group_size=32, method="rtn")
    assert {row.name for row in report.rows} == {"query", "key", "value", "out"}
    assert {row.shape for row in report.rows} == {(128, 128)}
    for name in ("query", "key", "value", "out"):
        setattr(reference, name, rounded(getattr(reference, name), getattr(model, name)))
    x = RNG.normal(size=(2, 6, 128)).astype(np.float32)
    wanted = reference(x)
    np.testing.assert_allclose(model(x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    assert "query.dense" in flax_layers.add_lora(model, rank=2, rngs=nnx.Rngs(1))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=wrt)(model)
    assert float(jnp.abs(gradients["query"]["dense"]["lora"]["lora_b"][...]).max()) > 0


def test_sharding_names_of_heads_become_those_of_columns():
    metadata = {"out_sharding": ("embed", "heads", None)}
    with nnx.use_eager_sharding(False):
        linear = nnx.LinearGeneral(
            128,
            (4, 32),
            kernel_metadata=metadata,
            bias_metadata={"out_sharding": ("heads",)},
            rngs=nnx.Rngs(0),
        )
        layer = QuantDenseGeneral.from_linear_general(linear, group_size=32)
    assert layer.dense.words.out_sharding == ("embed", "heads", None)
    assert layer.dense.bias.out_sharding == ("heads",)


def test_stacked_layers_stay_stacked():
    stack = nnx.vmap(lambda rngs: nnx.LinearGeneral((4, 32), 128, axis=(-2, -1), rngs=rngs))(
        nnx.Rngs(0).split(3)
    )
    layers = QuantDenseGeneral.from_linear_general(stack, group_size=32)
    x = RNG.normal(size=(5, 4, 32)).astype(np.float32)
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    dense = jax_trirun.dequantize(layers.weight).reshape(3, 4, 32, 128)
    wanted = jnp.einsum("bhd,lhdn->lbn", x, dense, precision="highest") + stack.bias[...][:, None]
    np.testing.assert_allclose(each, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_does_not_fit_says_so():
    batched = nnx.LinearGeneral(128, 64, batch_axis={0: 3}, axis=-1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"batch axes are not supported, got batch_axis=\{0: 3\}"):
        QuantDenseGeneral.from_linear_general(batched)
    with pytest.raises(TypeError, match=r"must be an nnx.LinearGeneral, got Linear"):
        QuantDenseGeneral.from_linear_general(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))

    class Model(nnx.Module):
        def __init__(self):
            self.batched = batched
            self.own = nnx.Linear(
                128, 64, dot_general=lambda *a, **k: jax.lax.dot_general(*a), rngs=nnx.Rngs(0)
            )
            self.plain = nnx.Linear(128, 64, rngs=nnx.Rngs(0))

    report = flax_layers.quantize_module(Model(), method="rtn")
    assert report.skipped == {"batched": "has batch axes", "own": "has a dot_general of its own"}


# ---- Linen -------------------------------------------------------------------------------------------

GENERAL = {r"(query|key|value)$": (1, 2), r"out$": (2, 1)}  # nn.MultiHeadDotProductAttention's


def dense_again(params, quant):
    """The float parameters with the weights that "quant" holds."""
    params = jax.tree.map(lambda a: a, params)
    for name, arrays in quant.items():
        kernel = params[name]["kernel"]
        k = arrays["scales"].shape[-2] * 32
        shape = (k, kernel.size // k)
        dense = jax_trirun.dequantize(arrays["words"], arrays["scales"], shape=shape)
        params[name]["kernel"] = dense.reshape(kernel.shape)
    return params


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_linen_dense_general(case, use_bias):
    in_features, out_features, axis, shape = case

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(
                out_features, axis=axis, use_bias=use_bias, bias_init=nn.initializers.normal(), name="layer"
            )(x)

    x = RNG.normal(size=shape).astype(np.float32)
    params = Model().init(jax.random.key(0), x)["params"]
    sides = tuple(1 if isinstance(sizes, int) else len(sizes) for sizes in (in_features, out_features))
    left, quant, _ = quantize_params(params, general={"layer": sides}, group_size=32)
    assert left == {}
    wanted = Model().apply({"params": dense_again(params, quant)}, x)
    with quantized():
        got = jax.jit(Model().apply)({"params": left, "quant": quant}, x)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_linen_attention_is_quantised_and_trained_around():
    model = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=128)
    x = RNG.normal(size=(2, 6, 128)).astype(np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    left, quant, report = quantize_params(params, general=GENERAL, group_size=32, method="rtn")
    assert {row.name: row.shape for row in report.rows} == dict.fromkeys(
        ("query", "key", "value", "out"), (128, 128)
    )
    wanted = model.apply({"params": dense_again(params, quant)}, x)
    with quantized(lora_rank=2, lora_where="query|out"):
        variables = {"params": left, "quant": quant}
        got, new = model.apply(variables, x, mutable="lora", rngs={"lora": jax.random.key(1)})
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        gradients = jax.grad(lambda lora: jnp.sum(model.apply({**variables, "lora": lora}, x) ** 2))(
            new["lora"]
        )
    assert set(gradients) == {"query", "out"}
    assert float(jnp.abs(gradients["out"]["lora_b"]).max()) > 0


def test_linen_axis_names_and_layers_stay():
    boxed = nn.Partitioned(
        jnp.asarray(RNG.normal(size=(3, 64, 4, 32)), jnp.float32), (None, "embed", "heads", "kv")
    )
    bias = nn.Partitioned(jnp.ones((3, 4, 32)), (None, "heads", "kv"))
    params = {"query": {"kernel": boxed, "bias": bias}}
    _, quant, report = quantize_params(params, general=GENERAL, group_size=32, donate=True)
    assert report.rows[0].shape == (3, 64, 128) and boxed.value.is_deleted()
    names = {name: box.names for name, box in quant["query"].items()}
    assert names == {
        "words": (None, "embed", "heads", None),
        "scales": (None, "embed", "heads"),
        "bias": (None, "heads"),
    }
    assert quant["query"]["bias"].value.shape == (3, 128)


def test_linen_what_does_not_fit_says_so():
    kernel = {"query": {"kernel": np.ones((64, 4, 32), np.float32)}}
    with pytest.raises(ValueError, match=r"query: its kernel has 3 axes; .* in general= if it has several"):
        quantize_params(kernel)
    with pytest.raises(
        ValueError, match=r"query: .* 2 input and 2 output axes, but the kernel has shape \(64, 4, 32\)"
    ):
        quantize_params(kernel, general={"query": (2, 2)})
    with pytest.raises(ValueError, match=r"such as \(1, 2\), for each regular expression, got 2 for 'query'"):
        quantize_params(kernel, general={"query": 2})
