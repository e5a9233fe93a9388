"""What a sweep tells while it runs: cells done, and when the rest will be, by FLOPs."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from experiments.budget import costs
from experiments.cells import Cell, outcome

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing when not `shown`."""

    def __init__(self, cells: tuple[Cell, ...], home: Path, *, shown: bool):
        self._shown = shown
        unique = {cell.address: cell for cell in cells}
        self._cells = {home / "cells" / address: cell for address, cell in unique.items()}
        self._work = {path: costs(cell.run).flops for path, cell in self._cells.items()} if shown else {}
        self._began, self._last = time.perf_counter(), 0.0
        self._finished: set[Path] = set()
        self._told: set[Path] = set()
        self._bar: Bar | None = None
        if shown:
            self._before = self._done()
            self._told |= self._finished
            console = Console()
            if console.is_terminal or console.is_jupyter:
                self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=console)
                self._bar.add_task("", total=sum(self._work.values()))
                self._bar.start()

    def _done(self) -> float:
        """FLOPs behind us, those of cells that are under way included."""
        return sum(self._work[path] * self._share(path) for path in self._cells)

    def _share(self, path: Path) -> float:
        if path not in self._finished and (path / "summary.json").exists():
            self._finished.add(path)
        if path in self._finished:
            return 1.0
        return last_step(path / "metrics.jsonl") / self._cells[path].run.steps

    def update(self) -> None:
        if not self._shown or (self._bar and time.perf_counter() - self._last < 0.5):
            return
        done, total = self._done(), sum(self._work.values())
        elapsed = time.perf_counter() - self._began
        left = "?"
        if done > self._before:
            left = _clock(elapsed * (total - done) / (done - self._before))
        text = f"{len(self._finished)}/{len(self._cells)} cells, {_clock(elapsed)} gone, about {left} left"
        for path in self._finished - self._told:
            self._tell(path)
        if self._bar:
            self._last = time.perf_counter()
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif time.perf_counter() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.perf_counter()
            self.say(text)

    def _tell(self, path: Path) -> None:
        self._told.add(path)
        summary = outcome(path).summary or {}
        name = ", ".join(f"{key}={value}" for key, value in self._cells[path].point.items())
        numbers = [
            f"{key} {summary[key]:.4f}" for key in ("loss", "accuracy") if summary.get(key) is not None
        ]
        self.say(f"{name}: {'  '.join(numbers)}")

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def last_step(metrics: Path) -> int:
    """The last step on record, 0 without one; only the end of the file is read."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - 4096))
        lines = stream.read().splitlines(keepends=True)
    whole = [line for line in lines[-2:] if line.endswith(b"\n") and line.startswith(b"{")]
    return json.loads(whole[-1])["step"] if whole else 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds:02d} s"
