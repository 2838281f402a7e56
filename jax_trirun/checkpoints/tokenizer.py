"""The byte-level BPE tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from . import gguf
from .errors import CheckpointError, optional_import

# tokenizer.ggml.token_type (gguf.TokenType)
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """Text to token ids and back, and chats to prompts.

    Built from `tokenizer.ggml.{tokens,merges,token_type}`. Only `model = gpt2` (byte-level BPE) with
    the pre-tokenizer `smollm` is understood: GPT-2's splitting with every digit alone.

    Raises:
      CheckpointError: another kind of tokenizer, or missing metadata.
      ImportError: the package `tokenizers` is not installed.
    """

    def __init__(self, file: gguf.File):
        tokenizers = optional_import("tokenizers", "turning text into tokens")
        kind = file.need("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise CheckpointError(
                f"{file.path}: wanted the tokenizer ('gpt2', 'smollm'), byte-level BPE with digits alone, "
                f"got {kind}"
            )
        self.path = file.path
        self.tokens: Sequence[str] = file.need("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in file.need("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        kinds = file.need("tokenizer.ggml.token_type")
        self._bpe.add_special_tokens(
            [t for t, kind in zip(self.tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
        )
        self.bos: int | None = file.metadata.get("tokenizer.ggml.bos_token_id")
        self.eos: int | None = file.metadata.get("tokenizer.ggml.eos_token_id")
        self._template: str | None = file.metadata.get("tokenizer.chat_template")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids. With special=False names of special tokens in the text are ordinary characters."""
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text. Special tokens are left out unless special=True."""
        return self._bpe.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids arrive, one piece an id; held back while a character is incomplete."""
        held: list[int] = []
        for i in ids:
            held.append(i)
            text = self.decode(held)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield ""
                continue
            yield text
            held = []
        yield self.decode(held)

    @cached_property
    def _render(self):
        if self._template is None:
            raise CheckpointError(f"{self.path}: the file has no chat template; give plain text (--raw)")
        jinja2 = optional_import("jinja2", "rendering a chat template")
        sandbox = optional_import("jinja2.sandbox", "rendering a chat template")
        environment = sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        return environment.from_string(self._template).render

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a chat up to where the assistant's answer starts.

        messages: [{"role": "user", "content": "..."}, ...]. The file's own template, run in Jinja's
        sandbox.
        """
        return self.encode(self._render(messages=messages, add_generation_prompt=True))
