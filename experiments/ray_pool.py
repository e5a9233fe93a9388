"""Workers as Ray actors: on this machine, or on a cluster that is joined by its address.

The machines of a cluster need this project installed, and nothing else in common: a worker trains in a
directory of its own, which is the sweep's where that can be seen and else a temporary one, and the finished
cell's files travel back. A worker that dies with its machine is started anew on another; the cell begins
again there.
"""

import os
import tempfile
from collections import Counter, deque
from pathlib import Path
from typing import Any

from experiments import worker
from experiments.cells import attempt, given_up
from experiments.pool import core_sets

FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "attempts.jsonl", "summary.json")


def _require_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ModuleNotFoundError("engine ray asked for: pip install 'recurrent-zoo[ray]'") from None
    return ray


class _Actor:
    """What runs on a worker's machine."""

    def __init__(self, number: int, cores: int):
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            sets = core_sets(cores)
            worker.pin(sets[number % len(sets)])

    def attempt(self, path: str, cell: str, runner: str, retries: int) -> tuple[str, dict[str, str]]:
        """How it ended, and files for a driver that does not see this machine's disk."""
        directory = Path(path)
        if directory.is_dir():
            return attempt(directory, runner, retries), {}
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            (directory / "cell.json").write_text(cell)
            state = attempt(directory, runner, retries)
            there = [name for name in FILES if (directory / name).exists()]
            return state, {name: (directory / name).read_text() for name in there}


class RayPool:
    """The interface of `experiments.pool.Pool`, over Ray."""

    def __init__(
        self,
        directories: list[Path],
        runner: str,
        *,
        workers: int | None,
        cores: int,
        retries: int,
        address: str | None,
    ):
        self._ray = ray = _require_ray()
        self._runner, self._retries, self._queue = runner, retries, deque(directories)
        self._ours = not ray.is_initialized()
        if self._ours:
            local: dict[str, Any] = {} if address else {"include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        fit = gpus or int(resources.get("CPU", 1)) // cores
        count = min(workers or max(1, fit), len(directories))
        # One attempt at a time each; a dead actor is made anew as often as it takes.
        actor = ray.remote(_Actor).options(num_cpus=cores, num_gpus=1 if gpus else 0, max_restarts=-1)
        self._actors = [actor.remote(number, cores) for number in range(count)]
        self._running: dict[Any, tuple[Any, Path]] = {}
        self._failures: Counter[Path] = Counter()
        self.interrupted = False
        for one in self._actors:
            self._give(one)

    def _give(self, actor: Any) -> None:
        if self._queue and not self.interrupted:
            directory = self._queue.popleft()
            cell = (directory / "cell.json").read_text()
            call = actor.attempt.remote(str(directory.absolute()), cell, self._runner, self._retries)
            self._running[call] = actor, directory

    def alive(self) -> bool:
        """Take in what has finished and give out what is left; False when there is nothing any more."""
        ready, _ = self._ray.wait(list(self._running), timeout=0) if self._running else ([], [])
        for call in ready:
            actor, directory = self._running.pop(call)
            try:
                state, files = self._ray.get(call)
            except self._ray.exceptions.RayError:  # the worker's process or machine died
                state, files = "failed", {}
            for name, text in files.items():
                (directory / name).write_text(text)
            again = state in ("busy", "stopped")
            if state == "failed":
                # Counted here too: a worker that sees another disk, or died, leaves no count on this one.
                self._failures[directory] += 1
                tried = self._failures[directory] > self._retries
                again = not tried and not given_up(directory, self._runner, self._retries)
            if again:
                self._queue.append(directory)
            self._give(actor)
        return bool(self._running)

    def stop(self) -> None:
        """No new cells; those under way end as if their machine had gone: their checkpoints stay."""
        self.interrupted = True
        for call in list(self._running):
            actor, _ = self._running.pop(call)
            self._ray.kill(actor)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()
