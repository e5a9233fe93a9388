"""The training loop.

    result = train(run)                     nothing is written
    result = train(run, "runs/mamba-0")     begins there, or goes on where that run stopped

A run is decided by its `Run` alone: batch `i` is `source.batch(seed, i, size)`, nothing else is random, and a
run that was killed and continued has the same parameters and rows of metrics as one that was not, bit for bit
on the same machine. SIGINT and SIGTERM end it within a step, with a checkpoint; a second one ends it at once.
"""

import math
import signal
import statistics
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from experiments import optimizer, state_passing
from experiments.config import Optimizer, Run
from experiments.directory import Directory
from experiments.evaluate import evaluate
from experiments.losses import continued_losses, model_losses
from experiments.record import Recorder, Screen
from experiments.samples import Samples, Writer
from layers.checks import require
from zoo import autoencoder, checkpoint, classifier, lm

# What each kind of model is trained on.
KINDS: dict[ModuleType, str] = {lm: "language", classifier: "classification", autoencoder: "reconstruction"}


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@struct.dataclass
class TrainState:
    step: Array  # batches used
    bad_steps: Array  # of which skipped
    bad_in_row: Array  # of which just now
    params: Any
    opt_state: Any
    passed: Any = None  # what a batch leaves to the next (see `experiments.state_passing`)


@dataclass(frozen=True)
class Result:
    """What `train` returns. `stopped` is None for a run that has ended, else what stopped it."""

    summary: dict
    params: Any
    rows: list[dict]
    stopped: str | None = None


def model_module(model: Any) -> ModuleType:
    """The functions of a model Config."""
    modules: dict[type, ModuleType] = {module.Config: module for module in KINDS}
    require(type(model) in modules, f"model={model!r} is no Config of zoo's lm, classifier or autoencoder")
    return modules[type(model)]


def init_state(run: Run, key: Array) -> TrainState:
    """Step 0."""
    params = model_module(run.model).init(key, run.model)
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer.make(run.optimizer, optimizer.numbers(run.optimizer, run.steps)).init(params)
    return TrainState(zero, zero, zero, params, opt_state, state_passing.first(run, key))


def accumulated_gradient(run: Run, params: Any, batch: dict[str, Array], state: Any = None):
    """`(gradient, mean loss with auxiliary losses, sums, aux, last state)` of a batch, part by part.

    Losses are summed over labelled positions and divided by their number in the whole batch, so the
    result does not depend on how the batch is cut. Auxiliary losses of the layers weigh by those positions.
    `state` is what the rows begin with; without it they begin empty, and the last state is None.
    """
    tokens = jnp.maximum((batch["targets"] >= 0).sum(), 1)
    how = {"chunk": run.loss_chunk, "dtype": jnp.dtype(run.compute_dtype)}

    def objective(params, part, begun):
        if begun is None:
            (sums, aux), last = model_losses(params, run.model, part, **how), None
        else:
            sums, aux, last = continued_losses(params, run.model, part, begun, **how)
        extra = sum(value for name, value in aux.items() if name.endswith("_loss"))
        return (sums["loss"] + sums["tokens"] * extra) / tokens, (sums, aux, last)

    def add(grads, part):
        (loss, out), new = jax.value_and_grad(objective, has_aux=True)(params, *part)
        return jax.tree.map(jnp.add, grads, new), (loss, *out)

    parts = jax.tree.map(lambda x: x.reshape(run.accumulate, -1, *x.shape[1:]), batch)
    parts = parts, state_passing.cut(state, run.accumulate)
    grads, (loss, sums, aux, last) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    sums = {name: value.sum() for name, value in sums.items()}
    return (
        grads,
        loss.sum(),
        sums,
        {name: value.mean(0) for name, value in aux.items()},
        state_passing.join(last),
    )


def make_train_step(run: Run):
    """`(state, batch, numbers=those of the run's optimizer) -> (state, metrics)`.

    When the loss or the gradient is not finite, parameters and optimiser stay as they are, and so does the
    schedule, which counts the updates that were made.
    """
    own = optimizer.numbers(run.optimizer, run.steps)

    def train_step(state: TrainState, batch: dict[str, Array], numbers: optimizer.Numbers = own):
        update = optimizer.make(run.optimizer, numbers).update
        rate = optimizer.schedule(run.optimizer.schedule, numbers)
        begun = state_passing.begin(run, state.passed, state.step)
        grads, loss, sums, aux, last = accumulated_gradient(run, state.params, batch, begun)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = update(grads, state.opt_state, state.params)
        proposed = (optax.apply_updates(state.params, updates), opt_state)
        kept = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), proposed, kept)
        bad_steps, bad_in_row = state.bad_steps + ~ok, jnp.where(ok, 0, state.bad_in_row + 1)
        metrics = {
            "loss": sums["loss"] / jnp.maximum(sums["tokens"], 1),
            "accuracy": sums["correct"] / jnp.maximum(sums["tokens"], 1),
            "grad_norm": norm,
            "lr": rate(state.step - state.bad_steps),
            "bad_steps": bad_steps,
            "bad_in_row": bad_in_row,
            **aux,
        }
        passed = state_passing.keep(run, state.passed, last, ok)
        return TrainState(state.step + 1, bad_steps, bad_in_row, params, opt_state, passed), metrics

    return train_step


class _Compiled:
    """A step compiled once per shape of batch, and the seconds that took."""

    def __init__(self, step):
        self.step, self.made, self.seconds = jax.jit(step, donate_argnums=0), {}, 0.0

    def __call__(self, state: TrainState, batch: dict[str, Array], numbers: optimizer.Numbers):
        shapes = tuple(sorted((name, x.shape, x.dtype.name) for name, x in batch.items()))
        if shapes not in self.made:
            start = time.perf_counter()
            self.made[shapes] = self.step.lower(state, batch, numbers).compile()
            self.seconds += time.perf_counter() - start
        return self.made[shapes](state, batch, numbers)


@dataclass(frozen=True)
class _AnyData:
    """In the place of data, which no program depends on."""

    def build(self):
        raise NotImplementedError


def _programs(run: Run):
    """`(key -> state, (state, batch, numbers) -> (state, metrics))`, compiled.

    Runs that differ in their seed, length, data or the numbers of their optimizer share them.
    """
    mine = run.optimizer
    shape = Optimizer(
        schedule=mine.schedule, beta1=mine.beta1, beta2=mine.beta2, eps=mine.eps, clip_norm=mine.clip_norm
    )
    fields = ("model", "batch_size", "accumulate", "compute_dtype", "loss_chunk")
    fields += ("initial_state", "state_scale")
    return _compiled(Run(data=_AnyData(), optimizer=shape, **{name: getattr(run, name) for name in fields}))


@lru_cache(8)
def _compiled(run: Run):
    return jax.jit(partial(init_state, run)), _Compiled(make_train_step(run))


@cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product on this machine: what a perfect program could reach."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def train_flops(model: Any, batch: dict[str, Any]) -> float:
    """FLOPs of forward and backward of a batch, recomputation not counted; the head only where it is read."""
    inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
    size, length = inputs.shape[:2]
    flops = size * length * model_module(model).flops_per_token(model, length)
    if "positions" in batch:
        flops -= (size * length - batch["targets"].size) * 2 * model.width * model.vocab_size
    return 3 * flops


def check(run: Run, source: Any) -> None:
    """The model and the data belong together. JAX reads past the end of an array without a word."""
    state_passing.check(run)
    kind = KINDS[model_module(run.model)]
    require(source.kind == kind, f"data of kind {source.kind!r} for a model of kind {kind!r}")
    for name in ("features", "classes") if kind == "classification" else ("vocab_size",):
        model, data = getattr(run.model, name), getattr(source, name)
        fits = model == data or (name != "features" and model > data)
        require(fits, f"model: {name}={model}, but the data have {name}={data}")


@contextmanager
def _signals():
    """A list that receives the name of a first SIGINT or SIGTERM; a second one interrupts at once."""
    received: list[str] = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt(signal.Signals(number).name)
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be received
        yield received
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Loop:
    """One process's part of a run."""

    def __init__(self, run: Run, source: Any, home: Directory | None):
        self.run, self.source, self.home = run, source, home
        self.initial, self.step = _programs(run)
        self.numbers = optimizer.numbers(run.optimizer, run.steps)
        self.pending: tuple[int, Any] | None = None  # the metrics not yet read
        self.evaluation: dict[str, float] = {}
        self.samples: Writer | None = None
        self.durations: list[float] = []  # seconds per step, without evaluations and checkpoints
        self.mark: float | None = None  # when the metrics before were read
        self.seconds_before, self.start = 0.0, time.perf_counter()
        self.tokens = self.flops = 0.0
        self.state = self._restore(home) if home and checkpoint.steps(home.checkpoints) else self._first()
        self.done = self.saved = int(self.state.step)

    def _first(self) -> TrainState:
        return self.initial(jax.random.key(self.run.seed))

    def _restore(self, home: Directory) -> TrainState:
        template = jax.eval_shape(self._first)
        _, state, extra = checkpoint.restore(home.checkpoints, template)
        self.evaluation, self.seconds_before = extra["evaluation"], extra["seconds"]
        return state

    def go(self, until: int, received: list[str], recorder: Recorder, screen: Screen) -> None:
        """Train to step `until`, or to a signal."""
        self.recorder, self.screen = recorder, screen
        run = self.run
        while self.done < until and not received:
            batch = jax.device_put(self.source.batch(run.seed, self.done, run.batch_size))
            if not self.tokens:
                self._measure(batch)
            self.state, metrics = self.step(self.state, batch, self.numbers)
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

    def _due(self, every: int) -> bool:
        return self.done == self.run.steps or (every > 0 and self.done % every == 0)

    def _measure(self, batch: dict[str, Array]) -> None:
        inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
        self.tokens = math.prod(inputs.shape[:2])
        self.flops = train_flops(self.run.model, batch) / peak_flops(self.run.compute_dtype)

    def _read(self) -> None:
        """Fetch the pending metrics, record them, and stop when too many steps were bad."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending, metrics = None, jax.device_get(metrics)
        now = time.perf_counter()
        if self.mark is not None:
            self.durations.append(now - self.mark)
        self.mark = now
        self._show(step, metrics)
        if metrics["bad_in_row"] >= self.run.max_bad_steps:
            running = metrics["bad_in_row"]
            raise NotFiniteError(
                f"stopped at step {step}: loss or gradient not finite in {running} steps running; "
                f"try a lower lr than {self.run.optimizer.lr} or a longer warmup_steps"
            )

    def _show(self, step: int, metrics: dict[str, Any]) -> None:
        timing = {"seconds": self.seconds()}
        recent = self.durations[-self.run.log_every :]
        text = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if recent:
            each = statistics.fmean(recent)
            timing |= {"tokens_per_second": self.tokens / each, "mfu": self.flops / each}
            text += f"  {self.tokens / each:,.0f} tokens/s"
        if metrics["bad_in_row"]:
            norm = metrics["grad_norm"]
            self.screen.say(f"step {step} skipped: loss {metrics['loss']}, gradient norm {norm}")
        if step % self.run.log_every == 0 or step in (1, self.run.steps) or metrics["bad_in_row"]:
            self.recorder.write("train", step, metrics, timing)
        self.screen.update(step, text)

    def _evaluate(self) -> None:
        self._read()
        self.evaluation = evaluate(self.run, self.state.params, self.source)
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
            "compile_seconds": self.step.seconds,
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

    `progress` shows a bar on a terminal and a line now and then elsewhere; `samples` are written at every
    evaluation, and change nothing else. Raises ValueError when model and data do not fit, OtherRunError when
    `directory` belongs to another run, CheckpointError when none of its checkpoints is intact,
    NotFiniteError after `run.max_bad_steps` bad steps in a row, OSError when a checkpoint cannot be written.
    """
    source = run.data.build()
    check(run, source)
    writer = None if samples is None else Writer(samples, run, source)
    with ExitStack() as stack:
        received = stack.enter_context(_signals())
        home = None
        if directory is not None:
            home = stack.enter_context(closing(Directory(directory, run, source.fingerprint)))
        if home:
            home.write_tokenizer(getattr(source, "tokenizer", None))
        loop = _Loop(run, source, home)
        rows = home.rows_until(loop.done) if home else []
        loop.samples = writer
        if writer and home:
            writer.begin(home.path / "samples.jsonl", loop.done)
        recorder = stack.enter_context(closing(Recorder(home.metrics if home else None, rows, tensorboard)))
        screen = stack.enter_context(closing(Screen(loop.done, run.steps, progress)))
        old_summary = home.read_summary() if home and loop.done == run.steps else None
        loop.go(run.steps if until is None else min(until, run.steps), received, recorder, screen)
        summary = old_summary or loop.summary()
        ended = loop.done == run.steps
        if home and ended:
            home.write_summary(summary)
        stopped = None if ended else received[0] if received else "until"
        return Result(summary, loop.state.params, recorder.rows, stopped)
