"""Matplotlib figures as parts of a page: text stays text, colours follow the scheme, points can be read."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from experiments.reports.colours import DARK, LIGHT, adapted

POINTS_OF_A_LINE = 60  # that can be read, where no marks are given
WIDE = 7.0  # inches: wider figures get the whole width of the page


@dataclass(frozen=True)
class Mark:
    """A point of a drawing, in the coordinates of its axes, and what it says; `series` as in its gids."""

    axes: Axes
    x: float
    y: float
    text: str
    series: int | None = None


@dataclass(frozen=True)
class Key:
    """An entry of a legend: label, colour, marker and dashes (as matplotlib names them; "" for none)."""

    label: str
    colour: str
    marker: str = ""
    dashes: Any = ""


class Pictures:
    """The figures of one page: ids that no two of them share, and one table of colours."""

    def __init__(self) -> None:
        self._count = 0
        self._colours: dict[str, str] = {}

    def add(
        self,
        drawing: Figure,
        title: str,
        description: str,
        marks: Sequence[Mark] | None = None,
        keys: Sequence[Key] = (),
    ) -> dict:
        """`id`, `svg`, `keys` and the width of the figure in points, for the template."""
        self._count += 1
        name = f"figure-{self._count}"
        root = _parsed(drawing)
        _rename(root, f"f{self._count}-")
        for element in root.iter():
            self._repaint(element)
        _describe(root, name, title, description)
        root.append(_targets(drawing, list(_found(drawing)) if marks is None else marks))
        width, _ = drawing.get_size_inches()
        return {
            "id": name,
            "svg": Markup(ElementTree.tostring(root, encoding="unicode")),
            "keys": [(key.label, Markup(self._sample(key))) for key in keys],
            "width": round(width * 72),
            "wide": width > WIDE,
        }

    def css(self) -> str:
        """Both schemes of every colour in use; on paper it is the light one."""
        schemes = [
            "".join(f"{name}:{adapted(colour, *scheme)};" for colour, name in self._colours.items())
            for scheme in (LIGHT, DARK)
        ]
        return f":root{{{schemes[0]}}}@media screen and (prefers-color-scheme:dark){{:root{{{schemes[1]}}}}}"

    def _repaint(self, element: ElementTree.Element) -> None:
        """Colours become variables, in styles and where an attribute names them."""
        styles = [element.attrib.pop("style", "")]
        for name in ("fill", "stroke"):
            if element.get(name, "").startswith("#"):
                styles.append(f"{name}: {element.attrib.pop(name)}")
        style = "; ".join(filter(None, styles))
        if style:
            element.set("style", re.sub(r"#[0-9a-fA-F]{6}\b", lambda m: self._variable(m[0]), style))

    def _variable(self, colour: str) -> str:
        return f"var({self._colours.setdefault(colour.lower(), f'--c{len(self._colours)}')})"

    def _sample(self, key: Key) -> str:
        """A bit of line with a marker."""
        paint = self._variable(key.colour)
        parts = []
        if key.dashes != "":
            gaps = "none" if isinstance(key.dashes, str) else " ".join(f"{2 * d:g}" for d in key.dashes[1])
            stroke = f"stroke:{paint};stroke-width:2;stroke-dasharray:{gaps}"
            parts.append(f'<path d="M1 7H27" style="{stroke}"/>')
        if key.marker:
            parts.append(f'<path d="{_marker(key.marker)}" style="fill:{paint}"/>')
        return f'<svg viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{"".join(parts)}</svg>'


def _parsed(drawing: Figure) -> ElementTree.Element:
    """What matplotlib draws, without namespaces, metadata and styles that would reach the whole page."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        # The reader's browser has other fonts than this machine.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawing.savefig(stream, format="svg", metadata=nothing)
    root = ElementTree.fromstring(_legal(stream.getvalue()))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
        parent.tag = parent.tag.rpartition("}")[2]
        parent.attrib = {name.rpartition("}")[2]: _short(name, text) for name, text in parent.attrib.items()}
        # Matplotlib's indentation; what is written stands in `text` and `tspan`.
        parent.tail = None
        if parent.tag not in ("text", "tspan"):
            parent.text = None
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return root


def _legal(xml: str) -> str:
    """Without the characters that XML has no place for, which matplotlib lets pass."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", xml)


def _short(name: str, text: str) -> str:
    """Hundredths of a point are enough; the page has its own fonts (but formulas are set in matplotlib's)."""
    if name == "style":
        return re.sub(r"(font-family: |font: [\d.]+px )'DejaVu Sans', [^;]*", r"\1inherit", text)
    if name in ("d", "x", "y", "points", "width", "height"):
        return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), text).replace(
            "\n", ""
        )
    return text


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """New ids, kept where something refers to them; gids "series-3-..." become `data-series`."""
    names: dict[str, str] = {}
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old is None:
            continue
        series = re.match(r"series-(\d+)-", old)
        if series:
            element.set("data-series", series[1])
        names[old] = f"{prefix}{len(names)}"
        if element.tag != "g":
            element.set("id", names[old])
    for element in root.iter():
        for name, text in element.attrib.items():
            if name == "href" and text.startswith("#"):
                element.set(name, f"#{names[text[1:]]}")
            elif "url(#" in text:
                element.set(name, re.sub(r"url\(#([^)]*)\)", lambda m: f"url(#{names[m[1]]})", text))


def _describe(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    """Alternative text, in the two elements that SVG has for it."""
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = _legal(text)
        root.insert(place, element)


def _targets(drawing: Figure, marks: Sequence[Mark]) -> ElementTree.Element:
    """A see-through circle with a tooltip over every mark that is in sight."""
    group = ElementTree.Element("g", {"class": "targets"})
    _, height = drawing.get_size_inches()
    for mark in marks:
        # Laid out by the drawing that went before, so that both agree to the last digit.
        place = np.asarray(mark.axes.transData.transform((mark.x, mark.y)))
        if not np.isfinite(place).all() or not _in_sight(mark.axes, place):
            continue
        x, y = place * 72 / drawing.dpi
        circle = ElementTree.SubElement(group, "circle", cx=f"{x:.1f}", cy=f"{72 * height - y:.1f}", r="5")
        if mark.series is not None:
            circle.set("data-series", str(mark.series))
        ElementTree.SubElement(circle, "title").text = _legal(mark.text)
    return group


def _in_sight(axes: Axes, place: np.ndarray) -> bool:
    box = axes.bbox
    return bool(box.x0 - 1 <= place[0] <= box.x1 + 1 and box.y0 - 1 <= place[1] <= box.y1 + 1)


def _found(drawing: Figure) -> Iterator[Mark]:
    """Marks of a drawing that came without: points of lines and scatters, ends of bars."""
    for axes in drawing.axes:
        for line in axes.lines:
            if line.get_visible() and line.get_transform() == axes.transData:
                points = np.asarray(line.get_xydata(), float)
                chosen = (
                    np.linspace(0, len(points) - 1, min(len(points), POINTS_OF_A_LINE)).round().astype(int)
                )
                yield from _points(axes, line.get_label(), points[chosen])
        for collection in axes.collections:
            if isinstance(collection, PathCollection) and collection.get_offset_transform() == axes.transData:
                yield from _points(axes, collection.get_label(), np.asarray(collection.get_offsets(), float))
        for container in axes.containers:
            if isinstance(container, BarContainer):
                yield from _bars(axes, container)


def _points(axes: Axes, label: object, points: np.ndarray) -> Iterator[Mark]:
    for x, y in points:
        yield Mark(axes, float(x), float(y), _says(axes, label, x, y))


def _bars(axes: Axes, bars: BarContainer) -> Iterator[Mark]:
    for bar in bars.patches:
        x, y, width, height = bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()
        along = (
            (x + width, y + height / 2) if bars.orientation == "horizontal" else (x + width / 2, y + height)
        )
        yield Mark(axes, *along, _says(axes, bars.get_label(), *along))


def _says(axes: Axes, label: object, x: float, y: float) -> str:
    """Label, x and y with the names of their axes; formulas without their marks."""
    words = [] if label is None or str(label).startswith("_") else [str(label)]
    words += [
        f"{axis or letter} {v:.4g}"
        for letter, axis, v in (("x", axes.get_xlabel(), x), ("y", axes.get_ylabel(), y))
    ]
    return re.sub(r"[${}\\]|\\mathdefault", "", ", ".join(words))


def _marker(name: str) -> str:
    """The outline of one of matplotlib's markers, 9 wide, in the middle of a sample."""
    style = MarkerStyle(name)
    path = style.get_path().transformed(style.get_transform())
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    pieces = []
    for points, code in path.iter_segments(simplify=False):
        numbers = [f"{14 + 9 * x:.1f} {7 - 9 * y:.1f}" for x, y in np.reshape(points, (-1, 2))]
        pieces.append(letters[int(code)] + (" ".join(numbers) if code != 79 else ""))
    return "".join(pieces)
