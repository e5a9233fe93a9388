"""Cells: the runs of a sweep or a comparison, each in a directory named by its content.

    DIR/cells/ADDRESS/   a run directory (see `experiments.directory`), and beside its files
        cell.json        the run, for whichever process takes it up
        attempts.jsonl   who began it, and how it ended when it did not end well
        .claim           locked while somebody works on it; the lock goes with the process that holds it

The address is the hash of the run, so that a cell that two sweeps share is trained once, a changed config
trains only what is new, and any number of processes can work through one directory: each takes the first cell
that is neither finished nor claimed.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import config
from experiments.budget import build
from experiments.config import Run
from experiments.directory import InUseError, drop_cut_line, lock, rows_of, write_json
from experiments.train import NotFiniteError, check, train
from layers.checks import require
from zoo.reading import read_json, read_object


@dataclass(frozen=True)
class Cell:
    """A run and what sets it apart from the others, `{"layer": "mamba", "seed": 0}`."""

    point: dict[str, Any]
    run: Run

    @cached_property
    def address(self) -> str:
        return config.fingerprint(self.run)


@dataclass(frozen=True)
class Outcome:
    """`summary` of a finished cell, else `error`, one line, of its last attempt, if there was one."""

    summary: dict | None = None
    error: str | None = None


def prepare(cells: tuple[Cell, ...], home: Path) -> None:
    """Write down every run, when all have passed what can be checked before training.

    ValueError, FileNotFoundError for data or a model that do not fit; ValueError for a run that does not
    survive being written down, such as one whose types the config file made itself.
    """
    for cell in cells:
        check(cell.run, build(cell.run.data))
    for cell in cells:
        config.vouch(cell.run)
        directory = home / "cells" / cell.address
        if not (directory / "cell.json").exists():
            saved = config.to_dict(cell.run)
            require(config.from_dict(saved) == cell.run, f"{cell.point}: the run changes when it is saved")
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "cell.json", saved)


def outcome(directory: Path) -> Outcome:
    """How a cell stands."""
    if (directory / "summary.json").exists():
        return Outcome(summary=read_object(directory / "summary.json"))
    ends = [row["error"] for row in _attempts(directory) if row.get("error")]
    return Outcome(error=ends[-1] if ends else None)


def _attempts(directory: Path) -> list[dict]:
    return rows_of(directory / "attempts.jsonl")


def _note(directory: Path, **row: Any) -> None:
    path = directory / "attempts.jsonl"
    drop_cut_line(path)
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def given_up(directory: Path, runner: str, retries: int) -> bool:
    """Whether `runner` (one invocation of a sweep) has tried often enough: the next invocation tries anew.

    An attempt that began and left no end was cut off, with its process, and counts like a failure.
    """
    mine = [row for row in _attempts(directory) if row["runner"] == runner]
    begun = sum("began" in row for row in mine) - sum("stopped" in row for row in mine)
    return any(row.get("final") for row in mine) or begun > retries


def attempt(directory: Path, runner: str, retries: int, *, progress: bool = False) -> str:
    """Train the cell of `directory` unless it is "done"; "busy", "failed" or "stopped" by a signal.

    Errors that training again would meet again (ValueError, NotFiniteError) are final for this runner.
    """
    if (directory / "summary.json").exists():
        return "done"
    try:
        claim = lock(directory / ".claim")
    except InUseError:
        return "busy"
    with claim:
        if (directory / "summary.json").exists():
            return "done"
        if given_up(directory, runner, retries):
            return "failed"
        where = {"host": platform.node(), "pid": os.getpid()}
        _note(directory, runner=runner, began=round(time.time(), 3), **where)
        try:
            run = config.from_dict(read_json(directory / "cell.json"))
            stopped = train(run, directory, progress=progress).stopped
        except Exception as error:
            final = isinstance(error, ValueError | NotFiniteError)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            _note(directory, runner=runner, error=text, final=final)
            return "failed"
        if stopped:
            _note(directory, runner=runner, stopped=stopped)
        return "stopped" if stopped else "done"


def work(
    directories: list[Path], runner: str, retries: int, *, limit: int = 0, progress: bool = False
) -> str:
    """Take one cell after the other until none is left: "done", or "stopped", or "more" after `limit` cells.

    Cells that another process has claimed are waited for: it may die.
    """
    taken = 0
    while True:
        states = []
        for number, directory in enumerate(directories, 1):
            if _settled(directory, runner, retries):
                continue
            if progress:
                print(f"[{number}/{len(directories)}] {directory.name}", flush=True)
            states.append(attempt(directory, runner, retries, progress=progress))
            if states[-1] == "stopped":
                return "stopped"
            taken += states[-1] != "busy"
            if limit and taken >= limit:
                return "more"
        if all(_settled(directory, runner, retries) for directory in directories):
            return "done"
        if set(states) <= {"busy"}:
            time.sleep(0.5)


def _settled(directory: Path, runner: str, retries: int) -> bool:
    return (directory / "summary.json").exists() or given_up(directory, runner, retries)
