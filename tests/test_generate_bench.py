"""The benchmark of generation: what it counts, and the table it makes of what processes tell it."""

import ast
import csv
import dataclasses
import sys

import pytest

from experiments import bench, bench_generate, bench_peers
from experiments.bench_generate import MODELS, PEERS, SMALL
from zoo import lm

THEIRS = {"prefill": 3.0, "decode": 0.5, "memory": 4_000_000, "parameters": 7}
OURS = {"prefill": 1.0, "decode": 0.1, "streamed": 0.2, "memory": 2_000_000, "state": 1_000, "parameters": 7}


def test_every_peer_is_in_the_script():
    tree = ast.parse((bench_peers.FOLDER / "transformers_models.py").read_text())
    assert set(PEERS) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(PEERS) <= set(MODELS)


def test_ours_counts_what_the_model_says(float32):
    row = bench_generate.measure("recurrent_gemma", SMALL, 40)
    cfg = bench_generate.config("recurrent_gemma", SMALL, 40)
    assert row["parameters"] == lm.param_count(cfg)
    assert row["state"] == lm.state_bytes(cfg)
    assert all(row[key] > 0 for key in ("prefill", "decode", "streamed"))


def test_full_attention_has_room_for_the_text():
    assert {layer.span for layer in bench_generate.config("attention", SMALL, 3000).layers} == {3008}


@pytest.fixture
def asked(monkeypatch):
    """Commands of processes that are not started; theirs fails at 64 tokens."""
    commands = []

    def answer(command):
        commands.append(list(map(str, command)))
        ours = "experiments.bench_generate" in command
        return OURS if ours else THEIRS if command[-2] == 32 else None

    monkeypatch.setattr(bench_generate, "_asked", answer)
    here = dataclasses.replace(PEERS["mamba"], packages=("pytest", "jax"))
    monkeypatch.setattr(bench_generate, "PEERS", {"mamba": here})
    return commands


def test_table(asked, tmp_path):
    options = ["--layers", "mamba,attention", "--lengths", "32,64,128", "--out", str(tmp_path)]
    assert bench.main(["generate", "--small", "--peer-python", sys.executable, *options]) == 0
    with (tmp_path / "generate_small.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["context"]) for row in rows] == [
        (name, context) for name in ("mamba", "attention") for context in ("32", "64", "128")
    ]
    assert float(rows[0]["ratio"]) == 5 and float(rows[0]["memory_MB"]) == 2
    assert rows[0]["theirs_per_second"] == "2.0" and rows[1]["theirs_per_second"] == ""
    # Who failed is asked no more.
    assert [c[-2:] for c in asked if c[1].endswith("transformers_models.py")] == [["32", "8"], ["64", "8"]]
    assert rows[3]["ratio"] == "" and "pytest" in rows[0]["theirs"]


def test_processes_that_fail_are_named(capsys):
    assert bench_generate._asked([sys.executable, "-c", "raise SystemExit('out of order')"]) is None
    assert "out of order" in capsys.readouterr().out
    assert bench_generate._asked([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}
