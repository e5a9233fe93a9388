"""The benchmark of kernels where there are none: small shapes on a CPU, and what it makes of faults."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import bench, bench_kernels, kernel_clock, kernel_peers, kernel_rows
from experiments.kernel_cases import DIRECTIONS, VARIANTS
from experiments.kernel_report import report
from experiments.kernel_workers import Worker


def test_a_rehearsal_on_a_cpu(tmp_path):
    """XLA is measured and right; of what a CPU cannot run there is a reason and never a figure."""
    assert bench.main(["kernels", "--layers", "short_conv,diagonal_scan", "--out", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert measured["platform"] == "cpu" and measured["date"] and measured["versions"]["jax"]
    rows = {(row["op"], row["direction"], row["by"]): row for row in measured["rows"]}
    for name in ("short_conv, 4 taps", "diagonal_scan, real", "diagonal_scan, complex"):
        for direction in DIRECTIONS:
            row = rows[name, direction, "xla"]
            assert row["ms"] > 0 and row["of_matmul"] > 0 and row["not_measured"] is None
            assert row["error"] < 1e-2 and row["gradient_error"] < 1e-2
    for (_, _, by), row in rows.items():
        if by != "xla":
            assert row["not_measured"] and not {"ms", "GB_per_s", "compile_s"} & set(row)
    assert "| not measured | not measured |" in (tmp_path / "kernels_cpu.md").read_text()


class Clock:
    """A probe without time."""

    def __init__(self, *arguments):
        self.start = 0.0

    def left(self, part=1.0):
        return -1.0

    def ask(self, question):
        about = {
            "platform": "gpu",
            "device": "a GPU",
            "versions": {"jax": "0"},
            "no_fla": "torch is not installed",
        }
        return about if question == "device" else {"error": bench_kernels.OUT_OF_TIME}

    def close(self):
        pass


def test_a_gpu_without_time(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "Probe", Clock)
    path = bench_kernels.bench(1.0, tmp_path)
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert path.name == "kernels"
    by = {row["by"]: row["not_measured"] for row in rows}
    assert by["xla"] == by["cudnn"] == "out of time" and by["fla chunk_gla"] == "torch is not installed"
    assert not any("ms" in row for row in rows)
    named = {(row["op"], row["shape"]) for row in rows}
    assert ("attention", "B8 T2048 H32 D256") in named
    assert ("selective_scan, Mamba", "B1 T65536 D2048 N16") in named
    assert "Ceilings: not measured (out of time)." in path.with_suffix(".md").read_text()


def test_rows_that_fail_say_so():
    """In one line, and the next row is measured."""

    def broken(x, weight, *, implementation):
        raise RuntimeError("no room\non the chip")

    variant = dataclasses.replace(VARIANTS["short_conv, 4 taps"], run=broken)
    rows = [row for row in kernel_rows.rows("cpu", ["short_conv"]) if row.by == "xla"]
    bad = rows[0]._replace(case=dataclasses.replace(rows[0].case, variant=variant))
    desk = kernel_clock.Desk([bad, rows[0]])
    assert kernel_clock.reply(desk, "time 0") == {
        "error": "RuntimeError: no room on the chip",
        "fatal": False,
    }
    assert kernel_clock.reply(desk, "time 1")["seconds"] > 0


def test_a_process_that_dies_costs_one_answer():
    script = (
        "import os, sys\nfor line in sys.stdin:\n    os.abort() if 'bad' in line else print('{}', flush=True)"
    )
    worker = Worker([sys.executable, "-c", script], {})
    assert worker.ask("good") == {}
    assert "SIGABRT" in worker.ask("bad")["error"]
    assert worker.ask("good") == {}
    worker.close()
    slow = Worker([sys.executable, "-c", "import time; time.sleep(60)"], {})
    assert "SIGKILL" in slow.ask("anything", 0.5)["error"]


def test_a_loop_makes_every_call():
    """One after the other, from the same arguments: the compiler may leave none out."""
    calls = []

    def count(x):
        jax.debug.callback(lambda: calls.append(1))
        return x * 2

    total = jax.jit(kernel_clock.repeated(count, 5))(jnp.ones(3))
    jax.effects_barrier()
    assert float(total) == 2.0 and len(calls) == 5
    matrix = jnp.ones((8, 8))
    text = jax.jit(kernel_clock.repeated(lambda x: x @ x, 5)).lower(matrix).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "while" in entry and " dot(" not in entry


def row(by, ms, **others):
    common = {
        "op": "dplr, RWKV-7", "shape": "B1", "dtype": "bfloat16", "direction": "forward", "channels": 64,
        "error": 1e-3, "gradient_error": 2e-3, "not_measured": None, "check_failed": None, "how": "loop of 4",
    }  # fmt: skip
    return common | {"by": by, "ms": ms} | others


def test_the_report_compares_with_the_fastest_of_fla():
    rates = {"TFLOP_per_s": 50.0, "GB_per_s": 900.0, "of_matmul": 0.1, "of_copy": 0.3, "compile_s": 2.5}
    failed = {k: v for k, v in row("fla c", None, not_measured="out of memory").items() if k != "ms"}
    measured = {
        "date": "2026-01-01", "platform": "gpu", "device": "a GPU", "versions": {}, "seconds": 400.0,
        "ceilings": {"matmul": 5e14, "copy": 3e12}, "tuners": {"all": 2, "unfinished": 1},
        "rows": [row("xla", 8.0), row("gpu", 2.0, **rates), row("fla a", 5.0), row("fla b", 3.0), failed],
    }  # fmt: skip
    text = report(measured)
    assert "| dplr, RWKV-7 | B1 | forward | 8 | 2 | 3 |  | 4 | 1.5 | 50 | 900 | 0.3 |" in text
    assert "| dplr, RWKV-7 | 64 | 1.0e-03, 2.0e-03 | 1.0e-03, 2.0e-03 | 1.0e-03, 2.0e-03 |" in text
    assert "| dplr, RWKV-7 | B1 | forward |  | 2.5 |" in text
    assert "- fla c: out of memory: dplr, RWKV-7 B1 forward" in text


@pytest.mark.parametrize("name", kernel_peers.PEERS)
def test_peers_are_told_all_arguments_by_name(name):
    variant = VARIANTS[name]
    names = kernel_rows.Case(variant, variant.small, "bfloat16").names()
    for peer in kernel_peers.PEERS[name]:
        assert set(peer.arguments.values()) <= set(names)
        assert peer.made or set(peer.arguments.values()) == set(names)
