"""The pages under docs/ hold what they say: their Python runs, block after block, in one namespace."""

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_snippets_run(page, run_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if ".serialize()" in text:
        pytest.importorskip(
            "flatbuffers", reason="jax.export serialises with flatbuffers, which is not installed"
        )
    blocks = list(BLOCK.finditer(text))
    assert blocks, "a page without snippets"
    names = {"__name__": page.stem}
    with jax.default_device(jax.devices("cpu")[0]):
        for block in blocks:
            line = text[: block.start()].count("\n") + 1
            if block["kind"].strip() == "fresh":  # in a process of its own
                run_python(block["code"], JAX_PLATFORMS="cpu")
            else:
                code = "\n" * line + block["code"]  # so that errors name the page's lines
                exec(compile(code, str(page), "exec"), names)


def test_links_inside_the_documentation_lead_somewhere():
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            assert not path or (page.parent / path).exists(), target
            assert not anchor or path or anchor in anchors, target
