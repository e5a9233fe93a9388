"""Tasks one after the other: a curriculum from easy to hard, evaluated on the last.

    Stages(tasks=(CopyingData(context=32), CopyingData(context=256)), steps=(2000, 500))

trains 2,000 steps on the first task and 500 on the second, which goes on if the run is longer. A step is
compiled once for every shape of batch. Text whose rows grow longer is `experiments.curriculum`.

Source: Bengio et al. 2009, "Curriculum Learning".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.sources import Batch, fingerprint, require_types
from layers.checks import require

SAME = ("kind", "vocab_size", "features", "classes")  # what sources of one model have in common


@dataclass(frozen=True, kw_only=True)
class Stages:
    """`steps[i]` steps of `tasks[i]`, configs of tasks, the last without end.

    Raises ValueError for other than one number >= 1 for every task.
    """

    tasks: tuple[Any, ...]
    steps: tuple[int, ...]

    def __post_init__(self):
        require_types(self)
        ok = len(self.tasks) == len(self.steps) > 0
        require(ok, f"Stages: {len(self.steps)} numbers of steps for {len(self.tasks)} tasks")
        ok = all(type(n) is int and n > 0 for n in self.steps)
        require(ok, f"Stages: steps={self.steps} must be integers >= 1")

    def build(self) -> "StagesSource":
        """The source. Raises ValueError where tasks differ in kind or vocabulary."""
        return StagesSource(self)


class StagesSource:
    """Batches of the task whose turn it is; everything else is that of the last one."""

    def __init__(self, cfg: Stages):
        self._sources = [task.build() for task in cfg.tasks]
        self._begins = np.concatenate([[0], np.cumsum(cfg.steps[:-1], dtype=np.int64)])
        for before, after in pairwise(self._sources):
            for name in SAME:
                one, other = getattr(before, name, None), getattr(after, name, None)
                require(one == other, f"Stages: tasks with {name}={one} and {name}={other}")
        self.length = max(source.length for source in self._sources)
        parts = [source.fingerprint for source in self._sources]
        self.fingerprint = fingerprint({"stages": parts, "begins": self._begins.tolist()})

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._sources[-1], name)

    def _stage(self, step: int) -> int:
        return int(np.searchsorted(self._begins, step, side="right")) - 1

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        stage = self._stage(step)
        return self._sources[stage].batch(seed, step - int(self._begins[stage]), size)

    def alike(self, seed: int, steps: int, size: int) -> list[tuple[int, int]]:
        """Steps of one stage, as (how many of them, the first of them): see `budget.costs`."""
        ends = [*self._begins[1:].tolist(), steps]
        spans = zip(self._begins.tolist(), ends, strict=True)
        return [(min(end, steps) - begin, begin) for begin, end in spans if begin < steps]

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """Those of the last task."""
        return self._sources[-1].eval_batches(split, size)

    def describe(self) -> str:
        """One line for people."""
        return ", then ".join(source.describe() for source in self._sources)
