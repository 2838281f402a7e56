"""One run of `quantize`: a layer read, quantised and written at a time, so that it can stop anywhere."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints.errors import CheckpointError, optional_import
from ..checkpoints.models import Model, write_config
from ..checkpoints.packed import Parts
from ..quantizers.recipe import Recipes
from ..types import QuantTensor, check_group_size
from .model import megabytes
from .output import clear, clear_unfinished, copy_tokenizer, write_json

REPORT = "quantize.json"


class Run:
    """What is to be done, the settings that a resumed run must share, and the doing.

    Args:
      model: where the float weights come from.
      recipes: how to quantise which module.
      documents: token ids of the calibration text; None when the methods need none.
      window: longest piece of a document; 2048 or the model's limit when None.
      bos: a token to put before every piece, as a part of its window; None for none.
      batch_tokens: tokens computed at once.
      float_dtype: of the weights that stay float.

    Raises:
      ValueError: a group size does not divide a layer's K, a method needs documents and there are none,
        or nothing is left to quantise.
    """

    def __init__(
        self,
        model: Model,
        recipes: Recipes,
        documents: Sequence[Sequence[int]] | None,
        *,
        window: int | None,
        batch_tokens: int,
        float_dtype: str,
        bos: int | None = None,
    ):
        from flax_layers.llama import LlamaConfig
        from flax_layers.quantize_llama import make_batches

        self.model, self.recipes = model, recipes
        self.config = LlamaConfig(**model.config)
        self.dtype = np.dtype(jnp.dtype(float_dtype))
        self.batches = None
        window = min(window or 2048, self.config.max_positions)
        if documents is not None:
            pieces = documents if bos is None else begin_with(bos, documents, window)
            self.batches = make_batches(pieces, window=window, batch_tokens=batch_tokens)
        self._check_recipes()
        ids = np.concatenate([np.asarray([*d, -1], np.int32) for d in documents or [[]]])
        self.settings: dict[str, Any] = {
            "model": model.name,
            "model_crc32": _checksum(model.path),
            "rotation": getattr(model, "description", None),
            "recipe": asdict(recipes.default),
            "overrides": [[pattern, dict(changes)] for pattern, changes in recipes.overrides],
            "skip": [*recipes.skip, *recipes.default_skip],
            "float_dtype": float_dtype,
            "calibration": {
                "documents": len(documents or ()),
                "tokens": sum(map(len, documents or ())),
                "crc32": zlib.crc32(ids.tobytes()),
                "window": window,
                "bos": bos,
                "batch_tokens": batch_tokens,
            },
        }

    def _check_recipes(self) -> None:
        """Finds what cannot be done before hours have gone into the layers before it."""
        chosen = 0
        checked = set()
        for path, shape in self.model.shapes.items():
            name = path.removesuffix(".kernel")
            recipe = self.recipes.of(name) if path != name else None
            if recipe is None:
                continue
            chosen += 1
            try:
                check_group_size("quantize", shape[0], recipe.group_size)
                if (repr(recipe), shape) not in checked:
                    recipe.check(shape)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from error
            checked.add((repr(recipe), shape))
            if recipe.calibrated and self.batches is None:
                raise ValueError(
                    f"{name}: method {recipe.method!r} needs calibration text; give --calibration FILE, or a method "
                    "that needs none, such as --method mse"
                )
        if not chosen:
            raise ValueError("no module is left to quantise; change --skip or --override")

    def memory(self) -> int:
        """Bytes of arrays at the highest, from the shapes; Python, JAX and compiled programs come on top."""
        config, shapes = self.config, self.model.shapes
        layer = [shape for path, shape in shapes.items() if path.startswith("layers.0.")]
        states = batch = hessians = 0
        if self.batches is not None:
            sizes = [tokens.shape for tokens, _ in self.batches]
            states = sum(rows * width for rows, width in sizes) * config.hidden_size
            # One batch: its inputs and outputs, q, k, v, both MLP products; the scores and their softmax.
            hidden, mlp = 6 * config.hidden_size, 3 * config.intermediate_size
            batch = max(b * t * (hidden + mlp) + 3 * b * config.num_heads * t * t for b, t in sizes)
            # H itself, ordered, damped, its factor, the factor's inverse, and a solver's copy.
            hessians = 6 * max(shape[0] ** 2 for shape in layer)
        # Beside a weight: its free rows, errors, levels, and what a search of scales tries out.
        solve = hessians + max(6 * int(np.prod(shape)) for shape in layer)
        # As read and as computed with; the quantised ones are small.
        weights = 2 * sum(int(np.prod(shape)) for shape in layer)
        outer = 2 * int(np.prod(shapes["embed.embedding"]))  # embedding and head, one after the other
        return 4 * (states + max(weights + max(batch, solve), outer))

    def state_memory(self) -> None:
        """Says what is about to be done, and the memory that it takes."""
        print(f"model      {self.model.name}: {self.model.path}")
        names = [path.removesuffix(".kernel") for path in self.model.shapes]
        for pattern in self.recipes.unused(names):
            print(f"warning: {pattern!r} of --skip or --override fits no module", file=sys.stderr)
        if self.batches is not None:
            calibration = self.settings["calibration"]
            widths = sorted({tokens.shape[1] for tokens, _ in self.batches})
            print(
                f"calibrate  {calibration['tokens']:,} tokens in {calibration['documents']} documents, in widths of "
                f"{', '.join(map(str, widths))}"
            )
        everything = 4 * sum(int(np.prod(shape)) for shape in self.model.shapes.values())
        print(
            f"memory     at most about {megabytes(self.memory())} of arrays at a time: the calibration and a layer; "
            f"all weights in float32 would be {megabytes(everything)}. Python, JAX and its programs come on top",
            flush=True,
        )

    def go(self, out: Path, *, overwrite: bool) -> None:
        """Quantises into the directory `out`, from the first layer that is not there yet.

        Raises:
          ValueError: what is there was made with other settings, and overwrite is False.
          CheckpointError: a file there is damaged.
        """
        from flax_layers import quantize_llama as driver

        started = time.perf_counter()
        count = self.config.num_layers
        parts = self._prepare(out, count + 2, overwrite)
        bar = optional_import("tqdm", "showing progress").tqdm(
            total=count, unit="layer", disable=None, file=sys.stderr
        )

        def show(report: driver.ModuleReport) -> None:
            with bar.external_write_mode(file=sys.stdout):
                print(report, flush=True)

        with bar:
            embedding = self._embedding(parts)
            calibration = None
            if self.batches is not None:
                calibration = driver.Calibration(self.config, self.batches, embedding)
            del embedding
            rows: list[dict[str, Any]] = []
            last = driver.last_layer(self.config, self.recipes)
            for i in range(count):
                if i > last:
                    calibration = None
                rows += self._layer(driver, parts, i, calibration, show)
                gc.collect()  # nnx leaves cycles behind that hold the layer's arrays
                bar.update()
            rows += self._head(driver, parts, calibration, show)
        self._finish(out, parts, rows, time.perf_counter() - started)

    def _prepare(self, out: Path, count: int, overwrite: bool) -> Parts:
        report = out / REPORT
        settings = json.loads(json.dumps(self.settings))  # as it will be read back
        if overwrite:
            clear(out, REPORT)
        elif report.is_file():
            try:
                before = json.loads(report.read_text(encoding="utf-8"))["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{report}: damaged ({error}); start again with --overwrite") from error
            for key, value in settings.items():
                if before.get(key) != value:
                    raise ValueError(
                        f"{report}: the run to resume had {key}={before.get(key)!r}, this one has {value!r}; use the "
                        "same settings, or start again with --overwrite"
                    )
        elif out.exists() and any(out.glob("model-*.safetensors")):
            raise ValueError(
                f"{out} holds a model, but no {REPORT}: nothing to resume; name another directory"
            )
        parts = Parts(out, count)
        clear_unfinished(out)  # of a run that was killed
        write_json(report, {"complete": False, "settings": settings})
        return parts

    def _embedding(self, parts: Parts) -> np.ndarray:
        name = "embed.embedding"
        if not parts.has(0):
            parts.write(0, {name: self._float(name)})
        return parts.read(0)[0][name]

    def _layer(self, driver: Any, parts: Parts, i: int, calibration: Any, show: Any) -> list[dict[str, Any]]:
        """One block quantised and written, or taken from its file; its modules' reports."""
        prefix = f"layers.{i}."
        if parts.has(i + 1):
            part, notes = parts.read(i + 1)
            if calibration is not None:
                saved = {name.removeprefix(prefix): value for name, value in part.items()}
                calibration.advance(driver.make_block(self.config, saved))
            return notes["modules"]
        weights: dict[str, Any] = {}
        for path in self.model.shapes:
            if path.startswith(prefix):
                name = path.removeprefix(prefix)
                recipe = self.recipes.of(path.removesuffix(".kernel")) if name.endswith(".kernel") else None
                weights[name] = self._float(path) if recipe is None else _as_float32(self.model.read(path))
        block = driver.make_block(self.config, weights)
        packed, reports = driver.quantize_block(block, prefix, self.recipes, calibration, show)
        weights |= {f"{name}.kernel": weight for name, weight in packed.items()}
        if calibration is not None:
            calibration.advance(block)
        modules = [report.to_dict() for report in reports]
        parts.write(i + 1, {prefix + name: value for name, value in weights.items()}, {"modules": modules})
        return modules

    def _head(self, driver: Any, parts: Parts, calibration: Any, show: Any) -> list[dict[str, Any]]:
        """The last norm and the head."""
        i = self.config.num_layers + 1
        if parts.has(i):
            return parts.read(i)[1]["modules"]
        weights: dict[str, Any] = {"norm.scale": self._float("norm.scale")}
        modules = []
        if not self.config.tie_embeddings:
            recipe = self.recipes.of("lm_head")
            if recipe is None:
                weights["lm_head.kernel"] = self._float("lm_head.kernel")
            else:
                hessian = None
                if calibration is not None:
                    hessian = calibration.head_hessian(weights["norm.scale"], self.config.rms_eps)
                kernel = jnp.asarray(_as_float32(self.model.read("lm_head.kernel")))
                weight, report = driver.quantize_linear("lm_head", kernel, recipe, hessian)
                show(report)
                weights["lm_head.kernel"] = weight
                modules.append(report.to_dict())
        parts.write(i, weights, {"modules": modules})
        return modules

    def _float(self, path: str) -> np.ndarray:
        """A weight that stays float, in the dtype it is stored in. Raises ValueError when it overflows."""
        value = _as_float32(self.model.read(path))
        with np.errstate(over="ignore"):
            stored = value.astype(self.dtype)
        if not np.isfinite(stored.astype(np.float32)).all():
            raise ValueError(
                f"{path}: its largest number, {np.abs(value).max():g}, is not finite in {self.dtype}; use "
                "--float-dtype bfloat16 or float32"
            )
        return stored

    def _finish(self, out: Path, parts: Parts, rows: list[dict[str, Any]], seconds: float) -> None:
        """Tokenizer, configuration and report; the index, which makes it a model, last."""
        if why := copy_tokenizer(self.model, out):
            print(f"tokenizer  left out: {why}", file=sys.stderr)
        write_config(out, self.model.config, {"bits": self.recipes.default.bits})
        before = sum(row["bytes_before"] for row in rows)
        after = sum(row["bytes_after"] for row in rows)
        count = sum(int(np.prod(row["shape"])) for row in rows)
        peak = _peak_resident()
        write_json(
            out / REPORT,
            {
                "complete": True,
                "settings": self.settings,
                "bits_a_weight": 8 * after / count,
                "weights_quantised": count,
                "bytes_before": before,
                "bytes_after": after,
                "memory_stated": self.memory(),
                "memory_peak_resident": peak,
                "device": jax.devices()[0].device_kind,
                "seconds": seconds,
                "modules": rows,
            },
        )
        parts.finish()
        errors = [row["output_error"] for row in rows if row["output_error"] is not None]
        mean = f"; mean relative output error {np.mean(errors):.4f}" if errors else ""
        print(
            f"quantised  {len(rows)} modules, {count:,} weights, {8 * after / count:.3f} bits a weight with scales"
            f"{mean}\n"
            f"           {megabytes(before)} in float32 before, {megabytes(after)} after; {seconds:.1f} s"
            + (f"; the whole process took {megabytes(peak)} at most" if peak else "")
            + f"\nwritten    {out}"
        )


def begin_with(bos: int, documents: Sequence[Sequence[int]], window: int) -> list[list[int]]:
    """The documents cut into pieces of window - 1 tokens, `bos` before each. Raises ValueError."""
    if window < 2:
        raise ValueError(f"--bos: wanted a window of 2 tokens or more, got {window}")
    step = window - 1
    return [[bos, *d[start : start + step]] for d in documents for start in range(0, len(d), step)]


def _as_float32(value: Any) -> np.ndarray:
    if isinstance(value, QuantTensor):
        from ..reference import dequantize

        value = dequantize(value, dtype=jnp.float32)
    return np.asarray(value).astype(np.float32)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, or of the safetensors files of a directory."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    crc = 0
    for name in files:
        with name.open("rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    return crc


def _peak_resident() -> int | None:
    """The most memory that the process ever had, in bytes; None where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
