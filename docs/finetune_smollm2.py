"""Fine-tune a packed language model: low-rank terms beside frozen 2-bit weights, or their scales alone.

    python docs/finetune_smollm2.py                        # all 30 layers of SmolLM2-135M, about 5 minutes
    python docs/finetune_smollm2.py --layers 4 --steps 20  # the model's first layers only, for a quick look
    python docs/finetune_smollm2.py --train scales --learning-rate 3e-4

Every linear layer is quantised to 2 bits without calibration, which destroys a model this small; training
brings it back on a text of 1,176 tokens (or yours, --text), all but its end. It prints the loss on both
parts, and what a step needs in memory: besides the packed weights, the arguments, that is activations and
the dense form of a part of one layer.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_layers
from flax_layers.llama import Llama, LlamaConfig, compile_losses, token_losses
from jax_trirun.checkpoints import gguf, smollm2
from jax_trirun.checkpoints.tokenizer import Tokenizer
from jax_trirun.evaluate import sample_text

TRAINED: dict[str, Any] = {  # nnx filters
    "lora": nnx.LoRAParam,
    "scales": nnx.All(flax_layers.QuantParam, nnx.PathContains("scales")),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """A model's trained and frozen arrays, and the compiled step: frozen ones are read, never copied."""

    graph: Any
    frozen: Any
    compiled: Callable[..., Any]
    trained: Any
    optimizer_state: Any

    @classmethod
    def start(cls, model: Llama, wrt: Any, optimizer: Any, tokens: jax.Array) -> "Training":
        """Compiles a step over arrays of tokens [batch, window] like this one."""
        graph, trained, frozen = nnx.split(model, wrt, ...)
        state = optimizer.init(trained)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, state, frozen, tokens):
            def loss(trained):
                return jnp.mean(token_losses(nnx.merge(graph, trained, frozen), tokens))

            value, gradients = jax.value_and_grad(loss)(trained)
            updates, state = optimizer.update(gradients, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return cls(graph, frozen, step.lower(trained, state, frozen, tokens).compile(), trained, state)

    def step(self, tokens: jax.Array) -> tuple["Training", jax.Array]:
        """After one batch; and the loss before it. The old one must not be used again."""
        trained, state, loss = self.compiled(self.trained, self.optimizer_state, self.frozen, tokens)
        return dataclasses.replace(self, trained=trained, optimizer_state=state), loss

    @property
    def model(self) -> Llama:
        return nnx.merge(self.graph, self.trained, self.frozen)


def load(layers: int | None) -> tuple[Llama, Tokenizer]:
    """SmolLM2-135M-Instruct in float32, or its first layers only."""
    file = gguf.read(smollm2.fetch())
    config = LlamaConfig(**gguf.llama_config(file))
    config = dataclasses.replace(config, num_layers=min(layers or config.num_layers, config.num_layers))
    beyond = tuple(f"layers.{i}." for i in range(config.num_layers, 1000))
    weights = {name: w for name, w in gguf.llama_weights(file).items() if not name.startswith(beyond)}
    return Llama.from_weights(config, weights), Tokenizer(file)


def batches(tokens: np.ndarray, batch: int, window: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Windows [batch, window] from random places, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - window + 1, batch)
        yield np.stack([tokens[s : s + window] for s in starts])


def mean_loss(model: Llama, tokens: np.ndarray, window: int) -> float:
    """Over whole windows, one after the other."""
    losses = compile_losses(model)
    rows = tokens[: len(tokens) // window * window].reshape(-1, window)
    return float(np.mean([losses(row[None]) for row in rows]))


def train(
    model: Llama,
    tokens: np.ndarray,
    *,
    wrt: Any = nnx.LoRAParam,
    steps: int,
    batch: int,
    window: int,
    learning_rate: float,
    report: Callable[[str], None] = print,
) -> tuple[Llama, list[float], Any]:
    """The trained model, the loss of each step, and the compiler's account of a step's memory."""
    warmup = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(10, steps // 4 + 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))
    source = batches(tokens, batch, window)
    training = Training.start(model, wrt, optimizer, next(source))
    losses = []
    for i in range(steps):
        started = time.perf_counter()
        training, loss = training.step(next(source))
        losses.append(float(loss))
        if i % max(steps // 10, 1) == 0 or i == steps - 1:
            report(f"step {i:4d}   loss {losses[-1]:7.3f}   {time.perf_counter() - started:.2f} s")
    return training.model, losses, training.compiled.memory_analysis()


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.layers)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else sample_text()
    tokens = np.asarray(tokenizer.encode(text), np.int32)
    learnt, held_out = np.split(tokens, [len(tokens) * 4 // 5])
    sizes = {"window": arguments.window}
    before = mean_loss(model, learnt, **sizes), mean_loss(model, held_out, **sizes)

    report = flax_layers.quantize_module(model, group_size=arguments.group_size, scale_dtype="float32")
    packed = mean_loss(model, learnt, **sizes), mean_loss(model, held_out, **sizes)
    if arguments.train == "lora":
        flax_layers.add_lora(model, rank=arguments.rank, rngs=nnx.Rngs(0))
    model.remat = True
    wrt = TRAINED[arguments.train]
    model, _, memory = train(
        model,
        learnt,
        wrt=wrt,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        **sizes,
    )
    after = mean_loss(model, learnt, **sizes), mean_loss(model, held_out, **sizes)
    print(f"\nloss         {'trained text':>12} {'held out':>12}")
    for name, (inside, outside) in {"float32": before, "2 bits": packed, "trained": after}.items():
        print(f"{name:<12} {inside:12.3f} {outside:12.3f}")
    largest = max(row.bytes_before for row in report.rows)
    print(
        f"\nmemory       {report.bytes_after / 1e6:.1f} MB of packed weights ({report.bytes_before / 1e6:.1f} "
        f"MB in float32, the largest layer {largest / 1e6:.1f}), {nbytes(nnx.state(model, wrt)) / 1e6:.1f} MB "
        f"trained\n             a step: {memory.argument_size_in_bytes / 1e6:.1f} MB of arguments, embedding "
        f"included, and {memory.temp_size_in_bytes / 1e6:.1f} MB besides"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=TRAINED, default="lora", help="what is trained (default: lora)")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank terms (default: 8)")
    parser.add_argument("--group-size", type=int, default=32, choices=(32, 64, -1), help="(default: 32)")
    parser.add_argument("--layers", type=int, help="use the model's first layers only (default: all)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text to train on")
    parser.add_argument("--steps", type=int, default=60, help="(default: 60)")
    parser.add_argument("--batch", type=int, default=2, help="windows a step (default: 2)")
    parser.add_argument("--window", type=int, default=128, help="tokens a window (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default: 3e-3)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
