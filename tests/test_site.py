"""The documentation site: a page for every architecture, tables that are the layers' own, blocks that run."""

import dataclasses
import html.parser
import importlib
import inspect
import itertools
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import timing
from experiments.site import architectures, drawing, influence, layout, pages, reference, tables
from experiments.tokenizer import ByteTokenizer
from zoo import lm, registry, trunk

ROOT = pathlib.Path(__file__).parent.parent
MODULES = architectures.modules()
SITE = architectures.FOLDER.parent
# Of a module without a page one test speaks, and no other.
WITH_PAGE = [module for module in MODULES if (architectures.FOLDER / f"{module}.toml").exists()]
TINY = lm.Config(vocab_size=257, width=16, depth=1, pattern=("gla",))


def about(module):
    return architectures.read(architectures.FOLDER / f"{module}.toml")


def test_every_module_has_its_page_and_every_page_its_module():
    assert list(architectures.load()) == list(MODULES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "gru.toml").unlink(), "layers/gru.py has no page"),
        (lambda folder: (folder / "gro.toml").write_text("x"), "gro.toml is about no module"),
        (lambda folder: (folder / "gru.toml").write_text("x"), "gru.toml: "),
        (lambda folder: (folder / "gru.toml").write_text('name = "GRU"'), "gru.toml: .*`use`"),
        (lambda folder: replace(folder / "gru.toml", "use =", "uses ="), "gru.toml: .*`uses`"),
        (lambda folder: replace(folder / "gru.toml", "year = 2014", 'year = "2014"'), r"gru.toml: .*year"),
    ],
)
def test_what_is_missing_or_unknown_is_named_in_one_line(tmp_path, change, message):
    folder = shutil.copytree(architectures.FOLDER, tmp_path / "architectures")
    change(folder)
    with pytest.raises(ValueError, match=message) as found:
        architectures.load(folder)
    assert "\n" not in str(found.value)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_drawings_say_what_stands_where():
    graph = layout.parse("x > W_in > (scan) > [*] > y\nW_in > silu > [*]\nx > [*] > (scan)#2\n")
    kinds = {name: (node.label, node.kind, node.column, node.lane) for name, node in graph.nodes.items()}
    assert kinds["x"] == ("x", "end", 0, 0)
    assert kinds["(scan)"] == ("scan", "memory", 2, 0)
    assert kinds["[*]"] == ("*", "operator", 3, 0)
    assert kinds["silu"] == ("silu", "box", 2, 1)
    assert kinds["(scan)#2"] == ("scan", "memory", 4, 2)
    assert ("W_in", "silu") in graph.edges
    assert len(graph.edges) == 8


@pytest.mark.parametrize("text", ["x", "x > > y", "x > a > b > a > y"])
def test_drawings_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"drawing"):
        layout.parse(text)


def apart(one, other):
    return abs(one.x - other.x) > one.half + other.half or abs(one.y - other.y) > one.tall + other.tall


@pytest.mark.parametrize("module", WITH_PAGE)
def test_nothing_overlaps_in_a_drawing(module):
    """Boxes stand apart, wide enough for their texts; arrows run where no box is."""
    graph = layout.parse(about(module).drawing)
    boxes, width, height = drawing.place(graph)
    for (name, one), (_, other) in itertools.combinations(boxes.items(), 2):
        assert apart(one, other), name
    for name, box in boxes.items():
        lines = drawing.lines_of(graph.nodes[name].label)
        assert graph.nodes[name].kind == "operator" or 2 * box.half > max(map(drawing.width_of, lines))
        assert box.half <= box.x + 1e-9 and box.x + box.half <= width + 1e-9 and 0 <= box.y <= height
    taken = {(node.column, node.lane) for node in graph.nodes.values()}
    for one, other in ((graph.nodes[start], graph.nodes[end]) for start, end in graph.edges):
        lane = layout.lane_of_way(graph, one, other)
        assert not {(column, lane) for column in range(one.column + 1, other.column)} & taken


def test_the_picture_shows_the_past_alone_and_a_window_as_one(float32):
    slopes = influence.matrix("base_conv")  # three taps
    t, s = np.indices(slopes.shape)
    assert ((slopes > 0) == ((s <= t) & (t - s < 3))).all()
    assert np.allclose(slopes, influence.matrix("base_conv"))


def rows_of(table):
    """Cells; a bar between backticks parts none."""
    lines = [line.strip("|") for line in table.strip().splitlines()[2:]]
    return [[cell.strip() for cell in re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line)] for line in lines]


def number(cell):
    return int(cell.replace(",", ""))


@pytest.mark.parametrize("module", MODULES)
def test_tables_are_the_layers_own(module, float32):
    names = MODULES[module]
    costs, state = rows_of(tables.costs(names)), rows_of(tables.state(names))
    for name, row in zip(names, costs, strict=True):
        cfg = registry.config(name, tables.WIDTH)
        layer = registry.module(cfg)
        assert row[0] == f"`{name}`"
        assert number(row[1]) == trunk.count(layer.init, cfg)
        assert number(row[2]) == cfg.state_bytes()
        assert number(row[3]) == cfg.flops_per_token(1024)
        leaves = [leaf for leaf in state if len(names) == 1 or leaf[0] == f"`{name}`"]
        assert sum(number(leaf[-1]) for leaf in leaves) == cfg.state_bytes()
        assert len(leaves) == len(jax.tree.leaves(jax.eval_shape(lambda c=cfg, m=layer: m.init_state(c, 1))))


@pytest.mark.parametrize("module", MODULES)
def test_settings_are_the_fields_of_the_config(module):
    layer = importlib.import_module(f"layers.{module}")
    rows = rows_of(tables.settings(layer))
    fields = {field.name: field for field in dataclasses.fields(layer.Config)}
    assert [row[0].strip("`") for row in rows] == list(fields)
    assert rows[0][:3] == ["`width`", "`int`", "required"]
    for row in rows[1:]:
        assert eval(row[2].strip("`"), vars(layer)) == fields[row[0].strip("`")].default


def test_measurements_come_with_where_they_were_made():
    found = tables.measured(["mamba"])
    kept = [row for row in timing.kept(tables.MEASURED, [])[0] if row["layer"] == "mamba"]
    assert len(rows_of(found.partition("|")[1] + found.partition("|")[2])) == len(kept) > 0
    assert re.search(r"width 128.* \d{4}-\d\d-\d\d\.", found.splitlines()[0])
    assert tables.measured(["nothing"]) == ""


def test_every_public_module_of_the_reference_exists():
    for _, _, modules in reference.PAGES.values():
        for module in modules:
            importlib.import_module(module)


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


WRITTEN = [path.stem for path in sorted((SITE / "pages").glob("*.md")) if blocks(path.read_text())]


def text_of(name):
    """Of a page what may hold blocks: written by hand, of an architecture, or the README."""
    if name == "README":
        return (ROOT / "README.md").read_text()
    if name in WRITTEN:
        return pages.written(SITE / "pages" / f"{name}.md")
    return about(name).use + pages.recurrence(name) + pages.blocks(name, MODULES[name])


def for_generation(names):
    """A model to write with, in place of one that was trained."""
    names |= {"cfg": TINY, "params": lm.init(jax.random.key(0), TINY), "tokenizer": ByteTokenizer()}


def for_weights(names):
    """Weights in a folder: small random ones in the format of published ones."""
    shutil.copytree(ROOT / "tests" / "oracles" / "fixtures" / "pretrained_mamba", "folder")
    names |= {"jnp": jax.numpy, "tokens": jax.numpy.zeros((1, 4), int)}


def compiled(text, monkeypatch):
    """The layers that `text` imports and models as programs: op by op they take several times as long."""
    names = set(re.findall(r"from layers import (\w+)", text))
    for module in [*(importlib.import_module(f"layers.{name}") for name in names), lm]:
        for function in (module.init, module.apply, module.step):
            flags = {"implementation", "dtype"} & set(inspect.signature(function).parameters)
            program = jax.jit(function, static_argnums=1, static_argnames=tuple(flags))
            monkeypatch.setattr(module, function.__name__, program)


# What the text around a block of the README takes for granted.
GIVEN = {"zoo.generate(": for_generation, 'load_pretrained("folder"': for_weights}


# Those of architectures come from one template: a few at every round of work, others with `make test-deep`.
FIRST = ("README", *WRITTEN, "mamba", "gated_linear_attention", "miras")
OTHERS = [pytest.param(module, marks=pytest.mark.deep) for module in WITH_PAGE if module not in FIRST]


@pytest.mark.parametrize("name", [*FIRST, *OTHERS])
def test_blocks_run_in_order(name, tmp_path, monkeypatch, float32):
    """Those of a page share their names, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    text = text_of(name)
    compiled(text, monkeypatch)
    names = {"__name__": "page"}
    assert blocks(text)
    for block in blocks(text):
        for sign, give in GIVEN.items() if name == "README" else ():
            if sign in block:
                give(names)
        exec(compile(block, name, "exec"), names)


class Loads(html.parser.HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "link" and "canonical" not in (given.get("rel") or ""):
            self.found.append(given.get("href"))
        self.found.append(given.get("src"))


@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_the_site_is_built_strictly_and_asks_nothing_of_the_net(tmp_path):
    pytest.importorskip("mkdocs")
    folder = tmp_path / "site"
    command = [sys.executable, "-m", "experiments.site", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in folder.glob("architectures/*.html")} == {"index", *MODULES}
    for path in folder.rglob("*.html"):
        outside = [found for found in Loads(path.read_text()).found if re.match(r"(https?:)?//", found or "")]
        assert not outside, (path, outside)
    for path in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import )\W?(https?:)?//", path.read_text()), path
