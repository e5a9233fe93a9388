"""What is known of every kernel: a table of ops, made of what tests, compilers and benchmarks wrote down.

Interpreted: `python -m pytest tests/test_kernels_*.py --record-kernels`. Compiled: `python -m
experiments.compile_kernels --all --write`. Measured: `python -m experiments.bench kernels` on a device. What
nobody wrote down is an empty cell.
"""

import csv
import json
from collections.abc import Collection
from pathlib import Path

from experiments.kernel_cases import DIRECTIONS, VARIANTS

RESULTS = Path(__file__).parent / "results"
INTERPRETED, COMPILED = "kernels_interpreted.csv", "kernels_static.csv"
MEASURED = ("kernels.json", "kernels_tpu.json")
PLATFORMS = {"tpu": "TPU", "gpu": "GPU"}
NO_KERNEL = "none"
YES = "yes"


def record(
    confirmed: Collection[tuple[str, str]], ran: Collection[tuple[str, str]], results: Path = RESULTS
) -> None:
    """Write down the (op, platform) whose values and gradients were right in an interpreter.

    Of those that did not run, what was known stays.
    """
    before = {(row["op"], row["platform"]) for row in _rows(results / INTERPRETED)}
    known = before - set(ran) | set(confirmed)
    with (results / INTERPRETED).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("op", "platform"))
        writer.writerows(sorted(known))


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _measured(results: Path) -> list[dict]:
    """Rows with a time, each with its device."""
    found = []
    for path in (results / name for name in MEASURED):
        if path.exists():
            run = json.loads(path.read_text())
            found += [row | {"device": run["device"]} for row in run["rows"] if row.get("ms") is not None]
    return found


def _op(row: dict) -> str:
    return VARIANTS[row["op"]].op if row["op"] in VARIANTS else row["op"]


def _targets(rows: list[dict], op: str, platform: str, direction: str) -> str:
    """Targets whose compiler took every case of the op, with "part" where the op refuses some."""
    outcomes: dict[str, set[str]] = {}
    for row in rows:
        ours = (row["target"][:3] == "TPU") == (platform == "tpu")
        if ours and _op(row) == op and row["direction"] == direction:
            outcomes.setdefault(row["target"], set()).add(row["outcome"])
    taken = {target for target, seen in outcomes.items() if "compiled" in seen}
    return ", ".join(
        target + ("" if outcomes[target] == {"compiled"} else " in part") for target in sorted(taken)
    )


def _devices(rows: list[dict], op: str, by: str, direction: str) -> str:
    of = {row["device"] for row in rows if (_op(row), row["by"], row["direction"]) == (op, by, direction)}
    return ", ".join(sorted(of))


def table(results: Path = RESULTS) -> str:
    """One row per op and direction; backward stands for forward with backward."""
    interpreted = {(row["op"], row["platform"]) for row in _rows(results / INTERPRETED)}
    compiled, measured = _rows(results / COMPILED), _measured(results)
    heads = [
        f"{name}, {what}" for name in PLATFORMS.values() for what in ("interpreted", "compiled", "measured")
    ]
    lines = [["op", "direction", "XLA", "XLA, measured", *heads]]
    lines.append(["---"] * len(lines[0]))
    for op, platforms in {variant.op: variant.platforms for variant in VARIANTS.values()}.items():
        for direction, shown in zip(DIRECTIONS, ("forward", "backward"), strict=True):
            line = [f"`{op}`", shown, YES, _devices(measured, op, "xla", direction)]
            for platform in PLATFORMS:
                if platform not in platforms:
                    line += [NO_KERNEL, "", ""]
                    continue
                line.append(YES if (op, platform) in interpreted else "")
                line.append(_targets(compiled, op, platform, direction))
                line.append(_devices(measured, op, platform, direction))
            lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
