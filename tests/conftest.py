"""Back ends as a fixture, and how far hypothesis looks.

Every test that takes ``backend`` runs once for "reference" and for each back end that is installed and
has a device; those on a GPU carry the marker ``gpu``.
"""

import os
import subprocess
import sys

import jax
import pytest
from hypothesis import HealthCheck, settings

from jax_trirun import _ffi

_QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=30, derandomize=True, **_QUIET)
settings.register_profile("explore", max_examples=500, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [_param(name) for name in _ffi.usable_backends()])


def _param(name):
    on_gpu = name in _ffi.BACKENDS and _ffi.BACKENDS[name].platform == "cuda"
    return pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else [])


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a process of its own, away from the checkout; returns what it prints."""

    def run(program, *arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def _on_the_backends_platform(request):
    """Tests of the CPU back end run on the CPU also where there is a GPU."""
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if name in _ffi.BACKENDS:
        with jax.default_device(jax.devices(_ffi.BACKENDS[name].platform)[0]):
            yield
    else:
        yield


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of the real model."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from jax_trirun.checkpoints import CheckpointError, gguf
    from jax_trirun.checkpoints import smollm2 as source

    try:
        return gguf.read(source.fetch())
    except CheckpointError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"SmolLM2 cannot be had: {error}")
