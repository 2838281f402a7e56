"""QuantDense, nnx and linen, against the same layers with the dequantised weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flax_layers
import jax_trirun
from flax_layers import QuantDense, QuantParam

K, N, G = 192, 40, 64
X = np.random.default_rng(0).normal(size=(3, 5, K)).astype(np.float32)


def linear(seed=0, **options):
    options = {"bias_init": nnx.initializers.normal(), **options}
    return nnx.Linear(K, N, rngs=nnx.Rngs(seed), **options)


def rounded(layer, quant):
    """The float layer with the weight that ``quant`` holds."""
    copy = nnx.clone(layer)
    copy.kernel[...] = jax_trirun.dequantize(quant.weight, dtype=layer.kernel.dtype)
    return copy


def close(a, b, tolerance=2e-5):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("use_bias", (True, False))
def test_nnx_computes_what_linear_computes_with_the_stored_weight(use_bias):
    layer = linear(use_bias=use_bias)
    quant = QuantDense.from_linear(layer, group_size=G)
    close(quant(X), rounded(layer, quant)(X))
    assert np.linalg.norm(quant(X) - layer(X)) < 0.5 * np.linalg.norm(layer(X))


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "preferred"),
    [
        (jnp.float32, None, jnp.float32, None),
        (jnp.bfloat16, None, jnp.float32, None),
        (jnp.bfloat16, None, jnp.bfloat16, None),
        (jnp.float16, None, jnp.float16, None),
        (jnp.float32, jnp.bfloat16, jnp.float32, None),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
def test_dtypes_promote_as_in_flax(x_dtype, dtype, param_dtype, preferred):
    layer = linear(dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred)
    quant = QuantDense.from_linear(layer, group_size=G)
    x = jnp.asarray(X, x_dtype)
    assert quant.scales.dtype == param_dtype
    close(quant(x), rounded(layer, quant)(x), 2e-5 if quant(x).dtype == jnp.float32 else 2e-2)

    dense = nn.Dense(N, dtype=dtype, param_dtype=param_dtype)
    params = dense.init(jax.random.key(0), x)["params"]
    module, variables = flax_layers.linen.QuantDense.from_dense(dense, params, group_size=G)
    assert module.apply({"quant": variables}, x).dtype == dense.apply({"params": params}, x).dtype


def test_integer_inputs_promote_as_in_flax():
    layer = linear()
    quant = QuantDense.from_linear(layer, group_size=G)
    close(quant(jnp.ones((2, K), jnp.int32)), rounded(layer, quant)(jnp.ones((2, K), jnp.int32)))


def test_nothing_is_trainable_and_optimisers_see_no_integers():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.quant = QuantDense(K, N, group_size=G, rngs=rngs)
            self.out = nnx.Linear(N, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.quant(x))

    model = Model(nnx.Rngs(0))
    assert set(nnx.state(model, nnx.Param)) == {"out"}
    assert set(nnx.state(model, QuantParam)["quant"]) == {"words", "scales", "bias"}
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(model, QuantParam))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(model, QuantParam)))


def test_gradient_with_respect_to_the_input_and_to_scales():
    layer = linear()
    quant = QuantDense.from_linear(layer, group_size=G)
    float_layer = rounded(layer, quant)
    close(
        jax.grad(lambda x: jnp.sum(quant(x) ** 2))(X),
        jax.grad(lambda x: jnp.sum(float_layer(x) ** 2))(X),
        1e-4,
    )
    wanted = nnx.DiffState(0, nnx.PathContains("scales"))
    gradient = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=wanted)(quant)["scales"][...]
    # Along the scales the weight is linear: its gradient times the scales is <dL/dW, W>.
    w = jax_trirun.dequantize(quant.weight)
    dw = jax.grad(lambda w: jnp.sum((X @ w + quant.bias[...]) ** 2))(w)
    close(jnp.sum(gradient * quant.scales[...]), jnp.sum(dw * w), 1e-3)


def test_split_merge_jit_and_pickle_like_round_trip():
    quant = QuantDense.from_linear(linear(), group_size=G)
    graph, state = nnx.split(quant)
    close(nnx.merge(graph, state)(X), quant(X))
    close(nnx.jit(lambda m, x: m(x))(quant, X), quant(X))
    other = QuantDense(K, N, group_size=G, rngs=nnx.Rngs(7))
    nnx.update(other, state)
    close(other(X), quant(X))
    shapes = nnx.eval_shape(lambda: QuantDense(K, N, group_size=G, rngs=nnx.Rngs(0)))
    assert shapes.words.shape == quant.words.shape and shapes.words.dtype == jnp.uint32


def test_stacked_layers_scan():
    def square(rngs):
        return nnx.Linear(K, K, rngs=rngs)

    stack = nnx.vmap(square, in_axes=0, out_axes=0)(nnx.Rngs(0).split(4))
    quant = QuantDense.from_linear(stack, group_size=G)
    assert quant.words.shape[0] == quant.scales.shape[0] == quant.bias.shape[0] == 4

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    want = jnp.asarray(X)
    for i in range(4):
        want = want @ jax_trirun.dequantize(jax.tree.map(lambda a, i=i: a[i], quant.weight)) + stack.bias[i]
    close(run(quant, X), want, 1e-4)
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(quant, X)
    assert each.shape == (4, *X.shape[:-1], K)

    made = nnx.vmap(lambda rngs: QuantDense(K, K, group_size=G, rngs=rngs))(nnx.Rngs(0).split(4))
    assert run(made, X).shape == X.shape


def test_weight_with_zeros_and_four_bits():
    layer = linear()
    plain = jax_trirun.quantize(layer.kernel[...], group_size=G)
    zeros = jnp.full_like(plain.scales, 1.5)
    weight = jax_trirun.QuantTensor(plain.words, plain.scales, zeros, shape=(K, N), group_size=G)
    quant = QuantDense.from_weight(weight, layer.bias[...])
    close(quant(X), rounded(layer, quant)(X))
    fine = QuantDense.from_linear(layer, group_size=G, bits=4)
    close(fine(X), rounded(layer, fine)(X))
    assert np.linalg.norm(fine(X) - layer(X)) < 0.15 * np.linalg.norm(layer(X))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_layers_side_by_side(use_bias, bits):
    options = dict(use_bias=use_bias, group_size=32, bits=bits, bias_init=nnx.initializers.normal())
    layers = [QuantDense(64, n, rngs=nnx.Rngs(n), **options) for n in (96, 32, 40)]
    together = QuantDense.concatenate(layers)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    wanted = jnp.concatenate([layer(x) for layer in layers], -1)
    np.testing.assert_allclose(together(x), wanted, rtol=1e-5, atol=1e-5)
    assert together.out_features == 168 and together.dtype == layers[0].dtype

    @nnx.vmap
    def stacked(key):
        return QuantDense(64, 32, rngs=nnx.Rngs(key), **options)

    pair = [stacked(jax.random.split(jax.random.key(seed), 4)) for seed in (1, 2)]
    both = nnx.vmap(lambda layer: layer(x))(QuantDense.concatenate(pair))
    wanted = jnp.concatenate([nnx.vmap(lambda layer: layer(x))(layer) for layer in pair], -1)
    np.testing.assert_allclose(both, wanted, rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_fit_beside_each_other():
    def layer(k=64, n=32, **options):
        return QuantDense(k, n, rngs=nnx.Rngs(0), **{"group_size": 32, **options})

    zeros = jax_trirun.quantize(np.eye(64, 32), group_size=32, method="hqq")
    with_term = layer()
    flax_layers.add_lora(with_term, rank=2, rngs=nnx.Rngs(0))
    for others, message in [
        ([layer(), layer(k=128)], "must agree in in_features, got 64 and 128"),
        ([layer(), layer(group_size=64)], "must agree in group_size, got 32 and 64"),
        ([layer(), layer(use_bias=False)], "must agree in use_bias, got True and False"),
        ([layer(), layer(dtype=jnp.bfloat16)], "must agree in dtype, got None and"),
        ([layer(), layer(backend="reference")], "must agree in backend, got None and reference"),
        (
            [layer(use_bias=False), QuantDense.from_weight(zeros)],
            "must agree in dtype of zeros, got None and",
        ),
        ([layer(n=40), layer()], r"out_features must be multiples of 32 \(but the last\), got 40"),
        ([layer(), with_term], "a layer has a low-rank term"),
        ([], "there must be one layer at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantDense.concatenate(others)


def test_output_sharding_is_followed():
    mesh = jax.make_mesh((1,), ("data",))
    quant = QuantDense.from_linear(linear(), group_size=G)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, None))
    assert quant(X, out_sharding=sharding).sharding.spec[0] == "data"


def test_linen_computes_what_dense_computes_with_the_stored_weight():
    dense = nn.Dense(N, bias_init=nn.initializers.normal())
    params = dense.init(jax.random.key(0), X)["params"]
    module, variables = flax_layers.linen.QuantDense.from_dense(dense, params, group_size=G)
    weight = jax_trirun.quantize(params["kernel"], group_size=G)
    want = dense.apply({"params": {"kernel": jax_trirun.dequantize(weight), "bias": params["bias"]}}, X)
    close(jax.jit(module.apply)({"quant": variables}, X), want)


@pytest.mark.parametrize(("zeros", "bits", "use_bias"), [(False, 2, True), (True, 2, False), (True, 4, True)])
def test_linen_init_draws_a_quantised_kernel_outside_params(zeros, bits, use_bias):
    module = flax_layers.linen.QuantDense(N, group_size=G, zeros=zeros, bits=bits, use_bias=use_bias)
    variables = module.init(jax.random.key(0), X)
    assert set(variables) == {"quant"}
    names = {"words", "scales"} | ({"zeros"} if zeros else set()) | ({"bias"} if use_bias else set())
    assert set(variables["quant"]) == names
    y = module.apply(variables, X)
    assert 0.5 < float(jnp.std(y)) < 2  # lecun_normal keeps the variance


def test_linen_scan_over_stacked_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return flax_layers.linen.QuantDense(K, group_size=G, name="dense")(x), None

    stack = nn.scan(Block, variable_axes={"quant": 0}, split_rngs={"params": True}, length=3)()
    variables = stack.init(jax.random.key(0), X, None)
    arrays = variables["quant"]["dense"]
    assert arrays["words"].shape[0] == 3
    want = jnp.asarray(X)
    for i in range(3):
        one = {name: array[i] for name, array in arrays.items()}
        want = flax_layers.linen.QuantDense(K, group_size=G).apply({"quant": one}, want)
    y, _ = jax.jit(stack.apply)(variables, X, None)
    close(y, want, 1e-4)


def test_linen_names_what_is_missing():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return flax_layers.linen.QuantDense(N, group_size=G, name="up")(x)

    with pytest.raises(ValueError, match=r"up: the collection 'quant' has no words, scales, bias; pass"):
        Model().apply({"params": {}}, X)


def test_messages():
    with pytest.raises(TypeError, match=r"linear must be an nnx.Linear, got Embed"):
        QuantDense.from_linear(nnx.Embed(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"dense must be an nn.Dense, got Embed"):
        flax_layers.linen.QuantDense.from_dense(nn.Embed(4, 4), {})
    with pytest.raises(ValueError, match=r"params must hold this module's 'kernel', got \['up'\]"):
        flax_layers.linen.QuantDense.from_dense(nn.Dense(4), {"up": {}})
    with pytest.raises(TypeError, match=r"rngs must be given to draw a weight"):
        QuantDense(K, N)
    with pytest.raises(ValueError, match=r"group_size must divide K, got group_size=128, K=192"):
        QuantDense(K, N, rngs=nnx.Rngs(0))
    weight = jax_trirun.quantize(jnp.ones((N * 32, 4)), group_size=32)
    with pytest.raises(
        ValueError, match=r"\(in_features, out_features\) = \(4, 1280\), got \(1280, 4\).*transpose"
    ):
        QuantDense(4, N * 32, weight=weight, use_bias=False)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., K=192\]"):
        QuantDense.from_linear(linear(), group_size=G)(jnp.ones((2, 128)))
