"""Data flow drawn with matplotlib: boxes, memories, operators and arrows, in points."""

import re
from functools import cache
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from experiments.site.layout import Graph, Node, lane_of_way

FONT = 11.0
LINE = 13.0  # between two lines of a label
PITCH = 58.0  # between lanes
GAP = 25.0  # between columns, for the arrows
HEAD = 6.0  # of an arrow, which arrives level
PADDING = 6.0
RADIUS = 10.5  # of an operator
LONG = 9  # characters of a label that is put on two lines
INK, ARROWS = "#1b1f24", "#5b6673"
# Fill and edge.
COLOURS = {
    "box": ("#eaf1fb", "#1260c0"),
    "memory": ("#fdeadb", "#df670d"),
    "operator": ("#ffffff", "#5b6673"),
}
SIGNS = {"*": "×", "-": "−"}


def lines_of(label: str) -> list[str]:
    """A long label on two lines, cut at the space nearest to its middle."""
    spaces = [found.start() for found in re.finditer(" ", label)]
    if len(label) <= LONG or not spaces:
        return [label]
    cut = min(spaces, key=lambda place: abs(place - len(label) / 2))
    return [label[:cut], label[cut + 1 :]]


def typeset(text: str) -> str:
    """`W_in` with a subscript, a dollar as itself."""

    def lowered(found: re.Match) -> str:
        below = found[2].replace("_", r"\ ")
        return rf"{found[1]}$_{{\mathregular{{{below}}}}}$"

    return re.sub(r"([^\W_])_(\w+(?:,\w+)*)", lowered, text.replace("$", r"\$"))


@cache
def width_of(text: str) -> float:
    return float(TextPath((0, 0), typeset(text), size=FONT).get_extents().width)


class Box(NamedTuple):
    """Where a node stands: its middle and half its width and height."""

    x: float
    y: float
    half: float
    tall: float


def _size(node: Node) -> tuple[float, float]:
    lines = lines_of(node.label)
    if node.kind == "operator":
        return 2 * RADIUS, 2 * RADIUS
    padding = 3.0 if node.kind == "end" else 2 * PADDING
    return max(map(width_of, lines)) + padding, LINE * len(lines) + 11


def place(graph: Graph) -> tuple[dict[str, Box], float, float]:
    """Where all nodes stand, and width and height of the whole."""
    sizes = {name: _size(node) for name, node in graph.nodes.items()}
    widths = [0.0] * (1 + max(node.column for node in graph.nodes.values()))
    for name, node in graph.nodes.items():
        widths[node.column] = max(widths[node.column], sizes[name][0])
    middles = [sum(widths[:i]) + GAP * i + widths[i] / 2 for i in range(len(widths))]
    bottom = max(node.lane for node in graph.nodes.values())
    boxes = {
        name: Box(middles[node.column], PITCH * (bottom - node.lane), sizes[name][0] / 2, sizes[name][1] / 2)
        for name, node in graph.nodes.items()
    }
    return boxes, sum(widths) + GAP * (len(widths) - 1), PITCH * bottom


def _arrow(axes: Axes, curve: Curve) -> None:
    style = "-|>,head_length=4,head_width=2.2"
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=style, color=ARROWS, linewidth=1.2, zorder=1))


def _swing(x: float, y: float, to_x: float, to_y: float) -> list[tuple[float, float]]:
    """Control points of a curve that leaves and arrives level."""
    middle = (x + to_x) / 2
    return [(middle, y), (middle, to_y), (to_x, to_y)]


def _edge(axes: Axes, start: Box, end: Box, way: list[tuple[float, float]]) -> None:
    """From box to box through the points of a way, between which it swings."""
    points = [(start.x + start.half, start.y)]
    for point in [*way, (end.x - end.half, end.y)]:
        points += _swing(*points[-1], *point)
    _arrow(axes, Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1)))


def _loop(axes: Axes, box: Box) -> None:
    """The arrow from a memory to itself, above it."""
    side, top = min(box.half * 0.55, 16.0), box.y + box.tall
    points = [
        (box.x + side, top),
        (box.x + side + 6, top + 17),
        (box.x - side - 6, top + 17),
        (box.x - side, top),
    ]
    _arrow(axes, Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * 3))


def _shape(axes: Axes, node: Node, box: Box) -> None:
    fill, edge = COLOURS[node.kind]
    look: dict[str, Any] = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.3, "zorder": 2}
    if node.kind == "operator":
        axes.add_patch(Circle((box.x, box.y), RADIUS, **look))
        return
    corner, rounded = (box.x - box.half, box.y - box.tall), "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch(corner, 2 * box.half, 2 * box.tall, boxstyle=rounded, **look))


def _node(axes: Axes, node: Node, box: Box) -> None:
    if node.kind != "end":
        _shape(axes, node, box)
    lines = lines_of(SIGNS.get(node.label, node.label))
    middle: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    for i, line in enumerate(lines):
        height = box.y + LINE * ((len(lines) - 1) / 2 - i)
        axes.text(box.x, height, typeset(line), fontsize=FONT, color=INK, zorder=3, **middle)


def _edges_of(graph: Graph, boxes: dict[str, Box]) -> tuple[dict[int, float], dict[int, float]]:
    """Where every column begins and ends."""
    left: dict[int, float] = {}
    right: dict[int, float] = {}
    for name, node in graph.nodes.items():
        box, column = boxes[name], node.column
        left[column] = min(left.get(column, box.x), box.x - box.half)
        right[column] = max(right.get(column, box.x), box.x + box.half)
    return left, right


def draw(axes: Axes, graph: Graph) -> None:
    """The drawing, in the units of `place`. Arrows change their height in the gaps between columns only."""
    boxes, _, height = place(graph)
    left, right = _edges_of(graph, boxes)
    for start, end in graph.edges:
        one, other = graph.nodes[start], graph.nodes[end]
        out, into = right[one.column], left[other.column] - HEAD
        way = [(out, boxes[start].y)]
        if other.column > one.column + 1:
            y = height - PITCH * lane_of_way(graph, one, other)
            way += [(out + GAP - HEAD, y), (into + HEAD - GAP, y)]
        _edge(axes, boxes[start], boxes[end], [*way, (into, boxes[end].y)])
    for name, node in graph.nodes.items():
        _node(axes, node, boxes[name])
        if node.kind == "memory":
            _loop(axes, boxes[name])
