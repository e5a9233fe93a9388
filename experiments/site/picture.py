"""One picture of an architecture: how data flow through it, and what it sees of the past."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.site import drawing, influence, layout
from zoo import registry

POINT = 1 / 72  # of an inch
MARGIN, BETWEEN, SIDE, SCALE = 14.0, 40.0, 190.0, 9.0  # SIDE of the matrix, SCALE of its colours
ABOVE, BELOW, BESIDE = 34.0, 34.0, 38.0  # title, axis, numbers of the scale
RANGE = 1e-4  # of the largest slope: what is below has the lightest colour
INK = "#3c4650"


def _matrix(axes: Axes, scale: Axes, slopes: np.ndarray) -> None:
    top = float(slopes.max())
    norm = LogNorm(RANGE * top, top)
    look: dict[str, Any] = {"cmap": colormaps["YlGnBu"], "norm": norm, "interpolation": "none"}
    image = axes.imshow(np.where(slopes > 0, np.maximum(slopes, RANGE * top), np.nan), **look)
    axes.set_title("how much output t depends on input s", fontsize=10, color=INK, pad=9)
    axes.set_xlabel("input s", fontsize=9, color=INK)
    axes.set_ylabel("output t", fontsize=9, color=INK)
    axes.figure.colorbar(image, cax=scale)
    for each in (axes, scale):
        each.tick_params(labelsize=8, colors=INK, length=2)
        for spine in (*each.spines.values(), *([scale.spines["outline"]] if each is scale else [])):
            spine.set(color="#c3cad2", linewidth=0.8)


def figure(name: str, text: str) -> Figure:
    """The drawing of `text` beside the slopes of the layer called `name`."""
    graph = layout.parse(text)
    _, wide, tall = drawing.place(graph)
    height = max(tall + 60, SIDE + ABOVE + BELOW)
    width = wide + SIDE + SCALE + 2 * MARGIN + BETWEEN + BESIDE + 12
    result = Figure((width * POINT, height * POINT), facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        return result.add_axes((x / width, y / height, w / width, h / height))

    flow = axes(0, 0, wide + 2 * MARGIN, height)
    flow.set(xlim=(-MARGIN, wide + MARGIN), ylim=((tall - height) / 2, (tall + height) / 2))
    flow.axis("off")
    drawing.draw(flow, graph)
    x, y = wide + 2 * MARGIN + BETWEEN, (height - SIDE - ABOVE + BELOW) / 2
    _matrix(axes(x, y, SIDE, SIDE), axes(x + SIDE + 8, y, SCALE, SIDE), influence.matrix(name))
    return result


def _digest(name: str, text: str) -> str:
    """Of all that the picture is made of: the layer, the drawing and this code."""
    module = registry.module(influence.config(name))
    sources = [inspect.getsource(part) for part in (module, drawing, influence, layout)]
    sources += [Path(__file__).read_text(), text, name]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def svg(name: str, text: str, kept: Path) -> str:
    """The picture as SVG, from the folder `kept` if it is there already."""
    path = kept / f"{name}-{_digest(name, text)}.svg"
    if not path.exists():
        kept.mkdir(parents=True, exist_ok=True)
        for old in kept.glob(f"{name}-*.svg"):
            old.unlink()
        # Letters as outlines: no viewer's fonts can push a text out of its box.
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure(name, text).savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return path.read_text()
