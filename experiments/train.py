"""The training loop.

    result = train(run)                     nothing is written
    result = train(run, "runs/mamba-0")     begins there, or goes on where that run stopped

A run is decided by its `Run` alone: batch `i` is `source.batch(seed, i, size)`, nothing else is random, and a
run that was killed and continued has the same parameters and rows of metrics as one that was not, bit for bit
on the same machine. SIGINT and SIGTERM end it within a step, with a checkpoint; a second one ends it at once
(see `experiments.interrupts`). A batch with a token id out of range, or that makes a loss or a gradient that
is not finite, is skipped, and `max_bad_steps` of them in a row stop the run.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array

from experiments import faults, frozen, mesh, optimizer, state_passing, weights
from experiments.config import Run, fingerprint
from experiments.directory import Directory, Guest
from experiments.evaluate import evaluate
from experiments.feed import Feed
from experiments.flops import peak_flops, train_flops
from experiments.interrupts import signals
from experiments.record import Recorder, Screen
from experiments.samples import Samples, Writer
from experiments.step import KINDS, TrainState, model_module, programs
from layers.checks import require
from zoo import checkpoint, processes


class NotFiniteError(RuntimeError):
    """Too many updates in a row were skipped, for a loss, gradient or batch that is not as it should be."""


@dataclass(frozen=True)
class Result:
    """What `train` returns. `stopped` is None for a run that has ended, else what stopped it."""

    summary: dict
    params: Any
    rows: list[dict]
    stopped: str | None = None


def check(run: Run, source: Any) -> None:
    """The model and the data belong together. JAX reads past the end of an array without a word."""
    state_passing.check(run)
    module = model_module(run.model)
    if run.frozen:
        frozen.check(run.frozen, jax.eval_shape(lambda: module.init(jax.random.key(0), run.model)))
    kind = KINDS[module]
    require(source.kind == kind, f"data of kind {source.kind!r} for a model of kind {kind!r}")
    for name in ("features", "classes") if kind == "classification" else ("vocab_size",):
        model, data = getattr(run.model, name), getattr(source, name)
        fits = model == data or (name != "features" and model > data)
        require(fits, f"model: {name}={model}, but the data have {name}={data}")


def _check_devices(run: Run, source: Any, samples: Samples | None) -> None:
    """The run fits on its mesh, and the mesh on the devices at hand."""
    rows = {"batch_size / accumulate": run.batch_size // run.accumulate}
    mesh.check(run.mesh, **rows, eval_batch_size=run.eval_batch_size or run.batch_size)
    ok = source.length % run.mesh.sequence == 0
    require(ok, f"mesh: sequence={run.mesh.sequence} does not divide the data's length={source.length}")
    alone = jax.process_count() == 1
    require(
        alone or samples is None, "samples are written by a single process; generate from its checkpoints"
    )


class _Loop:
    """One process's part of a run."""

    def __init__(self, run: Run, source: Any, home: Directory | None, initial: Any = None):
        self.run, self.source, self.home = run, source, home
        self.programs, self.numbers = programs(run), optimizer.numbers(run.optimizer, run.steps)
        self.pending: tuple[int, Any] | None = None  # the metrics not yet read
        self.evaluation: dict[str, float] = {}
        self.samples: Writer | None = None
        self.feed: Callable[[int], dict[str, Any]] = partial(source.batch, run.seed, size=run.batch_size)
        self.durations: list[float] = []  # seconds per step, without evaluations and checkpoints
        self.mark: float | None = None  # when the metrics before were read
        self.seconds_before, self.start = 0.0, time.perf_counter()
        self.tokens = self.flops = 0.0
        self.asked = False  # to stop, in any process
        self.state = self._restored() or self._first(initial)
        self.done = self.saved = int(self.state.step)

    def _first(self, initial: Any) -> TrainState:
        return self.programs.initial(jax.random.key(self.run.seed), initial)

    def _restored(self) -> TrainState | None:
        """The state where the run stopped before, if it did."""
        home = self.home
        if home is None or not processes.by_first(lambda: checkpoint.steps(home.checkpoints)):
            return None
        _, state, extra = checkpoint.restore(home.checkpoints, self.programs.template())
        self.evaluation, self.seconds_before = extra["evaluation"], extra["seconds"]
        return state

    def go(self, until: int, received: list[str], recorder: Recorder, screen: Screen) -> None:
        """Train to step `until`, or to a signal."""
        self.recorder, self.screen = recorder, screen
        run = self.run
        while self.done < until and not self._stopping(received):
            batch = self.programs.placement.batch(self.feed(self.done))
            self._measure(batch)
            self.state, metrics = self.programs.step(self.state, batch, bool(received), self.numbers)
            self._read()  # of the step before: the device is never kept waiting for the host
            self.done += 1
            self.pending = (self.done, metrics)
            if self._due(run.eval_every):
                self._evaluate()
            if self._due(run.checkpoint_every):
                self._save()
        self._read()
        if self.saved != self.done:
            self._save()

    def _stopping(self, received: list[str]) -> bool:
        """Whether to stop; of many processes all find the same, a step after one received a signal."""
        return self.asked if jax.process_count() > 1 else bool(received)

    def _due(self, every: int) -> bool:
        return self.done == self.run.steps or (every > 0 and self.done % every == 0)

    def _measure(self, batch: dict[str, Array]) -> None:
        inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
        if self.tokens != math.prod(inputs.shape[:2]):
            self.tokens = math.prod(inputs.shape[:2])
            peak = self.run.mesh.devices * peak_flops(self.run.compute_dtype)
            self.flops = train_flops(self.run.model, batch) / peak

    def _read(self) -> None:
        """Fetch the pending metrics, record them, and stop when too many steps were bad."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending, metrics = None, jax.device_get(metrics)
        self.asked = bool(metrics.pop("asked", False))
        now = time.perf_counter()
        if self.mark is not None:
            self.durations.append(now - self.mark)
        self.mark = now
        self._show(step, metrics)
        if metrics["bad_in_row"] >= self.run.max_bad_steps:
            advice = f"try a lower lr than {self.run.optimizer.lr} or a longer warmup_steps"
            raise NotFiniteError(
                f"stopped at step {step}: {self._fault(step) or 'loss or gradient not finite'}, the last of "
                f"{metrics['bad_in_row']} steps running that were skipped; "
                f"{'look at the data' if self._fault(step) else advice}"
            )

    def _fault(self, step: int) -> str | None:
        """What was wrong with the batch of a step, if it was the batch."""
        batch = self.source.batch(self.run.seed, step - 1, self.run.batch_size)
        return faults.fault(self.run.model, batch)

    def _show(self, step: int, metrics: dict[str, Any]) -> None:
        timing = {"seconds": self.seconds()}
        recent = self.durations[-self.run.log_every :]
        text = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if recent:
            each = statistics.fmean(recent)
            timing |= {"tokens_per_second": self.tokens / each, "mfu": self.flops / each}
            text += f"  {self.tokens / each:,.0f} tokens/s"
        if metrics["bad_in_row"]:
            numbers = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            self.screen.say(f"step {step} skipped: {self._fault(step) or numbers}")
        if step % self.run.log_every == 0 or step in (1, self.run.steps) or metrics["bad_in_row"]:
            self.recorder.write("train", step, metrics, timing)
        self.screen.update(step, text)

    def _evaluate(self) -> None:
        self._read()
        self.evaluation = evaluate(
            self.run, self.state.params, self.source, placement=self.programs.placement
        )
        values = {"split": self.run.eval_split, **self.evaluation}
        self.recorder.write("eval", self.done, values, {"seconds": self.seconds()})
        loss, accuracy = self.evaluation["loss"], self.evaluation["accuracy"]
        self.screen.say(f"step {self.done}  {self.run.eval_split} loss {loss:.4f}  accuracy {accuracy:.4f}")
        if self.samples:
            self.samples.take(self.done, self.state.params, self.screen.say)
        self.mark = None

    def _save(self) -> None:
        """A checkpoint, after every row that belongs before it."""
        self._read()
        if self.home:
            self.recorder.sync()
            extra = {"evaluation": self.evaluation, "seconds": self.seconds()}
            checkpoint.save(self.home.checkpoints, self.done, self.state, extra, keep=self.run.keep)
        self.mark, self.saved = None, self.done

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def summary(self) -> dict:
        run, each = self.run, statistics.median(self.durations) if self.durations else None
        module = model_module(run.model)
        return {
            "step": self.done,
            "loss": self.evaluation.get("loss"),
            "accuracy": self.evaluation.get("accuracy"),
            "exact": self.evaluation.get("exact"),
            "split": run.eval_split,
            "params": module.param_count(run.model),
            "state_bytes": module.state_bytes(run.model),
            "bad_steps": int(self.state.bad_steps),
            "tokens_per_second": each and self.tokens / each,
            "mfu": each and self.flops / each,
            "compile_seconds": self.programs.step.seconds,
            "wall_seconds": self.seconds(),
        }


def train(
    run: Run,
    directory: str | Path | None = None,
    *,
    progress: bool = True,
    tensorboard: bool = False,
    until: int | None = None,
    samples: Samples | None = None,
) -> Result:
    """Train `run` to its end, or to step `until`; in `directory`, also from where it stopped before.

    Of many processes (see `experiments.distributed`) all call this, and process 0 alone writes and speaks.
    `progress` shows a bar on a terminal and a line now and then elsewhere; `samples` are written at every
    evaluation, and change nothing else. Raises ValueError when model and data, or initial weights, do not
    fit, OtherRunError when `directory` belongs to another run, CheckpointError when none of its checkpoints
    is intact, NotFiniteError after `run.max_bad_steps` bad steps in a row, OSError when a checkpoint cannot
    be written.
    """
    run, initial = weights.resolved(run)
    source = run.data.build()
    check(run, source)
    _check_devices(run, source, samples)
    processes.require_same("runs or data", [fingerprint(run), source.fingerprint])
    writer = None if samples is None else Writer(samples, run, source)
    with ExitStack() as stack:
        received = stack.enter_context(signals())
        home = None if directory is None else _enter(stack, directory, run, source)
        if home:
            home.write_tokenizer(getattr(source, "tokenizer", None))
            weights.keep_source(run, home.path)
        loop = _Loop(run, source, home, initial)
        del initial
        rows = home.rows_until(loop.done) if home else []
        loop.samples = writer
        if writer and home:
            writer.begin(home.path / "samples.jsonl", loop.done)
        recorder = stack.enter_context(
            closing(Recorder(home.metrics if home else None, rows, tensorboard and processes.first()))
        )
        shown = progress and processes.first()
        screen = stack.enter_context(closing(Screen(loop.done, run.steps, shown)))
        until = run.steps if until is None else min(until, run.steps)
        feed = Feed(source, run.seed, run.batch_size, until=until, ahead=run.prefetch)
        loop.feed = stack.enter_context(feed)
        old_summary = home.read_summary() if home and loop.done == run.steps else None
        loop.go(until, received, recorder, screen)
        summary = old_summary or loop.summary()
        ended = loop.done == run.steps
        if home and ended:
            home.write_summary(summary)
        asked = "a signal to another process" if loop.asked else "until"
        stopped = None if ended else received[0] if received else asked
        return Result(summary, loop.state.params, recorder.rows, stopped)


def _enter(stack: ExitStack, directory: str | Path, run: Run, source: Any) -> Directory:
    """The run's directory; process 0 holds it, the others only read there."""
    opened: list[Directory] = []
    processes.by_first(lambda: opened.append(Directory(directory, run, source.fingerprint)))
    home = opened[0] if opened else Guest(directory)
    return stack.enter_context(closing(home))
