"""Worker processes on this machine: started, watched, started again when one dies, and stopped politely."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments import freed_memory
from experiments.worker import MORE, STOPPED

# numpy starts a thread for every core of the machine, whatever cores the worker is kept to.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
QUICK = 10.0  # seconds: a worker that dies sooner, time after time, will not do better the next time
DEATHS = 3


@dataclass
class _Worker:
    cores: str
    process: subprocess.Popen
    began: float
    quick_deaths: int = 0


def gpus() -> list[str]:
    """The GPUs this process may use, without starting jax."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def core_sets(cores: int) -> list[list[int]]:
    """The cores of this machine in sets of so many, one set a worker; a smaller rest stays out."""
    if not hasattr(os, "sched_getaffinity"):
        return [[number] for number in range(os.cpu_count() or 1)]
    here = sorted(os.sched_getaffinity(0))
    return [here[i : i + cores] for i in range(0, max(len(here) - cores, 0) + 1, cores)]


def default_workers(cores: int) -> int:
    """One for every GPU, or else for every `cores` cores."""
    return len(gpus()) or len(core_sets(cores))


class Pool:
    """`workers` processes working through the cells of `home`; `cores` of the CPU for each."""

    def __init__(self, home: Path, runner: str, *, workers: int, cores: int, retries: int):
        self.home, self.runner, self.retries = home, runner, retries
        self.interrupted = False
        cards = gpus()
        self._environments = [
            {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if cards else {} for number in range(workers)
        ]
        # With a GPU the host's sums are not what counts.
        sets: list[list[int]] = [[]] if cards else core_sets(cores)
        self._workers = [
            self._start(number, ",".join(map(str, sets[number % len(sets)]))) for number in range(workers)
        ]

    def _log(self, number: int) -> Path:
        return self.home / f"worker-{number}.log"

    def _start(self, number: int, cores: str) -> _Worker:
        command = [sys.executable, "-m", "experiments.worker", str(self.home), self.runner]
        with self._log(number).open("a") as log:
            process = subprocess.Popen(
                [*command, str(self.retries), cores],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=ONE_THREAD | freed_memory.environment() | os.environ | self._environments[number],
                start_new_session=True,  # a Ctrl-C reaches this process alone, which passes it on once
            )
        return _Worker(cores, process, time.monotonic())

    def alive(self) -> bool:
        """Whether anybody still works; a worker that died or has taken its share is replaced.

        RuntimeError, with the end of its log, for one that dies again and again before it does anything.
        """
        for number, worker in enumerate(self._workers):
            code = worker.process.poll()
            if code in (None, 0, STOPPED) or self.interrupted:
                continue
            new = self._start(number, worker.cores)
            if code != MORE and time.monotonic() - worker.began < QUICK:
                new.quick_deaths = worker.quick_deaths + 1
            self._workers[number] = new
            if new.quick_deaths >= DEATHS:
                self.stop()
                text = self._log(number).read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"workers die at once, with {code}: {' '.join(text) or 'no word'}")
        return any(worker.process.poll() is None for worker in self._workers)

    def stop(self) -> None:
        """Ask for checkpoints; a second time, end at once."""
        number = signal.SIGKILL if self.interrupted else signal.SIGTERM
        self.interrupted = True
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    def close(self) -> None:
        """Wait for a polite end of all, a minute at most."""
        until = time.monotonic() + 60
        while any(worker.process.poll() is None for worker in self._workers):
            if time.monotonic() > until:
                self.interrupted = True
                self.stop()
            time.sleep(0.1)
