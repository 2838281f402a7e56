"""Flax layers with packed weights, and the conversion of whole models."""

from . import linen as linen
from .convert import Report as Report
from .convert import quantize_module as quantize_module
from .convert import quantize_params as quantize_params
from .general import QuantDenseGeneral as QuantDenseGeneral
from .lora import LoRA as LoRA
from .lora import add_lora as add_lora
from .quant_dense import QuantDense as QuantDense
from .quant_dense import QuantParam as QuantParam
