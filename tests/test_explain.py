"""explain says what would run, and counts what it costs."""

import jax
import jax.numpy as jnp
import pytest

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, costs

PROBLEM = MatmulProblem(4, 256, 64, 128, "bfloat16", "float16")


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def explain(**options):
    return jax_trirun.explain(PROBLEM.x(), PROBLEM.quant_tensor(), **options)


def test_names_the_native_call_and_its_instruction_set():
    text = explain()
    assert "runs: the FFI call jax_trirun_matmul_v1 of back end 'cpu'" in text
    assert _ffi.cpu_module.current_isa() in text
    assert "[4, 256] bfloat16 @ [256, 64] 2-bit, 2 groups, scales float16" in text


def test_names_the_reference_and_why():
    assert "why: backend='reference' was asked for" in explain(backend="reference")


def test_counts_bytes_and_flops():
    words, scales = 4 * 2 * 128 * 4, 2 * 64 * 2
    assert costs(4, 256, 64, "bfloat16", PROBLEM.quant_tensor()) == (
        words + scales,
        4 * (256 + 64) * 2,
        2 * 4 * 256 * 64,
    )
    text = explain()
    assert f"bytes: {words + scales:,} of weight" in text and f"{4 * (256 + 64) * 2:,} of x and y" in text
    assert f"flops: {2 * 4 * 256 * 64:,}" in text


def test_shapes_alone_are_enough():
    arrays = PROBLEM.quant_tensor()
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    assert jax_trirun.explain(x, spec) == explain()
