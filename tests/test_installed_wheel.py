"""The package as users get it: a wheel, installed elsewhere, imported far from the checkout."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]

_PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
import jax_trirun
from jax_trirun.testing import MatmulProblem, check_problem

here = pathlib.Path(jax_trirun.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), here
check_problem(MatmulProblem(3, 384, 100, 128, "bfloat16", "float16", True))
p = MatmulProblem(2, 128, 64, 64)
g = jax.jit(jax.grad(lambda x: jax_trirun.matmul(x, p.quant_tensor()).sum()))(jnp.asarray(p.x()))
assert g.shape == (2, 128) and np.isfinite(g).all()
import flax_layers
assert pathlib.Path(flax_layers.__file__).resolve().is_relative_to(pathlib.Path(sys.argv[1]).resolve())
print("installed wheel works")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the checkout with the libraries of this environment, or given by the caller."""
    if given := os.environ.get("JAX_TRIRUN_TEST_WHEEL"):
        return pathlib.Path(given)
    pytest.importorskip("scikit_build_core", reason="building a wheel here needs scikit-build-core")
    pytest.importorskip("nanobind", reason="building a wheel here needs nanobind")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        CHECKOUT,
    ]
    options = ["-C", f"build-dir={folder / 'build'}", "-C", "cmake.define.JAX_TRIRUN_CUDA=OFF"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_works_from_any_folder(wheel, tmp_path, run_python):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # An editable install of the checkout would win over PYTHONPATH: take its import hook out.
    hook = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    assert "installed wheel works" in run_python(hook + _PROGRAM, target, PYTHONPATH=str(target))


def test_it_holds_what_it_should_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"jax_trirun", "flax_layers"}
    assert any(n.startswith("jax_trirun/_cpu.") and n.endswith(".so") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if n.endswith((".cc", ".h", ".o", ".pyc"))]
    if sys.version_info >= (3, 12):
        assert "-cp312-abi3-" in wheel.name, "one wheel for 3.12 and later"
