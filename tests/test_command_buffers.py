"""A decoder's step on a GPU is one CUDA graph, or several: no call of this package is launched from outside of them."""

import re

import numpy as np
import pytest

pytest.importorskip("flax")
pytestmark = pytest.mark.gpu

LAYERS, PRODUCTS = 4, 7  # quantised products of a layer: q, k, v, o, gate, up, down

# Decodes with a quantised model of random weights; saves the logits, prints microseconds a step.
_DECODE = """
import statistics, sys, time
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from flax_layers import quantize_module
from flax_layers.llama import Decoder, Llama, LlamaConfig

config = LlamaConfig(
    vocab_size=256, hidden_size=512, intermediate_size=1024, num_layers=int(sys.argv[1]), num_heads=8,
    num_kv_heads=4, max_positions=256, rope_theta=10000.0,
)
model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
quantize_module(model, group_size=64, progress=False)
decoder = Decoder(model, max_length=256)
logits, cache = decoder.prefill([[1, 2, 3, 4, 5]])
kept, elsewhere = [], []
for i in range(24):  # the cache is donated every time
    tokens = jnp.argmax(logits, -1)
    if i % 3 == 0:  # the cache moves, and so does what the allocator hands out next
        cache = jax.tree.map(jnp.copy, cache)
        elsewhere.append(jnp.full((1 + 1000 * i,), i, jnp.bfloat16))
    logits, cache = decoder.step(tokens, cache)
    kept.append(np.asarray(logits, np.float32))
np.save(sys.argv[2], np.stack(kept))

times = []
for _ in range(100):
    start = time.perf_counter()
    logits, cache = decoder.step(tokens, cache)
    logits.block_until_ready()
    times.append(time.perf_counter() - start)
print(statistics.median(times) * 1e6)
"""


def thunks(text):
    """[(depth, kind)] of a dumped sequence of XLA's GPU thunks, whose lines are like "  001: kCustomCall ..."."""
    found = [(len(m[1]), m[2]) for m in re.finditer(r"^([ \t]*)\d+: (k\w+)", text, re.MULTILINE)]
    assert found, f"no thunks in what XLA dumped: {text[:500]!r}"
    return found


def dumped(folder, suffix):
    paths = list(folder.glob(f"*jit_step*.{suffix}.txt"))
    there = [path.name for path in folder.iterdir()]
    assert len(paths) == 1, f"wanted one dump of jit_step's {suffix}, found {there}"
    return thunks(paths[0].read_text())


@pytest.fixture
def decode(run_python, tmp_path):
    def run(name, flags):
        """Logits [steps, 1, vocab] and microseconds a step, with these XLA flags."""
        saved = tmp_path / f"{name}.npy"
        printed = run_python(_DECODE, LAYERS, saved, XLA_FLAGS=f"--xla_gpu_autotune_level=0 {flags}")
        return np.load(saved), float(printed.splitlines()[-1])

    return run


def test_a_decoders_step_is_captured_with_the_same_bits(decode, tmp_path):
    folder = tmp_path / "dump"
    captured, with_graphs = decode(
        "captured", f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
    )
    launched, without = decode("launched", "--xla_gpu_enable_command_buffer=")
    print(
        f"a step of {LAYERS} layers takes {with_graphs:.0f} us with command buffers, {without:.0f} us without"
    )

    before = [kind for _, kind in dumped(folder, "thunk_sequence")]
    assert before.count("kCustomCall") >= LAYERS * PRODUCTS
    after = dumped(folder, "thunk_sequence_after_thunk_passes")
    outside = [kind for depth, kind in after if depth == min(d for d, _ in after)]
    assert "kCommandBuffer" in outside
    assert "kCustomCall" not in outside, f"outside of command buffers: {outside}"

    assert np.isfinite(captured).all() and np.ptp(captured) > 0
    np.testing.assert_array_equal(captured, launched)
