"""Runs that are killed, and the processes they live in.

The parent imports everything and starts no device; a life is a fork of it, so that a restart costs a second,
with one compilation cache for all. What a life is doing, and how far it is, it writes into memory it shares
with its parent, which reads that when it is dead. Everything here is done to the child's own modules: nothing
in the project knows of it.
"""

import mmap
import os
import signal
import struct
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from experiments import directory, record, step, train
from experiments.config import Optimizer, Run
from experiments.curriculum import Curriculum
from experiments.text import TextData
from zoo import checkpoint, lm

# What a life is in the middle of.
PHASES = (
    "starting", "restoring", "a step", "between steps", "writing metrics", "arrays being written",
    "manifest being made", "on its way to the disk", "before the rename", "between rename and prune",
    "pruning", "replacing a file",
)  # fmt: skip
# Where a life can be told to kill itself: on entering a phase, or a moment later.
POINTS = PHASES[1:]
LENGTHS = (4, 8, 16)
NOT_YET = -1  # no step to begin at has been found
METRICS = ("loss", "accuracy", "grad_norm", "lr", "bad_steps", "bad_in_row")


def run_of(place: Path, steps: int, interval: int) -> Run:
    """A tiny model on text in three lengths that take turns, a row of metrics a step."""
    text = place / "text.txt"
    if not text.exists():
        lines = [
            "every line of this text is a document",
            "a few of them are longer than a row of it",
            "short",
        ]
        text.write_text("\n".join(f"{line} {number}" for number in range(40) for line in lines))
    data = TextData(path=str(text), tokenizer="char", documents="lines", mode="packed", length=LENGTHS[-1])
    vocabulary = data.build().vocab_size
    return Run(
        model=lm.Config(
            vocab_size=vocabulary, width=8, depth=1, pattern=("min_gru",), mlp="none", remat=False
        ),
        data=Curriculum(text=data, lengths=LENGTHS, steps=(7, 5, 3), cycle=True),
        optimizer=Optimizer(warmup_steps=5),
        steps=steps,
        batch_size=4,
        log_every=1,
        eval_every=50,
        eval_batches=1,
        checkpoint_every=interval,
        keep=2,
    )


class Shared:
    """Numbers that outlive a child: `done` steps, `phase`, `restored` step, `made` programs, `compiled`."""

    NAMES = ("done", "phase", "restored", "made", "compiled", "lengths")

    def __init__(self):
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("<q", self._memory, 8 * self.NAMES.index(name))[0]

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * self.NAMES.index(name), value)


@dataclass(frozen=True)
class Plan:
    """When a life ends: `seconds` after its first step, by its parent's hand; or by its own, `delay` seconds
    after it has come to `point` for the `times`-th time. None of them: when the run does."""

    seconds: float | None = None
    point: str | None = None
    times: int = 1
    delay: float = 0.0


def draw(random: Random) -> Plan:
    """Two in five by the clock, the others at a point, half of them a moment later."""
    if random.random() < 0.4:
        return Plan(seconds=random.uniform(0.0, 1.0))
    point = random.choice(POINTS)
    often = point in ("a step", "between steps", "writing metrics", "on its way to the disk")
    times = random.randint(1, 15) if often else random.randint(1, 2)
    times = 1 if point == "restoring" else times
    return Plan(point=point, times=times, delay=random.choice([0.0, random.uniform(0.0, 0.05)]))


class Life:
    """The child's side: a run, with everything that it does made visible."""

    def __init__(self, shared: Shared, plan: Plan, memory: Path | None = None, program: Path | None = None):
        self.shared, self.plan, self.memory, self.program = shared, plan, memory, program
        self.counts: dict[str, int] = {}
        self.lengths: set[int] = set()
        self.in_step = False

    def enter(self, phase: str) -> None:
        self.shared["phase"] = PHASES.index(phase)
        self.counts[phase] = self.counts.get(phase, 0) + 1
        if phase == self.plan.point and self.counts[phase] == self.plan.times:
            if not self.plan.delay:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(self.plan.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def wrap(self, holder: Any, name: str, before: str, after: str | None = None) -> None:
        """Let `holder.name` say that it begins, and what comes when it has ended."""
        function: Callable = getattr(holder, name)

        def told(*args, **kwargs):
            self.enter(before)
            result = function(*args, **kwargs)
            if after:
                self.enter(after)
            return result

        setattr(holder, name, told)

    def watch(self) -> None:
        """Put all the wrappers on."""
        self.wrap(checkpoint, "_write", "arrays being written")
        self.wrap(checkpoint, "_file_digests", "manifest being made")
        self.wrap(checkpoint, "_sync", "on its way to the disk")
        self.wrap(checkpoint, "_prune", "pruning", "between steps")
        self.wrap(record.Recorder, "_append", "writing metrics", "between steps")
        self.wrap(directory, "_replace", "replacing a file")
        self._watch_rename()
        self._watch_restore()
        self._watch_steps()
        vars(train)["peak_flops"] = lambda dtype: 1e9  # a measurement that every life would repeat

    def _watch_rename(self) -> None:
        rename = os.rename

        def told(source, target):
            final = Path(target).name.startswith("step_")
            if final:
                self.enter("before the rename")
            rename(source, target)
            if final:
                self.enter("between rename and prune")

        vars(os)["rename"] = told

    def _watch_restore(self) -> None:
        restore = checkpoint.restore

        def told(home, template):
            self.enter("restoring")
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing damaged is ever visible
                found = restore(home, template)
            self.shared["restored"] = self.shared["done"] = found[0]
            return found

        vars(checkpoint)["restore"] = told

    def _watch_steps(self) -> None:
        call = step._Step.__call__

        def told(program, state, batch, *more):
            if self.program and not program.made:
                program.made[step.shapes_of(batch)] = kept(self.program, program, state, batch)
            self.shared["restored"] = max(self.shared["restored"], 0)  # where there was nothing to restore
            self.enter("a step")
            self.in_step = True
            result = call(program, state, batch, *more)
            self.in_step = False
            self.lengths.add(batch["tokens"].shape[1])
            self.shared["done"] += 1
            self.shared["made"], self.shared["lengths"] = len(program.made), len(self.lengths)
            if self.memory and self.shared["done"] % 250 == 0:
                with self.memory.open("a") as stream:
                    stream.write(f"{self.shared['done']},{resident()}\n")
            self.enter("between steps")
            return result

        def compiled(event: str, duration_secs: float, **_: Any) -> None:
            self.shared["compiled"] += self.in_step and event.endswith("backend_compile_duration")

        type.__setattr__(step._Step, "__call__", told)
        jax.monitoring.register_event_duration_secs_listener(compiled)


def kept(path: Path, program: Any, state: Any, batch: Any) -> Any:
    """The compiled step as an earlier life has left it in `path`, or made now and left there.

    Making it is nearly all that a restart costs; the persistent cache of JAX saves only the last part of it.
    """
    ours = (state, dict.fromkeys(METRICS, 0))
    trees = jax.tree.structure(((state, batch, program.numbers), {})), jax.tree.structure(ours)
    if path.exists():
        return deserialize_and_load(path.read_bytes(), *trees)
    made = program.lower(state, batch).compile()
    payload, *found = serialize(made)
    assert tuple(found) == trees, found
    path.write_bytes(payload)
    return made


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live(run: Run, home: Path, plan: Plan, shared: Shared, **how: Path) -> int:
    """One life of a run in a fork of this process; its exit status, negative for the signal that ended it.

    `memory` is where it writes down its size, `program` where the compiled step of all lives is kept.
    """
    for name in Shared.NAMES:
        shared[name] = 0
    shared["restored"] = NOT_YET
    child = os.fork()
    if not child:
        _child(run, home, Life(shared, plan, **how))
    if plan.seconds is not None:
        while not shared["done"] and _alive(child):
            time.sleep(0.005)
        time.sleep(plan.seconds)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _alive(child: int) -> bool:
    """Whether a child still runs; it is left to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _child(run: Run, home: Path, life: Life) -> None:
    status = 1
    try:
        jax.config.update("jax_compilation_cache_dir", str(home.parent / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        life.watch()
        result = train.train(run, home, progress=False)
        status = 0 if result.stopped is None else 3
    except BaseException as error:  # whatever it is, the child must not go on as its parent
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)
