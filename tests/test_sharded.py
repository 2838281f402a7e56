"""Layers and models on a mesh: the tests of on_eight_devices.py, in a process that simulates devices."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(here / "on_eight_devices.py")],
        cwd=here.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
