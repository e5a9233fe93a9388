"""Several runs with one task and one loop, side by side: a table, a CSV and a plot.

A finished run of the comparison is not trained again, an interrupted one goes on where it stopped.
"""

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.config import Run
from experiments.overrides import override
from experiments.train import Result, train
from layers.common import require

# key of a summary, heading of its column, format
COLUMNS = (
    ("accuracy", "accuracy", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("params", "parameters", "{:,}"),
    ("state_bytes", "state bytes", "{:,}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
)


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
    """Train every run in `directory/label`; write `results.csv` and `plot.png` there; print the table.

    Returns results by label. A signal stops the comparison after the run it hits has saved a checkpoint.
    """
    results: dict[str, Result] = {}
    # Into a file or a pipe the table goes at its full width.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, (label, run) in enumerate(comparison.runs, 1):
        if progress:
            console.print(f"[{number}/{len(comparison.runs)}] {label}", highlight=False, markup=False)
        result = train(run, directory / label, progress=progress)
        if result.stopped:
            console.print(f"stopped by {result.stopped}; the same command goes on from here")
            return results
        results[label] = result
    write_csv(results, directory / "results.csv")
    plot(comparison.title, results, directory / "plot.png")
    console.print(table(comparison.title, results))
    console.print(f"{directory / 'results.csv'}\n{directory / 'plot.png'}", highlight=False)
    return results


def _cell(summary: dict, key: str, form: str) -> str:
    value = summary.get(key)
    return "–" if value is None else form.format(value)


def table(title: str, results: dict[str, Result]) -> Table:
    """Summaries as a table for the terminal."""
    grid = Table(title=title)
    grid.add_column("model", no_wrap=True)
    for _, heading, _ in COLUMNS:
        grid.add_column(heading, justify="right")
    for label, result in results.items():
        grid.add_row(label, *(_cell(result.summary, key, form) for key, _, form in COLUMNS))
    return grid


def write_csv(results: dict[str, Result], path: Path) -> None:
    """Summaries with full precision, one row a run."""
    keys = list(next(iter(results.values())).summary)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["model", *keys])
        writer.writerows([label, *(r.summary.get(k) for k in keys)] for label, r in results.items())


def plot(title: str, results: dict[str, Result], path: Path) -> None:
    """Left: training loss against steps. Right: final accuracy against state size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, pareto = figure.subplots(1, 2)
    for label, result in results.items():
        rows = [row for row in result.rows if row["kind"] == "train" and row["loss"] is not None]
        (line,) = curve.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=label, lw=1.3)
        summary = result.summary
        pareto.scatter(summary["state_bytes"], summary["accuracy"], color=line.get_color(), s=45)
        pareto.annotate(
            label,
            (summary["state_bytes"], summary["accuracy"]),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=9,
        )
    curve.set(xlabel="step", ylabel="training loss (nats)", title=title)
    curve.legend(fontsize=9)
    pareto.set(xscale="log", xlabel="state (bytes per sequence)", ylabel="validation accuracy")
    pareto.set(title="what the state buys", ylim=(-0.05, 1.08))
    pareto.margins(x=0.25)
    for axes in (curve, pareto):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
