"""Kernels, their XLA form, fla's Triton kernels and attention on one device, in one go.

Errors against the definition in float64 come first, on short pieces of the shapes. Then the median time of
every row (`experiments/kernel_rows.py`), in the process of `experiments/kernel_clock.py`, which says how; a
row that fails, or brings the device down, says so and the next goes on in a new process. What the budget of
seconds does not reach is "not measured". On a CPU it is a rehearsal: small shapes, nothing of accelerators.
"""

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from experiments import kernel_peers
from experiments.kernel_report import report
from experiments.kernel_rows import Row, checks, rows
from experiments.kernel_workers import Worker
from experiments.record import plain
from experiments.timing import cell

SECONDS = 450.0
PREPARE, TUNE = 0.35, 0.5  # parts of the budget until which rows are compiled, and fla chooses tiles
PATIENCE = 180.0  # seconds for one answer
OUT_OF_TIME = "out of time"
ENVIRONMENT = {
    # torch and JAX share the device: none takes its memory in advance.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
KEYS = ("op", "shape", "dtype", "direction", "by")


class Probe:
    """The process that measures, and the seconds that are left for it."""

    def __init__(self, seconds: float, ops: Collection[str]):
        self.start, self.seconds = time.perf_counter(), seconds
        self._worker = Worker([sys.executable, "-m", "experiments.kernel_clock", *ops], ENVIRONMENT)

    def left(self, part: float = 1.0) -> float:
        """Seconds until this part of the budget is over."""
        return self.start + part * self.seconds - time.perf_counter()

    def ask(self, question: str) -> dict:
        if self.left() <= 0:
            return {"error": OUT_OF_TIME}
        answer = self._worker.ask(question, min(self.left(), PATIENCE))
        if answer.get("fatal"):
            self._worker.close()
        return {"error": OUT_OF_TIME} if "error" in answer and self.left() <= 0 else answer

    def close(self) -> None:
        self._worker.close()


def _await(tuners: list[subprocess.Popen], seconds: float) -> list[int]:
    """Which are not done after so many seconds; those are ended."""
    deadline, late = time.perf_counter() + seconds, []
    for number, process in enumerate(tuners):
        try:
            process.wait(max(deadline - time.perf_counter(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late.append(number)
    return late


def _row(row: Row, answer: dict, errors: dict, ceilings: dict) -> dict:
    """Times as rates, and as shares of what the device was seen to do."""
    case, seconds = row.case, answer.get("seconds")
    found: dict[str, Any] = dict(
        zip(KEYS, (case.variant.name, str(case.sizes), case.dtype, row.direction, row.by), strict=True)
    )
    found |= {
        "channels": case.sizes.D,
        "error": errors.get("output"),
        "gradient_error": errors.get("gradients"),
    }
    found |= {"not_measured": answer.get("error"), "check_failed": errors.get("error")}
    if seconds is None:
        return found
    rates = {"matmul": case.flops(row.direction) / seconds, "copy": case.bytes(row.direction) / seconds}
    shares = {kind: rate / ceilings[kind] for kind, rate in rates.items() if kind in ceilings}
    return found | {
        "ms": 1e3 * seconds,
        "TFLOP_per_s": rates["matmul"] / 1e12,
        "GB_per_s": rates["copy"] / 1e9,
        **{f"of_{kind}": share for kind, share in shares.items()},
        "compile_s": answer.get("compile_s"),
        "how": answer["how"],
    }


class Run:
    """Rows of some ops, or all, from the first question to the table."""

    def __init__(self, seconds: float, ops: Collection[str]):
        self.probe = Probe(seconds, ops)
        self.about = self.probe.ask("device")
        if "error" in self.about:
            raise RuntimeError(f"no device: {self.about['error']}")
        platform, no_fla = self.about["platform"], self.about["no_fla"]
        self.rows = rows(platform, ops)
        self.reasons = [row.reason(platform, no_fla) for row in self.rows]
        self.tuners = [] if no_fla else kernel_peers.tuners(ENVIRONMENT)
        self.late: list[int] = []

    def ask(self, verb: str, number: int) -> dict:
        if self.reasons[number]:
            return {"error": self.reasons[number]}
        answer = self.probe.ask(f"{verb} {number}")
        row = self.rows[number]
        what = f"{verb} {row.case.name}, {row.direction}, {row.by}"
        _tell(f"{self.probe.left():.0f} s left: {what}: {_said(answer)}")
        return answer

    def errors(self, *, peers: bool) -> dict:
        numbers = [number for number in checks(self.rows) if self.rows[number].peer == peers]
        return {_kind(self.rows[number]): self.ask("check", number) for number in numbers}

    def await_tuners(self) -> None:
        """A function that has not chosen its tiles by now would take the time of all other rows."""
        self.late = _await(self.tuners, self.probe.left(TUNE))
        untuned = [
            (name, sizes.D) for name, sizes in (kernel_peers.to_tune()[number] for number in self.late)
        ]
        for number, row in enumerate(self.rows):
            if row.peer and (row.case.variant.name, row.case.sizes.D) in untuned:
                self.reasons[number] = "had not chosen its tiles in time"

    def measure(self) -> dict:
        """Everything, as it is written to JSON."""
        ceilings = self.probe.ask("ceilings")
        _tell(f"{self.about['device']}: {_said(ceilings)}")
        errors = self.errors(peers=False)
        self.probe.ask(f"prepare {max(self.probe.left(PREPARE), 0):.0f}")
        self.await_tuners()
        errors |= self.errors(peers=True)
        times = [self.ask("time", number) for number in range(len(self.rows))]
        self.probe.close()
        answers = zip(self.rows, times, strict=True)
        return {
            "date": str(datetime.date.today()),
            **{key: self.about[key] for key in ("platform", "device", "versions")},
            "seconds": time.perf_counter() - self.probe.start,
            "ceilings": ceilings,
            "tuners": {"all": len(self.tuners), "unfinished": len(self.late)},
            "rows": [_row(row, answer, errors.get(_kind(row), {}), ceilings) for row, answer in answers],
        }


def _kind(row: Row) -> tuple:
    """What rows share that share a check."""
    return row.case.variant.name, row.case.sizes.D, row.by


def _tell(text: str) -> None:
    print(text, flush=True)


def _said(answer: dict) -> str:
    return ", ".join(f"{key} {cell(value)}" for key, value in answer.items() if value is not None)


def bench(seconds: float, out: Path, ops: Collection[str] = ()) -> Path:
    """Measure, and write a JSON and a Markdown file. Returns their common path without an ending."""
    measured = Run(seconds, ops).measure()
    kind = measured["platform"]
    table = out / ("kernels" if kind == "gpu" else f"kernels_{kind}")
    out.mkdir(parents=True, exist_ok=True)
    table.with_suffix(".json").write_text(json.dumps(plain(measured), indent=1, allow_nan=False) + "\n")
    table.with_suffix(".md").write_text(report(measured))
    return table
