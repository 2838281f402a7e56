"""QuantDenseGeneral, and Flax's attention made of it, against the same layers with the dequantised weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_layers
import jax_trirun
from flax_layers import QuantDenseGeneral

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
