"""Quantise layers of a language model to 2 bits, stream text from it, and say what that cost.

Without --model it downloads SmolLM2-135M-Instruct (98 MB) once. Without calibration, 2 bits in every
layer of a model this small leave noise, so the default quantises those that leave readable text;
--layers all shows the rest.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from . import model as shared

HELP = "quantise a small real model, stream text, print speed, memory and perplexity"
PROMPT = "What is the capital of France, and what is it known for?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=shared.MODEL_HELP)
    shared.add_arguments(parser)
    parser.add_argument("--prompt", default=PROMPT, help=f"the question (default: {PROMPT!r})")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, not as a chat")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--no-perplexity", action="store_true", help="do not measure perplexity")


def run(arguments: argparse.Namespace) -> None:
    shared.check(arguments)
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {arguments.max_new_tokens}")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, got {arguments.temperature}")
    started = time.perf_counter()
    lm = shared.load(arguments.model)
    prompt = _prompt(lm, arguments)
    tokens = None if arguments.no_perplexity else lm.tokenizer.encode(shared.sample_text())
    before = None if tokens is None else shared.measure(lm, [tokens], window=arguments.window)
    quantised = shared.quantise(lm, arguments)
    _stream(lm, prompt, arguments)
    if tokens is not None and before is not None:
        text = f"{before.value:.2f}, {shared.kind(lm.decoder)}"
        if quantised:
            after = shared.measure(lm, [tokens], window=arguments.window)
            text = f"{before.value:.2f} in float32, {after.value:.2f} 2-bit"
        print(
            f"perplexity {text}, over {sum(before.tokens)} tokens (Roosevelt on forests, 1901; windows of "
            f"{arguments.window})"
        )
    print(f"total      {time.perf_counter() - started:.1f} s")


def _prompt(lm: shared.LanguageModel, arguments: argparse.Namespace) -> list[int]:
    """The prompt's token ids; ValueError when they and the answer do not fit the model."""
    if arguments.raw:
        prompt = lm.tokenizer.encode(arguments.prompt)
    else:
        prompt = lm.tokenizer.chat([{"role": "user", "content": arguments.prompt}])
    if not prompt:
        raise ValueError("--prompt must not be empty")
    limit = lm.decoder.config.max_positions
    if len(prompt) + arguments.max_new_tokens > limit:
        raise ValueError(
            f"--prompt has {len(prompt)} tokens and --max-new-tokens asks for {arguments.max_new_tokens}, but the "
            f"model reads {limit} together"
        )
    return prompt


def _stream(lm: shared.LanguageModel, prompt: list[int], arguments: argparse.Namespace) -> None:
    """Prints the answer as it comes, then the speed of prefill and of decoding, compilation apart."""
    from flax_layers.llama import Decoder

    lm.decoder.fuse_projections()
    decoder = Decoder(lm.decoder, max_length=len(prompt) + arguments.max_new_tokens)
    started = time.perf_counter()
    # Two tokens compile all there is: the second needs the decode step.
    list(
        decoder.generate(
            prompt, max_new_tokens=min(2, arguments.max_new_tokens), temperature=arguments.temperature
        )
    )
    compiled = time.perf_counter()
    decoder.prefill([prompt])[0].block_until_ready()
    prefilled = time.perf_counter()

    print(f"prompt     {arguments.prompt}\n")
    times = []

    def new_tokens():
        stop = () if lm.tokenizer.eos is None else {lm.tokenizer.eos}
        for token in decoder.generate(
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            stop=stop,
        ):
            times.append(time.perf_counter())
            yield token

    for piece in lm.tokenizer.stream(new_tokens()):
        print(piece, end="", flush=True)
    print("\n")
    seconds = prefilled - compiled
    print(f"prefill    {len(prompt) / seconds:.1f} tokens a second ({len(prompt)} tokens in {seconds:.3f} s)")
    steps = np.diff(times)
    if len(steps):
        print(
            f"decode     {len(steps) / steps.sum():.1f} tokens a second ({len(times)} tokens, "
            f"median {1e3 * np.median(steps):.1f} ms a token)"
        )
    print(f"           compilation, {compiled - started:.1f} s, is in neither")
