"""Model files: reading other projects' formats."""

from .errors import CheckpointError

__all__ = ["CheckpointError"]
