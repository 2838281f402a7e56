"""The lm-eval adapter, against the decoder's own logits; the tasks, run for real on a few items."""

import json
import re
import warnings

import numpy as np
import pytest

pytest.importorskip("flax", reason="Flax is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say about each other
    pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
    from lm_eval.api.instance import Instance

    from jax_trirun.evaluate import lm_eval as harness

from flax import nnx

from flax_layers.llama import Decoder
from flax_layers.load import load_llama
from jax_trirun import cli
from jax_trirun.checkpoints import CheckpointError, open_model
from jax_trirun.checkpoints.tokenizer import Tokenizer
from jax_trirun.evaluate import texts
from jax_trirun.evaluate.tasks import OFFLINE

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'


@pytest.fixture(scope="module")
def float_path(tiny_llama):
    path, _ = tiny_llama()
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return path


@pytest.fixture(scope="module")
def packed_path(float_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    assert cli.main(["quantize", str(float_path), "--out", str(out), "--method", "mse"]) == 0
    return out


@pytest.fixture(scope="module", params=["float_path", "packed_path"])
def loaded(request):
    path = request.getfixturevalue(request.param)
    return load_llama(path), Tokenizer.from_directory(path)


@pytest.fixture(scope="module")
def adapter(loaded):
    return harness.DecoderLM(*loaded, max_length=48, batch_tokens=128)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@nnx.jit
def logits(model, tokens):
    return model(tokens)


def log_probs(model, tokens, length=64):
    """[T, V] float64: of the token after each of `tokens`, one text at a time; what is masked pads it."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    table = np.asarray(logits(model, padded)[0, : len(tokens)], np.float64)
    top = table.max(-1, keepdims=True)
    return table - top - np.log(np.exp(table - top).sum(-1, keepdims=True))


REQUESTS = [
    ("One", " two three"),
    ("", "From nothing"),
    ("A question? Answer:", " A"),
    ("A question? Answer:", " B"),
    ("A question? Answer:", " C is"),
    ("Trailing space ", "moves"),
    ("A context that is a good deal longer than forty-eight tokens, so that its start is cut off", " end"),
    ("Nothing follows", ""),
    ("One", " two three"),
]


def test_loglikelihoods_are_those_of_the_logits(loaded, adapter):
    model, tokenizer = loaded
    found = adapter.loglikelihood(instances("loglikelihood", *REQUESTS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(REQUESTS, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        count = len(whole) - len(tokenizer.encode(context.rstrip()))
        tokens = whole if context else [tokenizer.eos, *whole]
        tokens = tokens[-49:]
        table = log_probs(model, tokens[:-1])
        at = range(len(tokens) - 1 - count, len(tokens) - 1)
        np.testing.assert_allclose(value, sum(table[i, tokens[i + 1]] for i in at), rtol=1e-4, atol=1e-4)
        assert greedy == all(table[i].argmax() == tokens[i + 1] for i in at)


def test_a_greedy_continuation_is_recognised(loaded, adapter):
    model, tokenizer = loaded
    prompt = tokenizer.encode("Once")
    new = list(Decoder(model, max_length=32).generate(prompt, max_new_tokens=4))
    wrong = [*new[:-1], (new[-1] + 1) % 257]
    found = adapter._loglikelihood_tokens(
        [(None, prompt, new), (None, prompt, wrong), (None, prompt, new[:1])]
    )
    assert [greedy for _, greedy in found] == [True, False, True]
    table = log_probs(model, [*prompt, *new])
    values = [table[len(prompt) - 1 + i, token] for i, token in enumerate(new)]
    np.testing.assert_allclose([found[0][0], found[2][0]], [sum(values), values[0]], rtol=1e-4)


def test_rolling_scores_every_token_once(loaded, adapter):
    model, tokenizer = loaded
    documents = ["A short text.", "Long. " * 25, "x", ""]
    found = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", *((d,) for d in documents)))
    for text, value in zip(documents, found, strict=True):
        tokens = tokenizer.encode(text)
        wanted, done = 0.0, 0
        while done < len(tokens):  # windows of 48; the last one reaches back to be whole
            end = min(done + 48, len(tokens))
            read = [tokenizer.eos, *tokens][max(0, end - 48) : end]
            table = log_probs(model, read)
            wanted += sum(table[i - end, tokens[i]] for i in range(done, end))
            done = end
        np.testing.assert_allclose(value, wanted, rtol=1e-4)


def test_generation_is_the_decoders(loaded, adapter):
    model, tokenizer = loaded
    prompts = ["One", "Another, longer prompt", "x" * 100, *("abcdefgh"[i:] for i in range(8))]
    options = {"until": [], "max_gen_toks": 10}
    requests = instances("generate_until", *((p, dict(options)) for p in prompts))
    found = adapter.generate_until(requests)
    decoder = Decoder(model, max_length=48)
    for prompt, text in zip(prompts, found, strict=True):
        tokens = tokenizer.encode(prompt)[-38:]
        new = list(decoder.generate(tokens, max_new_tokens=10, stop={tokenizer.eos}))
        assert text == tokenizer.decode(new)
    stop = next(c for c in found[0][1:] if c.isascii())
    options = {"until": [stop], "max_gen_toks": 10}
    (short,) = adapter.generate_until(instances("generate_until", ("One", options)))
    assert short == found[0][: found[0].index(stop)] and len(short) < len(found[0])
    assert set(adapter._decoders) == {32, 48}  # one a number of slots, however many requests


def test_sampling_differs_from_greedy_and_repeats(adapter):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    requests = instances("generate_until", ("One", dict(options)), ("One", {"max_gen_toks": 12, "until": []}))
    first, second = adapter.generate_until(requests), adapter.generate_until(requests)
    assert first == second and first[0] != first[1]


def test_wrong_adapters(loaded, adapter):
    model, tokenizer = loaded
    for options, message in (
        ({"max_length": 1}, "max_length must be in 2 .. 128, got 1"),
        ({"max_length": 129}, "max_length must be in 2 .. 128, got 129"),
        ({"batch_tokens": 0}, "batch_tokens must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            harness.DecoderLM(model, tokenizer, **options)
    with pytest.raises(ValueError, match="at most 48 of continuation, got 1 and 49"):
        adapter._loglikelihood_tokens([(None, [1], [2] * 49)])
    with pytest.raises(ValueError, match=r"max_gen_toks must be in 1 \.\. 47, got 48"):
        adapter.generate_until(instances("generate_until", ("x", {"max_gen_toks": 48})))


# The tasks


@pytest.fixture(scope="module")
def corpora():
    try:
        texts.wikipedia(), texts.speeches(), texts.logiqa()
    except CheckpointError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"the texts cannot be had: {error}")


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = cli.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


@pytest.mark.usefixtures("corpora")
def test_every_offline_task_runs(capsys, float_path, packed_path, tmp_path):
    out = tmp_path / "figures.json"
    status, printed, err = run(
        capsys,
        "eval",
        packed_path,
        "--compare",
        float_path,
        "--tasks",
        ",".join(OFFLINE),
        "--limit",
        2,
        "--out",
        out,
    )
    assert status == 0, err
    figures = json.loads(out.read_text())["tasks"]
    assert list(figures) == ["float32", "2-bit"]
    for results in figures.values():
        assert results.keys() == OFFLINE.keys()
        assert results["trirun_logiqa"].keys() == {"acc", "acc_norm"}
        assert results["trirun_logiqa_generate"]["exact_match (first_letter)"]["value"] in (0, 0.5, 1)
        for task in ("trirun_wikipedia", "trirun_sotu"):
            value = results[task]["bits_per_byte"]["value"]
            assert 6 < value < 20  # random weights; a uniform guess among bytes would have 8
            np.testing.assert_allclose(results[task]["byte_perplexity"]["value"], 2**value)
    one, two = (figures[kind]["trirun_sotu"]["bits_per_byte"]["value"] for kind in figures)
    assert one != two
    assert re.search(rf"trirun_sotu bits_per_byte +{one:.4f} +{two:.4f}", printed)

    # The figure again, from the adapter alone.
    lm = harness.DecoderLM(load_llama(packed_path), Tokenizer.from_directory(packed_path))
    documents = [speech["text"] for speech in texts.speeches()[:2]]
    total = sum(lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((d,) for d in documents))))
    np.testing.assert_allclose(two, -total / np.log(2) / sum(len(d.encode()) for d in documents), rtol=1e-5)


@pytest.mark.usefixtures("corpora")
def test_the_real_model_answers_logiqa(smollm2):
    """A question to SmolLM2's first four layers: the likelihood of each option is that of its logits."""
    model = open_model(smollm2.path)
    decoder, tokenizer = load_llama(model), model.tokenizer()
    decoder.layers = nnx.List(list(decoder.layers)[:4])
    adapter = harness.DecoderLM(decoder, tokenizer)
    question = texts.logiqa()[0]
    letters = "".join(f"{c}. {o}\n" for c, o in zip("ABCD", question["options"], strict=True))
    prompt = f"Passage: {question['passage']}\nQuestion: {question['question']}\nChoices:\n{letters}Answer:"
    options = [(prompt, f" {option}") for option in question["options"]]
    found = [
        value for value, _ in adapter.loglikelihood(instances("loglikelihood", *options), disable_tqdm=True)
    ]
    wanted = []
    for _, option in options:
        tokens, start = tokenizer.encode(prompt + option), len(tokenizer.encode(prompt))
        table = log_probs(decoder, tokens[:-1], length=256)
        wanted.append(sum(table[i - 1, tokens[i]] for i in range(start, len(tokens))))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    results = harness.evaluate(adapter, harness.load_tasks(["trirun_logiqa"]), limit=1)
    assert results["trirun_logiqa"]["acc"][0] == (np.argmax(wanted) == question["answer"])


def test_tasks_that_cannot_be_had(capsys, float_path, monkeypatch):
    status, out, _ = run(capsys, "eval", float_path, "--tasks", "list")
    assert status == 0 and out.split()[0] == "trirun_wikipedia" and len(out.splitlines()) == 4
    from lm_eval.tasks import TaskManager

    def unreachable(self, names):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    monkeypatch.setattr(TaskManager, "all_tasks", property(lambda self: ["wikitext"]))
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **options: None)
    status, _, err = run(capsys, "eval", float_path, "--tasks", "wikitext")
    assert status == 2 and re.search(
        "data of wikitext come from .* hub, which cannot be reached .*no hub: trirun", err
    )
    status, _, err = run(capsys, "eval", float_path, "--tasks", "wikitexxt")
    assert status == 2 and "no such task: wikitexxt; without a hub there are trirun_wikipedia" in err
