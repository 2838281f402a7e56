"""The primitive under every JAX transformation, against the same formula in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun.primitive import matmul_p
from jax_trirun.testing import MatmulProblem

K, N, M, G = 192, 40, 5, 64
PROBLEM = MatmulProblem(M, K, N, G, with_zeros=True, scale_magnitude=0.1)
CODES = PROBLEM.codes()
WORDS = jax_trirun.pack(CODES)
ARGS = (jnp.asarray(PROBLEM.x()), jnp.asarray(PROBLEM.scales()), jnp.asarray(PROBLEM.zeros()))
NAMES = ("x", "scales", "zeros")


def fused(x, scales, zeros, words=WORDS):
    return jax_trirun.matmul(x, words, scales, zeros)


def plain(x, scales, zeros, codes=CODES):
    def rows(a):
        return jnp.repeat(a, K // a.shape[0], axis=0)

    return jnp.matmul(x, rows(scales) * (codes - rows(zeros)), precision="highest")


def scalar(f):
    return lambda *args: jnp.sum(jnp.tanh(f(*args)))


def assert_same(got, want, tolerance=2e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(initial=0), 1e-6))


# ---- Derivatives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", range(3), ids=NAMES)
@pytest.mark.parametrize(
    "derivative", [jax.grad, jax.jacfwd, jax.jacrev, jax.hessian], ids=["grad", "jacfwd", "jacrev", "hessian"]
)
def test_derivatives_of_each_argument(derivative, argument):
    args = (ARGS[0][:2], *ARGS[1:])
    assert_same(derivative(scalar(fused), argument)(*args), derivative(scalar(plain), argument)(*args))


def test_value_and_grad_of_all_at_once_under_jit():
    both = [jax.jit(jax.value_and_grad(scalar(f), (0, 1, 2)))(*ARGS) for f in (fused, plain)]
    assert_same(*both)


@pytest.mark.parametrize("argument", range(3), ids=NAMES)
def test_jvp_and_vjp_agree_with_each_other(argument):
    rng = np.random.default_rng(0)
    tangent = jnp.asarray(rng.normal(size=ARGS[argument].shape), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(M, N)), jnp.float32)

    def f(a):
        return fused(*(a if i == argument else b for i, b in enumerate(ARGS)))

    _, y_dot = jax.jvp(f, (ARGS[argument],), (tangent,))
    _, pull = jax.vjp(f, ARGS[argument])
    np.testing.assert_allclose(jnp.vdot(y_dot, cotangent), jnp.vdot(tangent, pull(cotangent)[0]), rtol=1e-4)


def test_third_derivatives_mixing_all_arguments():
    def nested(f):
        inner = lambda *args: jnp.sum(jax.grad(scalar(f), 1)(*args) ** 2)  # noqa: E731
        middle = lambda *args: jnp.sum(jax.grad(inner, 2)(*args) ** 2)  # noqa: E731
        return jax.grad(middle, (0, 1, 2))(*ARGS)

    assert_same(nested(fused), nested(plain), 1e-4)


def test_forward_over_reverse_and_reverse_over_forward():
    def hvp(f, a, v):
        return jax.jvp(jax.grad(f), (a,), (v,))[1], jax.grad(lambda a: jax.jvp(f, (a,), (v,))[1])(a)

    for i in range(3):
        fs = [
            (lambda a, f=f, i=i: scalar(f)(*(a if j == i else b for j, b in enumerate(ARGS))))
            for f in (fused, plain)
        ]
        v = jnp.ones_like(ARGS[i])
        assert_same(hvp(fs[0], ARGS[i], v), hvp(fs[1], ARGS[i], v), 1e-4)


@pytest.mark.parametrize("argument", [0, 1], ids=NAMES[:2])
def test_linear_transpose(argument):
    def linear(f):
        at = lambda a: f(*(a if i == argument else b for i, b in enumerate(ARGS)))  # noqa: E731
        return jax.linear_transpose(at, ARGS[argument])(jnp.ones((M, N)))

    assert_same(linear(fused), linear(plain))


def test_transposing_twice_is_the_product_again():
    f = lambda x: fused(x, *ARGS[1:])  # noqa: E731
    once = lambda y: jax.linear_transpose(f, ARGS[0])(y)[0]  # noqa: E731
    twice = jax.linear_transpose(once, jnp.ones((M, N)))(ARGS[0])[0]
    assert_same(twice, f(ARGS[0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_cotangents_have_their_arguments_dtypes(dtype, out_dtype):
    x, scales, zeros = ARGS[0].astype(dtype), ARGS[1].astype("float32"), ARGS[2].astype(dtype)

    def loss(x, scales, zeros):
        return jnp.sum(jax_trirun.matmul(x, WORDS, scales, zeros, out_dtype=out_dtype).astype(jnp.float32))

    grads = jax.grad(loss, (0, 1, 2))(x, scales, zeros)
    assert [g.dtype for g in grads] == [dtype, "float32", dtype]
    wide = [a.astype(jnp.float32) for a in (x, scales, zeros)]
    want = jax.grad(lambda *args: jnp.sum(plain(*args)), (0, 1, 2))(*wide)
    assert_same([g.astype(jnp.float32) for g in grads], want, 2e-2)


def test_gradient_without_zeros():
    got = jax.grad(scalar(lambda x, s: jax_trirun.matmul(x, WORDS, s)), (0, 1))(*ARGS[:2])
    want = jax.grad(scalar(lambda x, s: plain(x, s, jnp.ones_like(s))), (0, 1))(*ARGS[:2])
    assert_same(got, want)


def test_gradient_through_a_quant_tensor():
    qt = PROBLEM.quant_tensor()
    grads = jax.grad(lambda q: jnp.sum(jax_trirun.matmul(ARGS[0], q)), allow_int=True)(qt)
    want = jax.grad(lambda s: jnp.sum(plain(ARGS[0], s, ARGS[2])))(ARGS[1])
    assert_same(grads.scales, want)
    assert grads.words.dtype == jax.dtypes.float0


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_gradient_of_scales_made_part_by_part(group_size, with_zeros):
    k = 768  # parts of whole blocks and groups, or of some of one group's rows
    problem = MatmulProblem(M, k, N, group_size, with_zeros=with_zeros, scale_magnitude=0.1)
    x, scales, zeros = problem.x(), problem.scales(), problem.zeros()
    words, codes = jax_trirun.pack(problem.codes()), problem.codes().astype(np.float32)

    def by_rows(a):
        return jnp.repeat(a, k // a.shape[0], axis=0)

    def dense(scales):
        return jnp.matmul(
            x, by_rows(scales) * (codes - (by_rows(zeros) if with_zeros else 1)), precision="highest"
        )

    def packed(scales):
        return jax_trirun.matmul(x, words, scales, zeros)

    got, want = (
        jax.grad(lambda s, f=f: jnp.sum(jnp.tanh(f(s))))(jnp.asarray(scales)) for f in (packed, dense)
    )
    assert_same(got, want)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("rows", [4, 256])
def test_gradient_of_scales_in_memory_near_the_packed_size(rows, group_size):
    problem = MatmulProblem(rows, 2048, 1024, group_size)
    # On the CPU, whose kernel takes float32: elsewhere it is the reference that holds the dense weight.
    with jax.default_device(jax.devices("cpu")[0]):
        x, scales = jnp.asarray(problem.x()), jnp.asarray(problem.scales())
        words = jax_trirun.pack(problem.codes())
        gradient = jax.grad(lambda scales, x, words: jnp.sum(jnp.tanh(jax_trirun.matmul(x, words, scales))))
        temporary = jax.jit(gradient).lower(scales, x, words).compile().memory_analysis().temp_size_in_bytes
    # y and its cotangent; a part of x.T @ y_bar (1 MB) and its codes as bytes. The dense weight has 8 MB.
    activations = 4 * (x.nbytes + 4 * rows * 1024)
    assert temporary < 2 * words.nbytes + 1.5 * (1 << 20) + activations


@pytest.mark.parametrize("loop", [True, False], ids=["scan", "unrolled"])
def test_gradients_of_many_layers_scales_never_hold_their_codes(loop):
    layers, size = 8, 1024
    problem = MatmulProblem(4, size, size, 128, scale_magnitude=0.05)
    scales = jnp.stack([jnp.asarray(problem.scales())] * layers)
    words = jnp.stack([jax_trirun.pack(problem.codes())] * layers)

    def layer(x, weight):
        return jnp.tanh(jax_trirun.matmul(x, *weight)), None

    def loss(scales, words, x):
        if loop:
            return jnp.sum(jax.lax.scan(layer, x, (words, scales))[0])
        for weight in zip(words, scales, strict=True):
            x, _ = layer(x, weight)
        return jnp.sum(x)

    program = jax.jit(jax.grad(loss)).lower(scales, words, problem.x())
    temporary = (
        program.compile({"xla_cpu_enable_concurrency_optimized_scheduler": False})
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert temporary < size * size * layers  # bytes of codes; half of one layer dense, for x, has 2 MB


def test_words_need_no_gradient():
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda w: jnp.sum(fused(*ARGS, w)))(WORDS)


# ---- Batching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask", range(1, 16), ids=lambda m: "".join("xwsz"[i] for i in range(4) if m >> i & 1)
)
def test_vmap_of_every_combination(mask):
    stacks = [
        jnp.stack([ARGS[0], ARGS[0] * 2, ARGS[0] - 1]),
        jnp.stack([WORDS, jax_trirun.pack(3 - CODES), WORDS]),
        jnp.stack([ARGS[1], -ARGS[1], ARGS[1] * 3]),
        jnp.stack([ARGS[2], ARGS[2] + 1, ARGS[2] * 0.5]),
    ]
    singles = [ARGS[0], WORDS, ARGS[1], ARGS[2]]
    axes = [0 if mask >> i & 1 else None for i in range(4)]
    args = [stack if a == 0 else single for a, stack, single in zip(axes, stacks, singles, strict=True)]
    want = [
        jax_trirun.matmul(*(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)))
        for i in range(3)
    ]
    for f in (jax.vmap(jax_trirun.matmul, axes), jax.jit(jax.vmap(jax_trirun.matmul, axes))):
        assert_same(f(*args), jnp.stack(want), 1e-6)


def test_vmap_over_inner_and_output_axes():
    xs = jnp.moveaxis(jnp.stack([ARGS[0], ARGS[0] * 2]), 0, 2)
    got = jax.vmap(fused, (2, None, None), 1)(xs, *ARGS[1:])
    assert_same(got, jnp.stack([fused(xs[..., i], *ARGS[1:]) for i in range(2)], 1), 1e-6)


def test_vmap_of_x_is_one_call():
    """The batch joins M: a single product, not a loop."""
    jaxpr = jax.make_jaxpr(jax.vmap(fused, (0, None, None)))(jnp.stack([ARGS[0]] * 4), *ARGS[1:])
    calls = [e for e in jaxpr.jaxpr.eqns if e.primitive is matmul_p]
    assert len(calls) == 1 and calls[0].outvars[0].aval.shape == (4 * M, N)


def test_nested_vmap_and_gradient_of_vmap():
    xs = jnp.stack([jnp.stack([ARGS[0], ARGS[0] + i]) for i in range(3)])
    scales = jnp.stack([ARGS[1], ARGS[1] * 2])
    f = jax.vmap(jax.vmap(fused, (0, 0, None)), (0, None, None))
    g = jax.vmap(jax.vmap(plain, (0, 0, None)), (0, None, None))
    assert_same(f(xs, scales, ARGS[2]), g(xs, scales, ARGS[2]))
    args = (xs, scales, ARGS[2])
    assert_same(jax.grad(scalar(f), (0, 1, 2))(*args), jax.grad(scalar(g), (0, 1, 2))(*args), 1e-4)


def test_per_example_gradients():
    f = jax.vmap(jax.grad(scalar(fused), 1), (0, None, None))
    g = jax.vmap(jax.grad(scalar(plain), 1), (0, None, None))
    xs = ARGS[0][:, None]
    assert_same(f(xs, *ARGS[1:]), g(xs, *ARGS[1:]))


# ---- Control flow, remat, donation ------------------------------------------------------------------


def test_scan_over_stacked_layers_and_its_gradient():
    square = MatmulProblem(3, 128, 128, 64)
    codes = np.stack([MatmulProblem(3, 128, 128, 64, seed=i).codes() for i in range(3)])
    scales = jnp.stack([jnp.asarray(square.scales()) * (i + 1) for i in range(3)])
    stacked = jax_trirun.QuantTensor(jax_trirun.pack(codes), scales, shape=(128, 128), group_size=64)
    assert stacked.batch_shape == (3,)

    def run(scales):
        qt = jax_trirun.QuantTensor(stacked.words, scales, shape=(128, 128), group_size=64)
        return jax.lax.scan(lambda x, q: (jnp.tanh(jax_trirun.matmul(x, q)), None), square.x(), qt)[0]

    def unrolled(scales):
        x = square.x()
        for i in range(3):
            x = jnp.tanh(jnp.matmul(x, jnp.repeat(scales[i], 64, 0) * (codes[i] - 1.0), precision="highest"))
        return x

    assert_same(jax.jit(run)(scales), unrolled(scales))
    assert_same(jax.grad(lambda s: run(s).sum())(scales), jax.grad(lambda s: unrolled(s).sum())(scales), 1e-4)


def test_cond_switch_and_while():
    branch = jax.jit(lambda p, *args: jax.lax.cond(p, fused, lambda *a: -fused(*a), *args))
    assert_same(branch(True, *ARGS), fused(*ARGS), 1e-6)
    assert_same(branch(False, *ARGS), -fused(*ARGS), 1e-6)

    def body(state):
        i, total = state
        return i + 1, total + fused(*ARGS)

    _, total = jax.lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.zeros((M, N))))
    assert_same(total, 3 * fused(*ARGS))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_remat(policy):
    f = jax.checkpoint(scalar(fused), policy=policy)
    assert_same(jax.jit(jax.grad(f, (0, 1, 2)))(*ARGS), jax.grad(scalar(plain), (0, 1, 2))(*ARGS))


def test_donated_arguments():
    square = MatmulProblem(128, 128, 128, 64)
    qt = square.quant_tensor()
    f = jax.jit(lambda x: jax_trirun.matmul(x, qt), donate_argnums=0)
    x = jnp.asarray(square.x())
    want = np.asarray(jax_trirun.matmul(x, qt))
    np.testing.assert_array_equal(f(x), want)
    assert x.is_deleted()


def test_gradients_of_no_rows():
    args = (ARGS[0][:0], *ARGS[1:])
    y, pull = jax.vjp(fused, *args)
    assert y.shape == (0, N)
    for got, arg in zip(pull(y), args, strict=True):
        assert got.shape == arg.shape and (got == 0).all()


def test_eval_shape_and_custom_shapes_need_no_arrays():
    out = jax.eval_shape(fused, *(jax.ShapeDtypeStruct(a.shape, "bfloat16") for a in ARGS))
    assert (out.shape, out.dtype) == ((M, N), jnp.bfloat16)


def test_a_quant_tensor_is_a_pytree():
    qt = PROBLEM.quant_tensor()
    leaves, tree = jax.tree.flatten(qt)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert (again.shape, again.group_size, again.bits) == ((K, N), G, 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(qt)]
    assert paths == [".words", ".scales", ".zeros"]
    assert jax.tree.map(lambda _: None, qt, is_leaf=lambda a: a is not qt).words is None
    assert_same(jax.jit(jax_trirun.matmul)(ARGS[0], qt), fused(*ARGS), 1e-6)


# ---- Where there is no module -----------------------------------------------------------------------


def test_other_platforms_get_the_reference():
    """Lowered for TPU: plain operations, no custom call."""
    lowered = jax.jit(fused).trace(*ARGS).lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in lowered and "dot_general" in lowered
    assert "jax_trirun_matmul_v1" in jax.jit(fused).trace(*ARGS).lower(lowering_platforms=("cpu",)).as_text()


def test_export_for_two_platforms_and_any_batch():
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers")
    (m,) = export.symbolic_shape("m")
    x = jax.ShapeDtypeStruct((m, K), jnp.float32)
    targets = [export.DisabledSafetyCheck.custom_call(jax_trirun._ffi.MATMUL_TARGET)]
    exported = export.export(
        jax.jit(lambda x: fused(x, *ARGS[1:])), platforms=("cpu", "tpu"), disabled_checks=targets
    )(x)
    again = export.deserialize(exported.serialize())
    with jax.default_device(jax.devices("cpu")[0]):  # one of the two, where a GPU is the default
        for rows in (1, 5):
            x = jnp.asarray(np.asarray(ARGS[0])[:rows])
            assert_same(again.call(x), fused(x, *ARGS[1:]), 1e-6)


# ---- shard_map, on devices of a process of their own ------------------------------------------------

_SHARD_MAP_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, jax_trirun
from jax.sharding import PartitionSpec as P
from jax_trirun.testing import MatmulProblem

p = MatmulProblem(8, 256, 128, 64, with_zeros=True, scale_magnitude=0.1)
codes, words = p.codes(), jax_trirun.pack(p.codes())
args = tuple(map(jnp.asarray, (p.x(), p.scales(), p.zeros())))
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

def plain(x, s, z):
    w = jnp.repeat(s, 64, 0) * (codes - jnp.repeat(z, 64, 0))
    return jnp.sum(jnp.tanh(jnp.matmul(x, w, precision="highest")))

want = jax.value_and_grad(plain, (0, 1, 2))(*args)
none, rows, cols = P(), P("d", None), P(None, "d")
ways = {
    "data": ((rows, none, none, none), False),
    "columns": ((none, P(None, "d", None), cols, cols), False),
    "rows": ((cols, P("d", None, None), rows, rows), True),
}
for name, (specs, sum_before) in ways.items():
    def body(x, w, s, z):
        y = jax_trirun.matmul(x, w, s, z)
        if sum_before:
            return jnp.sum(jnp.tanh(jax.lax.psum(y, "d")))
        return jax.lax.psum(jnp.sum(jnp.tanh(y)), "d")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
    got = jax.jit(jax.value_and_grad(lambda x, s, z: mapped(x, words, s, z), (0, 1, 2)))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max(), err_msg=name)

for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    f = jax.jit(jax_trirun.matmul)
    whole = f(args[0], words, *args[1:])
    for specs in [w[0] for w in ways.values()]:
        named = [jax.NamedSharding(mesh, spec) for spec in specs]
        shards = jax.device_put([args[0], words, *args[1:]], named)
        np.testing.assert_allclose(f(*shards), whole, rtol=1e-5, atol=1e-5)
print("all ways agree")
"""


def test_shard_map_and_sharded_arrays(run_python):
    """check_vma=True: operands that are the same on every device get their cotangents summed."""
    flags = "--xla_force_host_platform_device_count=4"
    assert "all ways agree" in run_python(_SHARD_MAP_SCRIPT, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
