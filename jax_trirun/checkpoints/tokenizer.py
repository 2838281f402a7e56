"""A byte-level BPE tokenizer from a GGUF file's metadata, or any from a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from . import gguf
from .errors import CheckpointError, optional_import
from .safetensors import whole_file

# tokenizer.ggml.token_type (gguf.TokenType)
_CONTROL, _USER_DEFINED = 3, 4
FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back, and chats to prompts.

    From a GGUF file, built from `tokenizer.ggml.{tokens,merges,token_type}`: only `model = gpt2`
    (byte-level BPE) with the pre-tokenizer `smollm`, GPT-2's splitting with every digit alone, is
    understood. `from_directory` takes what Hugging Face's tokenizers do.

    Raises:
      CheckpointError: another kind of tokenizer, or missing metadata.
      ImportError: the package `tokenizers` is not installed.
    """

    def __init__(self, file: gguf.File):
        tokens = file.need("tokenizer.ggml.tokens")
        bos, eos = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        self._fill(
            file.path, _from_gguf(file, tokens), bos, eos, file.metadata.get("tokenizer.chat_template")
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """From tokenizer.json and, where they are there, tokenizer_config.json and chat_template.jinja.

        Raises:
          FileNotFoundError: no tokenizer.json. CheckpointError: one that cannot be read.
        """
        tokenizers = optional_import("tokenizers", "turning text into tokens")
        path = Path(directory) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; text cannot be turned into tokens without it")
        try:
            bpe = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing narrower
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
        config_path, template_path = path.with_name(CONFIG), path.with_name(TEMPLATE)
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{config_path}: not readable JSON ({error})") from error
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if template_path.is_file():
            template = template_path.read_text(encoding="utf-8")

        def token_id(name: str) -> int | None:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else bpe.token_to_id(token)

        tokenizer = cls.__new__(cls)
        tokenizer._fill(path, bpe, token_id("bos_token"), token_id("eos_token"), template)
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Writes what `from_directory` reads."""
        directory = Path(directory)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._token(self.bos),
            "eos_token": self._token(self.eos),
            "chat_template": self._template,
        }
        for name, text in (
            (FILE, self._bpe.to_str(pretty=True)),
            (CONFIG, json.dumps({k: v for k, v in config.items() if v is not None}, indent=2)),
        ):
            with whole_file(directory / name) as file:
                file.write(text.encode())

    def _fill(self, path: Path, bpe: Any, bos: int | None, eos: int | None, template: str | None) -> None:
        self.path, self.bos, self.eos = path, bos, eos
        self._bpe, self._template = bpe, template

    @cached_property
    def tokens(self) -> list[str]:
        """Every token's text, by id."""
        return [self._bpe.id_to_token(i) for i in range(self._bpe.get_vocab_size())]

    def _token(self, i: int | None) -> str | None:
        return None if i is None else self._bpe.id_to_token(i)

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
        environment.globals["raise_exception"] = self._refuse
        names = {"bos_token": self._token(self.bos) or "", "eos_token": self._token(self.eos) or ""}
        return partial(environment.from_string(self._template).render, **names)

    def _refuse(self, message: str) -> None:
        raise CheckpointError(f"{self.path}: the chat template refuses this chat: {message}")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a chat up to where the assistant's answer starts.

        messages: [{"role": "user", "content": "..."}, ...]. The file's own template, run in Jinja's
        sandbox.
        """
        return self.encode(self._render(messages=messages, add_generation_prompt=True))


def _from_gguf(file: gguf.File, tokens: Sequence[str]) -> Any:
    tokenizers = optional_import("tokenizers", "turning text into tokens")
    kind = file.need("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{file.path}: wanted the tokenizer ('gpt2', 'smollm'), byte-level BPE with digits alone, got {kind}"
        )
    merges = [tuple(pair.split(" ")) for pair in file.need("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    kinds = file.need("tokenizer.ggml.token_type")
    bpe.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    )
    return bpe
