"""Figures of a comparison, from plain numbers: what was measured, by label, one value (or curve) a seed.

Every function returns a `report.Figure` with its legend, its description, and its values as a table. A label
has the same colour, marker and dashes in all figures that were given the same `styles`. Values that are not
finite are left out and counted in the description.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reports.axes import (
    SIZE,
    Spread,
    Style,
    bar,
    cut_off,
    decades,
    finish_bars,
    keys,
    line,
    mark_chance,
    mark_front,
    mark_trained,
    plot,
    room_for,
    short_length,
    styles,
    ticks,
)
from experiments.reports.numbers import amount, number, plus_minus, spread
from experiments.reports.page import Cell, Column, Figure, Table, measured
from experiments.reports.svg import Mark
from layers.checks import require

BINS = 40  # points of a training curve
Values = Sequence[float | None]


def loss_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Values]]],
    *,
    title: str = "Training loss",
    unit: str = "nats",
    log: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """`{label: [(steps, losses) of a seed, ...]}`: means over stretches of steps, with s.d. over seeds."""
    require(any(len(steps) for runs in curves.values() for steps, _ in runs), f"{title}: no steps")
    look = _styles(curves, styles)
    ends = _stretches(curves)
    rows = {label: [_binned(run, ends) for run in runs] for label, runs in curves.items()}
    with plot() as (drawing, axes):
        marks: list[Mark] = []
        columns: dict[str, list[Cell | None]] = {}
        for i, (label, runs) in enumerate(rows.items()):
            points = [(x, spread(values)) for x, *values in zip(ends, *runs, strict=True)]
            line(axes, i, look[label], points)
            marks += _marks(axes, i, label, points, lambda x: f"step {x:,.0f}", None)
            columns[label] = [measured(values) for _, *values in zip(ends, *runs, strict=True)]
        axes.set(xlabel="step", ylabel=f"loss ({unit})", xlim=(0, ends[-1]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        if log:
            axes.set_yscale("log")
            decades(axes.yaxis, number)
        cut_off(axes, [run[0] for runs in rows.values() for run in runs])
    last = {label: next((c for c in reversed(cells) if c), None) for label, cells in columns.items()}
    lost = _lost({label: [v for _, losses in runs for v in losses] for label, runs in curves.items()})
    return Figure(
        drawing,
        title,
        f"Averaged over stretches of steps; {_seeds(curves)}. At the end: {_ranking(last, True)}.{lost}",
        marks,
        keys(look, curves, marker=False),
        Table(
            ["step", *curves],
            [[int(end), *cells] for end, *cells in zip(ends, *columns.values(), strict=True)],
        ),
    )


def quality_against_state(
    points: Mapping[str, Sequence[tuple[float, Values]]],
    *,
    title: str = "What the state buys",
    quality: str = "accuracy",
    chance: float | None = None,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """`{label: [(state bytes, qualities of its seeds), ...]}`: more is better; the front is marked.

    On the front is what no other point beats in quality without a larger state.
    """
    look = _styles(points, styles)
    # A log scale has no place for no state at all.
    points = {label: [(max(x, 1), values) for x, values in sizes] for label, sizes in points.items()}
    found = {label: _spreads(sizes) for label, sizes in points.items()}
    front = _front([xy for sizes in found.values() for xy in _means(sizes)])
    with plot() as (drawing, axes):
        axes.set_xscale("log")
        marks: list[Mark] = []
        for i, (label, sizes) in enumerate(found.items()):
            line(axes, i, look[label], sizes, dots=True)
            marks += _marks(axes, i, label, sizes, lambda x: f"{amount(x)} of state", _short)
        mark_front(axes, {xy: label for label, sizes in found.items() for xy in _means(sizes) if xy in front})
        mark_chance(axes, chance)
        axes.set(xlabel="state of one sequence", ylabel=quality)
        decades(axes.xaxis, amount)
        room_for(axes, [y for _, y in front], chance)
    rows = [
        (label, Cell(amount(x), x), measured(values, _short), (x, spread(values)[0]) in front)
        for label, sizes in points.items()
        for x, values in sorted(sizes, key=itemgetter(0))
        if spread(values)[2]
    ]
    leaders = dict.fromkeys(row[0] for row in sorted(rows, key=lambda row: row[1].value) if row[3])
    names = ", ".join(leaders) or "nothing finite"
    return Figure(
        drawing,
        title,
        f"{quality.capitalize()} against the bytes of a sequence's state, {_seeds_of(points)}. On the Pareto "
        f"front (ringed), from the smallest state: {names}.{_lost_of(points)}",
        marks,
        keys(look, points),
        Table(
            ["model", "state", Column(quality, best="max"), "on the front"],
            [(*row[:3], "yes" if row[3] else "no") for row in rows],
        ),
    )


def quality_against_length(
    points: Mapping[str, Sequence[tuple[float, Values]]],
    *,
    trained: float | tuple[float, float],
    title: str = "Beyond the training length",
    quality: str = "accuracy",
    chance: float | None = None,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """`{label: [(length in tokens, qualities of its seeds), ...]}`; `trained`: one, or (first, last)."""
    low, high = trained if isinstance(trained, tuple) else (trained, trained)
    look = _styles(points, styles)
    found = {label: _spreads(lengths) for label, lengths in points.items()}
    lengths = sorted({x for of in points.values() for x, _ in of})
    with plot() as (drawing, axes):
        axes.set_xscale("log", base=2)
        marks: list[Mark] = []
        for i, (label, along) in enumerate(found.items()):
            line(axes, i, look[label], along, dots=True)
            marks += _marks(axes, i, label, along, lambda x: f"length {x:,.0f}", _short)
        mark_chance(axes, chance)
        mark_trained(axes, low, high)
        axes.set(xlabel="length (tokens)", ylabel=quality)
        ticks(axes.xaxis, lengths, short_length)
        room_for(axes, [y for of in found.values() for _, (y, _, _) in of], chance)
    by_length = {label: {x: measured(values, _short) for x, values in of} for label, of in points.items()}
    longest = {label: of.get(lengths[-1]) for label, of in by_length.items()}
    span = f"{high:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    return Figure(
        drawing,
        title,
        f"{quality.capitalize()} against length, trained at {span} (marked), {_seeds_of(points)}. At length "
        f"{lengths[-1]:,.0f}: {_ranking(longest, lowest_first=False)}.{_lost_of(points)}",
        marks,
        keys(look, points),
        Table(["length", *points], [[int(x), *(of.get(x) for of in by_length.values())] for x in lengths]),
    )


def bars(
    values: Mapping[str, Values],
    *,
    title: str,
    unit: str,
    best: str,
    log: bool = False,
    form: Callable[[float], str] | None = None,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """`{label: values of its seeds}`, the best ("max" or "min") on top, with ± s.d.; dots on a log scale.

    Of the unit "bytes" thousands get a prefix (kB). A bar's length has no meaning on a log scale: there is no
    zero to measure it from.
    """
    require(best in ("max", "min"), f"{title}: best is 'max' or 'min'")
    look = _styles(values, styles)
    if unit == "bytes" and form is None:
        form = amount
    number_of = {label: i for i, label in enumerate(values)}
    means = {label: spread(of) for label, of in values.items()}
    finite = [label for label, (_, _, count) in means.items() if count]
    order = sorted(finite, key=lambda label: means[label][0], reverse=best == "max")
    with plot((SIZE[0], 1.0 + 0.24 * max(len(order), 2))) as (drawing, axes):
        marks: list[Mark] = []
        for row, label in enumerate(order):
            mean, deviation, _ = means[label]
            bar(axes, number_of[label], look[label], row, mean, deviation, log)
            text = _says(label, means[label], form) + ("" if unit == "bytes" else f" {unit}")
            marks.append(Mark(axes, mean, row, text, number_of[label]))
        finish_bars(axes, order, means, form or number, unit, log)
    cells = {label: measured(of, form) for label, of in values.items()}
    several = f", {_seeds(values)}" if any(len(of) > 1 for of in values.values()) else ""
    better = "More is better" if best == "max" else "Less is better"
    ranking = _ranking({label: cells[label] for label in order}, lowest_first=best == "min")
    lost = _lost(values)
    return Figure(
        drawing,
        title,
        f"In {unit}{several}. {better}: {ranking}.{lost}",
        marks,
        (),
        Table(["model", Column(unit, best=best)], [[label, cell] for label, cell in cells.items()]),
    )


def _styles(labels: Mapping[str, Any], given: Mapping[str, Style] | None) -> Mapping[str, Style]:
    require(len(labels) > 0, "a figure needs at least one label")
    return styles(list(labels)) if given is None else given


def _stretches(curves: Mapping[str, Sequence[tuple[Sequence[float], Values]]]) -> list[float]:
    """The last step of each of at most BINS stretches with equally many of the logged steps."""
    steps = np.unique(np.concatenate([np.asarray(s, float) for runs in curves.values() for s, _ in runs]))
    return [float(part[-1]) for part in np.array_split(steps, min(BINS, len(steps)))]


def _binned(run: tuple[Sequence[float], Values], ends: Sequence[float]) -> list[float]:
    """Mean loss of a run in every stretch; NaN where there is no finite one."""
    places = np.searchsorted(ends, np.asarray(run[0], float))
    inside: list[list[float | None]] = [[] for _ in ends]
    for place, loss in zip(places, run[1], strict=True):
        inside[place].append(loss)
    return [spread(losses)[0] for losses in inside]


def _spreads(points: Sequence[tuple[float, Values]]) -> list[tuple[float, Spread]]:
    """In order of x, without those that have no finite value."""
    found = [(x, spread(values)) for x, values in sorted(points, key=itemgetter(0))]
    return [(x, of) for x, of in found if of[2]]


def _means(points: Sequence[tuple[float, Spread]]) -> list[tuple[float, float]]:
    return [(x, mean) for x, (mean, _, _) in points]


def _short(quality: float) -> str:
    return f"{quality:.3f}"


def _says(label: str, found: Spread, form: Callable[[float], str] | None) -> str:
    mean, deviation, count = found
    return f"{label}: {plus_minus(mean, deviation, form)}" + (f" ({count} seeds)" if count > 1 else "")


def _marks(
    axes: Axes,
    series: int,
    label: str,
    points: Sequence[tuple[float, Spread]],
    where: Callable[[float], str],
    form: Callable[[float], str] | None,
) -> list[Mark]:
    return [
        Mark(axes, x, found[0], f"{_says(label, found, form)} at {where(x)}", series)
        for x, found in points
        if found[2]
    ]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in quality at the same or a smaller state, by state."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _ranking(cells: Mapping[str, Cell | None], lowest_first: bool) -> str:
    """In words: the first three and the last."""
    known = {label: cell for label, cell in cells.items() if cell}
    order = sorted(known, key=lambda label: known[label].value, reverse=not lowest_first)
    texts = [f"{label} {known[label].text}" for label in order]
    if len(texts) > 4:
        return f"{', '.join(texts[:3])}; last, {texts[-1]}"
    return ", ".join(texts) or "nothing finite"


def _seeds(runs: Mapping[str, Sequence[Any]]) -> str:
    return _count({len(of) for of in runs.values()})


def _seeds_of(points: Mapping[str, Sequence[tuple[float, Values]]]) -> str:
    return _count({len(values) for of in points.values() for _, values in of})


def _count(numbers: set[int]) -> str:
    if max(numbers, default=1) <= 1:
        return "one seed"
    few = f"{min(numbers)} to " if len(numbers) > 1 else ""
    return f"means ± s.d. over {few}{max(numbers)} seeds"


def _lost_of(points: Mapping[str, Sequence[tuple[float, Values]]]) -> str:
    return _lost({label: [v for _, values in of for v in values] for label, of in points.items()})


def _lost(values: Mapping[str, Values]) -> str:
    """What was left out, by label."""
    counts = {label: sum(v is None or not math.isfinite(v) for v in of) for label, of in values.items()}
    names = [f"{label} ({count} of {len(values[label])} values)" for label, count in counts.items() if count]
    return f" Left out because not finite: {', '.join(names)}." if names else ""
