"""What a comparison leaves behind: `report.html`, `results.csv`, `cells.csv`, `results.md`, and a table."""

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from experiments import compare, timing
from experiments.cells import outcome
from experiments.compare import Arm, Comparison
from experiments.config import to_dict
from experiments.reports import figures, page
from experiments.reports.numbers import amount, number, spread
from experiments.reports.page import Column, Details, Facts, Section, Table, measured
from experiments.sweep import row_of, write_rows

LAST_STEPS = 20  # over which the last training loss is a mean
# Columns that the terminal's table leaves to the report.
ELSEWHERE = ("first loss", "last loss", "test loss", "training tokens", "training FLOPs", "compile s")
SPEEDS = (
    ("train_tokens_per_second", "Training", "tokens/s", "max"),
    ("decode_tokens_per_second", "Decoding, one sequence", "tokens/s", "max"),
    ("temporary_bytes", "Temporary memory of a training step", "bytes", "min"),
    ("compile_seconds", "Compilation of a training step", "s", "min"),
)


def write(comparison: Comparison, arms: dict[str, Arm], home: Path) -> None:
    """All of the comparison's files, and its table on the terminal."""
    cells = [row_of(cell, outcome(home / "cells" / cell.address)) for cell in comparison.cells]
    write_rows(cells, home / "cells.csv")
    write_rows([_numbers(arm, comparison) for arm in arms.values()], home / "results.csv")
    (home / "results.md").write_text(markdown(comparison, arms))
    page.write(home / "report.html", comparison.title, sections(comparison, arms), lead=_lead(comparison))
    # Into a file or a pipe the table goes at its full width.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_grid(comparison, arms))
    for line in (line for arm in arms.values() for line in arm.failed):
        console.print(f"failed: {line}", highlight=False, markup=False)
    for name in ("report.html", "results.csv", "cells.csv", "results.md"):
        console.print(str(home / name), highlight=False, markup=False)


def losses(arm: Arm) -> tuple[float, float]:
    """Means over seeds: the training loss of step 1, and of the last LAST_STEPS steps that are on record."""
    first, last = [], []
    for steps, values in arm.curves():
        pairs = [(step, loss) for step, loss in zip(steps, values, strict=True) if loss is not None]
        first += [loss for step, loss in pairs if step == 1]
        last.append(spread(loss for step, loss in pairs if step > pairs[-1][0] - LAST_STEPS)[0])
    return spread(first)[0], spread(last)[0]


def _numbers(arm: Arm, comparison: Comparison) -> dict[str, Any]:
    """A row of results.csv: means and deviations over seeds, in full precision."""
    row: dict[str, Any] = {"model": arm.label, **{f"best {name}": value for name, value in arm.point.items()}}
    first, last = losses(arm)
    row |= {"seeds": len(arm.directories), "first_loss": first, "last_loss": last}
    parts = [(None, "validation"), *((name, name) for name in (arm.tested[0] if arm.tested else ()))]
    for part, name in parts:
        for figure in ("accuracy", "loss", "exact"):
            mean, deviation, count = spread(arm.values(figure, part))
            row |= {f"{name} {figure}": mean if count else None, f"{name} {figure} s.d.": deviation}
    spent = {name: getattr(arm.costs, name) for name in arm.costs.__dataclass_fields__}
    return row | spent | arm.speed | {"failed": "; ".join(arm.failed) or None}


def _columns(comparison: Comparison) -> list[Column]:
    budget = comparison.budget.kind if comparison.budget else ""

    def cost(name: str, heading: str, form: Any) -> Column:
        return Column(heading + (" (equal)" if name == budget else ""), form)

    best = "min" if comparison.select == "loss" else "max"
    return [
        Column("model"),
        Column("test " + comparison.select, best=best, note="of the winner on the test split"),
        *(Column(f"{name} {comparison.select}", best=best) for name, _ in comparison.probes),
        Column("validation " + comparison.select, note="what the winner was picked by"),
        Column("test loss", "{:.4f}", note="nats"),
        Column("first loss", "{:.3f}", note="of training, before any update"),
        Column("last loss", "{:.3f}", note=f"of training, the last {LAST_STEPS} steps"),
        *(Column(f"best {name}") for name, _ in comparison.grid),
        cost("params", "parameters", "{:,}"),
        cost("state_bytes", "state bytes", "{:,}"),
        cost("tokens", "training tokens", "{:,}"),
        cost("flops", "training FLOPs", "{:.3g}"),
        Column("tokens/s, training", "{:,.0f}"),
        Column("tokens/s, decoding", "{:,.0f}"),
        Column("compile s", "{:.1f}"),
    ]


def _row(arm: Arm, comparison: Comparison) -> list[Any]:
    select = comparison.select
    short = "{:.3f}".format
    parts = ["test", *(name for name, _ in comparison.probes)]
    results = [measured(arm.values(select, part), short) if arm.tested else None for part in parts]
    first, last = losses(arm)
    return [
        arm.label,
        *results,
        measured(arm.values(select), short),
        measured(arm.values("loss", "test"), "{:.4f}".format) if arm.tested else None,
        first,
        last,
        *(arm.point.get(name) for name, _ in comparison.grid),
        arm.costs.params,
        arm.costs.state_bytes,
        arm.costs.tokens,
        arm.costs.flops,
        arm.speed.get("train_tokens_per_second"),
        arm.speed.get("decode_tokens_per_second"),
        arm.speed.get("compile_seconds"),
    ]


def table(comparison: Comparison, arms: dict[str, Arm]) -> Table:
    """One row a model."""
    return Table(_columns(comparison), [_row(arm, comparison) for arm in arms.values()])


def _texts(comparison: Comparison, arms: dict[str, Arm]) -> list[list[str]]:
    columns = _columns(comparison)

    def text(column: Column, value: Any) -> str:
        return value.text if isinstance(value, page.Cell) else column.text(value)

    rows = [_row(arm, comparison) for arm in arms.values()]
    return [[text(c, v) for c, v in zip(columns, row, strict=True)] for row in rows]


def _grid(comparison: Comparison, arms: dict[str, Arm]) -> Grid:
    """What a terminal has room for; the report has the rest."""
    grid = Grid(title=comparison.title)
    shown = [c.heading not in ELSEWHERE for c in _columns(comparison)]
    for column in itertools.compress(_columns(comparison), shown):
        first = column.heading == "model"
        grid.add_column(column.heading, no_wrap=first, justify="left" if first else "right")
    for row in _texts(comparison, arms):
        grid.add_row(*itertools.compress(row, shown))
    return grid


def rule(comparison: Comparison) -> str:
    """How winners were picked, and what a ± stands for."""
    seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
    if len(comparison.points) == 1:
        return f"One setting for each model, {seeds}; results are those of the test split."
    tried = "; ".join(f"{name} in {', '.join(map(str, values))}" for name, values in comparison.grid)
    better = "lowest" if comparison.select == "loss" else "highest"
    return (
        f"Grid: {tried}; {seeds}. The winner of each model has the {better} mean {comparison.select} on the "
        f"validation split; results are the winner's on the test split."
    )


def _lead(comparison: Comparison) -> str:
    budget = comparison.budget
    equal = f" Equal within {budget.tolerance:.0%}: {budget.kind}." if budget else ""
    deviation = " ± is the standard deviation over seeds." if len(comparison.seeds) > 1 else ""
    task = compare.build(comparison.runs[0][1].data).describe()
    return f"{task}\n\n{rule(comparison)}{deviation}{equal}"


def command() -> str:
    """What was typed, if it was `zoo`."""
    return shlex.join(["zoo", *sys.argv[1:]]) if Path(sys.argv[0]).name == "zoo" else ""


def markdown(comparison: Comparison, arms: dict[str, Arm]) -> str:
    """The table in Markdown, headed by how it was made."""
    rows = [
        dict(zip([c.heading for c in _columns(comparison)], row, strict=True))
        for row in _texts(comparison, arms)
    ]
    skipped = sum(summary["bad_steps"] for arm in arms.values() for summary in arm.summaries)
    made = f"`{command()}`: " if command() else ""
    note = (
        f"{made}{comparison.title}. {timing.machine()}.\n\n{_lead(comparison)}\n\n"
        f"First loss: the training loss of step 1, before any update; last loss: its mean over the last "
        f"{LAST_STEPS} steps. Steps skipped because a loss or a gradient was not finite: {skipped} in "
        f"{len(arms)} models."
    )
    failed = [line for arm in arms.values() for line in arm.failed]
    return timing.markdown(rows, "\n\n".join([note, *(f"Failed: {line}" for line in failed)]))


def sections(comparison: Comparison, arms: dict[str, Arm]) -> list[Section]:
    """The report."""
    done = {label: arm for label, arm in arms.items() if arm.tested}
    failed = [line for arm in arms.values() for line in arm.failed]
    parts: list[Any] = [_facts(comparison, done), table(comparison, arms)] if done else []
    if failed:
        parts.append(Details(f"{len(failed)} runs failed", "\n".join(failed)))
    found = [Section("Result", parts)]
    if done:
        found += [
            Section("Quality", _quality(comparison, done)),
            Section("Speed and memory", _speed(done)),
        ]
    return [*found, Section("How it was made", _how(comparison, arms))]


def _facts(comparison: Comparison, arms: dict[str, Arm]) -> Facts:
    sign = -1 if comparison.select == "loss" else 1
    means = {label: spread(arm.values(comparison.select, "test"))[0] for label, arm in arms.items()}
    best = max(means, key=lambda label: sign * means[label])
    level = compare.chance(comparison)
    facts = [("best on test", best, f"{comparison.select} {means[best]:.3f}")]
    facts += [("guessing", f"{level:.3g}", "accuracy without looking")] if level is not None else []
    return Facts([*facts, ("models", str(len(arms)), ""), ("runs", str(len(comparison.cells)), "")])


def _quality(comparison: Comparison, arms: dict[str, Arm]) -> list[Any]:
    look, name = figures.styles(list(arms)), comparison.select
    # Bits of a loss are better when they are fewer: figures of quality then show the accuracy.
    quality = "accuracy" if name == "loss" else name
    level = compare.chance(comparison)
    states = {label: [(arm.costs.state_bytes, arm.values(quality, "test"))] for label, arm in arms.items()}
    parts: list[Any] = [
        figures.loss_curves({label: arm.curves() for label, arm in arms.items()}, styles=look),
        figures.quality_against_state(states, quality=quality, chance=level, styles=look),
    ]
    lengths = _lengths(comparison)
    if len({length for _, length in lengths}) > 1:
        along = {
            label: [(length, arm.values(quality, part)) for part, length in lengths]
            for label, arm in arms.items()
        }
        parts.append(
            figures.quality_against_length(
                along, trained=lengths[0][1], quality=quality, chance=level, styles=look
            )
        )
    return parts


def _lengths(comparison: Comparison) -> list[tuple[str, int]]:
    """Test split and probes with their lengths."""
    sources = (("test", comparison.runs[0][1].data), *comparison.probes)
    return [(name, compare.build(data).length) for name, data in sources]


def _speed(arms: dict[str, Arm]) -> list[Any]:
    look = figures.styles(list(arms))
    parts: list[Any] = [
        "One model after the other, when all training was over: the median of repeated calls on this machine."
    ]
    for name, title, unit, best in SPEEDS:
        values = {label: [arm.speed.get(name)] for label, arm in arms.items()}
        if any(value is not None for of in values.values() for value in of):
            form = (lambda x: amount(x)) if unit == "bytes" else number
            parts.append(figures.bars(values, title=title, unit=unit, best=best, form=form, styles=look))
    return parts


def _how(comparison: Comparison, arms: dict[str, Arm]) -> list[Any]:
    parts: list[Any] = [rule(comparison)]
    if command():
        parts.append(Details("Command", command()))
    if len(comparison.points) > 1:
        heads = [Column("model"), *(Column(name) for name, _ in comparison.grid)]
        parts.append(Details("The grid, on validation", _tried(comparison, arms, heads)))
    configs = {label: to_dict(run) for label, run in comparison.runs}
    return [*parts, Details("Configs", json.dumps(configs, indent=1))]


def _tried(comparison: Comparison, arms: dict[str, Arm], heads: list[Column]) -> Table:
    """Every point of the grid with its validation figures; winners are starred."""
    home = next(arm.directories[0].parent for arm in arms.values() if arm.directories)
    rows = []
    for label, _ in comparison.runs:
        for point in comparison.points:
            wanted = {"model": label, **point}.items()
            cells = [cell for cell in comparison.cells if wanted <= cell.point.items()]
            found = [(outcome(home / cell.address).summary or {}).get(comparison.select) for cell in cells]
            won = " *" if arms[label].directories and arms[label].point == point else ""
            rows.append([label + won, *point.values(), measured(found, "{:.4f}".format)])
    return Table([*heads, Column(f"validation {comparison.select}")], rows, "* the winner of its model")
