"""What each platform is asked to run. No GPU needed: a stand-in for the CUDA module answers its questions."""

_STAND_IN = """
import importlib.machinery, sys, types
import jax, jax.numpy as jnp

asked = []
fake = types.ModuleType("jax_trirun._cuda")
fake.__spec__ = importlib.machinery.ModuleSpec("jax_trirun._cuda", None)
fake.ffi_api_version = lambda: (0, 0)
fake.ffi_handlers = dict
fake.why_unsupported = lambda *args: asked.append(args) or ("" if args[0] <= 64 else "too many rows")
fake.scratch_bytes = lambda m, n, k, groups, dtype, portable: 4096 + m
sys.modules["jax_trirun._cuda"] = fake

import jax_trirun
from jax_trirun.testing import MatmulProblem

def lowered(m, dtype, zeros=False, platform="cuda", f=jax_trirun.matmul, scales=None, **options):
    p = MatmulProblem(m, 256, 64, 128, dtype, scales or dtype, zeros)
    qt = p.quant_tensor()
    g = jax.jit(lambda x, qt: f(x, qt, **options))
    return g.trace(p.x(), qt).lower(lowering_platforms=(platform,)).as_text()

CALL = "stablehlo.custom_call @jax_trirun_matmul_v1"
DEQUANTIZE = "stablehlo.custom_call @jax_trirun_dequantize_v1"
"""


def test_cuda_call_has_a_scratch_result_and_says_whether_it_is_portable(run_python):
    run_python(
        _STAND_IN
        + """
for backend, portable in ((None, 0), ("cuda", 0), ("cuda-portable", 1)):
    asked.clear()
    text = lowered(5, "bfloat16", backend=backend)
    assert text.count(CALL) == 1, text
    assert f"portable = {portable} : i64" in text, text
    assert "(tensor<5x64xbf16>, tensor<4101xui8>)" in text, text
    assert asked == [(5, 64, 256, 2, "bfloat16", "bfloat16", "bfloat16", bool(portable))], asked
    assert "tensor<0x64xbf16>" in text, "no zeros: an array without rows"
assert "tensor<0x64x" not in lowered(5, "float16", zeros=True)
"""
    )


def test_cuda_call_without_scratch_has_one_result(run_python):
    # An empty one would lie in memory that moves, and XLA write the call in its CUDA graph anew in every step.
    run_python(
        _STAND_IN
        + """
fake.scratch_bytes = lambda *sizes: 0
text = lowered(5, "bfloat16")
(call,) = (line for line in text.splitlines() if CALL in line)
assert call.strip().endswith("-> tensor<5x64xbf16>"), call
"""
    )


def test_cuda_leaves_to_the_reference_what_it_does_not_cover(run_python):
    run_python(
        _STAND_IN
        + """
assert CALL in lowered(64, "float16")
def gradient(x, qt, **options):
    return jax.grad(lambda x: jax_trirun.matmul(x, qt, **options).sum())(x)

for case in (lowered(65, "float16"), lowered(5, "float32"), lowered(5, "float16", f=gradient)):
    assert CALL not in case and DEQUANTIZE in case and "dot_general" in case
for case in (lowered(5, "float16", backend="reference"), lowered(5, "float16", f=gradient, backend="reference")):
    assert CALL not in case and DEQUANTIZE not in case and "dot_general" in case
assert DEQUANTIZE not in lowered(5, "float16", f=gradient, platform="cpu")
assert "HIGHEST" in lowered(5, "float32"), "float32 must not become TF32"
"""
    )


def test_what_cuda_leaves_to_the_reference_is_for_tensor_cores_where_that_rounds_nothing(run_python):
    run_python(
        _STAND_IN
        + """
def gradient(of, dtype, **options):
    def f(x, qt):
        if of == "x":
            return jax.grad(lambda x: jax_trirun.matmul(x, qt).astype("float32").sum())(x)
        s = jax.grad(lambda s: jax_trirun.matmul(x, qt.words, s, qt.zeros).astype("float32").sum())(qt.scales)
        return s
    return [line for line in lowered(5, dtype, f=f, **options).splitlines() if "dot_general" in line]

for of in ("x", "scales"):
    (dot,) = gradient(of, "bfloat16")
    assert dot.count("xbf16>") == 2 and "xf32>" in dot, dot  # bfloat16 operands, a float32 sum
    *rest, dot = gradient(of, "float16")
    assert dot.count("xf16>") == 2 and "xf32>" in dot, dot
    for dot in rest:  # TensorFloat-32, for weights that float16 does not hold
        assert of == "x" and "HIGHEST" not in dot and "xf16>" not in dot, dot
    (dot,) = gradient(of, "float32")
    assert "HIGHEST" in dot, dot
    (dot,) = gradient(of, "bfloat16", platform="cpu")
    assert "HIGHEST" in dot and "xbf16>" not in dot, dot
for case in (gradient("x", "bfloat16", scales="float32"), gradient("x", "bfloat16", zeros=True)):
    assert "HIGHEST" in case[0], case
"""
    )


def test_a_kernel_makes_weights_dense_in_what_holds_them(run_python):
    run_python(
        _STAND_IN
        + """
def gradient(x, qt):
    return jax.grad(lambda x: jax_trirun.matmul(x, qt).astype("float32").sum())(x)

def calls(*args, f=gradient, **options):
    return [line.split("->")[1] for line in lowered(*args, f=f, **options).splitlines() if DEQUANTIZE in line]

assert [c.strip() for c in calls(5, "bfloat16")] == ["tensor<128x64xbf16>"]  # half of K at a time
assert [c.strip() for c in calls(5, "float16")] == ["tensor<128x64xf32>", "tensor<128x64xf16>"]
for case in (calls(5, "float16", zeros=True), calls(5, "float16", scales="bfloat16"), calls(5, "float32")):
    assert [c.strip() for c in case] == ["tensor<128x64xf32>"], case
assert [c.strip() for c in calls(65, "bfloat16", f=jax_trirun.matmul)] == ["tensor<256x64xbf16>"]

def wide_zeros(x, qt):
    return gradient(x, jax_trirun.QuantTensor(qt.words, qt.scales, qt.zeros.astype("float32"), shape=qt.shape,
                                              group_size=qt.group_size))

(call,) = [line for line in lowered(5, "float16", zeros=True, f=wide_zeros).splitlines() if DEQUANTIZE in line]
assert call.count("tensor<1x64xf32>") == 2, call

from jax import export
x, qt = jnp.ones((4, 256), "bfloat16"), MatmulProblem(4, 256, 64, 128, "bfloat16", "bfloat16").quant_tensor()
(m,) = export.symbolic_shape("m")
for checks in ((), jax_trirun.export_disabled_checks()):
    try:
        export.export(jax.jit(gradient), platforms=("cpu", "cuda", "tpu"), disabled_checks=checks)(
            jax.ShapeDtypeStruct((m, 256), x.dtype), qt)
    except ValueError as error:
        assert not checks and "jax_trirun.export_disabled_checks()" in str(error), error
    else:
        assert checks
"""
    )


def test_cuda_gets_scales_and_zeros_in_a_dtype_its_kernels_take(run_python):
    run_python(
        _STAND_IN
        + """
text = lowered(5, "bfloat16", scales="float16", zeros=True)
call = next(line for line in text.splitlines() if CALL in line)
assert call.count("tensor<2x64xf32>") == 2, call
assert text.count("stablehlo.convert") == 2, text
assert asked[-1][4:7] == ("bfloat16", "float32", "bfloat16"), asked
for scales in ("bfloat16", "float32"):
    assert "stablehlo.convert" not in lowered(5, "bfloat16", scales=scales)
"""
    )


def test_other_platforms_do_not_change_when_cuda_is_there(run_python):
    run_python(
        _STAND_IN
        + """
assert CALL in lowered(5, "float32", platform="cpu") and "ui8" not in lowered(5, "float32", platform="cpu")
assert CALL not in lowered(5, "bfloat16", platform="rocm") and CALL not in lowered(5, "bfloat16", platform="tpu")
try:
    lowered(5, "bfloat16", platform="cpu", backend="cuda")
except ValueError as error:
    assert "backend='cuda' runs on cuda, but this computation is being compiled for cpu" in str(error)
else:
    raise AssertionError("a CUDA call was lowered for the CPU")
"""
    )


def test_a_module_built_with_a_newer_ffi_is_not_registered(run_python):
    run_python(
        _STAND_IN.split("import jax_trirun\n")[0]
        + """
fake.ffi_api_version = lambda: (0, 99)
try:
    import jax_trirun
except ImportError as error:
    assert "built with XLA FFI 0.99" in str(error)
else:
    raise AssertionError("a handler newer than the runtime was registered")
"""
    )


def test_cuda_rounds_odd_sizes_up_and_cuts_the_result(run_python):
    run_python(
        _STAND_IN
        + """
def odd(k, n, zeros=False):
    qt = MatmulProblem(5, k, n, -1, "bfloat16", "bfloat16", zeros).quant_tensor()
    return lambda x: jax_trirun.matmul(x, qt)

def text_of(f, k):
    return jax.jit(f).trace(jnp.ones((5, k), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()

text = text_of(odd(77, 45, True), 77)
call = next(line for line in text.splitlines() if CALL in line)
assert "(tensor<5x80xbf16>, tensor<2x2x128xui32>, tensor<1x48xbf16>, tensor<1x48xbf16>)" in call, call
assert "(tensor<5x48xbf16>, tensor<4101xui8>)" in call, call
assert asked[-1][:4] == (5, 48, 80, 1), asked
assert text.count("stablehlo.slice") == 1 and "tensor<5x45xbf16>" in text
assert "stablehlo.pad" not in text_of(odd(80, 48), 80)

mesh = jax.make_mesh((1,), ("d",))  # explicit axes, and inside shard_map
with jax.set_mesh(mesh):
    assert CALL in text_of(odd(77, 45), 77)
mesh, rows = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("d")
assert CALL in text_of(jax.shard_map(odd(77, 45), mesh=mesh, in_specs=rows, out_specs=rows), 77)
"""
    )
