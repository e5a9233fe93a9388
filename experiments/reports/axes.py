"""What the figures of a report share: how labels look, lines, marks and axes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from experiments.reports.colours import PALETTE
from experiments.reports.numbers import amount
from experiments.reports.svg import Key

# Seven colours, nine markers: 63 labels before a pair comes again, 28 before colour and dashes do.
COLOURS = tuple(PALETTE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
GREY, FAINT = "#777777", "#dddddd"
SIZE = (4.6, 3.4)  # inches: letters keep their size on a phone 360 pixels wide
RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a label is a label, dollars and all
}
LETTER = 0.025  # its width in small text, as a share of a plot's

Spread = tuple[float, float | None, int]  # mean, standard deviation, number of seeds


@dataclass(frozen=True)
class Style:
    """How a label is drawn, in every figure."""

    colour: str
    marker: str
    dashes: Any


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Colours, markers and dashes for labels; no two of the first 63 share all three."""
    return {
        label: Style(
            COLOURS[i % len(COLOURS)],
            MARKERS[i % len(MARKERS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, label in enumerate(labels)
    }


@contextmanager
def plot(size: tuple[float, float] = SIZE) -> Iterator[tuple[Drawing, Axes]]:
    """A drawing with one plot; what is made within looks as all figures of a report do."""
    with rc_context(RC):
        drawing = Drawing(figsize=size, layout="constrained")
        yield drawing, drawing.subplots()


def keys(look: Mapping[str, Style], labels: Mapping[str, Any], marker: bool = True) -> list[Key]:
    styles = [(label, look[label]) for label in labels]
    return [Key(label, of.colour, of.marker if marker else "", of.dashes) for label, of in styles]


def cut(label: str) -> str:
    """As much of a label as a figure has room for; legend and tooltips have all of it."""
    return f"{label[:22]}…" if len(label) > 23 else label


def line(
    axes: Axes, series: int, style: Style, points: Sequence[tuple[float, Spread]], dots: bool = False
) -> None:
    """Means along x; standard deviations are whiskers of dots, or a band around a line."""
    x, mean = np.array([x for x, _ in points]), np.array([mean for _, (mean, _, _) in points])
    deviation = np.array([of[1] or 0.0 for _, of in points])
    gid = f"series-{series}"
    (line,) = axes.plot(x, mean, color=style.colour, ls=style.dashes, gid=f"{gid}-line", zorder=3)
    if dots or len(points) == 1:
        line.set(marker=style.marker, markersize=6, linewidth=1.2, alpha=0.9)
    if deviation.any() and dots:
        axes.vlines(x, mean - deviation, mean + deviation, color=style.colour, lw=1.2, gid=f"{gid}-whiskers")
    elif deviation.any():
        edges = (mean - deviation, mean + deviation)
        axes.fill_between(x, *edges, color=style.colour, alpha=0.18, lw=0, gid=f"{gid}-band")


def cut_off(axes: Axes, first: Sequence[float]) -> None:
    """A loss that ran away does not press the others flat."""
    known = [loss for loss in first if math.isfinite(loss)]
    if known and axes.get_ylim()[1] > 1.5 * max(known):
        axes.set_ylim(top=1.25 * max(known))


def mark_front(axes: Axes, front: Mapping[tuple[float, float], str]) -> None:
    """Rings and a stair, and the names of the winners above and to the left, where nothing else can be."""
    if not front:
        return
    low, high = axes.get_xlim()
    x, y = map(list, zip(*sorted(front), strict=True))
    axes.step([*x, high], [*y, y[-1]], where="post", color=GREY, lw=4, alpha=0.25, zorder=1)
    axes.plot(x, y, "o", ms=12, mfc="none", mec=GREY, mew=1.2, zorder=4)
    axes.set_xlim(low, high)
    largest = {front[place]: place for place in sorted(front)}
    taken = math.inf
    for label, place in reversed(largest.items()):
        along = math.log(place[0] / low) / math.log(high / low)
        room = LETTER * len(cut(label))
        side, shift = ("right", 5) if along > room else ("left", -5)
        start, end = (along - room, along) if side == "right" else (along, along + room)
        if end < taken:
            _note(axes, cut(label), place, "data", (shift, 8), ha=side, va="bottom")
            taken = start


def mark_chance(axes: Axes, chance: float | None) -> None:
    if chance is None:
        return
    axes.axhline(chance, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
    _note(axes, "chance", (1, chance), ("axes fraction", "data"), (3, 0), ha="left", va="center", color=GREY)


def _note(axes: Axes, text: str, place: tuple, frame: Any, offset: tuple[int, int], **look: Any) -> None:
    """Small text near a place in a frame of coordinates; offset in points."""
    near = {"xycoords": frame, "xytext": offset, "textcoords": "offset points"}
    axes.annotate(text, place, fontsize=9, **near, **look)


def mark_trained(axes: Axes, low: float, high: float) -> None:
    """A band over the lengths of training, or a line at the only one."""
    if low < high:
        axes.axvspan(low, high, color=GREY, alpha=0.12, lw=0, zorder=0)
    axes.axvline(high, color=GREY, lw=1, zorder=1)
    middle = math.sqrt(low * high)
    _note(
        axes, "trained", (middle, 1), ("data", "axes fraction"), (0, 3), ha="center", va="bottom", color=GREY
    )


def room_for(axes: Axes, qualities: Sequence[float], chance: float | None) -> None:
    """Shares that spread far are shown on the whole scale from 0 to 1."""
    known = [*qualities, *([] if chance is None else [chance])]
    if known and min(known) >= 0 and max(known) <= 1 and max(known) - min(known) > 0.4:
        axes.set_ylim(-0.03, 1.08)


def decades(axis: Axis, show: Callable[[float], str]) -> None:
    """Few round numbers on a log axis, in plain writing."""
    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        places = [
            step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high
        ]
        if len(places) >= 3:
            break
    ticks(axis, places, show)


def ticks(axis: Axis, places: Sequence[float], show: Callable[[float], str]) -> None:
    """At most six of them."""
    axis.set_major_locator(FixedLocator(list(places[:: math.ceil(len(places) / 6) or 1])))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_locator(NullLocator())


def short_length(tokens: float) -> str:
    """4096, but 64k and 1M: powers of 1024, as lengths go."""
    for power, letter in ((20, "M"), (10, "k")):
        if tokens >= 10_000 and tokens % 2**power == 0:
            return f"{tokens / 2**power:.0f}{letter}"
    return f"{tokens:.0f}"


def bar(
    axes: Axes, series: int, style: Style, row: int, mean: float, deviation: float | None, dot: bool
) -> None:
    gid = f"series-{series}"
    if dot:
        axes.plot(mean, row, style.marker, color=style.colour, markersize=7, gid=f"{gid}-dot")
    else:
        axes.barh(row, mean, height=0.66, color=style.colour, alpha=0.85)[0].set_gid(f"{gid}-bar")
    if deviation:
        # A log scale has no place for what may be nothing.
        low = mean if dot and deviation >= mean else mean - deviation
        axes.hlines(row, low, mean + deviation, color="#000000", lw=1.2, gid=f"{gid}-whisker")


def finish_bars(
    axes: Axes,
    order: Sequence[str],
    means: Mapping[str, Spread],
    form: Callable[[float], str],
    unit: str,
    log: bool,
) -> None:
    """Labels to the left, values at the ends of the bars."""
    prefixed = partial(amount, unit="B" if unit == "bytes" else "")
    axes.set_xlabel("" if unit == "bytes" else unit)
    axes.set_yticks(range(len(order)), [cut(label) for label in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for row, label in enumerate(order):
        mean, deviation, _ = means[label]
        end = (mean + (deviation or 0.0), row)
        _note(axes, form(mean), end, "data", (6, 0), ha="left", va="center", annotation_clip=False)
    if log and order:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.15)
        decades(axes.xaxis, prefixed)
    else:
        axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: prefixed(value)))
