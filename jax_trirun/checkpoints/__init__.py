"""Model files: packed models of our own, and reading other projects' formats.

Every importer returns W as [K, N] = [in, out], whatever the file's orientation.
"""

from .errors import CheckpointError
from .packed import load, save

__all__ = ["CheckpointError", "load", "save"]
