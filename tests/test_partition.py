"""Products on meshes of eight devices: right everywhere, and sharded at no more communication than it takes."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_trirun
from jax_trirun.partition import Placement, Weight, place
from jax_trirun.testing import MatmulProblem, assert_close, matmul_float64

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
K, N, M, G = 512, 256, 8, 64
PROBLEM = MatmulProblem(M, K, N, G, with_zeros=True, scale_magnitude=0.1)
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

both_kinds = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def mesh_of(*kinds, shape=(2, 4), names=("b", "t")):
    kinds = kinds * len(shape) if len(kinds) == 1 else kinds
    return jax.make_mesh(shape, names, kinds, devices=jax.devices("cpu"))


def weight_specs(k, n):
    """How words, scales and zeros are sharded when K and N are."""
    return P(k, n, None), P(k, n), P(k, n)


def arrays_of(problem):
    arrays = (problem.x(), jax_trirun.pack(problem.codes()), problem.scales(), problem.zeros())
    return tuple(jnp.asarray(a) for a in arrays if a is not None)


def put(mesh, arrays, specs):
    return tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=False))


def collectives(f, *arrays):
    """{name: how many} of the compiled program."""
    text = jax.jit(f).lower(*arrays).compile().as_text()
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def loss(x, scales, zeros, words):
    return jnp.sum(jnp.tanh(jax_trirun.matmul(x, words, scales, zeros)))


def spec_of(array):
    """The sharding's spec, as long as the array's rank."""
    spec = tuple(array.sharding.spec)
    return P(*spec, *[None] * (array.ndim - len(spec)))


def assert_same(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-3))


# ---- What each sharding costs -----------------------------------------------------------------------

# name: (spec of x, axes of K, axes of N), the result's spec, collectives of y, and of the gradients.
REDUCE, TWICE = {"all-reduce": 1}, {"all-reduce": 2}
WAYS = {
    "replicated": ((P(None, None), None, None), P(None, None), {}, {}),
    "N": ((P(None, None), None, "t"), P(None, "t"), {}, REDUCE),
    "K": ((P(None, "t"), "t", None), P(None, None), REDUCE, REDUCE),
    "rows": ((P("b", None), None, None), P("b", None), {}, REDUCE),
    "rows and N": ((P("b", None), None, "t"), P("b", "t"), {}, TWICE),
    "rows and K": ((P("b", "t"), "t", None), P("b", None), REDUCE, TWICE),
    "K and N": ((P(None, "b"), "b", "t"), P(None, "t"), REDUCE, TWICE),
    "K over both axes": ((P(None, ("b", "t")), ("b", "t"), None), P(None, None), REDUCE, REDUCE),
    "N over both axes": ((P(None, None), None, ("b", "t")), P(None, ("b", "t")), {}, REDUCE),
}


@both_kinds
@pytest.mark.parametrize("way", WAYS)
def test_result_gradients_and_collectives(kind, way):
    (x_spec, k, n), y_spec, of_y, of_gradients = WAYS[way]
    x, words, scales, zeros = put(mesh_of(kind), arrays_of(PROBLEM), (x_spec, *weight_specs(k, n)))
    y = jax.jit(jax_trirun.matmul)(x, words, scales, zeros)
    assert spec_of(y) == y_spec
    assert_close(y, matmul_float64(PROBLEM.x(), PROBLEM.codes(), PROBLEM.scales(), PROBLEM.zeros()))
    assert collectives(jax_trirun.matmul, x, words, scales, zeros) == of_y

    gradients = jax.grad(loss, (0, 1, 2))
    got = jax.jit(gradients)(x, scales, zeros, words)
    alone = arrays_of(PROBLEM)
    assert_same(got, gradients(alone[0], alone[2], alone[3], alone[1]))
    assert [spec_of(g) for g in got] == [x_spec, *weight_specs(k, n)[1:]]
    assert collectives(gradients, x, scales, zeros, words) == of_gradients


@both_kinds
def test_gradients_of_scales_are_summed_by_groups(kind):
    """Devices that have rows of x add what is as small as the scales, never something as large as the weight."""
    x, words, scales, zeros = put(mesh_of(kind), arrays_of(PROBLEM), (P("b", None), *weight_specs(None, "t")))
    gradient = jax.jit(jax.grad(lambda scales, *rest: loss(rest[0], scales, *rest[1:])))
    text = gradient.lower(scales, x, zeros, words).compile().as_text()
    sizes = re.findall(r"= \w+\[([\d,]+)\]\S* all-reduce\(", text)
    assert [[int(n) for n in size.split(",")] for size in sizes] == [[scales.shape[0], scales.shape[1] // 4]]


@both_kinds
def test_eagerly_and_in_the_context_of_the_mesh(kind):
    mesh = mesh_of(kind)
    arrays = put(mesh, arrays_of(PROBLEM), (P("b", "t"), *weight_specs("t", None)))
    want = jax_trirun.matmul(*arrays_of(PROBLEM))
    assert_same(jax_trirun.matmul(*arrays), want)
    with jax.set_mesh(mesh):
        assert_same(jax_trirun.matmul(*arrays), want)
        assert collectives(jax_trirun.matmul, *arrays) == REDUCE
        assert_same(
            jax.jit(jax.grad(loss))(*(arrays[i] for i in (0, 2, 3, 1))),
            jax.grad(loss)(*(arrays_of(PROBLEM)[i] for i in (0, 2, 3, 1))),
        )


@both_kinds
def test_devices_in_another_order(kind):
    devices = np.asarray(jax.devices("cpu"))[[3, 0, 7, 1, 6, 2, 5, 4]].reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("b", "t"), axis_types=(kind, kind))
    arrays = put(mesh, arrays_of(PROBLEM), (P("b", "t"), *weight_specs("t", None)))
    y = jax.jit(jax_trirun.matmul)(*arrays)
    assert_same(y, jax_trirun.matmul(*arrays_of(PROBLEM)))
    assert spec_of(y) == P("b", None) and collectives(jax_trirun.matmul, *arrays) == REDUCE


@both_kinds
def test_x_moves_to_a_weight_that_is_sharded_otherwise(kind):
    arrays = put(mesh_of(kind), arrays_of(PROBLEM), (P(None, "t"), *weight_specs(None, "t")))
    assert_same(jax.jit(jax_trirun.matmul)(*arrays), jax_trirun.matmul(*arrays_of(PROBLEM)))
    text = jax.jit(jax_trirun.matmul).lower(*arrays).compile().as_text()
    assert re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", text) == ["f32"] and "all-to-all" not in text


@both_kinds
def test_what_is_not_sharded_follows_what_is(kind):
    """x and scales on one device, words on all: nothing is gathered."""
    x, words, scales, zeros = arrays_of(PROBLEM)
    mesh = mesh_of(kind)
    for k, n, expected in (("t", None, REDUCE), (None, "t", {})):
        sharded = put(mesh, (words,), weight_specs(k, n))[0]
        assert_same(
            jax.jit(jax_trirun.matmul)(x, sharded, scales, zeros), jax_trirun.matmul(x, words, scales, zeros)
        )
        assert collectives(jax_trirun.matmul, x, sharded, scales, zeros) == expected


@both_kinds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_partial_sums_are_float32(kind, dtype):
    """Row-parallel results are as exact as on one device: rounded once, after the sum."""
    problem = MatmulProblem(M, 2048, 64, 128, dtype, dtype, x_mean=1.0)
    arrays = put(mesh_of(kind), arrays_of(problem), (P(None, ("b", "t")), *weight_specs(("b", "t"), None)))
    y = jax.jit(jax_trirun.matmul)(*arrays)
    assert y.dtype == dtype
    assert_close(y, matmul_float64(problem.x(), problem.codes(), problem.scales()))
    text = jax.jit(jax_trirun.matmul).lower(*arrays).compile().as_text()
    assert re.findall(r"= (\w+)\[[\d,]*\]\S* all-reduce\(", text) == ["f32"]


@both_kinds
def test_one_all_reduce_for_a_column_parallel_and_a_row_parallel_layer(kind):
    up, down = MatmulProblem(M, 256, 512, 64), MatmulProblem(M, 512, 256, 64, seed=1)
    mesh = mesh_of(kind)
    x, *up_weight = put(mesh, arrays_of(up), (P("b", None), *weight_specs(None, "t")))
    down_weight = put(mesh, arrays_of(down)[1:], weight_specs("t", None))

    def block(x, up, down):
        return jax_trirun.matmul(jax.nn.silu(jax_trirun.matmul(x, *up)), *down)

    assert collectives(block, x, tuple(up_weight), down_weight) == REDUCE
    want = block(arrays_of(up)[0], arrays_of(up)[1:], arrays_of(down)[1:])
    assert_same(jax.jit(block)(x, tuple(up_weight), down_weight), want)


@pytest.mark.parametrize("lead", [(2, 3), (8,), (2, 2, 2), ()])
@both_kinds
def test_leading_axes(kind, lead):
    x, *weight = arrays_of(PROBLEM)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*lead, K)).astype(np.float32))
    specs = (P(*(("b",) + (None,) * (len(lead) - 1) if lead else ()), "t"), *weight_specs("t", None))
    arrays = put(mesh_of(kind), (x, *weight), specs)
    y = jax.jit(jax_trirun.matmul)(*arrays)
    assert_same(y, jax_trirun.matmul(x, *weight))
    assert collectives(jax_trirun.matmul, *arrays) == REDUCE


# ---- Who moves when an axis is wanted twice ---------------------------------------------------------


@both_kinds
def test_an_axis_of_both_x_rows_and_the_weight_gathers_the_weight(kind):
    """Fully sharded data parallelism: y stays sharded over rows."""
    arrays = put(mesh_of(kind), arrays_of(PROBLEM), (P("t", None), *weight_specs("t", None)))

    def f(*arrays):
        y = jax_trirun.matmul(*arrays)
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("t", None))) if kind == AUTO else y

    mesh = arrays[0].sharding.mesh
    y = jax.jit(f)(*arrays)
    assert spec_of(y) == P("t", None)
    assert_same(y, jax_trirun.matmul(*arrays_of(PROBLEM)))
    assert set(collectives(f, *arrays)) == {"all-gather"}


def test_a_result_wanted_by_rows_does_not_move_the_weight():
    """Sequence parallelism after a row-parallel layer."""
    mesh = mesh_of(AUTO)
    arrays = put(mesh, arrays_of(PROBLEM), (P(None, "t"), *weight_specs("t", None)))

    def f(*arrays):
        return jax.lax.with_sharding_constraint(jax_trirun.matmul(*arrays), NamedSharding(mesh, P("t", None)))

    assert "all-gather" not in collectives(f, *arrays)
    assert_same(jax.jit(f)(*arrays), jax_trirun.matmul(*arrays_of(PROBLEM)))


def test_placement():
    sizes, weight = {"a": 2, "b": 2, "c": 4}, Weight(k=1024, n=512, groups=8, bits=2)
    none = ((), ())

    def placed(x, words, result=None, weight=weight, transpose=False):
        return place(weight, sizes, x, (*words, ()), words, result, transpose=transpose)

    assert placed(none, none) == Placement((), (), ())
    assert placed((("a",), ()), (("b",), ("c",))) == Placement(("a",), ("b",), ("c",))
    assert placed(none, (("a", "b"), ())) == Placement((), ("a", "b"), ())
    assert placed(((), ("a",)), none) == Placement((), ("a",), ()), "x's K shards a replicated weight"
    assert placed(((), ("a",)), ((), ("a",))) == Placement((), (), ("a",)), "x is gathered, not the weight"
    assert placed((("a",), ()), (("a",), ())) == Placement(("a",), (), ()), "fully sharded data parallel"
    assert placed((("a",), ()), ((), ("a",))) == Placement(("a",), (), ())
    assert placed((("a",), ()), ((), ("a",)), ((), ("a",))) == Placement((), (), ("a",))
    assert placed(none, none, (("a",), ("b",))) == Placement(("a",), (), ("b",)), "as the result is wanted"
    assert placed(none, (("a",), ()), (("a",), ())) == Placement((), ("a",), ()), "the weight stays"
    assert placed(((), ("c",)), ((), ("c",)), transpose=True) == Placement((), (), ("c",))
    with pytest.warns(
        UserWarning, match="16 shards of K=1024 do not hold whole blocks of 64 rows and whole groups of 128"
    ):
        assert placed(none, (("c", "a", "b"), ())) == Placement((), ("c", "a"), ()), "8 of the 16"


# ---- What cannot be cut -----------------------------------------------------------------------------

# (K, N, group size, axes of K, axes of N): sharded arrays that do not make whole blocks and groups.
UNCUTTABLE = {
    "groups": (256, 64, 128, "t", None),
    "groups along both": (256, 128, 128, ("b", "t"), None),
    "blocks of a padded K": (480, 64, 32, "t", None),
    "blocks of a padded N": (128, 104, 64, None, "t"),
}


@both_kinds
@pytest.mark.parametrize("case", UNCUTTABLE)
def test_shards_that_cut_a_block_or_a_group_are_gathered_with_a_warning(kind, case):
    k, n, group_size, k_axes, n_axes = UNCUTTABLE[case]
    problem = MatmulProblem(M, k, n, group_size, with_zeros=True)
    mesh = mesh_of(kind)
    scales_fit = (k // group_size) % 4 == 0 if k_axes == "t" else k_axes is None
    words_fit = (
        -(-k // 64) % (8 if k_axes == ("b", "t") else 4 if k_axes else 1) == 0
        and -(-n // 32) % (4 if n_axes else 1) == 0
    )
    arrays = put(mesh, arrays_of(problem), (
        P(None, k_axes),
        P(k_axes, n_axes, None) if words_fit else P(None, None, None),
        *[P(k_axes, n_axes) if scales_fit else P(None, None)] * 2,
    ))  # fmt: skip
    with pytest.warns(UserWarning, match=r"matmul: \d shards of [KN]=\d+ do not hold whole blocks of"):
        y = jax.jit(jax_trirun.matmul)(*arrays)
    want = matmul_float64(problem.x(), problem.codes(), problem.scales(), problem.zeros())
    assert_close(y, want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*(arrays[i] for i in (0, 2, 3, 1)))
    alone = arrays_of(problem)
    assert_same(got, jax.grad(loss, (0, 1, 2))(*(alone[i] for i in (0, 2, 3, 1))))


@pytest.mark.parametrize(
    ("m", "shape"),
    [(5, (77, 45, -1)), (1, (100, 64, -1)), (16, (64, 33, 32)), (5, (1, 1, -1)), (9, (96, 256, 32))],
)
def test_ragged_sizes_with_rows_over_all_devices(m, shape):
    """Eight devices, and rows that do not divide by eight: what XLA pads is never seen."""
    problem = MatmulProblem(m, *shape, with_zeros=True)
    mesh = mesh_of(AUTO)

    def f(x, *weight):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(("b", "t"), None)))
        return jax_trirun.matmul(x, *weight)

    arrays = put(mesh, arrays_of(problem), [P()] * 4)
    y = jax.jit(f)(*arrays)
    assert_close(y, matmul_float64(problem.x(), problem.codes(), problem.scales(), problem.zeros()))


@both_kinds
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_group_sizes(kind, group_size):
    (x_spec, k, n), y_spec, of_y, _ = WAYS["K and N"]
    problem = MatmulProblem(3, K, N, group_size, "bfloat16")
    one = None if group_size == -1 else k
    arrays = put(mesh_of(kind), arrays_of(problem), (x_spec, P(k, n, None), P(one, n)))
    y = jax.jit(jax_trirun.matmul)(*arrays)
    assert spec_of(y) == y_spec and collectives(jax_trirun.matmul, *arrays) == of_y
    assert_close(y, matmul_float64(problem.x(), problem.codes(), problem.scales()))

    def of_scales(x, words, scales):
        return jnp.sum(jnp.sin(jax_trirun.matmul(x, words, scales, out_dtype="float32")))

    gradient = jax.jit(jax.grad(of_scales, 2))
    got = gradient(*arrays)
    assert spec_of(got) == P(one, n)
    assert_same(got, gradient(*arrays_of(problem)), 1e-4)


# ---- Under other transformations --------------------------------------------------------------------


@both_kinds
def test_scan_over_sharded_layers_with_remat(kind):
    mesh = mesh_of(kind)
    layers = [MatmulProblem(M, 256, 256, 64, seed=i) for i in range(3)]
    words, scales = (jnp.stack(a) for a in zip(*(arrays_of(p)[1:] for p in layers), strict=True))
    x = jnp.asarray(layers[0].x())

    def run(x, scales, words):
        @jax.checkpoint
        def layer(x, weight):
            return jnp.tanh(jax_trirun.matmul(x, *weight)), None

        return jnp.sum(jax.lax.scan(layer, x, (words, scales))[0])

    gradients = jax.value_and_grad(run, (0, 1))
    specs = P("b", None), P(None, "t", None), P(None, "t", None, None)  # all row-parallel
    sharded = put(mesh, (x, scales, words), specs)
    got = jax.jit(gradients)(*sharded)
    assert_same(got, gradients(x, scales, words), 1e-4)
    text = jax.jit(gradients).lower(*sharded).compile().as_text()
    assert not re.search(r"= u32\S* all-gather", text), "words are not gathered"
    assert spec_of(got[1][1]) == P(None, "t", None)


@both_kinds
def test_vmap_of_sharded_operands(kind):
    mesh = mesh_of(kind)
    x, *weight = arrays_of(PROBLEM)
    xs = jnp.stack([x, x * 2, x - 1, x + 1])
    batched = jax.vmap(jax_trirun.matmul, (0, None, None, None))
    want = batched(xs, *weight)
    for batch in (None, "b"):
        arrays = put(mesh, (xs, *weight), (P(batch, None, "t"), *weight_specs("t", None)))
        if batch is None or kind == AUTO:
            assert_same(jax.jit(batched)(*arrays), want)
            assert collectives(batched, *arrays) == REDUCE
        else:
            with pytest.warns(UserWarning, match=r"along \('b',\) gathers .* x with that axis in front"):
                assert_same(jax.jit(batched)(*arrays), want)
            assert_same(jax.jit(jax_trirun.matmul)(*arrays), want)
            assert collectives(jax_trirun.matmul, *arrays) == REDUCE
    stacked = tuple(jnp.stack([a, a]) for a in weight)
    every = jax.vmap(jax_trirun.matmul, (None, 0, 0, 0))
    specs = [P(None, *spec) for spec in weight_specs(None, "t")]
    arrays = put(mesh, (x, *stacked), (P("b", None), *specs))
    assert_same(jax.jit(every)(*arrays), every(x, *stacked))
    assert collectives(every, *arrays) == {}


@both_kinds
def test_vmap_over_an_axis_that_is_sharded(kind):
    """Experts, each with a weight of its own: right under vmap, without communication with shard_map around it."""
    mesh = mesh_of(kind)
    x, words, scales, zeros = (jnp.stack([a] * 4) for a in arrays_of(PROBLEM))
    scales *= jnp.arange(1, 5, dtype=scales.dtype)[:, None, None]

    def experts(x, words, scales, zeros):
        return jax.vmap(jax_trirun.matmul)(x, words, scales, zeros)

    def total(scales, x, words, zeros, experts=experts):
        return jnp.sum(jnp.sin(experts(x, words, scales, zeros)))

    want, gradient = experts(x, words, scales, zeros), jax.grad(total)(scales, x, words, zeros)
    x, words, scales, zeros = put(mesh, (x, words, scales, zeros), [P("t")] * 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(jax.jit(experts)(x, words, scales, zeros), want)
        assert_same(jax.jit(jax.grad(total))(scales, x, words, zeros), gradient)
    told = {str(w.message) for w in caught}
    assert all("put jax.shard_map around jax.vmap" in text for text in told) and bool(told) == (
        kind == EXPLICIT
    )

    by_parts = jax.shard_map(experts, mesh=mesh, in_specs=(P("t"),) * 4, out_specs=P("t"))
    assert_same(jax.jit(by_parts)(x, words, scales, zeros), want)
    assert collectives(by_parts, x, words, scales, zeros) == {}
    of_scales = jax.grad(functools.partial(total, experts=by_parts))
    assert_same(jax.jit(of_scales)(scales, x, words, zeros), gradient)
    assert collectives(of_scales, scales, x, words, zeros) == {}


@both_kinds
def test_quant_tensors(kind):
    mesh = mesh_of(kind)
    qt = PROBLEM.quant_tensor()
    specs = jax.tree.unflatten(jax.tree.structure(qt), weight_specs(None, "t"))
    sharded = jax.device_put(
        qt, jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    )
    x = jax.device_put(PROBLEM.x(), NamedSharding(mesh, P("b", None)))
    assert_same(jax.jit(jax_trirun.matmul)(x, sharded), jax_trirun.matmul(jnp.asarray(PROBLEM.x()), qt))
    assert collectives(jax_trirun.matmul, x, sharded) == {}


# ---- Inside shard_map -------------------------------------------------------------------------------


@both_kinds
def test_partly_manual_shard_map(kind):
    """Rows by hand; the other axis is left to types, or to XLA, which gathers."""
    mesh = mesh_of(kind)
    alone = arrays_of(PROBLEM)
    for k, n in ((None, "t"), ("t", None)):
        arrays = put(mesh, alone, (P("b", k), *weight_specs(k, n)))
        by_rows = jax.shard_map(
            jax_trirun.matmul, mesh=mesh, axis_names={"b"},
            in_specs=(P("b", None), P(), P(), P()), out_specs=P("b", None),
        )  # fmt: skip
        assert_same(jax.jit(by_rows)(*arrays), jax_trirun.matmul(*alone))
        if kind == EXPLICIT and jax.__version_info__[:3] not in ((0, 10, 1), (0, 10, 2)):
            # Those two gather whatever enters a partly manual shard_map.
            assert collectives(by_rows, *arrays) == ({} if n else REDUCE)

        def total(x, scales, zeros, words, by_rows=by_rows):
            return jnp.sum(jnp.tanh(by_rows(x, words, scales, zeros)))

        got = jax.jit(jax.grad(total, (0, 1, 2)))(*(arrays[i] for i in (0, 2, 3, 1)))
        assert_same(got, jax.grad(loss, (0, 1, 2))(*(alone[i] for i in (0, 2, 3, 1))))


def test_mesh_with_both_kinds_of_axes():
    alone = arrays_of(PROBLEM)
    for kinds in ((AUTO, EXPLICIT), (EXPLICIT, AUTO)):
        mesh = mesh_of(*kinds)
        for k, n, expected in ((None, "t", {}), ("t", None, REDUCE)):
            arrays = put(mesh, alone, (P("b", k), *weight_specs(k, n)))
            with jax.set_mesh(mesh):
                assert_same(jax.jit(jax_trirun.matmul)(*arrays), jax_trirun.matmul(*alone))
                assert collectives(jax_trirun.matmul, *arrays) == expected
                got = jax.jit(jax.grad(loss, (0, 1, 2)))(*(arrays[i] for i in (0, 2, 3, 1)))
            assert_same(got, jax.grad(loss, (0, 1, 2))(*(alone[i] for i in (0, 2, 3, 1))))


# ---- Packing ----------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(("k", "n"), [("b", "t"), (("b", "t"), None), (None, ("b", "t"))])
def test_pack_unpack_and_dequantize_stay_sharded(kind, k, n):
    mesh = mesh_of(kind)
    codes = jnp.asarray(PROBLEM.codes())
    (there,) = put(mesh, (codes,), (P(k, n),))
    packed = jax.jit(jax_trirun.pack)(there)
    np.testing.assert_array_equal(packed, jax_trirun.pack(codes))
    assert spec_of(packed) == P(k, n, None) and collectives(jax_trirun.pack, there) == {}

    def unpack(words):
        return jax_trirun.unpack(words, (K, N))

    np.testing.assert_array_equal(jax.jit(unpack)(packed), codes)
    assert spec_of(jax.jit(unpack)(packed)) == P(k, n) and collectives(unpack, packed) == {}


@both_kinds
def test_ragged_codes_are_packed_whole(kind):
    mesh = mesh_of(kind)
    codes = jnp.asarray(MatmulProblem(1, 96, 40, 32).codes())
    (there,) = put(mesh, (codes,), (P("t", "b"),))
    with pytest.warns(UserWarning) as warned:
        words = jax.jit(jax_trirun.pack)(there)
    messages = "\n".join(str(w.message) for w in warned)
    assert "4 shards of K=96 do not hold whole blocks of 64 rows" in messages
    assert "2 shards of N=40 do not hold whole blocks of 32 columns" in messages
    np.testing.assert_array_equal(words, jax_trirun.pack(codes))
    np.testing.assert_array_equal(jax.jit(lambda w: jax_trirun.unpack(w, (96, 40)))(words), codes)


# ---- Messages ---------------------------------------------------------------------------------------


def test_arrays_on_two_meshes():
    x, *weight = arrays_of(PROBLEM)
    (x,) = put(mesh_of(EXPLICIT), (x,), (P("b", None),))
    weight = put(mesh_of(EXPLICIT, shape=(8,), names=("d",)), weight, weight_specs(None, "d"))
    with pytest.raises(ValueError, match=r"matmul: all arrays must be on one mesh, got .*; move them with"):
        jax_trirun.matmul(x, *weight)


def test_a_weight_that_was_put_on_one_device():
    x, *weight = arrays_of(PROBLEM)
    (x,) = put(mesh_of(EXPLICIT), (x,), (P("b", None),))
    weight = jax.device_put(weight, jax.devices("cpu")[0])
    with pytest.raises(
        ValueError, match=r"matmul: all arrays must be on one mesh, got .* and an array \(8, 8, "
    ):
        jax_trirun.matmul(x, *weight)
    want = matmul_float64(PROBLEM.x(), PROBLEM.codes(), PROBLEM.scales(), PROBLEM.zeros())
    assert_close(jax.jit(lambda x: jax_trirun.matmul(x, *weight))(x), want)  # a constant may lie anywhere
    there = jax.device_put(weight, NamedSharding(mesh_of(EXPLICIT), P()))
    assert_close(jax_trirun.matmul(x, *there), want)


def test_the_older_partitioner():
    """GSPMD, for as long as JAX has it."""
    script_flag = getattr(jax.config, "jax_use_shardy_partitioner", None)
    if script_flag is None:
        pytest.skip("this JAX has no other partitioner than Shardy")
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        for way in ("N", "K", "rows and K", "K and N"):
            (x_spec, k, n), _, of_y, _ = WAYS[way]
            arrays = put(mesh_of(AUTO), arrays_of(PROBLEM), (x_spec, *weight_specs(k, n)))
            assert_same(jax.jit(jax_trirun.matmul)(*arrays), jax_trirun.matmul(*arrays_of(PROBLEM)))
            assert collectives(jax_trirun.matmul, *arrays) == of_y
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
