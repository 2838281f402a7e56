"""Model files: packed models of our own, and reading other projects' formats.

Every importer returns W as [K, N] = [in, out], whatever the file's orientation, bit by bit what the
file says; what a QuantTensor cannot hold exactly is an error that offers to quantise again.
"""

from .bitnet import from_bitnet
from .compressed_tensors import from_compressed_tensors
from .errors import CheckpointError
from .gguf import from_gguf
from .gptq import from_gptq, gptq_order
from .hqq import from_hqq
from .models import open_model
from .packed import load, save
from .trilm import from_trilm
from .trirun import from_trirun

__all__ = [
    "CheckpointError",
    "from_bitnet",
    "from_compressed_tensors",
    "from_gguf",
    "from_gptq",
    "from_hqq",
    "from_trilm",
    "from_trirun",
    "gptq_order",
    "load",
    "open_model",
    "save",
]
