"""Reports: one HTML file that holds all it shows, asks nobody for anything and runs no script but its own.

    write(path, "Recall at equal parameters", [
        Section("Result", [Facts([("best", "attention", "0.997")]), Table(("model", "accuracy"), rows)]),
        Section("Curves", [figures.loss_curves(curves)]),
    ])

A section is a heading over parts: `Prose` (or plain text), `Facts`, `Table`, `Figure`, `Details`. What is
given as text is shown as text, whatever it contains. What a page may load is settled by its Content-Security-
Policy: inline styles, `data:` pictures, and the one script whose hash it names.
"""

import base64
import dataclasses
import datetime
import hashlib
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from experiments.reports import svg
from experiments.reports.numbers import amount as amount
from experiments.reports.numbers import formatted, number, plus_minus, spread
from layers.checks import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

NOTHING = "–"  # stands in a table where there is no value
LIBRARIES = ("recurrent-zoo", "jax", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Prose:
    """Paragraphs, parted by empty lines; lines that all begin with "- " are a list; `code` and **bold**."""

    text: str


@dataclass(frozen=True)
class Facts:
    """A strip of key facts: (what, its value, a remark or "")."""

    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Column:
    """Heading of a column, the format of its numbers, what it means, and whether "max" or "min" is best.

    The best value is set in bold, and the first click on the heading sorts by it.
    """

    heading: str
    form: str | Callable[[Any], str] = ""
    note: str = ""
    best: str = ""

    def __post_init__(self):
        require(self.best in ("", "max", "min"), f"column {self.heading!r}: best is 'max' or 'min'")

    def text(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return NOTHING
        if not _is_number(value):
            return str(value)
        return formatted(self.form or number, value)


@dataclass(frozen=True)
class Cell:
    """Text in a table that is sorted, and compared with the others of its column, by `value`."""

    text: str
    value: float


@dataclass(frozen=True)
class Table:
    """Columns (or their headings), and rows of text, numbers, `Cell`s, or None where there is nothing.

    Raises ValueError for a row of another length than the head.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    sortable: bool = True

    def __post_init__(self):
        for row in self.rows:
            short = f"a row of {len(row)} cells under {len(self.columns)} headings: {row!r}"
            require(len(row) == len(self.columns), short)


@dataclass(frozen=True)
class Details:
    """Folded away under `summary`: text as it stands, such as a config or a command, or a table."""

    summary: str
    content: str | Table


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, its heading, and in `description` what a reader who cannot see it should know.

    marks: points that can be read; None: every point, marker and bar of the drawing.
    keys: the legend, in the order of the drawing's series (gids "series-0-...", "series-1-...", ...).
    data: the values, folded away below the figure.
    """

    drawing: "Drawing"
    title: str
    description: str
    marks: Sequence[svg.Mark] | None = None
    keys: Sequence[svg.Key] = ()
    data: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading over parts; plain text is prose."""

    heading: str
    parts: Sequence[Prose | Facts | Table | Figure | Details | str]


def write(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    made: Mapping[str, str] | None = None,
) -> Path:
    """Write the report to `path`, whole or not at all; returns the path.

    lead: prose below the title. made: what the footer says of its making (default `provenance()`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # A label may hold half of a surrogate pair (an undecodable file name), which UTF-8 has no bytes for.
    unfinished.write_bytes(render(title, sections, lead=lead, made=made).encode("utf-8", "replace"))
    os.replace(unfinished, path)
    return path


def render(
    title: str, sections: Sequence[Section], *, lead: str = "", made: Mapping[str, str] | None = None
) -> str:
    """The page that `write` writes."""
    pictures = svg.Pictures()
    shown = [
        {
            "id": f"section-{i}",
            "heading": section.heading,
            "parts": [_shown(p, pictures) for p in section.parts],
        }
        for i, section in enumerate(sections, 1)
    ]
    script = _asset("report.js")
    return _environment().get_template("report.html").render(
        title=title,
        lead=_paragraphs(lead),
        sections=shown,
        made=provenance() if made is None else made,
        colours=Markup(pictures.css()),
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def provenance(device: str | None = None) -> dict[str, str]:
    """Device (default: that of jax, and this machine's number of cores), versions and date."""
    if device is None:
        import jax

        kind = jax.devices()[0].device_kind
        device = f"{kind}, {os.cpu_count()} cores" if kind == "cpu" else kind
    versions = [f"{name} {_version(name)}" for name in LIBRARIES]
    versions.append(f"Python {platform.python_version()}")
    return {"device": device, "versions": ", ".join(versions), "date": str(datetime.date.today())}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def measured(values: Iterable[float | None], form: str | Callable[[float], str] | None = None) -> Cell | None:
    """A cell with mean ± standard deviation over seeds, sorted by the mean; None without a finite value."""
    mean, deviation, count = spread(values)
    return Cell(plus_minus(mean, deviation, form), mean) if count else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def _asset(name: str) -> str:
    return (resources.files("experiments.reports") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("experiments.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(part: Any, pictures: svg.Pictures) -> dict:
    """What the template shows of a part."""
    match part:
        case str() | Prose():
            return {"kind": "prose", "blocks": _paragraphs(part if isinstance(part, str) else part.text)}
        case Facts():
            return {"kind": "facts", "facts": part.facts}
        case Table():
            return {"kind": "table", "table": _table(part)}
        case Details():
            folded = _table(part.content) if isinstance(part.content, Table) else None
            return {"kind": "details", "summary": part.summary, "text": part.content, "table": folded}
        case Figure():
            picture = pictures.add(part.drawing, part.title, part.description, part.marks, part.keys)
            return {"kind": "figure", "figure": part, "data": part.data and _table(part.data), **picture}
    raise ValueError(f"not a part of a report: {type(part).__name__}")


def _table(table: Table) -> dict:
    """Columns with their alignment; rows of (text, key to sort by or None, whether the best)."""
    columns = [c if isinstance(c, Column) else Column(c) for c in table.columns]
    rows = [[_cell(v, c) for v, c in zip(row, columns, strict=True)] for row in table.rows]
    heads = []
    for i, column in enumerate(columns):
        keys = [key for _, key, _ in (row[i] for row in rows) if key is not None]
        words = any(row[i][1] is None and row[i][0] != NOTHING for row in rows)
        heads.append({**dataclasses.asdict(column), "numeric": bool(keys) and not words})
        if column.best and keys and not words and len(rows) > 1:
            best = max(keys) if column.best == "max" else min(keys)
            for row in rows:
                row[i] = (*row[i][:2], row[i][1] == best)
    return {"columns": heads, "rows": rows, "caption": table.caption, "sortable": table.sortable}


def _cell(value: Any, column: Column) -> tuple[str, float | None, bool]:
    if isinstance(value, Cell):
        return value.text, value.value, False
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    text = column.text(value)
    return text, value if _is_number(value) and text != NOTHING else None, False


def _paragraphs(text: str) -> list[tuple[str, list[Markup]]]:
    """("p", [paragraph]) and ("ul", items)."""
    blocks: list[tuple[str, list[Markup]]] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines and all(line.startswith("- ") for line in lines):
            blocks.append(("ul", [_inline(line[2:]) for line in lines]))
        elif lines:
            blocks.append(("p", [_inline(" ".join(lines))]))
    return blocks


def _inline(text: str) -> Markup:
    """`code` and **bold**; stars within code are stars."""
    pieces = []
    for i, piece in enumerate(re.split(r"`([^`]+)`", text)):
        safe = str(escape(piece))
        bold = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", safe)
        pieces.append(f"<code>{safe}</code>" if i % 2 else bold)
    return Markup("".join(pieces))
