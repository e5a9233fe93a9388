"""The README's table of kernels: what is on record, and blanks for the rest."""

import csv
import json
import types

import kernels
import pytest

from experiments import kernel_matrix
from experiments.kernel_cases import VARIANTS
from pallas_kernels.dispatch import Kernel


def cells(results, op):
    """Two lines of the table, by column."""
    lines = kernel_matrix.table(results).splitlines()
    text = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(text[0], line, strict=True)) for line in text[2:] if line[0] == f"`{op}`"]


@pytest.fixture
def both(monkeypatch):
    """The delta rule has a kernel on both platforms."""
    kind = type(VARIANTS["gated_delta_rule, scalar decay"])
    monkeypatch.setattr(
        kind, "platforms", property(lambda self: ["tpu", "gpu"] if self.op == "gated_delta_rule" else [])
    )


def test_without_records_all_is_blank(both, tmp_path):
    forward, backward = cells(tmp_path, "gated_delta_rule")
    assert (forward["direction"], backward["direction"]) == ("forward", "backward")
    for line in (forward, backward):
        assert line.pop("XLA") == "yes" and line.pop("op") and line.pop("direction")
        assert set(line.values()) == {""}
    assert cells(tmp_path, "dplr")[0]["TPU, interpreted"] == "none"


def test_a_record_replaces_what_ran_and_keeps_the_rest(tmp_path):
    kernel_matrix.record({("a", "gpu"), ("b", "gpu")}, {("a", "gpu"), ("b", "gpu")}, tmp_path)
    kernel_matrix.record({("c", "gpu")}, {("b", "gpu"), ("c", "gpu")}, tmp_path)
    text = (tmp_path / kernel_matrix.INTERPRETED).read_text()
    assert text.split() == ["op,platform", "a,gpu", "c,gpu"]


def write_compiled(path, *outcomes):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("op", "direction", "target", "outcome"))
        writer.writerows(outcomes)


def test_records_fill_their_cells(both, tmp_path):
    kernel_matrix.record({("gated_delta_rule", "gpu")}, {("gated_delta_rule", "gpu")}, tmp_path)
    scalar, channel = (f"gated_delta_rule, {kind} decay" for kind in ("scalar", "channel"))
    write_compiled(
        tmp_path / "kernels_static.csv",
        (scalar, "forward", "TPU v5e", "compiled"),
        (scalar, "forward", "TPU v6e", "compiled"),
        (channel, "forward", "TPU v6e", "'tpu' takes heads of at most 128 channels"),
        (scalar, "forward+backward", "TPU v5e", "ValueError: no"),
        (channel, "forward+backward", "H200", "compiled"),
    )
    rows = [
        {"op": scalar, "by": by, "direction": "forward+backward", "ms": ms}
        for by, ms in {"gpu": 2.0, "xla": 3.0, "tpu": None}.items()
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": rows}))
    forward, backward = cells(tmp_path, "gated_delta_rule")
    assert forward["TPU, compiled"] == "TPU v5e, TPU v6e in part" and forward["GPU, compiled"] == ""
    assert backward["TPU, compiled"] == "" and backward["GPU, compiled"] == "H200"
    assert forward["GPU, interpreted"] == backward["GPU, interpreted"] == "yes"
    assert forward["TPU, interpreted"] == forward["GPU, measured"] == backward["TPU, measured"] == ""
    assert backward["GPU, measured"] == backward["XLA, measured"] == "NVIDIA H200"


def test_the_committed_record_names_kernels_that_exist():
    path = kernel_matrix.RESULTS / kernel_matrix.INTERPRETED
    with path.open(newline="") as stream:
        recorded = {(row["op"], row["platform"]) for row in csv.DictReader(stream)}
    existing = {(variant.op, platform) for variant in VARIANTS.values() for platform in variant.platforms}
    assert recorded <= existing


def test_a_watched_kernel_is_noted_when_it_runs(monkeypatch):
    implementations = {"xla": abs, "tpu": Kernel(abs), "gpu": Kernel(abs)}
    variant = types.SimpleNamespace(op="op", implementations=implementations)
    monkeypatch.setattr(kernels, "VARIANTS", {"variant": variant})
    monkeypatch.setattr(kernels, "ran", set())
    kernels.watch()
    assert implementations["xla"] is abs and implementations["gpu"].run(-2) == 2
    assert kernels.ran == {("op", "gpu")}
