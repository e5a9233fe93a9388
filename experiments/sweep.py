"""Sweeps: many runs from one config file, in parallel, resumable, in one table.

    from experiments.grid import axis, product
    from experiments.sweep import Sweep

    def run(layer, width, seed): ...                                       # -> Run
    POINTS = product(axis("layer", "mamba", "gla"), axis("width", 32, 64), axis("seed", 0, 1, 2))
    config = Sweep.of("widths", POINTS, run)

`zoo sweep FILE` trains what is missing in DIR/cells and writes DIR/results.csv: what was varied, what each
run cost, what came of it; no times, so that the table of a sweep that was interrupted, continued, shared by
several runners or spread over machines is that of one that was not, byte for byte on equal machines.
DIR/timings.csv has the times.
"""

import csv
import dataclasses
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.budget import Costs, costs
from experiments.cells import Cell, Outcome, outcome, prepare, work
from experiments.config import Run
from experiments.directory import write_json
from experiments.grid import Point
from experiments.overrides import override
from experiments.pool import Pool, default_workers
from experiments.progress import Progress
from layers.checks import require

RESULTS = ("step", "loss", "accuracy", "exact", "split", "bad_steps")
TIMINGS = ("tokens_per_second", "mfu", "compile_seconds", "wall_seconds")
ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Cells in the order of their rows. Raises ValueError for none, or for points that name unlike things."""

    title: str
    cells: tuple[Cell, ...]
    cores: int = 1  # of the CPU, for each worker

    def __post_init__(self):
        require(len(self.cells) > 0, "a sweep needs at least one cell")
        require(self.cores > 0, f"sweep: cores={self.cores} must be > 0")
        taken = {f.name for f in dataclasses.fields(Costs)} | {*RESULTS, "cell", "error"}
        names = sorted(taken & {name for cell in self.cells for name in cell.point})
        require(not names, f"sweep: {', '.join(names)} cannot be varied under that name: results have it")

    @classmethod
    def of(cls, title: str, points: Iterable[Point], run: Callable[..., Run], **settings: Any) -> "Sweep":
        """The cell of every point, `run(**point)`."""
        return cls(title=title, cells=tuple(Cell(dict(p), run(**p)) for p in points), **settings)

    def override(self, changes: dict[str, str]) -> "Sweep":
        """Every run with the same fields replaced."""
        cells = tuple(Cell(cell.point, override(cell.run, changes)) for cell in self.cells)
        return dataclasses.replace(self, cells=cells)


def sweep(
    config: Sweep,
    home: Path,
    *,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    retries: int = 1,
    progress: bool = True,
) -> dict[str, Outcome]:
    """Train every cell that is not there yet; outcomes by address. Writes results.csv and timings.csv.

    `workers`: processes (default: one for every GPU, or for every `config.cores` cores), or 0 for this
    process alone. `engine="ray"` spreads them over a Ray cluster at `address`, or one started here. A cell
    that fails is tried again `retries` times; the next call tries again. KeyboardInterrupt stops with
    checkpoints, and is raised again.
    """
    require(engine in ENGINES, f"engine={engine!r} must be one of {', '.join(ENGINES)}")
    train_all(
        config.cells,
        home,
        workers=workers,
        engine=engine,
        address=address,
        cores=config.cores,
        retries=retries,
        progress=progress,
    )
    outcomes = {cell.address: outcome(home / "cells" / cell.address) for cell in config.cells}
    write_tables(config.cells, outcomes, home)
    return outcomes


def train_all(
    cells: tuple[Cell, ...],
    home: Path,
    *,
    workers: int | None,
    engine: str = "local",
    address: str | None = None,
    cores: int = 1,
    retries: int = 1,
    progress: bool = True,
) -> None:
    """Train what is missing, until every cell is finished or given up; see `sweep`."""
    require(workers is None or workers >= 0, f"workers={workers} must be >= 0")
    prepare(cells, home)
    runner = f"{int(time.time())}-{uuid.uuid4().hex[:8]}"
    addresses = list(dict.fromkeys(cell.address for cell in cells))
    directories = [home / "cells" / each for each in addresses]
    missing = [path for path in directories if not (path / "summary.json").exists()]
    if not missing:
        return
    if engine == "ray":
        from experiments.ray_pool import RayPool

        pool: Any = RayPool(missing, runner, workers=workers, cores=cores, retries=retries, address=address)
    elif workers == 0:
        if work(directories, runner, retries, progress=progress) == "stopped":
            raise KeyboardInterrupt
        return
    else:
        write_json(home / "plan.json", {"cells": addresses})
        count = min(workers or default_workers(cores), len(missing))
        pool = Pool(home, runner, workers=count, cores=cores, retries=retries)
    with _interruptible():
        _watch(pool, Progress(cells, home, shown=progress))


@contextmanager
def _interruptible():
    """SIGINT and SIGTERM as KeyboardInterrupt, for a process too that began with SIGINT ignored."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be received
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _watch(pool: Any, screen: Progress) -> None:
    """Until nobody works any more; a signal stops the workers, and is passed on when they have stopped."""
    interrupted: BaseException | None = None
    while True:
        try:
            if not pool.alive():
                break
            screen.update()
            time.sleep(0.25)
        except KeyboardInterrupt as error:
            interrupted = error
            screen.say("stopping: checkpoints are being written")
            pool.stop()
        except BaseException:
            pool.close()
            screen.close()
            raise
    screen.update()
    screen.close()
    pool.close()
    if interrupted:
        raise interrupted


def row_of(cell: Cell, found: Outcome) -> dict[str, Any]:
    """What a table says of a cell: its point, its costs, its result."""
    summary = found.summary or {}
    row = {"cell": cell.address, **cell.point, **dataclasses.asdict(costs(cell.run))}
    return row | {name: summary.get(name) for name in RESULTS} | {"error": found.error}


def write_tables(cells: tuple[Cell, ...], outcomes: dict[str, Outcome], home: Path) -> None:
    """`results.csv` and `timings.csv`, in the order of the cells."""
    rows = [row_of(cell, outcomes[cell.address]) for cell in cells]
    write_rows(rows, home / "results.csv")
    times = [
        {"cell": cell.address} | {name: (outcomes[cell.address].summary or {}).get(name) for name in TIMINGS}
        for cell in cells
    ]
    write_rows(times, home / "timings.csv")


def write_rows(rows: list[dict], path: Path) -> None:
    """A CSV of rows that need not have the same keys: columns come in the order of their first row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
