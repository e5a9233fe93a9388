"""What is measured of a trained run, each figure once: it is kept beside the run and read from there again.

Test split and probes say how good a run is where it was not selected; speeds are those of a machine with
nothing else to do, so they are taken one after the other, when all training is over.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import config, timing
from experiments.budget import build
from experiments.config import Run
from experiments.directory import write_json
from experiments.evaluate import evaluate
from experiments.record import plain
from experiments.step import init_state, make_train_step, model_module
from zoo import checkpoint
from zoo.blocks import Block
from zoo.reading import read_object

Numbers = dict[str, Any]


def once(path: Path, of: Any, measure) -> Numbers:
    """`measure()`, or what `path` has of it if it was made for the same config `of`."""
    key = config.fingerprint(of)
    if path.exists():
        saved = read_object(path, "of", "numbers")
        if saved["of"] == key:
            return saved["numbers"]
    numbers = plain(measure())
    write_json(path, {"of": key, "numbers": numbers})
    return numbers


def tested(directory: Path, run: Run, probes: tuple[tuple[str, Any], ...]) -> dict[str, Numbers]:
    """`{"test": ..., probe: ...}`: `evaluate` of a run's last parameters on the test split of its data, or
    the validation split where there is none (`split` says which), and of each probe's."""
    numbers = {}
    for name, data in (("test", run.data), *probes):
        here = dataclasses.replace(run, data=data, eval_batches=None)
        path = directory / f"tested-{config.fingerprint(data)}.json"
        numbers[name] = once(path, here, partial(_evaluate, directory, here))
    return numbers


def _evaluate(directory: Path, run: Run) -> Numbers:
    source = build(run.data)
    split = "test" if "test" in source.splits else run.eval_split
    run = dataclasses.replace(run, model=reaching(run.model, source.length))
    return {"split": split, **evaluate(run, checkpoint.load_params(directory), source, split)}


def reaching(model: Any, length: int) -> Any:
    """`model`, its full attention with room for `length` tokens: no parameter depends on that."""

    def grown(entry: Any, layer: Any) -> Any:
        if getattr(layer, "max_length", length) < length:
            layer = dataclasses.replace(layer, max_length=length)
        return dataclasses.replace(entry, mixer=layer) if isinstance(entry, Block) else layer

    pattern = tuple(grown(*pair) for pair in zip(model.pattern, model.layers, strict=False))
    shared = tuple(
        dataclasses.replace(block, attention=grown(block.attention, block.attention))
        for block in model.shared
    )
    return dataclasses.replace(model, pattern=pattern, shared=shared)


def speed(directory: Path, run: Run) -> Numbers:
    """Training and decoding in tokens per second, bytes XLA plans for a training step beside parameters and
    batch, seconds to compile it; decoding is one sequence inside a compiled loop."""
    return once(directory / "speed.json", run, partial(_speed, run))


def _speed(run: Run) -> Numbers:
    batch = jax.device_put(build(run.data).batch(run.seed, 0, run.batch_size))
    inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
    state = init_state(run, jax.random.key(0))
    program, seconds = timing.compiled(make_train_step(run), state, batch)
    return {
        "train_tokens_per_second": inputs.shape[0] * inputs.shape[1]
        / timing.median_seconds(program, state, batch, patience=2.0),
        "decode_tokens_per_second": _decoding(run, state.params, inputs),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }  # fmt: skip


def _decoding(run: Run, params: Any, inputs: jax.Array, steps: int = 64) -> float | None:
    """Tokens per second of one sequence; None for a model that reads its input whole."""
    module, model = model_module(run.model), run.model
    if not hasattr(module, "step"):
        return None
    dtype = jnp.dtype(run.compute_dtype)
    repeated = jnp.resize(inputs[0], (steps, 1, *inputs.shape[2:]))

    def loop(params, state, stream):
        def body(state, token):
            out, state = module.step(params, model, token, state, dtype=dtype)
            return state, out

        return jax.lax.scan(body, state, stream)

    arguments = params, module.init_state(model, 1), repeated
    program, _ = timing.compiled(loop, *arguments)
    return steps / timing.median_seconds(program, *arguments, patience=1.0)
