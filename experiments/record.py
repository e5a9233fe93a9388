"""What a run tells while it runs: rows in `metrics.jsonl`, TensorBoard, and a line on the screen."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


def plain(value: Any) -> Any:
    """A value as strict JSON has it: arrays become lists, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Recorder:
    """Rows of metrics, in memory and (with a path) appended to a JSONL file, each handed over at once.

    A row has `kind` ("train" or "eval"), `step`, its numbers, and `timing` for all that depends on the
    machine: without `timing`, the rows of a run that was interrupted are those of one that was not.
    """

    def __init__(self, path: Path | None = None, rows: tuple | list = (), tensorboard: bool = False):
        self.rows = list(rows)
        self._path = path
        # Without a buffer: nothing is left to write, and to fail at, when it is closed.
        self._file = None if path is None else path.open("ab", buffering=0)
        self._board = _board(path, self.rows) if tensorboard else None

    def write(self, kind: str, step: int, values: dict, timing: dict | None = None) -> None:
        row = plain({"kind": kind, "step": step, **values, "timing": timing or {}})
        self.rows.append(row)
        if self._file:
            self._append(json.dumps(row, allow_nan=False).encode() + b"\n")
        if self._board:
            for name, value in {**row, **row["timing"]}.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        for stream in (self._file, self._board):
            if stream:
                stream.close()


def _board(path: Path | None, rows: list[dict]):
    if path is None:
        raise ValueError("TensorBoard needs a run directory to write to")
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("TensorBoard asked for: pip install recurrent-zoo[tensorboard]") from None
    return SummaryWriter(str(path.parent / "tensorboard"), purge_step=rows[-1]["step"] + 1 if rows else None)


class Screen:
    """A bar on a terminal or in a notebook, a line now and then elsewhere, nothing when not `shown`."""

    def __init__(self, first: int, steps: int, shown: bool = True):
        self._steps, self._shown = steps, shown
        self._began: tuple[int, float] | None = None  # the first step seen and when: compilation came before
        self._last = time.perf_counter()
        self._bar: Progress | None = None
        console = Console()
        if shown and (console.is_terminal or console.is_jupyter):
            text = TextColumn("{task.description}")
            columns = (MofNCompleteColumn(), BarColumn(), text, TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._bar.add_task("compiling", total=steps, completed=first)
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        now = time.perf_counter()
        self._began = self._began or (step, now)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif self._shown and (step == self._steps or now - self._last >= SECONDS_BETWEEN_LINES):
            self._last = now
            began, then = self._began
            left = ""
            if step > began:
                left = f"  {(now - then) / (step - began) * (self._steps - step):.0f} s left"
            print(f"step {step}/{self._steps}  {text}{left}", flush=True)

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
