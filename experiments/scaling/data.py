"""Runs to fit, from a CSV with a row for every run.

Rows that cannot be right (a size that is not positive, a cell that is no number) are refused; runs without a
finite loss, as diverged ones are, are left out and named.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from layers.checks import require

COLUMNS = {"params": "params", "tokens": "tokens", "loss": "loss", "flops": "flops"}
MULTIPLIERS = ("token_multiplier", "multiplier", "M")  # tokens per parameter
LEAST_SIZES = 3  # of N, and of D: a power law and its offset have three parameters


@dataclass(frozen=True)
class Runs:
    """R runs in an order of their own, so that the order of rows changes nothing.

    `params`, `tokens`, `loss` [R] float64, positive and finite; `flops` and `budget` [R] where the CSV has
    them; `lines` [R] where each stands in the CSV (the header is line 1).
    """

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    flops: np.ndarray | None = None
    budget: np.ndarray | None = None
    lines: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index) -> "Runs":
        """Those of `index`, integers or a mask."""
        given = {name: x for name, x in vars(self).items() if x is not None}
        return replace(self, **{name: x[index] for name, x in given.items()})

    def line(self, row: int) -> str:
        """How messages call a run."""
        where = f"run {row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{where} (N = {self.params[row]:.4g}, D = {self.tokens[row]:.4g})"


def runs(params, tokens, loss, flops=None, budget=None, lines=None) -> Runs:
    """Checked and sorted runs. Raises ValueError for lengths that differ and for numbers that cannot be."""
    given = {"params": params, "tokens": tokens, "loss": loss, "flops": flops, "budget": budget}
    arrays = {name: None if x is None else np.asarray(x, float).ravel() for name, x in given.items()}
    sizes = {name: len(x) for name, x in arrays.items() if x is not None}
    require(len(set(sizes.values())) == 1, f"columns of different lengths: {sizes}")
    for name, x in arrays.items():
        bad = np.flatnonzero(~(np.isfinite(x) & (x > 0))) if x is not None else ()
        require(len(bad) == 0, f"{name} must be positive and finite; run {_first(bad)} has {_at(x, bad)}")
    numbers = None if lines is None else np.asarray(lines)
    made = Runs(**arrays, lines=numbers)  # type: ignore[arg-type]
    last = np.zeros(len(made)) if made.flops is None else made.flops
    return made.take(np.lexsort((last, made.loss, made.tokens, made.params)))


def _first(bad) -> int:
    return bad[0] + 1 if len(bad) else 0


def _at(x, bad) -> float:
    return x[bad[0]] if len(bad) else math.nan


def require_determined(found: Runs, *, tied: bool = False) -> None:
    """Raise ValueError, with the reason, where no fit of the five parameters (`tied`: four) can be unique."""
    points = len(set(zip(found.params, found.tokens, strict=True)))
    unknowns = 4 if tied else 5
    require(len(found) > 0, "underdetermined: no runs to fit")
    require(points > 1, f"underdetermined: all {len(found)} runs are duplicates of one size and one length")
    for name, x in (("params", found.params), ("tokens", found.tokens)):
        least = 2 if tied else LEAST_SIZES
        require(
            len(set(x)) >= least,
            f"underdetermined: {len(set(x))} distinct values of {name}, at least {least} are needed",
        )
    require(
        points >= unknowns,
        f"underdetermined: {points} distinct (params, tokens) for the {unknowns} parameters of the law",
    )
    n, d = (np.log(x) - np.log(x).mean() for x in (found.params, found.tokens))
    across = np.linalg.svd(np.stack([n, d], 1), compute_uv=False)
    require(
        across[1] > 1e-6 * across[0],
        "underdetermined: tokens are one power of params in all runs, their effects cannot be told apart",
    )


@dataclass(frozen=True)
class Table:
    """A CSV as text: `rows` by column, `lines` in the file, and which columns hold what."""

    path: Path
    rows: tuple[Mapping[str, str], ...]
    lines: tuple[int, ...]
    columns: Mapping[str, str]

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(self.rows[0])

    def values(self, column: str) -> list[str]:
        """Distinct values of a column, sorted. Raises ValueError where there is no such column."""
        self.require(column)
        return sorted({row[column] for row in self.rows})

    def where(self, column: str, value: str) -> "Table":
        """Rows with this value. Raises ValueError where there are none."""
        known = self.values(column)
        require(value in known, f"{self.path}: no row has {column}={value!r}; there: {', '.join(known)}")
        keep = [i for i, row in enumerate(self.rows) if row[column] == value]
        rows = tuple(self.rows[i] for i in keep)
        return replace(self, rows=rows, lines=tuple(self.lines[i] for i in keep))

    def require(self, column: str) -> None:
        there = ", ".join(self.header)
        require(column in self.header, f"{self.path}: no column {column!r}; columns there: {there}")

    def runs(self) -> tuple[Runs, list[str]]:
        """The runs, and a line for what was left out. Raises ValueError for cells that cannot be."""
        notes: list[str] = []
        found = {name: self._numbers(name) for name in ("params", "loss")}
        found["tokens"] = self._tokens(found["params"])
        for name in ("params", "tokens"):
            self._require_sizes(name, found[name])
        keep = np.isfinite(found["loss"])
        if not keep.all():
            notes.append(f"left out, loss is not finite: {_listed(self.lines, ~keep)}")
        self._require_sizes("loss", np.where(keep, found["loss"], 1.0))
        for name in ("flops", "budget"):
            found |= self._optional(name, keep, notes)
        kept = {name: x[keep] for name, x in found.items()}
        return runs(**kept, lines=np.array(self.lines)[keep]), notes

    def _tokens(self, params: np.ndarray) -> np.ndarray:
        """The tokens of each run, also where the CSV has only tokens per parameter."""
        column = self.multiplier
        if self.columns["tokens"] not in self.header and column is not None:
            return params * np.array([self._number(row, i, column) for i, row in enumerate(self.rows)])
        return self._numbers("tokens")

    @property
    def multiplier(self) -> str | None:
        """The column of tokens per parameter, if there is one."""
        return next((name for name in MULTIPLIERS if name in self.header), None)

    def _optional(self, name: str, keep: np.ndarray, notes: list[str]) -> dict[str, np.ndarray]:
        column = self.columns.get(name, name)
        if column not in self.header:
            return {}
        if any(not row[column].strip() for row, kept in zip(self.rows, keep, strict=True) if kept):
            notes.append(f"column {column!r} is not used: some runs have no value there")
            return {}
        # What is left out may be empty.
        x = np.array([self._number(r, i, column) if keep[i] else 1.0 for i, r in enumerate(self.rows)])
        self._require_sizes(name, x)
        return {name: x}

    def _numbers(self, name: str) -> np.ndarray:
        column = self.columns[name]
        self.require(column)
        return np.array([self._number(row, i, column) for i, row in enumerate(self.rows)])

    def _number(self, row: Mapping[str, str], index: int, column: str) -> float:
        text = (row[column] or "").strip()
        try:
            return float(text) if text else math.nan
        except ValueError:
            message = f"{self.path}, line {self.lines[index]}: {column} is {text!r}, not a number"
        require(False, message)
        raise AssertionError

    def _require_sizes(self, name: str, x: np.ndarray) -> None:
        bad = np.flatnonzero(~(np.isfinite(x) & (x > 0)))
        if len(bad):
            column = self.columns.get(name, name)
            line, value = self.lines[bad[0]], x[bad[0]]
            require(False, f"{self.path}, line {line}: {column} is {value:g}, it must be positive and finite")


def _listed(lines: Iterable[int], mask: np.ndarray, most: int = 8) -> str:
    chosen = [str(line) for line, bad in zip(lines, mask, strict=True) if bad]
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return f"{'line' if len(chosen) == 1 else 'lines'} {', '.join(chosen[:most])}{more}"


def read(path: str | Path, **columns: str | None) -> Table:
    """The CSV at `path`, `results.csv` in it if that is a directory.

    `columns` say what `params`, `tokens`, `loss`, `flops` are called there. Raises FileNotFoundError, and
    ValueError for what is no CSV with a header and rows.
    """
    path = Path(path)
    path = path / "results.csv" if path.is_dir() else path
    require(path.is_file() or not path.exists(), f"{path} is no regular file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        reason = str(error)
        rows = []
    else:
        reason = "it has no rows"
    require(len(rows) > 0, f"{path} cannot be read as a CSV of runs: {reason}")
    require(all(None not in row for _, row in rows), f"{path}: a row has more cells than the header")
    names = COLUMNS | {name: column for name, column in columns.items() if column}
    return Table(path, tuple(row for _, row in rows), tuple(line for line, _ in rows), names)
