"""Low-rank terms over packed weights: what they compute, what is trained, and what memory that takes."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flax_layers
import jax_trirun
from flax_layers import QuantDense
from flax_layers.linen import quantized
from flax_layers.llama import Llama, LlamaConfig, token_losses

K, N, G = 192, 40, 64
X = np.random.default_rng(0).normal(size=(3, 5, K)).astype(np.float32)
SMALL = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2
)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = QuantDense(128, 192, group_size=32, rngs=rngs)
        self.down = QuantDense(192, 128, group_size=32, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.again = self.blocks[0].up
        self.head = nnx.Linear(128, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def float64(layer):
    """W + alpha / rank * A @ B of a nnx layer."""
    w = np.asarray(jax_trirun.dequantize(layer.weight, dtype=jnp.float32), np.float64)
    a, b = (np.asarray(v[...], np.float64) for v in (layer.lora.lora_a, layer.lora.lora_b))
    return w + layer.lora.alpha / a.shape[-1] * (a @ b)


def with_lora(rank=3, alpha=6.0, **options):
    """A layer whose B is not zero."""
    layer = QuantDense(K, N, group_size=G, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options)
    normal = nnx.initializers.normal(0.1)
    flax_layers.add_lora(layer, rank=rank, alpha=alpha, b_initializer=normal, rngs=nnx.Rngs(1))
    return layer


def test_the_term_is_added_with_its_factor():
    layer = with_lora()
    wanted = X @ float64(layer) + np.asarray(layer.bias[...], np.float64)
    np.testing.assert_allclose(layer(X), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    with_term = layer(X)
    layer.lora = None
    assert np.abs(with_term - layer(X)).max() > 0.1


def test_a_new_term_changes_nothing():
    model = Model(nnx.Rngs(0))
    x = X[0, :, :128]
    before = model(x)
    found = flax_layers.add_lora(model, rank=4, where=r"blocks\.\d+\.", rngs=nnx.Rngs(1))
    assert sorted(found) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("down", "up")]
    np.testing.assert_array_equal(model(x), before)
    assert model.again.lora is model.blocks[0].up.lora
    a = [np.asarray(block.up.lora.lora_a[...]) for block in model.blocks]
    assert a[0].std() > 0 and not np.array_equal(*a)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "wanted"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, None, None),
    ],
)
def test_the_layer_keeps_its_dtype(x_dtype, dtype, wanted):
    layer, x = with_lora(dtype=dtype), jnp.asarray(X, x_dtype)
    y = layer(x)
    assert layer.lora.lora_a.dtype == jnp.float32
    assert y.dtype == (wanted or x_dtype)
    exact = np.asarray(x, np.float64) @ float64(layer) + np.asarray(layer.bias[...], np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=0.03 * np.abs(exact).max())


def test_gradients_are_those_of_the_same_term_over_a_float_weight():
    layer = with_lora()
    w = jax_trirun.dequantize(layer.weight)

    def plain(ab):
        y = X @ w + layer.bias[...] + 2.0 * (X @ ab[0]) @ ab[1]
        return jnp.sum(jnp.tanh(y))

    wanted = jax.grad(plain)((layer.lora.lora_a[...], layer.lora.lora_b[...]))
    trained = nnx.DiffState(0, nnx.LoRAParam)
    got = nnx.grad(lambda m: jnp.sum(jnp.tanh(m(X))), argnums=trained)(layer)["lora"]
    for name, want in zip(("lora_a", "lora_b"), wanted, strict=True):
        np.testing.assert_allclose(got[name][...], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.PathContains("scales")], ids=["lora", "scales"])
def test_only_what_is_named_is_trained(wrt):
    model = Model(nnx.Rngs(0))
    flax_layers.add_lora(model, rank=4, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    before = jax.tree.map(np.array, nnx.to_flat_state(nnx.state(model)))
    x, y = X[0, :, :128], jnp.ones((5, 4))

    @nnx.jit
    def step(model, optimizer):
        def loss(m):
            return jnp.mean((m(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    changed = {
        path[-1]
        for (path, old), (_, new) in zip(before, nnx.to_flat_state(nnx.state(model)), strict=True)
        if not np.array_equal(old[...], new[...])
    }
    assert changed == ({"lora_a", "lora_b"} if wrt is nnx.LoRAParam else {"scales"})


def test_stacked_layers_get_a_term_each():
    stack = nnx.vmap(lambda rngs: QuantDense(K, K, group_size=G, rngs=rngs))(nnx.Rngs(0).split(3))
    flax_layers.add_lora(stack, rank=2, b_initializer=nnx.initializers.normal(0.1), rngs=nnx.Rngs(1))
    assert stack.lora.lora_a.shape == (3, K, 2) and stack.lora.lora_b.shape == (3, 2, K)
    a = np.asarray(stack.lora.lora_a[...])
    assert not np.array_equal(a[0], a[1])

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    wanted, weights = X.astype(np.float64), float64(stack)
    for w in weights:
        wanted = wanted @ w
    np.testing.assert_allclose(run(stack, X), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"rank": 2, "where": "("}, r"where must be a regular expression, got '\('"),
        ({"rank": 2, "where": "head"}, "finds no QuantDense; .* nnx.LoRALinear"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        flax_layers.add_lora(Model(nnx.Rngs(0)), rngs=nnx.Rngs(1), **options)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"must be an nnx.Module, got dict; .*linen"):
        flax_layers.add_lora({}, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="quantise the model first"):
        flax_layers.add_lora(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has a low-rank term already"):
        flax_layers.add_lora(with_lora(), rank=2, rngs=nnx.Rngs(0))


# ---- linen ------------------------------------------------------------------------------------------


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="up")(x))
        return nn.Dense(32, name="down")(x)


def test_linen_term_and_its_gradient():
    layer = flax_layers.linen.QuantDense(N, group_size=G, lora_rank=3, lora_alpha=6.0)
    variables = layer.init(jax.random.key(0), X)
    assert set(variables) == {"quant", "lora"}
    quant, lora = variables["quant"], variables["lora"]
    lora = lora | {"lora_b": 0.1 * jax.random.normal(jax.random.key(1), (3, N))}
    plain = flax_layers.linen.QuantDense(N, group_size=G)
    without = plain.apply({"quant": quant}, X)

    def f(lora):
        return layer.apply({"quant": quant, "lora": lora}, X)

    def g(lora):
        return without + 2.0 * (X @ lora["lora_a"]) @ lora["lora_b"]

    np.testing.assert_allclose(f(lora), g(lora), rtol=0, atol=1e-5)
    got, wanted = (jax.grad(lambda p, h=h: jnp.sum(jnp.tanh(h(p))))(lora) for h in (f, g))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)
    with pytest.raises(ValueError, match="collection 'lora' has no lora_a"):
        layer.apply({"quant": quant}, X)


def test_linen_models_written_with_dense_get_terms_where_asked():
    model, x = Dense(), X[0]
    params, quant, _ = flax_layers.quantize_params(model.init(jax.random.key(0), x)["params"], group_size=64)
    frozen = {"params": params, "quant": quant}
    with quantized():
        before = model.apply(frozen, x)
    with quantized(lora_rank=4, lora_where="up$"):
        y, new = model.apply(frozen, x, mutable="lora", rngs={"lora": jax.random.key(1)})
        np.testing.assert_array_equal(y, before)
        assert set(new["lora"]) == {"up"}
        optimizer = optax.adam(1e-2)
        lora, state = new["lora"], optimizer.init(new["lora"])

        @jax.jit
        def step(lora, state):
            def loss(lora):
                return jnp.mean((model.apply({**frozen, "lora": lora}, x) - 1) ** 2)

            value, grads = jax.value_and_grad(loss)(lora)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(lora, updates), state, value

        losses = []
        for _ in range(30):
            lora, state, value = step(lora, state)
            losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_linen_scan_stacks_terms():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return flax_layers.linen.QuantDense(K, group_size=G, lora_rank=2, name="dense")(x), None

    split = {"params": True, "lora": True}
    stack = nn.scan(Layer, variable_axes={"quant": 0, "lora": 0}, split_rngs=split, length=3)()
    variables = stack.init(jax.random.key(0), X, None)
    a = np.asarray(variables["lora"]["dense"]["lora_a"])
    assert a.shape == (3, K, 2) and not np.array_equal(a[0], a[1])
    y, _ = jax.jit(stack.apply)(variables, X, None)
    assert y.shape == X.shape


# ---- Training a decoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetune():
    """docs/finetune_smollm2.py as a module."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    path = Path(__file__).parent.parent / "docs" / "finetune_smollm2.py"
    spec = importlib.util.spec_from_file_location("finetune_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("train", ["lora", "scales"])
def test_finetuning_the_real_models_first_layers_lowers_the_loss(finetune, smollm2, train):
    del smollm2  # which sees to it that the file is there
    model, tokenizer = finetune.load(layers=2)
    tokens = np.asarray(tokenizer.encode(finetune.sample_text())[:200], np.int32)
    flax_layers.quantize_module(model, group_size=32, method="rtn", scale_dtype="float32")
    if train == "lora":
        flax_layers.add_lora(model, rank=4, rngs=nnx.Rngs(0))
    frozen = nnx.state(model.layers, nnx.PathContains("words"))
    before = finetune.mean_loss(model, tokens, 64)
    trained, losses, _ = finetune.train(
        model,
        tokens,
        wrt=finetune.TRAINED[train],
        steps=15,
        batch=1,
        window=64,
        learning_rate=5e-3 if train == "lora" else 3e-3,
        report=lambda line: None,
    )
    after = finetune.mean_loss(trained, tokens, 64)
    assert len(losses) == 15 and after < before - 1, (before, losses, after)
    words = nnx.state(trained.layers, nnx.PathContains("words"))
    jax.tree.map(np.testing.assert_array_equal, words, frozen)


def finetuning_memory(finetune, train, layers, tokens=8):
    """(bytes besides the arguments of a step, bytes of a layer's dense kernels and of its packed ones)."""
    config = dataclasses.replace(WIDE, num_layers=layers)
    model = Llama(config, rngs=nnx.Rngs(0))
    report = flax_layers.quantize_module(model, group_size=64, method="rtn", scale_dtype="float16")
    if train == "lora":
        flax_layers.add_lora(model, rank=2, rngs=nnx.Rngs(0))
    model.remat = True
    batch = jnp.zeros((1, tokens), jnp.int32)
    training = finetune.Training.start(model, finetune.TRAINED[train], optax.sgd(1e-3), batch)
    analysis = training.compiled.memory_analysis()
    return analysis.temp_size_in_bytes, report.bytes_before / layers, report.bytes_after / layers


WIDE = dataclasses.replace(SMALL, hidden_size=512, intermediate_size=1024, num_kv_heads=4)


@pytest.mark.parametrize("train", ["lora", "scales"])
def test_a_training_step_never_holds_the_dense_weights_of_a_second_layer(finetune, train):
    two, dense, packed = finetuning_memory(finetune, train, 2)
    five, _, _ = finetuning_memory(finetune, train, 5)
    assert packed < dense / 14
    assert five < dense  # of five layers not even one: they are made dense one after the other, in parts
    # What three more layers add: activations, low-rank terms; of scales, one for 64 weights, gradients in float32.
    gradients = dense / 64 if train == "scales" else 0
    assert five - two < 3 * (dense / 10 + gradients)


def test_computing_blocks_again_gives_the_same_gradients():
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    flax_layers.quantize_module(model, group_size=64, method="rtn")
    flax_layers.add_lora(model, rank=2, b_initializer=nnx.initializers.normal(0.1), rngs=nnx.Rngs(1))
    tokens = np.random.default_rng(0).integers(0, 97, (2, 9))

    @nnx.jit
    def gradients(model):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda m: jnp.mean(token_losses(m, tokens)), argnums=wrt)(model)

    plain = gradients(model)
    model.remat = True
    again = gradients(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), again, plain)
