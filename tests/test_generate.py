"""The command line on a small random model, and the main job on the real one."""

import re

import numpy as np
import pytest

from jax_trirun import cli
from jax_trirun.evaluate import sample_text

pytest.importorskip("flax", reason="Flax is not installed")
pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

# The command line


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A random Llama in a GGUF file whose vocabulary is the bytes."""
    import gguf
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("small") / "small.gguf"
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    shapes = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    for layer in range(2):
        for name, shape in {
            "attn_q": (64, 64),
            "attn_k": (64, 64),
            "attn_v": (64, 64),
            "attn_output": (64, 64),
            "ffn_gate": (128, 64),
            "ffn_up": (128, 64),
            "ffn_down": (64, 128),
            "attn_norm": (64,),
            "ffn_norm": (64,),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = cli.main(arguments)
    return status, *capsys.readouterr()


def test_info_names_what_is_here(capsys):
    import jax

    status, out, _ = run(capsys, "info")
    assert status == 0
    for pattern in (
        r"jax_trirun +\d+\.\d+\.\d+, packed layout \d+",
        rf"jax +{re.escape(jax.__version__)}",
        r"backend cpu +built, registered for cpu",
        r"cpu kernels +\w+ in use",
        r"device 0 +\w+: ",
    ):
        assert re.search(pattern, out), (pattern, out)


def test_generate_quantises_streams_and_measures(capsys, small_model):
    arguments = (
        "generate",
        "--model",
        small_model,
        "--prompt",
        "the",
        "--max-new-tokens",
        "8",
        "--window",
        "64",
    )
    status, out, err = run(capsys, *arguments, "--layers", "all")
    assert status == 0, err
    assert "quantised  14 of 14 linear layers, 100% of their weights, to 2 bits" in out
    assert "2.50 bits a weight" in out
    assert re.search(r"prefill +[\d.]+ tokens a second \(3 tokens", out)  # "th", "e", the end
    assert re.search(r"decode +[\d.]+ tokens a second", out)
    assert re.search(r"compilation, [\d.]+ s, is in neither", out)
    before, after = re.search(r"perplexity ([\d.]+) in float32, ([\d.]+) 2-bit", out).groups()
    assert before != after

    status, out, _ = run(capsys, *arguments, "--layers", r"layers\.1\.mlp", "--no-perplexity")
    assert status == 0 and "quantised  3 of 14 linear layers" in out and "perplexity" not in out

    status, out, _ = run(capsys, *arguments, "--layers", "none", "--raw", "--temperature", "1")
    assert status == 0 and "none quantised" in out and "(2 tokens in" in out


def test_the_backend_can_be_chosen(capsys, small_model, monkeypatch):
    import jax_trirun

    seen = set()
    matmul = jax_trirun.matmul

    def spy(*arguments, backend=None, **options):
        seen.add(backend)
        return matmul(*arguments, backend=backend, **options)

    monkeypatch.setattr(jax_trirun, "matmul", spy)
    arguments = (
        "generate",
        "--model",
        small_model,
        "--layers",
        "all",
        "--max-new-tokens",
        "2",
        "--no-perplexity",
    )
    assert run(capsys, *arguments, "--backend", "reference")[0] == 0
    assert seen == {"reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere.gguf"), "nowhere.gguf: no such file"),
        (("--layers", "("), r"--layers: '\(' is not a regular expression"),
        (("--layers", "nothing_has_this"), "no module is left to quantise"),
        (("--method", "magic"), "--method must be one of mse, .* got 'magic'"),
        (("--group-size", "128", "--layers", "q_proj"), "group_size=128"),
        (("--backend", "tpu"), "--backend: backend must be None or one of .* got 'tpu'"),
        (("--window", "1"), "--window must be at least 2, got 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be positive, got 0"),
        (("--max-new-tokens", "999"), "--max-new-tokens asks for 999, but the model reads 128"),
        (("--prompt", "", "--raw"), "--prompt must not be empty"),
        (("--temperature", "-1"), "--temperature must be 0 or more, got -1.0"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, small_model, arguments, message):
    model = () if "--model" in arguments else ("--model", small_model)
    status, _, err = run(capsys, "generate", "--no-perplexity", *model, *arguments)
    assert status == 2 and err.startswith("error: ")
    assert re.search(message, err), err


def test_traceback_shows_where(small_model):
    with pytest.raises(ValueError, match="--window"):
        cli.main(["generate", "--model", small_model, "--window", "1", "--traceback"])


# The real model


def test_the_real_tokenizer(smollm2):
    from jax_trirun.checkpoints.tokenizer import Tokenizer

    tokenizer = Tokenizer(smollm2)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([504, 3575, 282, 4649, 314]) == "The capital of France is"
    assert tokenizer.decode(tokenizer.encode("12 345")) == "12 345" and len(tokenizer.encode("345")) == 3
    assert tokenizer.decode(tokenizer.encode(sample_text())) == sample_text()
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1 and tokenizer.decode(chat, special=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.usefixtures("smollm2")
def test_the_main_job(capsys):
    """The first command of the README, shortened: text from 2-bit layers still names Paris."""
    status, out, err = run(capsys, "generate", "--max-new-tokens", "12")
    assert status == 0, err
    assert "The capital of France is Paris." in out
    assert "quantised  25 of 210 linear layers" in out
    before, after = (
        float(v) for v in re.search(r"perplexity ([\d.]+) in float32, ([\d.]+) 2-bit", out).groups()
    )
    assert abs(before - 28.57) < 0.1
    assert before < after < 45
