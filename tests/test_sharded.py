"""Layers and models on a mesh of eight CPU devices: the same numbers as on one, each device with its part."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_layers
from flax_layers import QuantDense
from flax_layers.linen import quantized
from flax_layers.llama import SHARDING_RULES, Decoder, KVCache, Llama, LlamaConfig, token_losses
from flax_layers.load import load_llama
from jax_trirun.checkpoints import models, save
from jax_trirun.testing import MatmulProblem

K, N, G = 512, 256, 64
X = np.random.default_rng(0).normal(size=(8, K)).astype(np.float32)
KINDS = [AxisType.Auto, AxisType.Explicit]
WAYS = {  # axis names of a kernel
    "columns": (None, "tensor"),
    "rows": ("tensor", None),
    "both": ("data", "tensor"),
    "one axis twice as long": (None, ("data", "tensor")),
}
NORMAL = nnx.initializers.normal()


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def mesh_of(kind=AxisType.Auto, shape=(2, 4), names=("data", "tensor")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices("cpu"))


def weight(k, n, group_size):
    return MatmulProblem(1, k, n, group_size).quant_tensor()


def put(x, mesh, *names):
    return jax.device_put(x, NamedSharding(mesh, P(*names)))


def close(got, wanted, tolerance=1e-5):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def specs(layer):
    state = nnx.get_partition_spec(nnx.state(layer))
    return {path[-1]: leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def collectives(hlo):
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= \S+ ({kinds})(?:-start)?\(", hlo)


def share(array):
    """Of an array's bytes, on the device that holds most."""
    return max(s.data.nbytes for s in array.addressable_shards) / array.nbytes


# ---- QuantDense, nnx --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", WAYS.values(), ids=WAYS)
def test_nnx_arrays_lie_as_the_kernel_does_and_compute_the_same(kind, names):
    def linear():
        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        metadata = {"out_sharding": names[1:]}
        return nnx.Linear(
            K, N, kernel_init=kernel_init, bias_init=NORMAL, bias_metadata=metadata, rngs=rngs()
        )

    def rngs():
        return nnx.Rngs(0)

    one = QuantDense.from_linear(nnx.Linear(K, N, bias_init=NORMAL, rngs=rngs()), group_size=G, method="rtn")
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        layer = QuantDense.from_linear(linear(), group_size=G, method="rtn")
        rows = "data" if "data" not in jax.tree.leaves(names) else None
        x = put(X, mesh, rows, names[0])
        y, dx = layer(x), jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x))))(x)
    assert specs(layer) == {"words": P(*names, None), "scales": P(*names), "bias": P(*names[1:])}
    assert layer.words[...].sharding.spec == P(*names, None)
    parts = np.prod([mesh.shape[a] for a in jax.tree.leaves(names) if a])
    assert share(layer.words[...]) == share(layer.scales[...]) == 1 / parts
    close(y, one(X))
    close(dx, jax.grad(lambda x: jnp.sum(jnp.tanh(one(x))))(X))


def test_logical_names_follow_rules():
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
    with jax.set_mesh(mesh_of()), nnx.logical_axis_rules((("embed", None), ("mlp", "tensor"))):
        layer = QuantDense(K, N, group_size=G, use_bias=False, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        assert specs(layer) == {"words": P(None, "tensor", None), "scales": P(None, "tensor")}
    assert layer.words.out_sharding == ("embed", "mlp", None)
    assert share(layer.words[...]) == 1 / 4


@pytest.mark.parametrize(
    ("k", "n", "group_size", "names", "wanted", "message"),
    [
        (576, N, 64, ("tensor", None), (None, None), "K=576 is not cut into 4 parts .* 3 parts would do"),
        (
            K,
            N,
            128,
            (("data", "tensor"), None),
            (None, None),
            "K=512 is not cut into 8 .* 128 .* 4 parts would do",
        ),
        (K, 80, 64, (None, "tensor"), (None, None), "N=80 is not cut into 4 .* Pad N to a multiple of 128"),
        (576, N, 64, ("tensor", "data"), (None, "data"), "K=576 is not cut"),
    ],
)
def test_what_would_cut_a_block_or_a_group_stays_whole_with_a_warning(
    k, n, group_size, names, wanted, message
):
    x = np.random.default_rng(1).normal(size=(8, k)).astype(np.float32)
    one = QuantDense.from_weight(weight(k, n, group_size))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        with pytest.warns(UserWarning, match=message):
            layer = QuantDense.from_weight(one.weight, kernel_metadata={"out_sharding": names})
        assert specs(layer)["words"] == P(*wanted, None)
        close(layer(put(x, mesh, "data")), one(x))


def test_one_group_is_on_every_device_of_a_row_of_shards():
    one = QuantDense.from_weight(weight(K, N, -1))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        layer = QuantDense.from_weight(one.weight, kernel_metadata={"out_sharding": ("tensor", "data")})
        assert specs(layer)["words"] == P("tensor", "data", None)
        assert specs(layer)["scales"] == P(None, "data")
        close(layer(put(X, mesh, None, "tensor")), one(X))


def test_stacked_layers_and_their_low_rank_terms():
    def square(rngs):
        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
        return nnx.Linear(K, K, use_bias=False, kernel_init=kernel_init, rngs=rngs)

    named = {nnx.PARTITION_NAME: "data"}
    with jax.set_mesh(mesh_of()):
        stack = nnx.vmap(square, transform_metadata=named)(nnx.Rngs(0).split(4))
        layers = QuantDense.from_linear(stack, group_size=G, method="rtn")
        flax_layers.add_lora(layers, rank=2, rngs=nnx.Rngs(1))
        assert specs(layers) == {
            "words": P("data", None, "tensor", None),
            "scales": P("data", None, "tensor"),
            "lora_a": P("data", None, None),
            "lora_b": P("data", None, "tensor"),
        }
        assert share(layers.words[...]) == share(layers.lora.lora_b[...]) == 1 / 8

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=named)
        def run(layer, x):
            return layer(x)

        y = run(layers, X)
    alone = [
        nnx.Linear(K, K, use_bias=False, rngs=nnx.Rngs(0), kernel_init=lambda *_, i=i: stack.kernel[i])
        for i in range(4)
    ]
    wanted = X
    for linear in alone:
        wanted = QuantDense.from_linear(linear, group_size=G, method="rtn")(np.asarray(wanted))
    close(y, wanted)


def test_a_whole_model_keeps_its_metadata():
    class Model(nnx.Module):
        def __init__(self, rngs):
            def linear(k, n, *names):
                return nnx.Linear(k, n, kernel_metadata={"out_sharding": names}, use_bias=False, rngs=rngs)

            self.up, self.down = linear(K, 1024, None, "tensor"), linear(1024, K, "tensor", None)

        def __call__(self, x):
            return self.down(jax.nn.gelu(self.up(x)))

    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        flax_layers.quantize_module(model, group_size=G, method="rtn")
        y = nnx.jit(lambda m, x: m(x))(model, put(X, mesh, "data"))
    assert specs(model.up)["words"] == P(None, "tensor", None)
    assert specs(model.down)["words"] == P("tensor", None, None)
    one = nnx.merge(*nnx.split(model))
    for layer in (one.up, one.down):
        for variable in (layer.words, layer.scales):
            variable.set_raw_value(jnp.asarray(np.asarray(variable[...])))
    close(y, one(X))


# ---- QuantDense, linen ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(None, "tensor"), ("tensor", None), ("data", "tensor")])
def test_linen_variables_are_boxed_with_the_kernels_names(names):
    def dense(kind, **options):
        return kind(
            N,
            kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), names),
            bias_init=nn.with_partitioning(nn.initializers.normal(), names[1:]),
            **options,
        )

    mesh, layer = mesh_of(), dense(flax_layers.linen.QuantDense, group_size=G)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X)
    wanted = {"words": P(*names, None), "scales": P(*names), "bias": P(*names[1:])}
    assert nn.get_partition_spec(shapes)["quant"] == wanted
    shardings = nn.get_sharding(shapes, mesh)
    variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), X)
    assert share(variables["quant"]["words"].value) < 1
    one = nn.unbox(layer.init(jax.random.key(0), X))
    close(jax.jit(layer.apply)(variables, X), layer.apply(one, X))

    float_layer = dense(nn.Dense)
    params = jax.jit(float_layer.init)(jax.random.key(0), X)["params"]
    _, quant = flax_layers.linen.QuantDense.from_dense(float_layer, params, group_size=G, method="rtn")
    assert nn.get_partition_spec(quant) == wanted


def test_linen_parameters_keep_their_names():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def dense(features, name, *names):
                kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
                return nn.Dense(features, kernel_init=kernel_init, use_bias=False, name=name)

            x = nn.gelu(dense(1024, "up", "embed", "mlp")(x))
            return dense(K, "down", "mlp", "embed")(x)

    rules = (("embed", None), ("mlp", "tensor"))
    mesh, model = mesh_of(), Model()
    params = model.init(jax.random.key(0), X)["params"]
    left, quant, _ = flax_layers.quantize_params(params, group_size=G, method="rtn")
    assert not left
    logical = nn.get_partition_spec(quant)
    assert logical["down"] == {"words": P("mlp", "embed", None), "scales": P("mlp", "embed")}
    shardings = nn.logical_to_mesh_sharding(logical, mesh, rules)
    placed = jax.device_put(nn.unbox(quant), shardings)
    assert share(placed["up"]["words"]) == share(placed["down"]["words"]) == 1 / 4
    with quantized(lora_rank=2):
        both = {"params": left, "quant": quant}
        _, new = model.apply(both, X, mutable="lora", rngs={"lora": jax.random.key(1)})
    assert nn.get_partition_spec(new["lora"]["down"]) == {
        "lora_a": P("mlp", None),
        "lora_b": P(None, "embed"),
    }
    with quantized():
        y = jax.jit(model.apply)({"params": left, "quant": placed}, put(X, mesh, "data"))
        close(y, model.apply({"params": left, "quant": nn.unbox(quant)}, X))


# ---- The decoder ------------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    max_positions=64,
)
TOKENS = np.random.default_rng(2).integers(0, 256, (4, 12)).astype(np.int32)
MESHES = {"data and tensor": (2, 4), "tensor": (1, 4), "data": (4, 1)}
run = nnx.jit(lambda model, tokens: model(tokens))


def random_weights(config):
    rng = np.random.default_rng(3)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[0]) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


WEIGHTS = random_weights(CONFIG)


@functools.cache
def decoder(shape=None, kind=AxisType.Auto):
    """On one device, or on a mesh of that shape. Not to be changed."""
    return quantised(CONFIG, WEIGHTS, None if shape is None else mesh_of(kind, shape))


def quantised(config, weights, mesh, **options):
    model = Llama.from_weights(config, weights, mesh=mesh, **options)
    flax_layers.quantize_module(model, group_size=32, method="rtn")
    return model


@functools.cache
def logits():
    return np.asarray(run(decoder(), TOKENS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_a_decoder_on_a_mesh_has_the_logits_of_one_device(shape, kind):
    close(run(decoder(shape, kind), TOKENS), logits())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_on_a_mesh_gives_the_logits_of_one_device(kind):
    prompts = [row[:n] for row, n in zip(TOKENS, (5, 3, 9, 12), strict=True)]
    one, many = (Decoder(m, max_length=32, batch=4) for m in (decoder(), decoder((2, 4), kind)))
    (wanted, old), (got, cache) = one.prefill(prompts), many.prefill(prompts)
    close(got, wanted)
    for column in TOKENS.T[:3]:
        wanted, old = one.step(column, old)
        got, cache = many.step(column, cache)
        close(got, wanted)
        assert share(cache.keys[0]) == share(cache.values[0]) == 1 / 8
    tokens = [TOKENS[:, 3]] * 2
    keys = [jax.random.key(0), jax.random.key(0)]
    for _ in range(3):
        tokens[0], old, keys[0] = one.next_tokens(tokens[0], old, keys[0], 0.5)
        tokens[1], cache, keys[1] = many.next_tokens(tokens[1], cache, keys[1], 0.5)
        np.testing.assert_array_equal(*tokens)
    assert share(cache.keys[0]) == 1 / 8
    for options in ({}, {"temperature": 0.7, "key": jax.random.key(1)}):
        wanted, got = (list(d.decode(prompts, max_new_tokens=5, **options)) for d in (one, many))
        np.testing.assert_array_equal(got, wanted)
    text = many._step.lower(many._weights, cache, None, TOKENS[:, 0]).compile().as_text()
    # One sum for the embedding, whose vocabulary is cut, and two a block: after o_proj and down_proj.
    assert collectives(text) == ["all-reduce"] * (1 + 2 * CONFIG.num_layers)


def test_each_device_holds_its_part_of_the_model():
    model = decoder((2, 4))
    block = model.layers[0]
    for layer in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj):
        assert share(layer.words[...]) == share(layer.scales[...]) == 1 / 4
    assert share(model.embed.embedding[...]) == 1 / 4


def test_a_batch_that_the_mesh_does_not_divide_is_on_every_device():
    rules = decoder((2, 4)).rules
    assert KVCache.empty(CONFIG, 3, 16, rules=rules).keys[0].sharding.spec == P(None, "tensor", None, None)
    close(run(decoder((2, 4)), TOKENS[:3]), logits()[:3])


def test_heads_that_the_mesh_does_not_divide_stay_whole_with_a_warning():
    config = dataclasses.replace(CONFIG, num_kv_heads=2)
    weights = random_weights(config)
    with pytest.warns(UserWarning, match=r"kv_heads \(2\) is not divided by the 4 devices along 'tensor'"):
        model = quantised(config, weights, mesh_of())
    block = model.layers[0]
    assert share(block.self_attn.k_proj.words[...]) == 1 and share(block.mlp.up_proj.words[...]) == 1 / 4
    close(run(model, TOKENS), run(quantised(config, weights, None), TOKENS))


def test_other_rules_and_names():
    mesh = mesh_of(shape=(2, 2, 2), names=("replica", "x", "y"))
    rules = {**dict(SHARDING_RULES), "batch": "replica", "mlp": ("x", "y"), "heads": "x", "kv_heads": "x"}
    model = quantised(CONFIG, WEIGHTS, mesh, sharding_rules=tuple({**rules, "vocab": None}.items()))
    assert share(model.layers[0].mlp.down_proj.words[...]) == 1 / 4
    assert share(model.layers[0].self_attn.q_proj.words[...]) == 1 / 2
    close(run(model, TOKENS), logits())


def test_on_explicit_axes_types_say_how_arrays_lie():
    """In the context of the mesh or not; what XLA does inside is the same as on Auto axes."""
    mesh, model = mesh_of(AxisType.Explicit), decoder((2, 4), AxisType.Explicit)
    tokens = put(TOKENS, mesh, "data", None)
    with jax.set_mesh(mesh):
        scores = run(model, tokens)
        assert jax.typeof(scores).sharding.spec == P("data", None, "tensor")
        close(scores, logits())
        losses = nnx.jit(token_losses)(model, tokens)
        assert jax.typeof(losses).sharding.spec == P("data", None)
    close(losses, nnx.jit(token_losses)(decoder(), TOKENS))
    close(run(decoder((2, 4), AxisType.Explicit), TOKENS[:3]), logits()[:3])

    one, many = (Decoder(m, max_length=32) for m in (decoder(), model))
    options = {"max_new_tokens": 4, "temperature": 0.7, "seed": 1}
    assert list(many.generate([1, 2, 3], **options)) == list(one.generate([1, 2, 3], **options))


def test_what_is_no_mesh_is_refused():
    with pytest.raises(
        TypeError, match=r"mesh must be a jax.sharding.Mesh, .* got AbstractMesh; make it with"
    ):
        Llama(CONFIG, mesh=mesh_of().abstract_mesh, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"axes must be Auto or Explicit, got .*; inside jax.shard_map"):
        Llama(CONFIG, mesh=mesh_of(AxisType.Manual), rngs=nnx.Rngs(0))


class Recorded:
    """A NumPy array that remembers the largest part asked of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.largest = array, array.shape, array.dtype, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.largest = max(self.largest, part.size)
        return part


def test_weights_are_read_slice_by_slice():
    recorded = {name: Recorded(array) for name, array in WEIGHTS.items()}
    model = Llama.from_weights(CONFIG, recorded, mesh=mesh_of())
    for name, array in recorded.items():
        assert array.largest == array.array.size / (4 if array.array.ndim == 2 else 1), name
    np.testing.assert_array_equal(
        model.layers[0].mlp.up_proj.kernel[...], WEIGHTS["layers.0.mlp.up_proj.kernel"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_file_is_loaded_onto_the_mesh(tmp_path, kind):
    config = dataclasses.asdict(CONFIG)
    model = decoder()
    state = nnx.to_flat_state(nnx.state(model))
    tree = {
        ".".join(map(str, path)): leaf[...] for path, leaf in state if path[-1] not in ("words", "scales")
    }
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantDense):
            tree[".".join(map(str, path)) + ".kernel"] = layer.weight
    save(tmp_path / "model", tree)
    models.write_config(tmp_path / "model", config, {})
    loaded = load_llama(tmp_path / "model", mesh=mesh_of(kind))
    assert share(loaded.layers[0].mlp.down_proj.words[...]) == share(loaded.embed.embedding[...]) == 1 / 4
    close(run(loaded, TOKENS), logits())


@pytest.mark.parametrize("kind", KINDS)
def test_training_low_rank_terms_on_a_mesh_gives_the_gradients_of_one_device(kind):
    def gradients(model):
        normal = nnx.initializers.normal(0.1)
        flax_layers.add_lora(model, rank=2, b_initializer=normal, where="mlp", rngs=nnx.Rngs(0))

        @nnx.jit
        def of(model, tokens):
            wrt = nnx.DiffState(0, nnx.LoRAParam)
            return nnx.grad(lambda m: jnp.mean(token_losses(m, tokens)), argnums=wrt)(model)

        return nnx.to_flat_state(of(model, TOKENS))

    model = nnx.clone(decoder((2, 4), kind))
    for (_, got), (_, wanted) in zip(gradients(model), gradients(nnx.clone(decoder())), strict=True):
        close(got[...], wanted[...], 1e-4)
    terms = model.layers[0].mlp.down_proj.lora
    assert (share(terms.lora_a[...]), share(terms.lora_b[...])) == (1 / 4, 1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.shape == (512, 2)]
    assert moments and all(share(leaf) == 1 / 4 for leaf in moments)
