"""lm-eval tasks whose data come out of Python packages: the YAML files here, and where they get documents.

A YAML file names one of the functions below as `custom_dataset`; lm-eval passes it the task's metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import texts

DIRECTORY = Path(__file__).parent
OFFLINE = {
    "trirun_wikipedia": "word and byte perplexity of 95 Wikipedia articles (rolling log-likelihood)",
    "trirun_sotu": "word and byte perplexity of 249 State of the Union messages (rolling log-likelihood)",
    "trirun_logiqa": "accuracy on 1,354 questions of LogiQA, by the options' log-likelihood",
    "trirun_logiqa_generate": "accuracy on the same questions, by the letter that is generated",
}


def wikipedia(**metadata: Any) -> dict[str, Any]:
    return _test_split(texts.wikipedia())


def sotu(**metadata: Any) -> dict[str, Any]:
    return _test_split(texts.speeches())


def logiqa(**metadata: Any) -> dict[str, Any]:
    return _test_split(texts.logiqa())


def _test_split(documents: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(documents)}
