"""Several runs with one task and one loop, side by side: a table (CSV, Markdown, terminal) and a plot.

A finished run of the comparison is not trained again, an interrupted one goes on where it stopped.
"""

import csv
import dataclasses
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import timing
from experiments.config import Run
from experiments.overrides import override
from experiments.train import Result, train
from layers.checks import require

# key of a result's numbers, heading of its column, format
COLUMNS = (
    ("first_loss", "first loss", "{:.3f}"),
    ("last_loss", "last loss", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("params", "parameters", "{:,}"),
    ("state_bytes", "state bytes", "{:,}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
)
LAST_STEPS = 20  # over which the last training loss is a mean
FEW = 12  # runs whose names a plot has room for


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Labelled runs. Raises ValueError for none at all or for two of one label."""

    title: str
    runs: tuple[tuple[str, Run], ...]

    def __post_init__(self):
        labels = [label for label, _ in self.runs]
        require(len(labels) > 0, "a comparison needs at least one run")
        require(len(set(labels)) == len(labels), f"two runs of one comparison share a label: {labels}")

    def override(self, changes: dict[str, str]) -> "Comparison":
        """Every run with the same fields replaced."""
        runs = tuple((label, override(run, changes)) for label, run in self.runs)
        return dataclasses.replace(self, runs=runs)


def compare(comparison: Comparison, directory: Path, *, progress: bool = True) -> dict[str, Result]:
    """Train every run in `directory/label`; write `results.csv`, `results.md`, `plot.png`; print the table.

    Returns results by label. A signal stops the comparison after the run it hits has saved a checkpoint.
    """
    results: dict[str, Result] = {}
    # Into a file or a pipe the table goes at its full width.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for number, (label, run) in enumerate(comparison.runs, 1):
        if progress:
            console.print(f"[{number}/{len(comparison.runs)}] {label}", highlight=False, markup=False)
        result = train(run, directory / label, progress=progress)
        if result.stopped:
            console.print(f"stopped by {result.stopped}; the same command goes on from here")
            return results
        results[label] = result
    write_csv(results, directory / "results.csv")
    (directory / "results.md").write_text(markdown(comparison.title, results))
    plot(comparison.title, results, directory / "plot.png")
    console.print(table(comparison.title, results))
    for name in ("results.csv", "results.md", "plot.png"):
        console.print(str(directory / name), highlight=False, markup=False)
    return results


def numbers(result: Result) -> dict:
    """The summary, and the training loss of the first step and of the last LAST_STEPS (those logged)."""
    losses = {row["step"]: row["loss"] for row in _training(result)}
    ends = [loss for step, loss in losses.items() if step > max(losses) - LAST_STEPS]
    last = statistics.fmean(ends) if ends else None
    return {**result.summary, "first_loss": losses.get(1), "last_loss": last}


def _training(result: Result) -> list[dict]:
    """Rows of training steps whose loss is a number."""
    return [row for row in result.rows if row["kind"] == "train" and row["loss"] is not None]


def _cells(result: Result) -> dict[str, str]:
    """Heading and text of each column."""
    values = {heading: (numbers(result).get(key), form) for key, heading, form in COLUMNS}
    return {heading: "–" if v is None else form.format(v) for heading, (v, form) in values.items()}


def table(title: str, results: dict[str, Result]) -> Table:
    """Summaries as a table for the terminal."""
    grid = Table(title=title)
    grid.add_column("model", no_wrap=True)
    for _, heading, _ in COLUMNS:
        grid.add_column(heading, justify="right")
    for label, result in results.items():
        grid.add_row(label, *_cells(result).values())
    return grid


def markdown(title: str, results: dict[str, Result]) -> str:
    """Summaries as a Markdown table, headed by how they were made, on what, and what its columns mean."""
    by_zoo = Path(sys.argv[0]).name == "zoo"
    command = f"`{shlex.join(['zoo', *sys.argv[1:]])}`: " if by_zoo else ""
    skipped = sum(result.summary["bad_steps"] for result in results.values())
    note = (
        f"{command}{title}. {timing.machine()}.\n\n"
        f"First loss: the training loss of step 1, before any update; last loss: its mean over the last "
        f"{LAST_STEPS} steps; accuracy and loss: on validation data. Steps skipped because a loss or a "
        f"gradient was not finite: {skipped} in {len(results)} runs."
    )
    return timing.markdown([{"model": label, **_cells(r)} for label, r in results.items()], note)


def write_csv(results: dict[str, Result], path: Path) -> None:
    """Summaries with full precision, one row a run."""
    rows = {label: numbers(result) for label, result in results.items()}
    keys = list(next(iter(rows.values())))
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["model", *keys])
        writer.writerows([label, *(row.get(k) for k in keys)] for label, row in rows.items())


def _curve(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, each a mean of a twentieth of the rows: curves of single steps hide each other."""
    rows = _training(result)
    width = max(1, len(rows) // 20)
    steps, losses = (np.array([row[key] for row in rows], float) for key in ("step", "loss"))
    return steps[width - 1 :], np.convolve(losses, np.full(width, 1 / width), "valid")


def plot(title: str, results: dict[str, Result], path: Path) -> None:
    """Left: training loss against steps. Right: final accuracy against state size.

    Of many runs, the right-hand side shows numbers, which the legend explains.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    few = len(results) <= FEW
    figure = Figure(figsize=(11, 4.2) if few else (14, 7), layout="constrained")
    curve, pareto = figure.subplots(1, 2)
    for i, (label, result) in enumerate(results.items()):
        color = f"C{i}" if few else colormaps["tab20"](i % 20)
        style = ("-", "--", ":")[i // 20 % 3]
        name = label if few else f"{i + 1} {label}"
        curve.plot(*_curve(result), style, label=name, color=color, lw=1.3)
        summary = result.summary
        where = (summary["state_bytes"], summary["accuracy"])
        pareto.scatter(*where, color=color, s=45 if few else 12)
        offset, size = ((6, 5), 9) if few else ((3, 2), 7)
        mark = label if few else str(i + 1)
        pareto.annotate(mark, where, textcoords="offset points", xytext=offset, fontsize=size)
    curve.set(xlabel="step", ylabel="training loss (nats)", title=title)
    if few:
        curve.legend(fontsize=9)
    else:
        figure.legend(loc="outside right upper", ncols=2, fontsize=7)
    pareto.set(xscale="log", xlabel="state (bytes per sequence)", ylabel="validation accuracy")
    pareto.set(title="what the state buys")
    pareto.margins(x=0.25 if few else 0.05)
    accuracies = [result.summary["accuracy"] for result in results.values()]
    if max(accuracies) - min(accuracies) > 0.5:
        pareto.set(ylim=(-0.05, 1.08))
    for axes in (curve, pareto):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
