"""What `zoo fit` tells people: the same tables for the terminal and for Markdown."""

from collections.abc import Iterable

import numpy as np

from experiments.scaling import published
from experiments.scaling.doubt import FAR
from experiments.scaling.law import Law
from experiments.scaling.study import FITTED, Study, beyond

Row = dict[str, str]
Section = tuple[str, list[Row]]  # a title and its rows


def number(x: float | None, digits: int = 4) -> str:
    return "–" if x is None or not np.isfinite(x) else f"{x:.{digits}g}"


def percent(x: float) -> str:
    return f"{100 * x:+.2f} %"


def between(pair: Iterable[float]) -> str:
    return " to ".join(number(x, 3) for x in pair)


def sections(study: Study) -> list[Section]:
    """All tables of a study; empty ones are left out."""
    found = [
        ("Fits of L(N, D) = E + A / N^alpha + B / D^beta", _fits(study)),
        ("Over-training law L = E + a N^eta + b 6^(eta/2) (M N)^eta", _overtraining(study)),
        ("Exponents of the optimum, N* ~ C^a and D* ~ C^b", _exponents(study)),
        ("Compute-optimal sizes", _optima(study)),
        ("IsoFLOP minima", _minima(study)),
        ("Sensitivity", _sensitivity(study)),
        ("Prediction of the largest runs from all others", _held_out(study)),
    ]
    return [(title, rows) for title, rows in found if rows]


def _parameters(law: Law) -> Row:
    return {name: number(getattr(law, name), 6) for name in ("E", "A", "B", "alpha", "beta")}


def _fits(study: Study) -> list[Row]:
    rows = []
    names = {"varpro": "least squares (varpro)", "huber": f"Huber on log L, δ = {study.settings.delta:g}"}
    for name in ("varpro", "huber"):
        law = study.methods.get(name)
        if law is not None:
            spread = np.sqrt(np.mean(law.residuals(study.runs) ** 2))
            rows.append({"fit": names[name], **_parameters(law), "rms of log L": f"{100 * spread:.2g} %"})
    intervals = study.intervals()
    if rows and intervals:
        cells = {name: between(intervals[name]) for name in FITTED[:5]}
        samples = f"95 % of {len(study.samples)} resamples"
        rows.append({"fit": samples, **cells, "rms of log L": ""})
    return rows


def _overtraining(study: Study) -> list[Row]:
    found = study.overtraining
    if found is None:
        return []
    names = {"E": "E", "a": "a", "scale": "b", "exponent": "eta"}
    values = {names[key]: number(value, 7) for key, value in found.to_dict().items()}
    spread = np.sqrt(np.mean(found.law.residuals(study.runs) ** 2))
    return [{"fit": "least squares", **values, "rms of log L": f"{100 * spread:.2g} %"}]


def _exponents(study: Study) -> list[Row]:
    def row(by: str, a: float, b: float, interval: tuple[str, str] = ("", "")) -> Row:
        return {"by": by, "a": number(a, 3), "95 %": interval[0], "b": number(b, 3), "95 % ": interval[1]}

    rows = []
    through = {
        "approach 1, fixed sizes": (study.envelope.params_law, study.envelope.tokens_law),
        "approach 2, isoFLOP parabolas": (study.profiles.params, study.profiles.tokens),
    }
    for label, (params, tokens) in through.items():
        if params is not None and tokens is not None:
            rows.append(row(label, params.exponent, tokens.exponent))
    intervals = study.intervals()
    for name, law in study.methods.items():
        known = name == "varpro" and intervals
        bounds = (between(intervals["a"]), between(intervals["b"])) if known else ("", "")
        rows.append(row(f"approach 3, {name}", *study.cost.exponents(law), bounds))
    for paper in published.of(study.name):
        rows.append(row(f"published: {paper.architecture}, {paper.method}; {paper.study}", paper.a, paper.b))
    return rows


def _optima(study: Study) -> list[Row]:
    params, tokens = study.cost.optimum(study.law, study.budgets)
    if not np.isfinite(params).all():
        return []
    rows = []
    bounds = [(between(n), between(d)) for n, d in study.optimum_intervals()] or [("", "")] * len(params)
    for c, n, d, (of_n, of_d) in zip(study.budgets, params, tokens, bounds, strict=True):
        row = {"C": number(c, 3), "N*": number(n), "95 %": of_n}
        row |= {"D*": number(d), "95 % ": of_d, "D*/N*": number(d / n, 3)}
        outside = beyond(study.runs, c, n)
        row |= {"L": number(float(study.law.loss(n, d)), 5)}
        rows.append(row | {"": f"{outside} beyond the runs" if outside else ""})
    return rows


def _minima(study: Study) -> list[Row]:
    bias = {} if study.bias is None else dict(zip(study.bias.compute, study.bias.params, strict=True))
    rows = []
    for p in study.profiles.budgets:
        near = [error for c, error in bias.items() if abs(np.log(c / p.compute)) < 0.3]
        row = {"C": number(p.compute, 3), "runs": str(len(p.rows)), "N*": number(p.params)}
        row |= {"D*": number(p.tokens), "L": number(p.loss, 5)}
        row |= {"bias of N* on the fitted surface": percent(near[0]) if near else "–"}
        rows.append(row | {"": p.problem or p.remark})
    return rows


def _span(laws: Iterable[Law], study: Study) -> Row:
    laws = list(laws)
    cells = {}
    for name in ("E", "alpha", "beta"):
        values = [getattr(law, name) for law in laws]
        cells[name] = number(values[0]) if len(values) == 1 else between((min(values), max(values)))
    a = [study.cost.exponents(law)[0] for law in laws]
    return cells | {"a": number(a[0], 3) if len(a) == 1 else between((min(a), max(a)))}


def _sensitivity(study: Study) -> list[Row]:
    rows = [{"change": "none (varpro)", **_span([study.law], study)}] if study.sensitivity else []
    for kind, laws in study.sensitivity.items():
        if kind == "without a run" and laws:
            name = f"each of {len(laws)} runs left out"
            rows.append({"change": name, **_span(laws.values(), study)})
            row, law = max(laws.items(), key=lambda item: abs(np.log(item[1].alpha / study.law.alpha)))
            rows.append({"change": f"of these, farthest: {study.runs.line(row)}", **_span([law], study)})
            continue
        for key, law in laws.items():
            names = {"delta": f"Huber, δ = {key:g}", "without a budget": f"budget {key:.3g} left out"}
            name = names.get(kind, f"{key} largest residuals left out")
            rows.append({"change": name, **_span([law], study)})
    return rows


def _held_out(study: Study) -> list[Row]:
    rows = []
    for held in study.held_out:
        for name, errors in held.errors.items():
            row = {"held out": held.rule, "runs": str(len(held.rows)), "fit": name}
            row |= {"mean |error|": f"{100 * np.abs(errors).mean():.3g} %"}
            rows.append(row | {"from": percent(errors.min()), "to": percent(errors.max())})
    return rows


def facts(study: Study) -> list[str]:
    """Sentences that stand above the tables: what was fitted, in which units."""
    runs = study.runs
    extent = f"N from {runs.params.min():.3g} to {runs.params.max():.3g}, "
    extent += f"D from {runs.tokens.min():.3g} to {runs.tokens.max():.3g}"
    lines = [f"{len(runs)} runs, {extent}."]
    lines += [f"{name}: {text}." for name, text in study.convention.items()]
    lines.append(
        "Intervals: percentiles of refits to runs drawn with replacement "
        f"(Philox, seed {study.settings.seed}). Outliers: beyond {FAR:g} robust s.d.; all are kept."
    )
    if study.noise is not None:
        sd, freedom = study.noise
        lines.append(
            f"Repeated runs differ by {100 * sd:.2g} % (s.d. of log L, {freedom} degrees of freedom)."
        )
    return lines


def terminal(studies: list[Study], refused: dict[str, str], console) -> None:
    """Print every study on a rich console."""
    from rich.table import Table

    for study in studies:
        console.rule(study.name)
        for line in facts(study):
            console.print(line, highlight=False, markup=False)
        for title, rows in sections(study):
            table = Table(title=title, title_justify="left")
            for column in rows[0]:
                table.add_column(
                    column, justify="left" if column in ("fit", "by", "change", "held out") else "right"
                )
            for row in rows:
                table.add_row(*row.values())
            console.print(table)
        for flag in study.flags:
            console.print(f"! {flag}", highlight=False, markup=False)
    for name, reason in refused.items():
        console.print(f"! {name} is refused: {reason}", highlight=False, markup=False)


def _markdown_table(rows: list[Row]) -> list[str]:
    keys = list(rows[0])
    lines = ["| " + " | ".join(key.strip() for key in keys) + " |", "|" + "---|" * len(keys)]
    cells = [[row[key].replace("|", "\\|") for key in keys] for row in rows]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def markdown(studies: list[Study], refused: dict[str, str], title: str, images: Iterable[str] = ()) -> str:
    """A report of all studies; `images` are paths of figures, relative to it."""
    lines = [f"# {title}", ""]
    lines += [line for image in images for line in (f"![{image}]({image})", "")]
    for study in studies:
        lines += [f"## {study.name}", "", *(f"- {line}" for line in facts(study)), ""]
        for heading, rows in sections(study):
            lines += [f"### {heading.replace('|', chr(92) + '|')}", "", *_markdown_table(rows), ""]
        if study.flags:
            lines += ["### Flags", "", *(f"- {flag}" for flag in study.flags), ""]
    if refused:
        lines += ["## Refused", "", *(f"- {name}: {reason}" for name, reason in refused.items()), ""]
    return "\n".join(lines).rstrip() + "\n"
