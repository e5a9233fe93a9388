"""Reports: what is in the file, and how headless Chromium shows it."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import browser
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure as Drawing
from PIL import Image

from experiments.reports import axes as report_axes
from experiments.reports import colours as report_colours
from experiments.reports import figures as report_figures
from experiments.reports import numbers as report_numbers
from experiments.reports import page as report
from experiments.reports.page import Cell, Column, Details, Facts, Figure, Prose, Section, Table

HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror=bad()> \"'&$a_{$ \x07"
LONG = "a_name_without_end" * 5
SEEN = HOSTILE.replace("\x07", "\ufffd")
MADE = {"device": "abacus", "date": "2026-11-22"}


class Page(html.parser.HTMLParser):
    """What a browser would read: elements with their attributes, and all text by element."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags):
        return "".join(data for tag, data in self.texts if not tags or tag in tags)


def drawing(**save):
    """One that knows nothing of reports: two panels, a log axis, a scatter, bars, formulas."""
    figure = Drawing(figsize=(8, 3), layout="constrained", **save)
    left, right = figure.subplots(1, 2)
    left.loglog([10, 100, 1000], [3.0, 2.0, 1.5], "o-", label="law")
    left.axhline(1.0, color="grey")
    left.scatter([20, 200], [1.7, 2.9], label="runs")
    left.set(xlabel="parameters $N$", ylabel="loss", title="isoFLOP")
    left.legend()
    right.bar(["a", "b"], [4.0, 7.0])
    right.set_ylabel("count")
    return figure


def comparison(labels, seeds=3, steps=600):
    """Figures of a comparison, all of them."""
    draw = np.random.default_rng(0).normal
    look = report_figures.styles(labels)
    order = dict(zip(labels, range(len(labels)), strict=True))
    at = np.arange(1, steps + 1).tolist()
    curves = {
        label: [
            (at, (i + 1 + 5 * np.exp(-np.array(at) / 150) + draw(0, 0.1, steps)).tolist())
            for _ in range(seeds)
        ]
        for label, i in order.items()
    }
    quality = {label: [0.97 - 0.08 * i + draw(0, 0.01) for _ in range(seeds)] for label, i in order.items()}
    states = {
        label: [(900 * 4.0**k * (1 + i), [q - 0.1 / (k + 1) for q in quality[label]]) for k in range(3)]
        for label, i in order.items()
    }
    lengths = {
        label: [(2**k, [q / (k - 5) for q in quality[label]]) for k in range(6, 12)] for label in labels
    }
    speed = {label: [1e5 / (1 + i) + draw(0, 900) for _ in range(seeds)] for label, i in order.items()}
    return [
        report_figures.loss_curves(curves, styles=look),
        report_figures.quality_against_state(states, chance=1 / 256, styles=look),
        report_figures.quality_against_length(lengths, trained=(64, 128), chance=1 / 256, styles=look),
        report_figures.bars(speed, title="Training", unit="tokens/s", best="max", styles=look),
        report_figures.bars(speed, title="Decoding", unit="tokens/s", best="max", log=True, styles=look),
    ]


LABELS = (
    "attention",
    "s4",
    "mamba",
    "gla",
    "mixture_of_memories",
    "titans",
    LONG,
    "kda",
    HOSTILE,
    "lstm",
)


def sections():
    rows = [
        (label, Cell(f"{0.5 + i / 50:.2f} ± 0.01", 0.5 + i / 50), 3000 - i, None if i == 3 else i / 7)
        for i, label in enumerate(LABELS)
    ]
    columns = (
        "model",
        Column("accuracy", best="max", note="on validation data"),
        "parameters",
        Column("loss", "{:.3f}", best="min"),
    )
    return [
        Section(
            "Result",
            [
                Facts([("best", "lstm", "0.68"), (HOSTILE, HOSTILE, ""), (LONG, LONG, LONG)]),
                Table(columns, rows, caption=HOSTILE),
            ],
        ),
        Section("Figures", [*comparison(LABELS), Figure(drawing(), HOSTILE, HOSTILE)]),
        Section(
            HOSTILE,
            [
                f"{HOSTILE} {LONG}",
                Prose(f"- {HOSTILE}\n- `{HOSTILE} {LONG}`\n- **{HOSTILE}**"),
                Details(f"{HOSTILE} {LONG}", HOSTILE * 9),
            ],
        ),
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A report of ten architectures whose every text would like to be markup."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    made = {**MADE, HOSTILE: HOSTILE, LONG: LONG}
    return report.write(path, f"{HOSTILE} {LONG}", sections(), lead=HOSTILE, made=made)


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_text_stays_text(page, path):
    assert len(page.of("script")) == 1
    assert not page.of("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.text("h1") and HOSTILE in page.text("h2") and HOSTILE in page.text("h3")
    for tag in ("title", "dt", "dd", "caption", "p", "li", "code", "strong", "summary", "pre", "th", "span"):
        assert HOSTILE.strip() in page.text(tag), tag
    # In drawings, whose text XML holds.
    assert SEEN in page.text("desc") and SEEN[:22] in page.text("text")


def test_nothing_comes_from_outside(page, path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|xmlns|url\((?!#)", text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith("#") or (tag, target) == ("link", "data:,")
    assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}


def test_policy_names_the_one_script(page):
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    digest = hashlib.sha256(page.text("script").encode()).digest()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{base64.b64encode(digest).decode()}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_ids_are_unique_and_found(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and not [name for name in ids if re.search(r"\s", name)]
    named = []
    for _, attributes in page.elements:
        named += re.findall(r"url\(#([^)]*)\)", " ".join(map(str, attributes.values())))
        named += attributes.get("aria-labelledby", "").split()
        named += [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
    assert len(named) > 100 and set(named) <= set(ids)


def test_drawings_have_alternatives_and_text(page):
    drawings = [a for a in page.of("svg") if a.get("role") == "img"]
    assert len(drawings) == 6
    assert all(a["aria-labelledby"].split() for a in drawings)
    for text in ("loss (nats)", "state of one sequence", "length (tokens)", "tokens/s", "isoFLOP", "chance"):
        assert text in page.text("text"), text


def test_size(path):
    assert path.stat().st_size < 500_000


def test_same_report_same_bytes():
    def render():
        return report.render(
            "t", [Section("s", [comparison("ab", 1, 9)[0], Figure(drawing(), "t", "d")])], made=MADE
        )

    assert render() == render()


def test_write_is_whole_or_not_at_all(tmp_path):
    path = report.write(tmp_path / "new" / "r.html", "first", [], made=MADE)
    first = path.read_bytes()
    with pytest.raises(ValueError, match="not a part of a report: int"):
        report.write(path, "second", [Section("s", [3])])
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == ["r.html"]
    report.write(path, "half of a pair: \ud800", [], made=MADE)
    assert "half of a pair: ?" in path.read_text(encoding="utf-8")


def test_footer_says_how_it_was_made():
    text = Page(report.render("t", [])).text("dd")
    assert "cpu" in text and re.search(r"jax \d", text) and re.search(r"recurrent-zoo \d", text)
    assert re.search(r"\d{4}-\d\d-\d\d", text)


def cells(table):
    page = report.render("t", [Section("s", [table])], made={})
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    return [
        re.findall(r"<t[dh]([^>]*)>([^<]*)</t[dh]>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
    ]  # fmt: skip


def test_tables_align_format_and_mark_the_best():
    columns = (
        "name",
        Column("loss", "{:.2f}", best="min"),
        Column("size", report_numbers.amount, best="max"),
        "either",
    )
    rows = [("a", np.float32(0.5), 35592, 1), ("b", math.nan, 10, "x"), ("c", 0.25, None, None)]
    found = cells(Table(columns, rows))
    assert [[text for _, text in row] for row in found] == [
        ["a", "0.50", "35.6 kB", "1"],
        ["b", "–", "10 B", "x"],
        ["c", "0.25", "–", "–"],
    ]
    assert ['class="n best"' in row[1][0] for row in found] == [False, False, True]
    assert ['class="n best"' in row[2][0] for row in found] == [True, False, False]
    assert all('class="n' in row[1][0] for row in found) and not any("class" in row[3][0] for row in found)
    assert 'data-value="0.5"' in found[0][1][0] and "data-value" not in found[1][1][0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Table(("a", "b"), [(1,)]), "a row of 1 cells under 2 headings"),
        (lambda: Column("loss", best="least"), "column 'loss': best is 'max' or 'min'"),
        (lambda: report_figures.bars({}, title="t", unit="s", best="max"), "needs at least one label"),
        (
            lambda: report_figures.bars({"a": [1]}, title="t", unit="s", best="up"),
            "t: best is 'max' or 'min'",
        ),
        (lambda: report_figures.loss_curves({"a": []}), "Training loss: no steps"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers():
    assert [report_numbers.number(v) for v in (1234567, 12345.6, 0.123456, 1e-7, 3)] == [
        "1,234,567",
        "12,346",
        "0.1235",
        "1e-07",
        "3",
    ]
    assert [report_numbers.amount(v) for v in (0, 999, 999.6, 35592, 5e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "35.6 kB",
        "5 GB",
    ]
    assert report_numbers.amount(250_000, "") == "250k"
    assert report.measured([1.0, None, math.inf, 2.0, 3.0]) == Cell("2.0 ± 1.0", 2.0)
    assert report.measured([0.985, 0.995]) == Cell("0.9900 ± 0.0071", 0.99)
    assert report.measured([2.0, 2.0], "{:.1f}") == Cell("2.0 ± 0.0", 2.0)
    assert report.measured([0.5]) == Cell("0.5", 0.5) and report.measured([math.nan, None]) is None


def test_prose():
    page = report.render("t", [Section("s", ["one\ntwo **bold** `a*b**c**`\n\n- x\n- y"])], made={})
    assert "<p>one two <strong>bold</strong> <code>a*b**c**</code></p>" in page
    assert "<ul><li>x</li><li>y</li></ul>" in page


def test_colours_can_be_told_apart_in_both_schemes():
    for colour in report_axes.COLOURS:
        for scheme in (report_colours.LIGHT, report_colours.DARK):
            adapted = report_colours.adapted(colour, *scheme)
            assert report_colours.contrast(adapted, scheme[0]) >= report_colours.LEGIBLE, (colour, scheme)
    for scheme in (report_colours.LIGHT, report_colours.DARK):
        adapted = [report_colours.adapted(c, *scheme) for c in report_axes.COLOURS]
        for sight in (np.eye(3), PROTANOPIA, DEUTERANOPIA):
            labs = [lab(sight @ linear(c)) for c in adapted]
            apart = [np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]]
            assert min(apart) > 25, (scheme, sight)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, white D65."""
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(matrix @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_styles_do_not_repeat():
    looks = report_figures.styles([str(i) for i in range(63)])
    assert len({str(of) for of in looks.values()}) == 63
    assert len({(of.colour, str(of.dashes)) for of in list(looks.values())[:28]}) == 28


def svg(figure):
    page = report.render("t", [Section("s", [figure])], made={})
    return ElementTree.fromstring(re.search(r'<svg[^>]*role="img".*?</svg>', page, flags=re.DOTALL)[0])


def targets(root):
    group = next(g for g in root.iter("g") if g.get("class") == "targets")
    return {c.find("title").text: (float(c.get("cx")), float(c.get("cy"))) for c in group}


@pytest.mark.parametrize("dpi", [72, 200])
def test_targets_lie_on_the_marks_of_any_drawing(dpi):
    root = svg(Figure(drawing(dpi=dpi), "t", "d"))
    places = targets(root)
    assert set(places) == {
        *(f"law, parameters N {x}, loss {y}" for x, y in ((10, 3), (100, 2), (1000, 1.5))),
        *(f"runs, parameters N {x}, loss {y}" for x, y in ((20, 1.7), (200, 2.9))),
        "x 0, count 4",
        "x 1, count 7",
    }
    used = [(float(use.get("x")), float(use.get("y"))) for use in root.iter("use")]
    for text, place in places.items():
        if "parameters" in text:
            assert min(math.dist(place, mark) for mark in used) < 0.1, text


def test_targets_lie_on_the_marks_of_a_comparison():
    figure = comparison("ab")[1]
    root = svg(figure)
    used = [(float(use.get("x")), float(use.get("y"))) for use in root.iter("use")]
    places = targets(root)
    assert len(places) == 6 and any(
        re.fullmatch(r"a: 0\.8\d+ ± 0\.0\d+ \(3 seeds\) at 900 B of state", t) for t in places
    )
    assert all(min(math.dist(place, mark) for mark in used) < 0.1 for place in places.values())


points = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12, unique=True)


@settings(max_examples=30, deadline=None)
@given(points)
def test_front_is_what_nothing_beats(xy):
    figure = report_figures.quality_against_state({f"{x} {y}": [(10.0**x, [y / 10])] for x, y in xy})
    found = {row[0] for row in figure.data.rows if row[3] == "yes"}
    beaten = {(x, y) for x, y in xy for u, v in xy if (u <= x and v >= y) and (u, v) != (x, y)}
    assert found == {f"{x} {y}" for x, y in set(xy) - beaten}
    names = figure.description.split("smallest state: ")[1].rstrip(".").split(", ")
    assert names == [f"{x} {y}" for x, y in sorted(set(xy) - beaten)]


def test_curves_average_over_stretches_and_seeds():
    steps = list(range(1, 401))
    runs = [(steps, [5.0 + s] * 200 + [math.nan] * 5 + [3.0 + s] * 195) for s in (0, 1)]
    figure = report_figures.loss_curves({"a": runs, "late": [([400], [9.0])]})
    first, *_, last = figure.data.rows
    assert len(figure.data.rows) == report_figures.BINS
    assert first == [10, Cell("5.50 ± 0.71", 5.5), None] and last == [
        400,
        Cell("3.50 ± 0.71", 3.5),
        Cell("9", 9.0),
    ]
    assert (
        "a 3.50 ± 0.71, late 9" in figure.description
        and "not finite: a (10 of 800 values)" in figure.description
    )


def test_a_loss_that_ran_away_is_cut_off():
    figure = report_figures.loss_curves(
        {"a": [([1, 2, 3], [5.0, 4.0, 3.0])], "wild": [([1, 2, 3], [5.0, 1e6, 1e9])]}
    )
    assert figure.drawing.axes[0].get_ylim()[1] < 10
    assert not any("wild" in text for text in targets(svg(figure)) if "step 1" not in text)


def test_bars_are_in_order_and_say_what_is_missing():
    figure = report_figures.bars(
        {"slow": [9.0], "lost": [None], "fast": [1.0, 3.0]}, title="t", unit="ms", best="min"
    )
    assert [text.get_text() for text in figure.drawing.axes[0].get_yticklabels()] == ["fast", "slow"]
    assert [mark.text for mark in figure.marks] == ["fast: 2.0 ± 1.4 (2 seeds) ms", "slow: 9 ms"]
    assert figure.description.endswith(
        "fast 2.0 ± 1.4, slow 9. Left out because not finite: lost (1 of 1 values)."
    )
    assert figure.data.rows == [["slow", Cell("9", 9.0)], ["lost", None], ["fast", Cell("2.0 ± 1.4", 2.0)]]


def test_bytes_have_prefixes():
    figure = report_figures.bars({"a": [2e6]}, title="t", unit="bytes", best="min")
    assert figure.description == "In bytes. Less is better: a 2 MB."
    assert [mark.text for mark in figure.marks] == ["a: 2 MB"]
    page = report.render("t", [Section("s", [figure])], made={})
    assert "500 kB</text>" in page and "1 MB</text>" in page


@pytest.mark.filterwarnings("error")
def test_thin_and_thick_comparisons():
    """No value that is a number; fifty labels; a state of nothing; letters without a glyph."""
    nothing = [None, math.nan]
    every = [
        report_figures.loss_curves({"a": [([1], [math.inf])], "never ran": []}),
        report_figures.quality_against_state({"a": [(0, nothing)]}),
        report_figures.quality_against_length({"a": [(256, nothing)]}, trained=256),
        report_figures.quality_against_length({"a": [(9, [0.5]), (9, nothing)]}, trained=(1, 9)),
        report_figures.quality_against_state({"a": [(9, [0.5]), (9, nothing)], "never ran": []}),
        report_figures.bars({"a": nothing}, title="t", unit="s", best="max", log=True),
        report_figures.bars({"a": [5.0]}, title="t", unit="s", best="max", log=True),
        report_figures.quality_against_state({"記憶": [(0, [0.5])]}),
        report_figures.bars(
            {"記憶 $a_{$": [3], "$": [0.5, 9]}, title="$t_{$", unit="$s_{$", best="max", log=True
        ),
    ]
    assert "nothing finite" in every[0].description
    page = report.render(
        "t", [Section("s", [*every, *comparison([f"model {i}" for i in range(50)], 1)])], made={}
    )
    assert "記憶 $a_{$</text>" in page and "$s_{$</text>" in page and "1 B of state" in page


# In a browser.

pixels = {
    "desktop": {"width": 1280, "height": 900},
    "desktop, dark": {"width": 1280, "height": 900, "dark": True},
    "tablet": {"width": 768, "height": 1024},
    "phone": {"width": 360, "height": 740, "phone": True},
    "phone, dark": {"width": 360, "height": 740, "phone": True, "dark": True},
    "paper": {"width": 700, "height": 990, "paper": True},
}


@pytest.fixture(scope="module")
def chromium():
    command = browser.executable()
    if command is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with browser.Browser(command) as running:
        yield running


# Outside its own scrolling box nothing may reach over the edge of the window.
OVERFLOWING = """[...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, .plot, pre")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 200))"""
# Per drawing: its box on the page, how much is drawn, and what of it lies outside (2 px: strokes and fonts).
DRAWN = """[...document.querySelectorAll(".plot > svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const drawn = [...svg.querySelectorAll("path, use, text, circle, rect, image")]
        .filter(e => !e.closest("defs, clipPath"));
    const outside = drawn.filter(e => {
        const b = e.getBoundingClientRect();
        return b.left < box.left - 2 || b.right > box.right + 2
            || b.top < box.top - 2 || b.bottom > box.bottom + 2;
    });
    const empty = drawn.filter(e => e.tagName === "text" && e.getBoundingClientRect().width === 0);
    return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height,
        drawn: drawn.length, outside: [...outside, ...empty].map(e => e.outerHTML.slice(0, 200)),
        scale: box.width / svg.viewBox.baseVal.width,
        letters: [...svg.querySelectorAll("text")].map(e => parseFloat(getComputedStyle(e).fontSize))};
})"""


@pytest.mark.parametrize("name", pixels)
def test_pages_are_sound(chromium, path, name):
    page = chromium.open(path, **pixels[name])
    assert page.evaluate("document.querySelectorAll('h2').length") == 3
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= pixels[name]["width"]
    drawn = page.evaluate(DRAWN)
    assert len(drawn) == 6
    for each in drawn:
        assert each["width"] > 250 and each["height"] > 100 and each["drawn"] > 30 and not each["outside"], (
            each
        )
        assert each["scale"] * min(each["letters"]) >= 8
    assert page.evaluate("typeof window.bad") == "undefined"
    look_at(page, drawn, dark=pixels[name].get("dark", False), scale=2 if pixels[name].get("phone") else 1)
    assert page.console == [] and page.requests == [path.resolve().as_uri()]
    page.close()


def look_at(page, drawn, dark, scale):
    """Every drawing on the picture of the page: paper for the most part, ink on it, and colours."""
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
    paper, ink = report_colours.DARK if dark else report_colours.LIGHT
    for box in drawn:
        x, y, width, height = (round(scale * box[key]) for key in ("x", "y", "width", "height"))
        part = picture[y : y + height, x : x + width]
        near = {c: np.abs(part - 255 * report_colours.channels(c)).max(-1) < 40 for c in (paper, ink)}
        coloured = np.ptp(part, axis=-1) > 60
        assert near[paper].mean() > 0.5 and near[ink].mean() > 0.003 and coloured.mean() > 0.003
        # All over: neither half is blank.
        for half in (*np.array_split(~near[paper], 2, 0), *np.array_split(~near[paper], 2, 1)):
            assert half.mean() > 0.003


def test_tables_sort(chromium, path):
    page = chromium.open(path)

    def after(column):
        """The first table after a click on a heading: the names, what the heading says, the column."""
        at = f"document.querySelector('table').tHead.rows[0].cells[{column}]"
        box = json.loads(
            page.evaluate(f"JSON.stringify({at}.querySelector('button').getBoundingClientRect())")
        )
        page.press(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        rows = page.evaluate(
            "[...document.querySelector('tbody').rows].map(r => [...r.cells].map(c => c.textContent))"
        )
        return [row[0] for row in rows], page.evaluate(f"{at}.ariaSort"), [row[column] for row in rows]

    names, order, _ = after(1)
    assert order == "descending" and names == list(reversed(LABELS))  # more is better
    names, order, _ = after(1)
    assert order == "ascending" and names == list(LABELS)
    _, order, losses = after(3)
    assert order == "ascending" and losses[-1] == "–" and losses[:-1] == sorted(losses[:-1], key=float)
    _, order, losses = after(3)
    assert (
        order == "descending"
        and losses[-1] == "–"
        and losses[:-1] == sorted(losses[:-1], key=float, reverse=True)
    )
    names, order, _ = after(0)
    assert order == "ascending" and names.index("attention") < names.index("gla") < names.index("titans")
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    assert page.console == []
    page.close()


MIDDLE = """(() => {{ const t = document.querySelectorAll('#figure-2 .targets circle')[{}];
    t.scrollIntoView({{block: 'center'}}); const b = t.getBoundingClientRect();
    return [b.x + b.width / 2, b.y + b.height / 2, t.querySelector('title').textContent]; }})()"""
TIP = "(t => t.hidden ? null : t.textContent)(document.getElementById('tip'))"


@pytest.mark.parametrize("phone", [False, True])
def test_figures_can_be_read(chromium, path, phone):
    page = chromium.open(path, **pixels["phone" if phone else "desktop"])
    x, y, text = page.evaluate(MIDDLE.format(4))
    assert text.startswith("s4: 0.8")
    assert page.evaluate(TIP) is None
    (page.tap if phone else page.point)(x + 2, y - 2)
    assert page.evaluate(TIP) == text
    box = page.evaluate("(b => [b.left, b.right])(document.getElementById('tip').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= pixels["phone" if phone else "desktop"]["width"]
    page.evaluate("document.querySelector('#figure-2 .plot').focus()")
    page.key("ArrowRight")
    assert page.evaluate(TIP) == page.evaluate(MIDDLE.format(5))[2] != text
    page.key("Escape")
    assert page.evaluate(TIP) is None and page.console == []
    page.close()


def test_a_key_singles_out_its_series(chromium, path):
    page = chromium.open(path)
    shown = """[...document.querySelectorAll('#figure-2 svg g[data-series]')]
        .filter(g => getComputedStyle(g).opacity === '1').map(g => g.dataset.series)"""
    everything = page.evaluate(shown)
    press = "document.querySelectorAll('#figure-2 .keys button')[2].click()"
    page.evaluate(press)
    assert set(page.evaluate(shown)) == {"2"}
    page.evaluate(press)
    assert page.evaluate(shown) == everything and set(everything) == {str(i) for i in range(10)}
    page.close()


def test_paper_gets_everything(chromium, path):
    page = chromium.open(path, dark=True)
    assert page.evaluate("document.querySelector('details').open") is False
    document = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert document.startswith(b"%PDF") and document.count(b"/Type /Page\n") >= 3
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    page.close()


def test_the_policy_holds(chromium, path):
    page = chromium.open(path)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'bad = 1'}))"
    )
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert page.evaluate("typeof bad") == "undefined"
    said = " ".join(page.console)
    assert all(f"{rule}-src" in said for rule in ("script", "img", "connect"))
    page.close()


def test_what_is_wrong_is_seen(chromium, tmp_path):
    """The checks above are able to fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><link rel=icon href='data:,'>"
        "<div class=plot><svg viewBox='0 0 9 9' width=300><text x=8>over</text></svg></div>"
        "<p style='width:5000px'>wide</p><img src='http://127.0.0.1:9/x.png'><script>oops()</script>"
    )
    page = chromium.open(bad, **pixels["phone"])
    assert len(page.evaluate(OVERFLOWING)) == 1
    assert page.evaluate(DRAWN)[0]["outside"]
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert any("oops is not defined" in said for said in page.console)
    page.close()
