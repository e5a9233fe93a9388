"""`zoo fit RESULTS`: scaling laws of a sweep's results, or of any CSV with a row for every run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.scaling.data import Table
    from experiments.scaling.study import Settings, Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo fit`."""
    parser.add_argument("results", metavar="RESULTS", help="directory of a sweep, or a CSV: one row a run")
    parser.add_argument("--json", metavar="FILE", help="write every fit to a JSON file")
    parser.add_argument("--report", metavar="DIR", help="write report.md and its figures into a directory")
    parser.add_argument(
        "--by", metavar="COLUMN", help="fit each value of a column by itself (an architecture)"
    )
    parser.add_argument(
        "--where", metavar="COLUMN=VALUE", action="append", default=[], help="only these rows"
    )
    for name in ("params", "tokens", "loss", "flops"):
        text = f"column of {name} (default {name!r})"
        parser.add_argument(f"--{name}", metavar="COLUMN", help=text)
    parser.add_argument(
        "--form",
        metavar="FORM",
        help="surface (five parameters), overtraining (four: one exponent) or both; "
        "default both where the CSV has a column of tokens per parameter, else surface",
    )
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss (default 1e-3)")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--budgets", metavar="C,C,...", help="compute to find the best N and D for")


def main(options: argparse.Namespace) -> int:
    """Fit, print, and write what was asked for; raises ValueError and OSError with one line for people."""
    import sys

    from rich.console import Console

    from experiments.scaling import data, report

    columns = {name: getattr(options, name) for name in ("params", "tokens", "loss", "flops")}
    table = data.read(options.results, **columns)
    _refuse_overwriting(table, options.json)
    settings = _settings(options)
    for condition in options.where:
        table = _where(table, condition)
    studies, refused = fit(table, settings, options.by)
    # Into a file or a pipe the tables go at their full width.
    console = Console(width=None if sys.stdout.isatty() else 160)
    report.terminal(studies, refused, console)
    if options.json:
        write_json(studies, refused, options.by, Path(options.json))
    if options.report:
        write_report(studies, refused, f"Scaling laws of {Path(options.results).name}", Path(options.report))
    return 0


def _settings(options: argparse.Namespace) -> "Settings":
    from experiments.scaling.study import Settings
    from layers.checks import require

    words = (options.budgets or "").split(",") if options.budgets else []
    try:
        budgets = tuple(float(word) for word in words)
    except ValueError:
        budgets = (-1.0,)
    require(all(c > 0 for c in budgets), f"--budgets {options.budgets!r} must be positive numbers and commas")
    names = ("delta", "resamples", "seed", "form")
    return Settings(budgets=budgets, **{name: getattr(options, name) for name in names})


def _where(table: "Table", condition: str) -> "Table":
    from layers.checks import require

    column, equals, value = condition.partition("=")
    require(bool(equals), f"--where {condition!r} must be COLUMN=VALUE")
    return table.where(column, value)


def _refuse_overwriting(table: "Table", json: str | None) -> None:
    from layers.checks import require

    same = json is not None and Path(json).resolve() == table.path.resolve()
    require(not same, f"--json {json} would overwrite the results themselves")


def fit(table: "Table", settings: "Settings", by: str | None) -> tuple[list["Study"], dict[str, str]]:
    """The study of each group, and why others are refused. Raises ValueError if none is left."""
    from experiments.scaling import study
    from layers.checks import require

    names = table.values(by) if by else [table.path.stem if table.path.stem != "results" else "all runs"]
    studies, refused = [], {}
    for name in names:
        try:
            part = table.where(by, name) if by else table
            runs, notes = part.runs()
            notes += _mixtures(part, by)
            studies.append(study.run(name, runs, settings, part, notes))
        except ValueError as error:
            refused[name] = str(error)
    reasons = "; ".join(f"{name}: {reason}" if by else reason for name, reason in refused.items())
    require(len(studies) > 0, reasons)
    return studies, refused


def _mixtures(table: "Table", by: str | None) -> list[str]:
    """A line where one law is fitted to several architectures."""
    for column in ("arch", "architecture", "model", "pattern"):
        if column == by or column not in table.header:
            continue
        values = table.values(column)
        sizes = [len(table.where(column, value).values(table.columns["params"])) for value in values]
        # A column that names sizes is no mixture.
        if len(values) > 1 and min(sizes) > 1:
            return [
                f"one law for {len(values)} values of column {column!r}: --by {column} fits each by itself"
            ]
    return []


def write_json(studies: list["Study"], refused: dict[str, str], by: str | None, path: Path) -> None:
    """Every fit by name; those of groups under `groups`, by group."""
    import json

    from experiments.scaling.study import to_dict

    result: dict[str, Any] = to_dict(studies[0])
    if by:
        result = {"by": by, "groups": {study.name: to_dict(study) for study in studies}, "refused": refused}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def write_report(studies: list["Study"], refused: dict[str, str], title: str, directory: Path) -> None:
    """`report.md` and a PNG for every figure."""
    from experiments.scaling import figures, report

    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for figure in figures.figures(studies):
        names.append(f"{figure.get_label()}.png")
        figure.savefig(directory / names[-1], dpi=120)
    (directory / "report.md").write_text(report.markdown(studies, refused, title, names))
