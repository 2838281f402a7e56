"""lm-eval (the Language Model Evaluation Harness) on this project's decoder, float or packed.

    from jax_trirun.evaluate.lm_eval import DecoderLM, evaluate, load_tasks

    adapter = DecoderLM(model, tokenizer)             # any lm_eval function takes it as its model
    evaluate(adapter, load_tasks(["trirun_logiqa"]), limit=50)

Needs the package lm-eval (the extra [eval]), not torch. Few shapes are compiled: sequences are padded to
powers of two and computed in batches of equal size, see `scoring.batches`; generation keeps one
compiled `Decoder` for each number of slots.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .scoring import Scorer, batches, bucket
from .tasks import DIRECTORY, OFFLINE

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise  # the package is there, something that it needs is not
    raise ImportError(
        "lm-eval's tasks need the package lm-eval, which is not installed; run: python -m pip install "
        "'jax-trirun[eval]'   (or: python -m pip install lm-eval==0.4.13)"
    ) from error

# Sequences generated side by side: enough to share the reading of the weights, few enough for a laptop.
GENERATE_BATCH = 8


class DecoderLM(TemplateLM):
    """What lm-eval asks of a model: loglikelihood, loglikelihood_rolling, generate_until.

    Args:
      model: a `flax_layers.llama.Llama`, its linear layers packed or not. Later changes to it are not
        seen.
      tokenizer: a `jax_trirun.checkpoints.tokenizer.Tokenizer`. Names of special tokens in a text are those
        tokens. Nothing is put before a text, but the BOS (or else EOS) token where lm-eval asks for a
        prefix: before an empty context and before the first token of a rolling text.
      max_length: tokens that the model sees before one; the smaller of 2048 and its max_positions when
        None. Longer contexts lose their beginning.
      batch_tokens: tokens computed at once.

    Raises:
      ValueError: max_length or batch_tokens is out of range, or the tokenizer has neither EOS nor BOS.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int | None = None, batch_tokens: int = 4096
    ):
        super().__init__()
        limit = model.config.max_positions
        max_length = min(2048, limit) if max_length is None else max_length
        if not 2 <= max_length <= limit:
            raise ValueError(f"DecoderLM: max_length must be in 2 .. {limit}, got {max_length}")
        if batch_tokens < 1:
            raise ValueError(f"DecoderLM: batch_tokens must be positive, got {batch_tokens}")
        if tokenizer.eos is None and tokenizer.bos is None:
            raise ValueError(f"DecoderLM: the tokenizer {tokenizer.path} has neither an EOS nor a BOS token")
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self._model, self._tokenizer = model, tokenizer
        self._scorer = Scorer(model)
        self._decoders: dict[int, Any] = {}

    @property
    def eot_token_id(self) -> int:
        eos = self._tokenizer.eos
        return self._tokenizer.bos if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; BOS is never added, whatever `add_special_tokens`."""
        return self._tokenizer.encode(string)

    # Likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(key, context, continuation) each -> (log-likelihood of the continuation, whether it is greedy).

        Requests that differ in one last token share a computation: four letters to choose from cost as
        much as one.

        Raises:
          ValueError: a context without tokens, or a continuation longer than max_length.
        """
        rows: dict[tuple[int, ...], int] = {}  # what the model reads -> its number
        places = []
        for _, context, continuation in requests:
            if not context or len(continuation) > self.max_length:
                raise ValueError(
                    f"loglikelihood: wanted at least one token of context and at most {self.max_length} of "
                    f"continuation, got {len(context)} and {len(continuation)}"
                )
            read = tuple([*context, *continuation][-self.max_length - 1 : -1])
            places.append((rows.setdefault(read, len(rows)), len(continuation)))
        wanted: list[list[int]] = [[] for _ in rows]  # requests by row
        for i, (row, count) in enumerate(places):
            if count:
                wanted[row].append(i)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        inputs = list(rows)
        needed = [i for i, users in enumerate(wanted) if users]
        for chosen, tokens in batches(
            [inputs[i] for i in needed], window=self.max_length, batch_tokens=self.batch_tokens
        ):
            ends = [len(inputs[needed[i]]) for i in chosen]
            padded_ends = np.asarray(ends + [1] * (len(tokens) - len(ends)), np.int32)
            losses, greedy, last = map(np.asarray, self._scorer.score_next(tokens, padded_ends))
            for row, (i, end) in enumerate(zip(chosen, ends, strict=True)):
                for request in wanted[needed[i]]:
                    continuation = requests[request][2]
                    inside = slice(end - len(continuation), end - 1)  # all of it but its last token
                    loss = float(losses[row, inside].sum(dtype=np.float64)) - float(
                        last[row, continuation[-1]]
                    )
                    likeliest = (
                        bool(greedy[row, inside].all()) and last[row, continuation[-1]] >= last[row].max()
                    )
                    results[request] = (-loss, bool(likeliest))
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token given up to max_length - 1 before it."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    # Text

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop sequence, EOS, or max_gen_toks tokens (256 by default).

        Raises:
          ValueError: max_gen_toks leaves no room for a context.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]))
            temperature = float(options["temperature"]) if options["do_sample"] else 0.0
            groups[tuple(options["until"]), options["max_gen_toks"], temperature].append(i)
        answers = [""] * len(requests)
        for (until, count, temperature), members in groups.items():
            if not 1 <= count < self.max_length:
                raise ValueError(
                    f"generate_until: max_gen_toks must be in 1 .. {self.max_length - 1}, got {count}"
                )
            prompts = {}
            for i in members:
                tokens = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                prompts[i] = tokens[-(self.max_length - count) :]
            members = sorted(members, key=lambda i: len(prompts[i]))  # alike lengths side by side
            for start in range(0, len(members), GENERATE_BATCH):
                chosen = members[start : start + GENERATE_BATCH]
                key = jax.random.fold_in(jax.random.key(0), start)
                texts = self._generate([prompts[i] for i in chosen], until, count, temperature, key)
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _generate(
        self, prompts: list[list[int]], until: Sequence[str], count: int, temperature: float, key: jax.Array
    ) -> list[str]:
        """At most GENERATE_BATCH prompts, decoded side by side."""
        decoder = self._decoder(bucket(max(map(len, prompts)) + count, self.max_length))
        padding = [[self.prefix_token_id]] * (GENERATE_BATCH - len(prompts))
        new: list[list[int]] = [[] for _ in prompts]
        texts: dict[int, str] = {}
        for tokens in decoder.decode(
            [*prompts, *padding], max_new_tokens=count, temperature=temperature, key=key
        ):
            for i, token in enumerate(tokens[: len(prompts)].tolist()):
                if i in texts:
                    continue
                if token == self._tokenizer.eos:
                    texts[i] = self._tokenizer.decode(new[i])
                    continue
                new[i].append(token)
                text = self._tokenizer.decode(new[i])
                ends = [text.find(stop) for stop in until if stop and stop in text]
                if ends:
                    texts[i] = text[: min(ends)]
            if len(texts) == len(prompts):
                break
        return [texts.get(i, self._tokenizer.decode(new[i])) for i in range(len(prompts))]

    def _decoder(self, slots: int) -> Any:
        from flax_layers.llama import Decoder

        if slots not in self._decoders:
            self._decoders[slots] = Decoder(self._model, max_length=slots, batch=GENERATE_BATCH)
        return self._decoders[slots]


def load_tasks(names: Sequence[str]) -> Mapping[str, Any]:
    """Tasks and groups by name, their data loaded: what lm_eval's `evaluate` takes.

    Args:
      names: of this project (`tasks.OFFLINE`), or lm-eval's own, such as "mmlu" or "wikitext", whose data
        come from the Hugging Face hub.
    Raises:
      ValueError: no such task.
      OSError: the data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in names if name.strip()]
    # lm-eval has over ten thousand tasks of its own: finding them takes seconds.
    manager = TaskManager(include_path=str(DIRECTORY), include_defaults=not set(names) <= OFFLINE.keys())
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError(
            f"no such task: {', '.join(unknown) or 'none given'}; without a hub there are {', '.join(OFFLINE)}, "
            "and lm-eval's own by the names that `lm-eval ls tasks` lists"
        )
    try:
        return manager.load(names)
    except Exception as error:
        if not _is_unreachable(error):
            raise
        raise OSError(
            f"the data of {', '.join(n for n in names if n not in OFFLINE)} come from the Hugging Face hub, which "
            f"cannot be reached ({error}); tasks that need no hub: {', '.join(OFFLINE)}"
        ) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an exception of the packages that talk to the hub, or of the network below them, is at the root."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or package in ("datasets", "huggingface_hub"):
            return True
        error = error.__cause__ or error.__context__
    return False


def evaluate(
    adapter: DecoderLM, tasks: Mapping[str, Any], *, limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Runs tasks: task or group -> metric -> (value, standard error or None).

    Args:
      tasks: from `load_tasks`; they can be run again with another model.
      limit: of each task's items, the first so many.
      num_fewshot: examples before an item; the task's own number, or 0, when None.
    """
    from lm_eval import evaluator

    # Some metrics' errors are resampled in forked processes; forks of JAX's threads can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    for task in tasks["tasks"].values():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:  # 0 in a task's file is meant
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    found = evaluator.evaluate(
        lm=adapter, task_dict=tasks, limit=limit, bootstrap_iters=1000, log_samples=False
    )
    results = {**found["results"], **found.get("groups", {})}
    return {task: _metrics(values) for task, values in results.items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """From {"acc,none": 0.5, "acc_stderr,none": 0.1 or "N/A", "alias": ..}; a filter's name follows its metric."""
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        usable = isinstance(error, int | float) and math.isfinite(error)
        metrics[name] = float(value), float(error) if usable and error is not None else None
    return metrics
