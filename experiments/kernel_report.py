"""The Markdown of what `experiments.bench_kernels.measure` found, and of what is missing."""

from collections.abc import Iterable
from typing import Any

from experiments.timing import cell

MISSING = "not measured"
HOW = """\
Milliseconds are medians of 7 repeats on the device. Ours, XLA and attention: a compiled loop of calls, each
depending on the one before, waited for once per loop. fla (its fastest function for the op): CUDA events
around replays of a CUDA graph of one call, or around launches where a graph cannot be made (`how` in the
JSON). forward+backward pulls one random cotangent of the output back to every argument. TFLOP/s and GB/s are
of the kernel, by the work's own FLOPs and fewest bytes (`experiments/kernel_cases.py`); of ceiling: the
larger of both as a share of what a large bf16 product and a large copy reached on this device in the same
run."""


class Group:
    """All rows of one op, shape and direction, by who computed them."""

    def __init__(self, rows: Iterable[dict], platform: str):
        self.rows = {row["by"]: row for row in rows}
        self._kernel = platform

    def _of(self, kind: str) -> list[dict]:
        own = {"XLA": "xla", "kernel": self._kernel}
        if kind == "fla":
            return [row for by, row in self.rows.items() if by.startswith("fla ")]
        return [row for by, row in self.rows.items() if by == own[kind]]

    def get(self, kind: str, key: str) -> Any:
        """Of the fastest row of its kind, or of any where none has a time; None without one."""
        rows = sorted(self._of(kind), key=lambda row: row.get("ms") or float("inf"))
        return rows[0].get(key) if rows else None

    def ratio(self, kind: str) -> float | None:
        """Their time over the kernel's."""
        theirs, ours = self.get(kind, "ms"), self.get("kernel", "ms")
        return theirs / ours if theirs and ours else None


def grouped(rows: list[dict], platform: str, keys: tuple[str, ...]) -> dict[tuple, Group]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return {key: Group(of, platform) for key, of in found.items()}


def table(head: list[str], lines: Iterable[Iterable[Any]]) -> str:
    """Markdown."""
    rows = [list(map(cell, line)) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _or_missing(value: Any) -> Any:
    return MISSING if value is None else value


def _times(measured: dict) -> str:
    platform, rows = measured["platform"], measured["rows"]
    attention = {(r["shape"], r["direction"]): r.get("ms") for r in rows if r["op"] == "attention"}
    ops = [row for row in rows if row["op"] != "attention"]
    lines = []
    for (op, shape, direction), group in grouped(ops, platform, ("op", "shape", "direction")).items():
        shares = [group.get("kernel", f"of_{ceiling}") for ceiling in ("matmul", "copy")]
        lines.append([
            op, shape, direction,
            *(_or_missing(group.get(kind, "ms")) for kind in ("XLA", "kernel", "fla")),
            _or_missing(attention[shape, direction]) if (shape, direction) in attention else None,
            group.ratio("XLA"), group.ratio("fla"),
            group.get("kernel", "TFLOP_per_s"), group.get("kernel", "GB_per_s"),
            max((share for share in shares if share is not None), default=None),
        ])  # fmt: skip
    head = ["op", "shape", "direction", "XLA ms", "kernel ms", "fla ms", "attention ms", "XLA / kernel"]
    return table([*head, "fla / kernel", "TFLOP/s", "GB/s", "of ceiling"], lines)


def _errors(measured: dict) -> str:
    """Relative RMS, output and worst gradient."""
    lines = []
    rows = [row for row in measured["rows"] if row["op"] != "attention"]
    for (op, channels), group in grouped(rows, measured["platform"], ("op", "channels")).items():
        pairs = [(group.get(k, "error"), group.get(k, "gradient_error")) for k in ("XLA", "kernel", "fla")]
        shown = (MISSING if out is None else f"{out:.1e}, {gradient:.1e}" for out, gradient in pairs)
        lines.append([op, channels, *shown])
    return table(["op", "channels", "XLA", "kernel", "fla"], lines)


def _compilation(measured: dict) -> str:
    lines = []
    groups = grouped(measured["rows"], measured["platform"], ("op", "shape", "direction"))
    for key, group in groups.items():
        seconds = [group.get(kind, "compile_s") for kind in ("XLA", "kernel")]
        if any(seconds):
            lines.append([*key, *seconds])
    return table(["op", "shape", "direction", "XLA s", "kernel s"], lines)


def _reasons(rows: list[dict]) -> str:
    """What was not measured, and why: rows by reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for reason in filter(None, (row["not_measured"], row["check_failed"])):
            found.setdefault(f"{row['by']}: {reason}", []).append(
                f"{row['op']} {row['shape']} {row['direction']}"
            )
    named = (
        f"- {reason}: {'; '.join(of) if len(of) <= 3 else f'{len(of)} rows'}" for reason, of in found.items()
    )
    return "\n".join(named)


def report(measured: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    ceilings = measured["ceilings"]
    reached = (
        f"Ceilings: {ceilings['matmul'] / 1e12:,.3g} TFLOP/s, {ceilings['copy'] / 1e9:,.0f} GB/s."
        if "matmul" in ceilings
        else f"Ceilings: {MISSING} ({ceilings['error']})."
    )
    tuners = measured["tuners"]
    tuned = f" fla chose its tiles in {tuners['all']} processes, {tuners['unfinished']} of them not in time."
    parts = [
        f"`python -m experiments.bench kernels`, {measured['date']}, {measured['device']}; {versions}; "
        f"{measured['seconds']:.0f} s in all.",
        HOW.replace("\n", " "),
        reached + (tuned if tuners["all"] else ""),
        _times(measured),
        "Errors, relative RMS against the definition in float64 on a short piece: output, worst gradient.",
        _errors(measured),
        "Seconds to trace and compile a loop with one call in it, several programs at a time.",
        _compilation(measured),
    ]
    reasons = _reasons(measured["rows"])
    return "\n\n".join(parts + (["Not measured:", reasons] if reasons else [])) + "\n"
