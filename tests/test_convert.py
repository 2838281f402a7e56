"""quantize_module and quantize_params convert what they are told to, say what they did, and keep memory low."""

import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_layers
import jax_trirun
from flax_layers import QuantDense, quantize_module, quantize_params

X = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(128, rngs=rngs)
        self.up = nnx.Linear(128, 192, rngs=rngs)
        self.down = nnx.Linear(192, 128, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 128, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict(first=nnx.Linear(128, 128, rngs=rngs))
        self.again = self.named["first"]
        self.sequence = nnx.Sequential(nnx.Linear(128, 128, rngs=rngs), jax.nn.relu)
        self.lm_head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.sequence(self.again(self.named["first"](x))))


def dequantized(model, reference):
    """``reference`` with the weights that ``model`` holds."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantDense):
            other = reference
            for key in path:
                other = (
                    other[key] if isinstance(key, int) or isinstance(other, nnx.Dict) else getattr(other, key)
                )
            other.kernel[...] = jax_trirun.dequantize(module.weight)
    return reference


def test_module_is_converted_in_place_and_computes_with_the_rounded_weights():
    model, reference = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    report = quantize_module(model, group_size="auto")
    names = {row.name for row in report.rows}
    blocks = {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert names == blocks | {"named.first", "sequence.layers.0"}
    assert isinstance(model.layers[1].down, QuantDense) and isinstance(model.lm_head, nnx.Linear)
    assert model.again is model.named["first"]  # shared layers stay shared
    want = dequantized(model, reference)(X)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), want, rtol=1e-4, atol=1e-4)


def test_report_tells_sizes_errors_and_reasons():
    model = Model(nnx.Rngs(0))
    kernel = model.layers[0].down.kernel[...]
    report = quantize_module(model, group_size="auto", scale_dtype="bfloat16")
    row = next(row for row in report.rows if row.name == "layers.0.down")
    assert (row.shape, row.group_size, row.bits, row.bytes_before) == ((192, 128), 64, 2, 192 * 128 * 4)
    assert row.bytes_after == 192 * 128 // 4 + 3 * 128 * 2
    weight = model.layers[0].down.weight
    lost = np.linalg.norm(jax_trirun.dequantize(weight, dtype=jnp.float32) - kernel) / np.linalg.norm(kernel)
    np.testing.assert_allclose(row.error, lost, rtol=1e-4)
    assert report.bytes_before > 12 * report.bytes_after
    assert "excluded by" in report.skipped["lm_head"]
    assert report.skipped["embed"] == "Embed is not nnx.Linear"
    assert report.skipped["layers.0.norm"] == "RMSNorm is not nnx.Linear"
    table = str(report).splitlines()
    assert table[0].split() == ["module", "shape", "bits", "group", "rel.", "error", "before", "after"]
    assert any(line.startswith("layers.0.down") and "192 x 128" in line for line in table)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["bits"] == 2


def test_include_and_exclude_choose_by_path():
    model = Model(nnx.Rngs(0))
    report = quantize_module(model, include=[r"\.up$", "lm_head"], exclude=r"layers\.0")
    assert {row.name for row in report.rows} == {"layers.1.up", "lm_head"}
    assert report.skipped["layers.0.up"] == r"excluded by 'layers\\.0'"
    assert report.skipped["layers.1.down"] == "not in include"
    again = quantize_module(model, include="up", group_size=64)
    assert {row.name for row in again.rows} == {"layers.0.up"}
    assert again.skipped["layers.1.up"] == "quantised already"


def test_float_kernels_are_released_one_by_one(monkeypatch):
    model = Model(nnx.Rngs(0))
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)]
    kernels = [weakref.ref(layer.kernel[...]) for layer in layers]
    del layers
    gc.collect()
    before = len(kernels)
    alive = []
    quantize = jax_trirun.quantize

    def spy(*args, **options):
        alive.append(sum(ref() is not None for ref in kernels))
        return quantize(*args, **options)

    monkeypatch.setattr(jax_trirun, "quantize", spy)
    quantize_module(model, group_size="auto")
    assert alive == [before - i for i in range(len(alive))] and len(alive) == 6


def test_a_group_size_that_does_not_fit_changes_nothing():
    model = Model(nnx.Rngs(0))
    message = (
        r"layers.0.down: quantize_module: group_size must divide K, got group_size=128, K=192; use .*\"auto\""
    )
    with pytest.raises(ValueError, match=message):
        quantize_module(model)
    assert not any(isinstance(module, QuantDense) for _, module in nnx.iter_modules(model))


def test_auto_skips_what_no_group_size_divides():
    model = nnx.Sequential(nnx.Linear(70, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 4, rngs=nnx.Rngs(0)))
    report = quantize_module(model, group_size="auto")
    assert [row.name for row in report.rows] == ["layers.1"]
    assert report.skipped["layers.0"] == "no group size of 128, 64, 32 divides K=70"


def test_subclasses_that_compute_something_else_are_left_alone():
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = nnx.Sequential(Doubled(64, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 4, rngs=nnx.Rngs(0)))
    report = quantize_module(model, group_size=64)
    assert report.skipped["layers.0"] == "Doubled changes what nnx.Linear computes"


def test_stacked_layers_convert():
    stack = nnx.vmap(Block)(nnx.Rngs(0).split(3))
    report = quantize_module(stack, include="up")
    assert report.rows[0].shape == (3, 128, 192) and stack.up.words.shape[0] == 3


def test_progress_is_drawn_when_asked_for(capsys):
    quantize_module(Model(nnx.Rngs(0)), include="up", progress=True)
    drawn = capsys.readouterr().err
    assert "0/2 layers.0.up" in drawn and "quantised 2 modules in" in drawn
    quantize_module(Model(nnx.Rngs(0)), include="up", progress=False)
    assert capsys.readouterr().err == ""


class LinenBlock(nn.Module):
    dense: type

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.silu(self.dense(192, name="up", **self.extra())(nn.RMSNorm(name="norm")(x)))
        return x + self.dense(128, use_bias=False, name="down", **self.extra())(h), None

    def extra(self):
        return {} if self.dense is nn.Dense else {"group_size": 64}


class LinenModel(nn.Module):
    dense: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        x, _ = LinenBlock(self.dense, name="first")(x)
        scanned = nn.scan(
            LinenBlock, variable_axes={"params": 0, "quant": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = scanned(self.dense, name="rest")(x, None)
        return nn.Dense(10, name="lm_head")(x)


def linen_params():
    params = LinenModel().init(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda a: a + 0.01 * jnp.arange(a.shape[-1]) / a.shape[-1], params)


def test_params_are_converted_and_run_in_both_ways():
    params = linen_params()
    left, quant, report = quantize_params(params, stacked="^rest/", group_size=64)
    assert {row.name for row in report.rows} == {"first/up", "first/down", "rest/up", "rest/down"}
    assert set(left) == {"first", "rest", "lm_head"} and set(left["first"]) == {"norm"}
    assert quant["rest"]["up"]["words"].shape[0] == 2 and "kernel" in params["first"]["up"]
    rounded = jax.tree.map(lambda a: a, params)
    for block in ("first", "rest"):
        for name, k, n in (("up", 128, 192), ("down", 192, 128)):
            arrays = quant[block][name]
            rounded[block][name]["kernel"] = jax_trirun.dequantize(
                arrays["words"], arrays["scales"], shape=(k, n)
            )
    want = LinenModel().apply({"params": rounded}, X)
    variables = {"params": left, "quant": quant}
    got = jax.jit(LinenModel(flax_layers.linen.QuantDense).apply)(variables, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with flax_layers.linen.quantized():
        same = LinenModel().apply(variables, X)
    np.testing.assert_allclose(same, want, rtol=1e-4, atol=1e-4)
    assert "excluded by" in report.skipped["lm_head"] and "but no kernel" in report.skipped["first/norm"]


def test_stacked_kernels_need_naming():
    _, quant, report = quantize_params(linen_params(), group_size=64)
    assert set(quant) == {"first"}
    assert "has 3 axes; name it in stacked=" in report.skipped["rest/up"]


def test_donated_kernels_are_deleted():
    params = linen_params()
    kernel, head = params["first"]["up"]["kernel"], params["lm_head"]["kernel"]
    quantize_params(params, include="first", group_size=64, donate=True)
    assert kernel.is_deleted() and not head.is_deleted()


def block():
    return Block(nnx.Rngs(0))


def up(value, k):
    return {"up": {"kernel": np.full((k, 2), value, np.float32)}}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, lambda: quantize_module({}), r"must be an nnx.Module, got dict; .*quantize_params"),
        (TypeError, lambda: quantize_params(block()), r"must be nested dicts, got Block; .*quantize_module"),
        (ValueError, lambda: quantize_module(block().up), r"use QuantDense.from_linear"),
        (ValueError, lambda: quantize_module(block(), include="("), r"include must be regular .*'\('"),
        (ValueError, lambda: quantize_module(block(), include="none"), r"no module is left .*not in include"),
        (ValueError, lambda: quantize_module(block(), group_size="best"), r"\"auto\", got 'best'"),
        (
            ValueError,
            lambda: quantize_module(block(), group_size=32, method="x"),
            r"^up: quantize: method must",
        ),
        (ValueError, lambda: quantize_params(up(np.nan, 128)), r"^up: quantize: w must be finite"),
        (ValueError, lambda: quantize_params(up(1, 96)), r"^up: quantize_params: .*group_size=128, K=96"),
    ],
)
def test_messages(error, call, message):
    with pytest.raises(error, match=message):
        call()
