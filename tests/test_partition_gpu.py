"""Every sharding on two or four GPUs, where the parts are products of the CUDA kernels and NCCL sums them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, assert_close, matmul_float64

GPUS = jax.devices("cuda") if "cuda" in _ffi.usable_backends() else []
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(GPUS) < 2, reason=f"needs two GPUs and the CUDA module, found {len(GPUS)}"),
]

K, N, G = 1024, 512, 128
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# name: (specs of x, of words, of scales, of y), whether the parts are summed.
WAYS = {
    "N": ((P(None, None), P(None, "d", None), P(None, "d"), P(None, "d")), False),
    "K": ((P(None, "d"), P("d", None, None), P("d", None), P(None, None)), True),
    "rows": ((P("d", None), P(None, None, None), P(None, None), P("d", None)), False),
    "rows and N": ((P("a", None), P(None, "b", None), P(None, "b"), P("a", "b")), False),
    "rows and K": ((P("a", "b"), P("b", None, None), P("b", None), P("a", None)), True),
    "K and N": ((P(None, "a"), P("a", "b", None), P("a", "b"), P(None, "b")), True),
}


def mesh_for(way, kind):
    if "and" not in way:
        return jax.make_mesh((len(GPUS),), ("d",), (kind,), devices=GPUS)
    if len(GPUS) < 4:
        pytest.skip(f"two axes of a mesh need four GPUs, found {len(GPUS)}")
    return jax.make_mesh((2, 2), ("a", "b"), (kind, kind), devices=GPUS[:4])


def collectives(text):
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("m", "dtype"), [(4, "bfloat16"), (8, "float16"), (200, "bfloat16")])
def test_result_and_collectives(way, kind, m, dtype):
    (*specs, y_spec), summed = WAYS[way]
    mesh = mesh_for(way, kind)
    problem = MatmulProblem(m, K, N, G, dtype, dtype)
    arrays = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(
            (problem.x(), jax_trirun.pack(problem.codes()), problem.scales()), specs, strict=True
        )
    ]
    f = jax.jit(jax_trirun.matmul)
    y = f(*arrays)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, y_spec), 2)
    assert_close(y, matmul_float64(problem.x(), problem.codes(), problem.scales()))
    text = f.lower(*arrays).compile().as_text()
    assert collectives(text) == ({"all-reduce": 1} if summed else {})
    assert _ffi.MATMUL_TARGET in text, "each device runs the kernel on its part"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_stay_sharded(way, kind):
    (x_spec, words_spec, scales_spec, _), _ = WAYS[way]
    mesh = mesh_for(way, kind)
    problem = MatmulProblem(8, K, N, G, "bfloat16", scale_magnitude=0.05)

    def loss(x, scales, words):
        return jnp.sum(jnp.tanh(jax_trirun.matmul(x, words, scales, out_dtype="float32")))

    alone = [jnp.asarray(a) for a in (problem.x(), problem.scales(), jax_trirun.pack(problem.codes()))]
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    specs = (x_spec, scales_spec, words_spec)
    there = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(alone, specs, strict=True)]
    for got, want, spec in zip(gradients(*there), gradients(*alone), specs, strict=False):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * np.abs(want).max())
    assert "all-gather" not in gradients.lower(*there).compile().as_text()


def test_shards_that_cut_a_group_are_gathered_with_a_warning():
    problem = MatmulProblem(4, 384, 64, 128, "bfloat16", "bfloat16")
    mesh = jax.make_mesh((2,), ("d",), devices=GPUS[:2])
    specs = (P(None, "d"), P("d", None, None), P(None, None))
    arrays = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(
            (problem.x(), jax_trirun.pack(problem.codes()), problem.scales()), specs, strict=True
        )
    ]
    with pytest.warns(UserWarning, match="2 shards of K=384 do not hold .* whole groups of 128"):
        y = jax.jit(jax_trirun.matmul)(*arrays)
    assert_close(y, matmul_float64(problem.x(), problem.codes(), problem.scales()))
