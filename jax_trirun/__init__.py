"""2-bit weights for JAX: quantise, pack, and multiply without unpacking."""

from importlib.metadata import version as _version

from .export import export_disabled_checks as export_disabled_checks
from .layout import LAYOUT_VERSION as LAYOUT_VERSION
from .matmul import explain as explain
from .matmul import matmul as matmul
from .pack import pack as pack
from .pack import unpack as unpack
from .quantizers import quantize as quantize
from .reference import dequantize as dequantize
from .types import QuantTensor as QuantTensor

__version__: str = _version("jax-trirun")
