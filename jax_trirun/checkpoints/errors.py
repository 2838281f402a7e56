"""What every reader of model files raises."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CheckpointError(ValueError):
    """A model file is missing, damaged, or holds what cannot be represented."""


class InexactError(CheckpointError):
    """A weight cannot be represented exactly.

    Attributes:
      why: in words.
      weight: () -> the decoded weight, float32 [in, out], for quantising it again.
    """

    def __init__(self, message: str, why: str, weight: Callable[[], Any]):
        super().__init__(message)
        self.why, self.weight = why, weight


def optional_import(name: str, purpose: str) -> ModuleType:
    """Imports a package of the `generate` extra, or says how to get it (ImportError)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # the package is there, something that it needs is not
        raise ImportError(
            f"{purpose} needs the package {name!r}, which is not installed; "
            f"run: python -m pip install 'jax-trirun[generate]'   (or: python -m pip install {name})"
        ) from error
