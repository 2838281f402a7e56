"""The directory that `quantize` and `convert` write: when it may be written, what in it is theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.errors import CheckpointError
from ..checkpoints.models import CONFIG, Model
from ..checkpoints.packed import INDEX
from ..checkpoints.safetensors import whole_file
from ..checkpoints.tokenizer import CONFIG as TOKENIZER_CONFIG
from ..checkpoints.tokenizer import FILE as TOKENIZER


def check_free(out: Path, report: str, *, overwrite: bool, instead: str = "") -> None:
    """Raises FileExistsError when `out` holds something, unless it is to be overwritten.

    Args:
      report: the name of the report that a run leaves there: without it nothing is deleted.
      instead: another way out, for the message.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} is not empty; name another directory, {instead}or delete an earlier run's files with "
            "--overwrite"
        )
    if not (out / report).is_file():
        raise FileExistsError(
            f"--overwrite: {out} has no {report}, so nothing in it is deleted; name another directory"
        )


def check_apart(out: Path, model: Model) -> None:
    """Raises ValueError when a model would be written over the one that is read."""
    if out.resolve() in (model.path.resolve(), model.path.resolve().parent):
        raise ValueError(f"--out {out} is where the model is read from; name another directory")


def clear(out: Path, report: str) -> None:
    """Deletes what a run wrote, the index first: from then on nothing takes the rest for a model."""
    ours = [INDEX, CONFIG, TOKENIZER, TOKENIZER_CONFIG]
    for path in [*(out / name for name in ours), *out.glob("model-*-of-*.safetensors"), out / report]:
        path.unlink(missing_ok=True)
    clear_unfinished(out)


def clear_unfinished(out: Path) -> None:
    """Deletes the files that a killed run was writing."""
    for path in out.glob(".*.part"):
        path.unlink()


def copy_tokenizer(model: Model, out: Path) -> str:
    """Saves the model's tokenizer beside the weights; why not, in words, when there is none."""
    try:
        model.tokenizer().save(out)
    except (CheckpointError, FileNotFoundError, ImportError) as error:
        return str(error)
    return ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())
