"""Tables that a layer answers for itself: what it costs, what it keeps, how it is set."""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from experiments import timing
from zoo import registry, trunk

WIDTH = 256
LENGTHS = (1024, 65_536)
MEASURED = Path(__file__).parent.parent / "results" / "layers"
COLUMNS = {
    "forward_ms": "forward, ms",
    "forward_backward_ms": "forward + backward, ms",
    "us_per_token": "µs per token",
    "temporary_MB": "temporary MB",
    "decode_us": "µs per decoded token",
}


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def plain(text: str) -> str:
    """Text in which nothing is markup, but for what stands between backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([|*_<\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def flops_per_token(cfg: Any, length: int) -> int:
    """At a length that the layer then takes as a whole."""
    if hasattr(cfg, "max_length"):
        cfg = dataclasses.replace(cfg, max_length=max(cfg.max_length, length))
    return cfg.flops_per_token(length)


def costs(names: list[str]) -> str:
    """Parameters, bytes of state and FLOPs per token of each name."""
    rows = []
    for name in names:
        cfg = registry.config(name, WIDTH)
        numbers = [trunk.count(registry.module(cfg).init, cfg), cfg.state_bytes()]
        numbers += [flops_per_token(cfg, length) for length in LENGTHS]
        rows.append([code(name), *(f"{number:,}" for number in numbers)])
    lengths = [f"FLOPs per token, T = {length:,}" for length in LENGTHS]
    return markdown(["name", "parameters", "state, bytes", *lengths], rows)


def measured(names: list[str]) -> str:
    """What `bench layers` wrote down of these names, under the notes that tell where; or nothing."""
    rows, notes = timing.kept(MEASURED, [])
    found = [row for row in rows if row["layer"] in names]
    if not found:
        return ""
    said = dict.fromkeys(_note(row["layer"], notes) for row in found)
    cells = [
        [code(row["layer"]), f"{row['T']:,}", *(timing.cell(row[key]) for key in COLUMNS)] for row in found
    ]
    return "\n".join(["\n\n".join(said), "", markdown(["name", "T", *COLUMNS.values()], cells)])


def _note(name: str, notes: list[str]) -> str:
    """The last of the notes of runs that measured `name`, without the names that it lists."""
    of_name = [note for note in notes if name in _listed(note, name)]
    return re.sub(r" --add| --layers [^\s`]+", "", of_name[-1])


def _listed(note: str, default: str) -> list[str]:
    found = re.search(r"--layers (\S+?)[ `]", note)
    return found[1].split(",") if found else [default]


def comments(cls: type) -> dict[str, str]:
    """What the source says beside each field of a class, or on lines of their own above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    notes, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = token.string.removeprefix("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for node in _fields(cls):
        above: list[str] = []
        first = node.lineno
        while first - 1 in alone:
            first -= 1
            above.insert(0, notes[first])
        found[ast.unparse(node.target)] = notes.get(node.end_lineno or node.lineno, " ".join(above))
    return found


def _fields(cls: type) -> list[ast.AnnAssign]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return [line for line in node.body if isinstance(line, ast.AnnAssign)]


def _default(value: ast.expr | None) -> str:
    """As in the source, of `later(x)` the x."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "later":
        value = value.args[0]
    return "" if value is None else ast.unparse(value)


def settings(layer: ModuleType) -> str:
    """The fields of the layer's Config."""
    notes = comments(layer.Config)
    rows = []
    for field in _fields(layer.Config):
        name = ast.unparse(field.target)
        kind, default = ast.unparse(field.annotation), _default(field.value)
        rows.append([code(name), code(kind), code(default) or "required", plain(notes[name])])
    return markdown(["field", "type", "default", "meaning"], rows)


def _symbols(state: Any, path: tuple) -> str:
    """The comment beside the innermost field on the way to a leaf."""
    found = ""
    for key in path:
        if name := getattr(key, "name", None):
            found = comments(type(state)).get(name, found) if dataclasses.is_dataclass(state) else found
            state = getattr(state, name)
        else:
            state = state[key.idx if hasattr(key, "idx") else key.key]
    return found


def state(names: list[str]) -> str:
    """The leaves of each name's state for one sequence."""
    rows = []
    for name in names:
        cfg = registry.config(name, WIDTH)
        empty = jax.eval_shape(lambda cfg=cfg: registry.module(cfg).init_state(cfg, 1))
        for path, leaf in jax.tree_util.tree_flatten_with_path(empty)[0]:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            shape = "[" + ", ".join(map(str, leaf.shape)) + "]"
            size = f"{leaf.size * leaf.dtype.itemsize:,}"
            what = plain(_symbols(empty, path))
            rows.append([code(name), code(where), what, code(shape), str(leaf.dtype), size])
    heads = ["name", "leaf", "what it is", f"at width {WIDTH}", "dtype", "bytes"]
    # One name need not be said in every row.
    first = int(len(names) == 1)
    return markdown(heads[first:], [row[first:] for row in rows])
