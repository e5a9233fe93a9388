"""Architectures side by side: one task, one budget, one loop; a report, a table, and nothing chosen on test.

    config = Comparison(
        title="recall at equal parameters",
        runs=(("attention", run("attention")), ("mamba", run("mamba"))),
        seeds=(0, 1, 2),
        grid=(("optimizer.lr", (3e-3, 1e-2)),),
        budget=Budget("params"),
        probes=(("length 512", dataclasses.replace(DATA, length=512)),),
    )

Every model is trained at every point of the grid with every seed. Its winner is the point with the best mean
over seeds on the validation split; what is reported of the winner is from the test split, and from the test
split of every probe. Cells are those of a sweep (`experiments.cells`): what is finished is not trained again,
an interrupted comparison goes on where it stopped.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import measure
from experiments.budget import Budget, Costs, build, costs, matched
from experiments.cells import Cell, outcome
from experiments.config import Run
from experiments.directory import rows_of
from experiments.grid import Point, axis, product
from experiments.overrides import override, replaced
from experiments.reports.numbers import spread
from experiments.sweep import train_all
from layers.checks import require, require_choice

SELECT = ("accuracy", "exact", "loss")
OWN = ("seeds", "select")  # fields that the command line can change


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Labelled runs. Raises ValueError for none at all, two of one label, or a budget that is not met.

    `seeds` replace those of the runs. `grid`: fields of a run and the values each is tried at. `select`: the
    validation figure that picks the winner. `cores` of the CPU for each of the processes that train.
    """

    title: str
    runs: tuple[tuple[str, Run], ...]
    seeds: tuple[int, ...] = (0,)
    grid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    select: str = "accuracy"
    budget: Budget | None = None
    probes: tuple[tuple[str, Any], ...] = ()
    cores: int = 1

    def __post_init__(self):
        labels = [label for label, _ in self.runs]
        require(len(labels) > 0, "a comparison needs at least one run")
        require(len(set(labels)) == len(labels), f"two runs of one comparison share a label: {labels}")
        ok = len(self.seeds) == len(set(self.seeds)) > 0
        require(ok, f"comparison: seeds={self.seeds} must be different numbers, at least one")
        require_choice(self, "select", SELECT)
        require(self.cores > 0, f"comparison: cores={self.cores} must be > 0")
        names = [name for name, _ in self.probes]
        ok = len(set(names)) == len(names) and "test" not in names
        require(ok, f"comparison: probes must have names of their own, and none 'test': {names}")

    def override(self, changes: dict[str, str]) -> "Comparison":
        """Every run with the same fields replaced; `seeds` and `select` are the comparison's own."""
        mine = {name: changes[name] for name in OWN if name in changes}
        theirs = {name: value for name, value in changes.items() if name not in OWN}
        runs = tuple((label, override(run, theirs)) for label, run in self.runs)
        return dataclasses.replace(override(self, mine), runs=runs)

    @cached_property
    def points(self) -> list[Point]:
        """Points of the grid; one without any field where there is none."""
        return product(*(axis(name, *values) for name, values in self.grid))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every run at every point with every seed, made equal in the budget first."""
        return tuple(
            Cell({"model": label, **point, "seed": seed}, replaced(run, {**point, "seed": seed}))
            for label, run in matched(self.runs, self.budget)
            for point in self.points
            for seed in self.seeds
        )


@dataclass
class Arm:
    """What came of one model: its winner's runs, one a seed."""

    label: str
    point: Point
    run: Run
    costs: Costs
    directories: list[Path]
    summaries: list[dict]
    tested: list[dict[str, dict]] = field(default_factory=list)
    speed: dict = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # lines of cells that did not end

    def values(self, name: str, part: str | None = None) -> list[float | None]:
        """A figure of every seed: of `tested[part]`, or of the validation split."""
        if part:
            return [of[part].get(name) for of in self.tested]
        return [of.get(name) for of in self.summaries]

    def curves(self) -> list[tuple[list[float], list[float | None]]]:
        """Steps and training losses of every seed."""
        curves = []
        for directory in self.directories:
            rows = [row for row in rows_of(directory / "metrics.jsonl", "step") if row["kind"] == "train"]
            curves.append(([row["step"] for row in rows], [row["loss"] for row in rows]))
        return curves


def compare(
    comparison: Comparison, home: Path, *, workers: int | None = None, progress: bool = True
) -> dict[str, Arm]:
    """Train, choose, test, measure; write `report.html`, `results.csv`, `cells.csv` and `results.md`.

    Returns arms by label. `workers` as in `experiments.sweep`. KeyboardInterrupt when a signal stopped it,
    with checkpoints written.
    """
    from experiments.reports import comparison as report

    train_all(comparison.cells, home, workers=workers, cores=comparison.cores, progress=progress)
    arms = {label: _arm(comparison, label, home) for label, _ in comparison.runs}
    for arm in arms.values():
        if arm.directories:
            arm.tested = [
                measure.tested(directory, run, comparison.probes)
                for directory, run in zip(arm.directories, _seeded(arm, comparison), strict=True)
            ]
            arm.speed = measure.speed(arm.directories[0], arm.run)
            _link(home / arm.label, arm.directories[0])
    report.write(comparison, arms, home)
    return arms


def _seeded(arm: Arm, comparison: Comparison) -> list[Run]:
    return [dataclasses.replace(arm.run, seed=summary["seed"]) for summary in arm.summaries]


def _arm(comparison: Comparison, label: str, home: Path) -> Arm:
    """The winner of a model: the best mean over seeds of `select` on validation, all seeds finished."""
    cells = [cell for cell in comparison.cells if cell.point["model"] == label]
    ended = {cell.address: outcome(home / "cells" / cell.address) for cell in cells}
    lines = [_line(cell, ended[cell.address].error) for cell in cells if not ended[cell.address].summary]
    best: tuple[float, Point, list[Cell]] | None = None
    for point in comparison.points:
        of = [cell for cell in cells if point.items() <= cell.point.items()]
        scores = [(ended[cell.address].summary or {}).get(comparison.select) for cell in of]
        mean, _, count = spread(scores)
        score = -mean if comparison.select == "loss" else mean
        if count == len(of) and (best is None or score > best[0]):
            best = score, point, of
    if best is None:
        return Arm(label, {}, cells[0].run, costs(cells[0].run), [], [], failed=lines)
    _, point, won = best
    summaries = [{**(ended[cell.address].summary or {}), "seed": cell.run.seed} for cell in won]
    directories = [home / "cells" / cell.address for cell in won]
    return Arm(label, point, won[0].run, costs(won[0].run), directories, summaries, failed=lines)


def _line(cell: Cell, error: str | None) -> str:
    where = ", ".join(f"{name}={value}" for name, value in cell.point.items())
    return f"{where}: {error or 'not finished'}"


def _link(path: Path, directory: Path) -> None:
    """A name for a winner's directory: `zoo generate DIR/mamba` finds it."""
    if path.is_symlink():
        path.unlink()
    if not path.exists():
        path.symlink_to(Path("cells") / directory.name)


def chance(comparison: Comparison) -> float | None:
    """Of guessing, where the task knows it."""
    found = getattr(build(comparison.runs[0][1].data), "chance", None)
    return None if found is None or math.isnan(found) else found
