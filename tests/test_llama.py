"""The decoder against the same equations written once more in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from flax_layers import QuantDense, add_lora, quantize_module
from flax_layers.llama import (
    Decoder,
    KVCache,
    Llama,
    LlamaConfig,
    compile_losses,
    draw,
    sample,
    store,
)
from flax_layers.partitioning import MeshRules

SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
    rope_theta=500.0,
)


def numpy_llama(weights, config, tokens):
    """Logits [T, vocab] of one sequence, float64, one head and one position at a time."""

    def rms_norm(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_eps) * scale

    def turn(vector, position):
        pairs = len(vector) // 2
        out = np.empty_like(vector)
        for i in range(pairs):
            angle = position / config.rope_theta ** (2 * i / len(vector))
            if config.rope_factors is not None:
                angle /= config.rope_factors[i]
            a, b = vector[i], vector[i + pairs]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + pairs] = a * np.sin(angle) + b * np.cos(angle)
        return out

    width, share = config.head_dim, config.num_heads // config.num_kv_heads
    x = weights["embed"][tokens]
    for layer in weights["layers"]:
        normed = rms_norm(x, layer["input_norm"])
        q, k, v = (normed @ layer[name] for name in ("q_proj", "k_proj", "v_proj"))
        mixed = np.zeros_like(q)
        for head in range(config.num_heads):
            mine = slice(head * width, (head + 1) * width)
            theirs = slice(head // share * width, (head // share + 1) * width)
            keys = np.stack([turn(k[t, theirs], t) for t in range(len(tokens))])
            for t in range(len(tokens)):
                scores = keys[: t + 1] @ turn(q[t, mine], t) / np.sqrt(width)
                chance = np.exp(scores - scores.max())
                mixed[t, mine] = chance / chance.sum() @ v[: t + 1, theirs]
        x = x + mixed @ layer["o_proj"]
        normed = rms_norm(x, layer["mlp_norm"])
        gate = normed @ layer["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["up_proj"])) @ layer["down_proj"]
    x = rms_norm(x, weights["norm"])
    return x @ (weights["embed"].T if config.tie_embeddings else weights["lm_head"])


def float64_weights(model):
    def get(variable):
        return np.asarray(variable[...], np.float64)

    def layer(block):
        linears = {**vars(block.self_attn), **vars(block.mlp)}
        return {
            "input_norm": get(block.input_norm.scale),
            "mlp_norm": get(block.mlp_norm.scale),
            **{name: get(m.kernel) for name, m in linears.items() if isinstance(m, nnx.Linear)},
        }

    weights = {
        "embed": get(model.embed.embedding),
        "norm": get(model.norm.scale),
        "layers": [layer(block) for block in model.layers],
    }
    if not model.config.tie_embeddings:
        weights["lm_head"] = get(model.lm_head.kernel)
    return weights


def random_weights(config, seed=0):
    """Random weights, the norms' too: their initial ones would hide a norm that is not applied."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(shape):
        noise = rng.standard_normal(shape)
        return (1 + 0.3 * noise if len(shape) == 1 else 2 * noise / np.sqrt(shape[0])).astype(np.float32)

    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): draw(leaf.shape) for path, leaf in flat}


def random_model(config, seed=0):
    return Llama.from_weights(config, random_weights(config, seed))


@nnx.jit
def run(model, *arguments):
    return model(*arguments)


def tokens_of(config, length, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, length)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"num_kv_heads": 1},
        {"num_kv_heads": 4, "head_dim": 8},
        {"rope_factors": tuple(1.0 + 0.5 * i for i in range(8))},
        {"rms_eps": 0.1},
    ],
    ids=lambda c: ",".join(c) or "tied",
)
def test_logits_are_those_of_the_float64_equations(changes):
    config = dataclasses.replace(SMALL, **{"head_dim": 0, **changes})
    model = random_model(config)
    tokens = tokens_of(config, 19)
    wanted = numpy_llama(float64_weights(model), config, tokens)
    got = np.asarray(run(model, jnp.asarray(tokens)[None]))[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_the_real_model_has_the_logits_of_the_float64_equations(smollm2):
    from jax_trirun.checkpoints import gguf

    config = LlamaConfig(**gguf.llama_config(smollm2))
    model = Llama.from_weights(config, gguf.llama_weights(smollm2))
    tokens = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    wanted = numpy_llama(float64_weights(model), config, tokens)
    got = np.asarray(run(model, jnp.asarray(tokens)[None]))[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert wanted[-1].argmax() == 7042  # " Paris"

    decoder = Decoder(model, max_length=8)
    logits, cache = decoder.prefill([tokens[:3]])
    for position in (3, 4):
        np.testing.assert_allclose(logits[0], got[position - 1], rtol=0, atol=1e-3)
        logits, cache = decoder.step(np.asarray(tokens[position : position + 1], np.int32), cache)
    np.testing.assert_allclose(logits[0], got[-1], rtol=0, atol=1e-3)


def test_decoding_gives_the_logits_of_the_whole_sequence_at_every_position():
    model = random_model(SMALL)
    tokens = tokens_of(SMALL, 24)
    whole = np.asarray(run(model, jnp.asarray(tokens)[None]))[0]
    decoder = Decoder(model, max_length=32)
    for start in (1, 7, 16, 17):
        logits, cache = decoder.prefill([tokens[:start]])
        seen = [logits[0]]
        for token in tokens[start:]:
            logits, cache = decoder.step(np.asarray([token], np.int32), cache)
            seen.append(logits[0])
        np.testing.assert_allclose(np.stack(seen), whole[start - 1 :], rtol=0, atol=1e-4)
        assert cache.lengths.tolist() == [24]


def test_a_batch_of_unequal_prompts_decodes_each_as_if_alone():
    model = random_model(SMALL)
    prompts = [tokens_of(SMALL, n, seed=n) for n in (3, 11, 6)]
    following = tokens_of(SMALL, 15, seed=5).reshape(5, 3).astype(np.int32)
    together = Decoder(model, max_length=32, batch=3)
    logits, cache = together.prefill(prompts)
    seen = [logits]
    for column in following:
        logits, cache = together.step(column, cache)
        seen.append(logits)
    seen = np.stack(seen)
    for row, prompt in enumerate(prompts):
        alone = np.concatenate([prompt, following[:, row]])
        wanted = np.asarray(run(model, jnp.asarray(alone)[None]))[0, len(prompt) - 1 :]
        np.testing.assert_allclose(seen[:, row], wanted, rtol=0, atol=1e-4)


def test_a_cache_can_be_filled_in_pieces():
    model = random_model(SMALL)
    tokens = jnp.asarray(tokens_of(SMALL, 12))[None]
    whole = run(model, tokens)
    first, cache = run(model, tokens[:, :5], KVCache.empty(SMALL, 1, 16))
    second, cache = run(model, tokens[:, 5:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=0, atol=1e-4)


def test_the_decode_step_updates_the_cache_in_place():
    decoder = Decoder(random_model(SMALL), max_length=32)
    _, cache = decoder.prefill([[1, 2, 3]])
    before = [a.unsafe_buffer_pointer() for a in (*cache.keys, *cache.values)]
    old = cache.keys[0]
    _, cache = decoder.step(np.asarray([4], np.int32), cache)
    assert [a.unsafe_buffer_pointer() for a in (*cache.keys, *cache.values)] == before
    assert old.is_deleted()


def test_a_step_may_take_the_memory_of_older_logits():
    decoder = Decoder(random_model(SMALL), max_length=32)
    logits, cache = decoder.prefill([[1, 2, 3]])
    kept, cache = decoder.step(np.asarray([4], np.int32), cache)
    at = logits.unsafe_buffer_pointer()
    wanted = run(random_model(SMALL), jnp.asarray([[1, 2, 3, 4, 5]]))[:, -1]
    got, cache = decoder.step(np.asarray([5], np.int32), cache, out=logits)
    assert got.unsafe_buffer_pointer() == at
    assert logits.is_deleted() and not kept.is_deleted()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.7])
def test_next_tokens_are_drawn_from_a_steps_logits(temperature):
    decoder = Decoder(random_model(SMALL), max_length=32, batch=2)
    prompts = [[5, 3], [7, 1, 9, 2]]

    logits, cache = decoder.prefill(prompts)
    first, key = draw(logits, jax.random.key(1), temperature)
    wanted = [first]
    for _ in range(6):
        logits, cache = decoder.step(wanted[-1], cache)
        tokens, key = draw(logits, key, temperature)
        wanted.append(np.asarray(tokens))

    logits, cache = decoder.prefill(prompts)
    key = draw(logits, jax.random.key(1), temperature)[1]
    tokens = first
    for i in range(1, 7):
        at = [a.unsafe_buffer_pointer() for a in (cache.lengths, cache.keys[0])]
        last = tokens
        tokens, cache, key = decoder.next_tokens(tokens, cache, key, temperature)
        np.testing.assert_array_equal(tokens, wanted[i])
        np.testing.assert_array_equal(last, wanted[i - 1])
        assert [a.unsafe_buffer_pointer() for a in (cache.lengths, cache.keys[0])] == at
    assert cache.lengths.tolist() == [8, 10]
    if not temperature:
        _, cache = decoder.prefill(prompts)
        tokens, cache, key = decoder.next_tokens(np.asarray(first), cache)
        assert key is None
        np.testing.assert_array_equal(tokens, wanted[1])


@pytest.mark.parametrize("on_a_mesh", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_storing_writes_each_sequences_slots_and_drops_what_does_not_fit(dtype, on_a_mesh):
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,)) if on_a_mesh else None
    rules = MeshRules(mesh, (("kv_heads", "tensor"),))
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 8):
        old = rng.normal(size=(6, 2, 8, 4)).astype(jnp.dtype(dtype))
        new = rng.normal(size=(6, 2, tokens, 4)).astype(jnp.dtype(dtype))
        starts = [0, 2, 8 - tokens, 8, 9 - tokens, 30]
        wanted = old.copy()
        for i, start in enumerate(starts):
            if start + tokens <= 8:
                wanted[i, :, start : start + tokens] = new[i]
        write = jax.jit(lambda old, starts, new: store(old, starts, new, rules))
        np.testing.assert_array_equal(write(old, jnp.asarray(starts, jnp.int32), new), wanted)


def quantized_model(config=SMALL, **options):
    model = random_model(config)
    quantize_module(model, **{"group_size": 32, **options})
    return model


FUSED = [f"layers.{i}.{name}" for i in range(3) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]


def test_fused_projections_compute_the_same():
    apart, fused = quantized_model(), quantized_model()
    words = [a.words[...] for a in (fused.layers[1].mlp.gate_proj, fused.layers[1].mlp.up_proj)]
    assert list(fused.fuse_projections()) == FUSED
    assert fused.fuse_projections() == ()  # they are by now
    np.testing.assert_array_equal(fused.layers[1].mlp.gate_up_proj.words[...], np.concatenate(words, 1))

    tokens = jnp.asarray(tokens_of(SMALL, 11))[None]
    wanted = run(apart, tokens)
    np.testing.assert_allclose(run(fused, tokens), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    generated = [list(Decoder(m, max_length=16).generate([5, 3], max_new_tokens=9)) for m in (apart, fused)]
    assert generated[0] == generated[1]


def test_fused_projections_take_no_more_memory():
    def bytes_of(model):
        return sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))

    model = quantized_model()
    before = bytes_of(model)
    model.fuse_projections()
    assert bytes_of(model) == before


def test_only_projections_that_fit_are_fused():
    assert random_model(SMALL).fuse_projections() == ()  # not packed

    of_the_mlp = quantized_model(include=["mlp"])
    assert list(of_the_mlp.fuse_projections()) == FUSED[1::2]
    assert isinstance(of_the_mlp.layers[0].self_attn.q_proj, nnx.Linear)

    with_terms = quantized_model()
    add_lora(with_terms, rank=2, where=r"0\.self_attn\.q_proj", rngs=nnx.Rngs(0))
    assert list(with_terms.fuse_projections()) == FUSED[1:]

    ragged = dataclasses.replace(SMALL, head_dim=10)  # 40 columns of q end inside a block
    assert list(quantized_model(ragged, group_size=-1).fuse_projections()) == FUSED[1::2]

    mesh = jax.make_mesh((1,), ("tensor",))
    on_mesh = Llama.from_weights(SMALL, random_weights(SMALL), mesh=mesh)
    quantize_module(on_mesh, group_size=32)
    assert on_mesh.fuse_projections() == ()
    assert isinstance(on_mesh.layers[0].self_attn.q_proj, QuantDense)


def test_a_whole_cache_can_be_used():
    model = random_model(SMALL)
    tokens = tokens_of(SMALL, 20)
    decoder = Decoder(model, max_length=20)
    logits, cache = decoder.prefill([tokens[:18]])
    for token in tokens[18:]:
        logits, cache = decoder.step(np.asarray([token], np.int32), cache)
    whole = np.asarray(run(model, jnp.asarray(tokens)[None]))[0, -1]
    np.testing.assert_allclose(logits[0], whole, rtol=0, atol=1e-4)


def test_bfloat16_stays_near_float32():
    model = random_model(SMALL)
    low = Llama.from_weights(SMALL, random_weights(SMALL), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    tokens = jnp.asarray(tokens_of(SMALL, 16))[None]
    wanted, got = run(model, tokens), run(low, tokens)
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_sampling():
    logits = jnp.log(jnp.asarray([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]]))
    key = jax.random.key(0)
    assert sample(logits, key, 0.0).tolist() == sample(logits, None, None).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"a temperature \(0.7\) needs a key"):
        draw(logits, None, 0.7)
    keys = jax.random.split(key, 4000)
    drawn = np.asarray(jax.vmap(lambda k: sample(logits, k, 1.0))(keys))
    shares = np.stack([np.bincount(drawn[:, row], minlength=3) / 4000 for row in (0, 1)])
    np.testing.assert_allclose(shares, jnp.exp(logits), atol=0.04)
    cold = np.asarray(jax.vmap(lambda k: sample(logits, k, 0.05))(keys))
    assert (cold == [1, 0]).all()


def test_generating_greedily_is_taking_the_likeliest_token_again_and_again():
    model = random_model(SMALL)
    decoder = Decoder(model, max_length=16)
    new = list(decoder.generate([5, 3, 8], max_new_tokens=13))
    likeliest = run(model, jnp.asarray([[5, 3, 8, *new]])).argmax(-1)[0, 2:-1].tolist()
    assert new == likeliest
    stop = new[4]
    assert list(decoder.generate([5, 3, 8], max_new_tokens=13, stop={stop})) == new[: new.index(stop)]


def test_the_seed_decides_the_text():
    decoder = Decoder(random_model(SMALL), max_length=32)
    texts = [tuple(decoder.generate([1, 2], max_new_tokens=20, temperature=2.0, seed=s)) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_losses_are_those_of_the_logits():
    model = random_model(SMALL)
    tokens = tokens_of(SMALL, 22).reshape(2, 11)
    chances = jax.nn.softmax(run(model, jnp.asarray(tokens)), axis=-1)
    wanted = -np.log([[chances[b, t, tokens[b, t + 1]] for t in range(10)] for b in range(2)])
    np.testing.assert_allclose(compile_losses(model)(tokens), wanted, rtol=1e-5)


def test_from_weights_takes_exactly_the_weights_it_needs():
    weights = random_weights(SMALL)
    model = Llama.from_weights(SMALL, weights)
    np.testing.assert_array_equal(
        model.layers[2].mlp.gate_proj.kernel[...], weights["layers.2.mlp.gate_proj.kernel"]
    )
    lacking = {k: v for k, v in weights.items() if k != "norm.scale"}
    with pytest.raises(ValueError, match=r"missing \['norm.scale'\], unknown nothing"):
        Llama.from_weights(SMALL, lacking)
    with pytest.raises(ValueError, match=r"missing nothing, unknown \['extra'\]"):
        Llama.from_weights(SMALL, {**weights, "extra": np.zeros(1)})
    turned = {**weights, "layers.1.mlp.up_proj.kernel": np.zeros((96, 64))}
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj.kernel must have shape \(64, 96\), got \(96, 64\)"
    ):
        Llama.from_weights(SMALL, turned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 7}, "2 tokens and max_new_tokens=7 do not fit max_length=8"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
    ],
)
def test_wrong_generate_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decoder(random_model(SMALL), max_length=8).generate([1, 2], **arguments)
    with pytest.raises(ValueError, match=message):
        Decoder(random_model(SMALL), max_length=8, batch=2).decode([[1, 2], [3]], **arguments)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [([[1, 2]], {"temperature": 1.0}, r"\(1.0\) needs a key"), ([], {}, "wanted batch=1 prompts, got 0")],
)
def test_wrong_decode_arguments(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(random_model(SMALL), max_length=8).decode(prompts, max_new_tokens=1, **options)


def test_generate_is_for_one_sequence():
    with pytest.raises(ValueError, match="wanted a Decoder with batch=1, got batch=2"):
        Decoder(random_model(SMALL), max_length=8, batch=2).generate([1, 2], max_new_tokens=1)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_decode_goes_on_with_all_sequences(temperature):
    model = random_model(SMALL)
    prompts = [[5, 3, 8], [7], [1, 2]]
    decoder = Decoder(model, max_length=16, batch=3)
    got = list(decoder.decode(prompts, max_new_tokens=13, temperature=temperature, key=jax.random.key(3)))
    assert len(got) == 13 and all(tokens.shape == (3,) for tokens in got)

    logits, cache = decoder.prefill(prompts)
    tokens, key = draw(logits, jax.random.key(3), temperature)
    for wanted in got:
        np.testing.assert_array_equal(tokens, wanted)
        if wanted is not got[-1]:
            logits, cache = decoder.step(tokens, cache)
            tokens, key = draw(logits, key, temperature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got num_kv_heads=3, num_heads=4"),
        ({"hidden_size": 66}, "num_heads must divide hidden_size, got num_heads=4, hidden_size=66"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"rope_factors": (1.0,)}, "rope_factors must have head_dim / 2 = 8 numbers, got 1"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{"head_dim": 0, **changes})


def test_wrong_prompts():
    model = random_model(SMALL)
    with pytest.raises(ValueError, match=r"max_length must be in 1 \.\. 64 .* got 65"):
        Decoder(model, max_length=65)
    decoder = Decoder(model, max_length=8)
    with pytest.raises(ValueError, match="at least one token"):
        decoder.prefill([[]])
    with pytest.raises(ValueError, match="9 tokens does not fit max_length=8"):
        decoder.prefill([[1] * 9])
    with pytest.raises(ValueError, match="wanted batch=1 prompts, got 2"):
        decoder.prefill([[1], [2]])
    with pytest.raises(ValueError, match=r"tokens must be in 0 \.\. 96, got 5 \.\. 97"):
        decoder.prefill([[5, 97]])
