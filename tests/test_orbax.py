"""Packed models through orbax-checkpoint, Flax's own way of saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import flax_layers
from flax_layers import QuantDense

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")

X = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)


class Model(nnx.Module):
    def __init__(self, rngs, mesh=None):
        def along(*names):
            return {} if mesh is None else {"out_sharding": names, "mesh": mesh}

        columns, rows, bias = along(None, "tensor"), along("tensor", None), along("tensor")
        self.up = nnx.Linear(256, 512, kernel_metadata=columns, bias_metadata=bias, rngs=rngs)
        self.down = nnx.Linear(512, 256, kernel_metadata=rows, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.up(x)))


def packed(seed, mesh=None):
    model = Model(nnx.Rngs(seed), mesh)
    flax_layers.quantize_module(model, group_size=64, method="rtn", scale_dtype="bfloat16")
    flax_layers.add_lora(model, rank=2, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(seed))
    return model


def test_an_nnx_model_comes_back_bit_by_bit(tmp_path):
    model = packed(0)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", nnx.state(model))
    shapes = nnx.eval_shape(lambda: packed(1))
    graph, abstract = nnx.split(shapes)
    with ocp.StandardCheckpointer() as saver:
        restored = nnx.merge(graph, saver.restore(tmp_path / "model", abstract))
    assert isinstance(restored.up, QuantDense) and restored.up.words.dtype == jnp.uint32
    jax.tree.map(np.testing.assert_array_equal, nnx.state(restored), nnx.state(model))
    np.testing.assert_array_equal(restored(X), model(X))


def test_an_nnx_model_is_restored_into_shards(tmp_path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", nnx.state(packed(0)))
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType.Auto,), devices=jax.devices("cpu")[:4])
    graph, abstract = nnx.split(nnx.as_abstract(nnx.eval_shape(lambda: packed(1, mesh))))
    with ocp.StandardCheckpointer() as saver:
        restored = nnx.merge(graph, saver.restore(tmp_path / "model", abstract))
    for words in (restored.up.words[...], restored.down.words[...]):
        assert words.addressable_shards[0].data.nbytes == words.nbytes // 4
    np.testing.assert_allclose(restored(X), packed(0)(X), rtol=1e-5, atol=1e-5)


def test_a_linen_model_comes_back_bit_by_bit(tmp_path):
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, name="out")(nn.relu(nn.Dense(128, name="up")(x)))

    model = Dense()
    params = model.init(jax.random.key(0), X)["params"]
    left, quant, _ = flax_layers.quantize_params(params, exclude="out", group_size=64, method="rtn")
    variables = {"params": left, "quant": quant}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", variables)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, variables)
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "model", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    with flax_layers.linen.quantized():
        np.testing.assert_array_equal(model.apply(restored, X), model.apply(variables, X))
