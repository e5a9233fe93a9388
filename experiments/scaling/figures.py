"""Pictures of scaling laws, as matplotlib figures for a report to embed; the label of each is a file name."""

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from experiments.scaling.law import compute_of
from experiments.scaling.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_SIZES = 12  # whose curves are drawn
COLUMNS = 3  # of panels


def figures(studies: list[Study]) -> list["Figure"]:
    """Loss against compute with the frontier, isoFLOP parabolas, residuals; of several, exponents."""
    found = [_grid(studies, "loss", _loss_axes)]
    with_profiles = [study for study in studies if study.profiles.budgets]
    if with_profiles:
        found.append(_grid(with_profiles, "isoflop", _isoflop_axes))
    found.append(_grid(studies, "residuals", _residual_axes))
    if len(studies) > 1:
        found.append(_comparison(studies))
    return found


def _grid(studies: list[Study], label: str, draw) -> "Figure":
    """One panel a study."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(studies))
    rows = math.ceil(len(studies) / columns)
    width = 7.5 if columns == 1 else 5.2 * columns
    figure = Figure(figsize=(width, 4.6 * rows), layout="constrained", label=label)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, study in zip(panels, studies, strict=False):
        draw(axes, study)
        axes.grid(alpha=0.3)
    for axes in panels[len(studies) :]:
        axes.set_axis_off()
    return figure


def _colors(values: np.ndarray):
    """A colour for each value, by its logarithm."""
    from matplotlib import colormaps

    logs = np.log(values)
    span = np.ptp(logs)
    return colormaps["viridis"](0.9 * (logs - logs.min()) / span if span else np.zeros_like(logs))


def _frontier(study: Study, compute: np.ndarray) -> np.ndarray:
    params, tokens = study.cost.optimum(study.law, compute)
    return study.law.loss(params, tokens)


def _loss_axes(axes: "Axes", study: Study) -> None:
    """Runs, the law's curve of each size, and the best loss of each amount of compute."""
    runs, law, cost = study.runs, study.law, study.cost
    compute = compute_of(runs)
    sizes = np.unique(runs.params)
    for size, color in zip(sizes, _colors(sizes), strict=True):
        own = runs.params == size
        several = len(sizes) <= FEW_SIZES
        axes.scatter(
            compute[own], runs.loss[own], s=22, color=color, zorder=3, label=_short(size) if several else None
        )
        if several:
            c = np.geomspace(compute[own].min() / 1.5, compute[own].max() * 1.5, 60)
            tokens = c / cost.flops(size, 1.0)
            axes.plot(c, law.loss(np.full_like(c, size), tokens), color=color, lw=0.9, alpha=0.8)
    line = np.geomspace(compute.min(), 10 * compute.max(), 100)
    axes.plot(line, _frontier(study, line), color="black", lw=1.6, label="best N for each C")
    seen = {int(row) for held in study.held_out[:1] for row in held.rows}
    rows = sorted(seen)
    if rows:
        axes.scatter(
            compute[rows], runs.loss[rows], s=75, fc="none", ec="tab:red", lw=1, label="held out, predicted"
        )
    if law.E > 0:
        axes.axhline(law.E, color="gray", ls=":", lw=1.2, label=f"E = {law.E:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="compute C (FLOPs)", ylabel="loss", title=study.name)
    _plain_ticks(axes)
    title = "parameters" if len(sizes) <= FEW_SIZES else "darker: fewer parameters"
    axes.legend(fontsize=7, ncols=2, loc="best", title=title)


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _isoflop_axes(axes: "Axes", study: Study) -> None:
    """Runs of each budget, their parabola, the law along the budget, and both minima."""
    budgets = study.profiles.budgets
    colors = _colors(np.array([p.compute for p in budgets]))
    for p, color in zip(budgets, colors, strict=True):
        sizes = study.runs.params[p.rows]
        axes.scatter(
            sizes, study.runs.loss[p.rows], s=20, color=color, zorder=3, label=f"C = {p.compute:.2g}"
        )
        n = np.geomspace(sizes.min() / 1.2, sizes.max() * 1.2, 100)
        axes.plot(n, np.polyval(p.parabola, np.log(n) - p.centre), color=color, ls="--", lw=1)
        tokens = p.compute / study.cost.flops(n, 1.0)
        axes.plot(n, study.law.loss(n, tokens), color=color, lw=1)
        if not p.problem:
            axes.scatter(p.params, p.loss, marker="v", s=50, fc="white", ec=color, zorder=4)
        best = study.cost.optimum(study.law, p.compute)
        axes.scatter(
            best[0], study.law.loss(*best), marker="*", s=90, color=color, ec="black", lw=0.6, zorder=5
        )
    axes.plot([], [], color="gray", ls="--", label="parabola, ▽ its minimum")
    axes.plot([], [], color="gray", label="law, ★ its minimum")
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss", title=study.name)
    axes.legend(fontsize=7)


def _residual_axes(axes: "Axes", study: Study) -> None:
    """Measured over predicted loss, less one, of every fit."""
    compute = compute_of(study.runs)
    markers = {"varpro": ("o", "tab:blue"), "huber": ("x", "tab:orange"), "overtraining": ("+", "tab:green")}
    for name, law in study.methods.items():
        mark, color = markers[name]
        rest = 100 * np.expm1(law.residuals(study.runs))
        axes.scatter(compute, rest, marker=mark, s=24, color=color, lw=1, alpha=0.8, label=name)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="compute C (FLOPs)", ylabel="measured / fitted − 1 (%)", title=study.name)
    axes.legend(fontsize=8)


def _comparison(studies: list[Study]) -> "Figure":
    """Frontiers of all studies, and their exponents and E with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6 + 0.4 * max(6, len(studies))), layout="constrained", label="comparison")
    frontier, *panels = figure.subplots(1, 4, width_ratios=(2, 1, 1, 1))
    for i, study in enumerate(studies):
        compute = compute_of(study.runs)
        line = np.geomspace(compute.min(), compute.max(), 100)
        frontier.plot(
            line,
            _frontier(study, line),
            color=f"C{i % 10}",
            ls=("-", "--", ":")[i // 10 % 3],
            label=study.name,
        )
    frontier.set(xscale="log", xlabel="compute C (FLOPs)", ylabel="best loss", title="frontiers")
    frontier.legend(fontsize=8)
    names = (("E", "E"), ("alpha", "α"), ("a", "a, N* ~ C^a"))
    for axes, (key, title) in zip(panels, names, strict=True):
        _intervals(axes, studies, key)
        axes.set(title=title, yticks=range(len(studies)))
        axes.set_yticklabels([study.name for study in studies] if axes is panels[0] else [])
        axes.invert_yaxis()
    for axes in (frontier, *panels):
        axes.grid(alpha=0.3)
    return figure


def _intervals(axes: "Axes", studies: list[Study], key: str) -> None:
    for i, study in enumerate(studies):
        value = study.cost.exponents(study.law)[0] if key == "a" else getattr(study.law, key)
        low, high = study.intervals().get(key, (value, value))
        axes.plot([low, high], [i, i], color=f"C{i % 10}", lw=2)
        axes.plot(value, i, "o", color=f"C{i % 10}", ms=5)


def _short(size: float) -> str:
    """1.4e9 as 1.4B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size >= unit:
            return re.sub(r"\.0$", "", f"{size / unit:.3g}") + letter
    return f"{size:.3g}"
