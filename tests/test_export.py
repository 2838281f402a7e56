"""Ahead of time: exported programs, loaded where nothing is known of them, and the persistent compilation cache."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_trirun
from jax_trirun import _ffi
from jax_trirun.testing import MatmulProblem, assert_close, matmul_float64

pytest.importorskip(
    "flatbuffers", reason="jax.export serialises with flatbuffers, which JAX does not install"
)
export = pytest.importorskip("jax.export")

PROBLEM = MatmulProblem(8, 512, 256, 64, with_zeros=True)
DATA = pathlib.Path(__file__).parent / "data"


def reference(problem):
    return matmul_float64(problem.x(), problem.codes(), problem.scales(), problem.zeros())


def product(x, words, scales, zeros):
    return jax_trirun.matmul(x, words, scales, zeros)


def arrays_of(problem):
    return tuple(
        map(jnp.asarray, (problem.x(), jax_trirun.pack(problem.codes()), problem.scales(), problem.zeros()))
    )


def shapes_of(arrays):
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in arrays)


def any_rows(x):
    (m,) = export.symbolic_shape("m")
    return jax.ShapeDtypeStruct((m, *x.shape[1:]), x.dtype)


def exported(f, arrays, **options):
    return export.export(jax.jit(f), disabled_checks=jax_trirun.export_disabled_checks(), **options)(*arrays)


# Runs every artefact of a folder on the arrays beside it: NAME.bin, NAME.npz (x, the rest, and wanted).
_RUN_ARTEFACTS = """
import glob, pathlib, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import jax_trirun
from jax import export
for path in sorted(glob.glob(sys.argv[1] + "/*.bin")):
    again = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
    saved = np.load(path.replace(".bin", ".npz"))
    arrays = [saved[name] for name in sorted(saved.files) if name != "want"]
    if again.nr_devices > 1:
        mesh = jax.make_mesh((8,), ("d",), devices=jax.devices("cpu"))
        arrays = [jax.device_put(a, s) for a, s in zip(arrays, again.in_shardings_jax(mesh))]
        call = jax.jit(again.call)
        text = call.lower(*arrays).compile().as_text()
        assert "all-gather" not in text and text.count(" all-reduce(") == 1, text
    else:
        call = again.call
    np.testing.assert_allclose(call(*arrays), saved["want"], rtol=1e-4, atol=1e-4)
    print("ran", pathlib.Path(path).stem)
"""


def test_artefacts_run_in_a_fresh_process(tmp_path, run_python):
    """One device; any number of rows; eight devices, row-parallel; gradients too; packing inside."""
    arrays = arrays_of(PROBLEM)
    x, *weight = arrays
    codes = jnp.asarray(PROBLEM.codes())
    mesh = jax.make_mesh((8,), ("d",), devices=jax.devices("cpu"))
    specs = (P(None, "d"), P("d", None, None), P("d", None), P("d", None))
    sharded = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    y = np.asarray(product(*arrays))

    def gradient(x, *weight):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(product(x, *weight))))(x)

    def packed_there(x, codes, scales, zeros):
        return product(x, jax_trirun.pack(codes), scales, zeros)

    any_shapes = (any_rows(x), *shapes_of(weight))
    with_codes = (x, codes, *weight[1:])
    artefacts = {
        "one": (exported(product, shapes_of(arrays), platforms=["cpu"]), arrays, y),
        "symbolic": (
            exported(product, any_shapes, platforms=("cpu", "cuda", "tpu")),
            (x[:3], *weight),
            y[:3],
        ),
        "gradient": (exported(gradient, any_shapes, platforms=["cpu"]), arrays, gradient(*arrays)),
        "packing": (exported(packed_there, with_codes, platforms=["cpu"]), with_codes, y),
        "sharded": (exported(product, shapes_of(sharded), platforms=["cpu"]), arrays, y),
    }
    assert artefacts["sharded"][0].nr_devices == 8
    for name, (artefact, inputs, want) in artefacts.items():
        (tmp_path / f"{name}.bin").write_bytes(artefact.serialize())
        np.savez(tmp_path / f"{name}.npz", **{f"in{i}": a for i, a in enumerate(inputs)}, want=want)
    printed = run_python(_RUN_ARTEFACTS, tmp_path, JAX_PLATFORMS="cpu")
    assert printed.splitlines() == [f"ran {name}" for name in sorted(artefacts)]


def test_each_platform_gets_its_own_lowering():
    x, *weight = arrays_of(PROBLEM)
    text = str(exported(product, (x, *weight), platforms=("cpu", "tpu")).mlir_module())
    assert _ffi.MATMUL_TARGET in text and "dot_general" in text and "platform_index" in text


def test_without_the_exemption_the_message_says_what_to_pass():
    with pytest.raises(ValueError, match=r"pass disabled_checks=jax_trirun.export_disabled_checks\(\) to"):
        export.export(jax.jit(product), platforms=["cpu"])(*arrays_of(PROBLEM))


def test_exempts_every_target_of_the_package():
    checks = jax_trirun.export_disabled_checks()
    targets = [c.is_custom_call() for c in checks]
    names = ("matmul", "dequantize", "pack", "unpack")
    assert targets == [f"jax_trirun_{name}_v1" for name in names]
    on_cuda = _ffi.cpu_module.missing_cuda_handlers()
    assert set(_ffi.cpu_module.ffi_handlers()) | set(on_cuda) == set(targets)
    if "cuda" in _ffi.BACKENDS:
        assert set(_ffi.BACKENDS["cuda"].module.ffi_handlers()) == set(on_cuda)


def test_auto_axes_in_an_export_gather_with_a_warning():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,), devices=jax.devices("cpu"))
    specs = (P(None, "d"), P("d", None, None), P("d", None), P("d", None))
    arrays = tuple(
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays_of(PROBLEM), specs, strict=True)
    )
    with pytest.warns(
        UserWarning, match="an export for 8 devices on a mesh with Auto axes .* Use a mesh of Explicit axes"
    ):
        artefact = exported(product, shapes_of(arrays), platforms=["cpu"])
    again = export.deserialize(artefact.serialize())
    assert_close(jax.jit(again.call)(*arrays), reference(PROBLEM))


# ---- An artefact that was written once ------------------------------------------------------------------

KEPT = MatmulProblem(1, 256, 96, 64, "float32", "float16", with_zeros=True)


def write_kept(path):
    """How tests/data/matmul_v1.jax_export was made, with the oldest JAX that is supported."""
    x, *weight = arrays_of(KEPT)
    shapes = (any_rows(x), *shapes_of(weight))
    shapes = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes)
    path.write_bytes(exported(product, shapes, platforms=("cpu", "cuda", "tpu")).serialize())


@pytest.mark.parametrize("rows", [1, 7])
def test_an_artefact_of_version_1_still_runs(rows):
    """It calls jax_trirun_matmul_v1: that target's operands, attributes and meaning never change."""
    again = export.deserialize(bytearray((DATA / "matmul_v1.jax_export").read_bytes()))
    assert again.platforms == ("cpu", "cuda", "tpu")
    problem = MatmulProblem(
        rows, *[getattr(KEPT, f) for f in ("k", "n", "group_size", "x_dtype", "scale_dtype", "with_zeros")]
    )
    with jax.default_device(jax.devices("cpu")[0]):
        assert_close(again.call(*arrays_of(problem)), reference(problem))


# ---- The persistent compilation cache -------------------------------------------------------------------

_CACHED = """
import sys
import jax, jax.monitoring, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import jax_trirun
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_trirun.testing import MatmulProblem

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
p = MatmulProblem(8, 512, 256, 64)
arrays = (p.x(), np.asarray(jax_trirun.pack(p.codes())), p.scales())

def hits(name, arrays):
    events.clear()
    jax.block_until_ready(jax.jit(jax_trirun.matmul)(*arrays))
    print(name, "hit" if any(e.endswith("/cache_hits") for e in events) else "miss")

hits("one", arrays)
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((8,), ("d",), (kind,))
    put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, (P(None, "d"), P("d"), P("d")))]
    hits(kind.name, put)
"""


def test_compiled_programs_are_found_by_other_processes(tmp_path, run_python):
    """On Auto axes the key has a pointer in it, unless JAX is told to leave it out."""
    flag = {"JAX_PLATFORMS": "cpu", "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1"}
    runs = [run_python(_CACHED, tmp_path / "cache", **flag).splitlines() for _ in range(2)]
    assert runs[0] == ["one miss", "Explicit miss", "Auto miss"]
    assert runs[1] == ["one hit", "Explicit hit", "Auto hit"]


def test_a_program_without_its_cuda_module_says_so():
    """The handler that stands in for the module's, under another name on the CPU."""
    handler = _ffi.cpu_module.missing_cuda_handlers()[_ffi.DEQUANTIZE_TARGET]
    jax.ffi.register_ffi_target("jax_trirun_test_missing", handler, platform="cpu")
    call = jax.ffi.ffi_call("jax_trirun_test_missing", jax.ShapeDtypeStruct((2,), np.float32))
    message = "installed without its CUDA module; reinstall it where nvcc is found"
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(Exception, match=message):
        jax.block_until_ready(call(jnp.ones(3), portable=np.int64(0)))
