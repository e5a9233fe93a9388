"""The benchmark of generation: what it counts, and the table it makes of what processes tell it."""

import ast
import csv
import dataclasses
import sys

import pytest

from experiments import bench, bench_generate, bench_peers
from experiments.bench_generate import MODELS, PEERS, ROUNDS, SMALL, Side
from experiments.generate_worker import Work
from zoo import lm

# A side in the place of a process that has a model: what it says to every line, and where it fails.
FAKE = """
import json, sys
script, slowness, breaks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
say = lambda **values: print(json.dumps(values), flush=True)
print("noise", file=sys.stderr)
say(parameters=7)
for context in map(int, sys.argv[4:]):
    if context == breaks:
        raise SystemExit("out of order")
    sys.stdin.readline()
    say(prefill=slowness, **({"first": [1]} if slowness > 0.1 else {}))
    for n in range({rounds}):
        sys.stdin.readline()
        say(decode=slowness * (n + 1), busy=slowness / 2, tokens=[1, n])
    say(memory=2_000_000, state=1_000, streamed=0.5)
"""


def test_every_peer_is_in_the_script():
    tree = ast.parse((bench_peers.FOLDER / "transformers_models.py").read_text())
    assert set(PEERS) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(PEERS) <= set(MODELS)


def test_ours_counts_what_the_model_says(float32):
    work = Work("recurrent_gemma", SMALL, [40])
    cfg = bench_generate.config("recurrent_gemma", SMALL, 40)
    assert work.about()["parameters"] == lm.param_count(cfg)
    read, written = work.read(40), work.write()
    more = work.write()["tokens"]
    rest = work.rest()
    assert rest["state"] == lm.state_bytes(cfg) and len(written["tokens"]) == SMALL.tokens
    assert all(value > 0 for value in (read["prefill"], written["decode"], rest["streamed"], rest["memory"]))
    work.read(40)
    assert [work.write()["tokens"] for _ in range(2)] == [written["tokens"], more]


def test_full_attention_has_room_for_the_text():
    assert {layer.span for layer in bench_generate.config("attention", SMALL, 3000).layers} == {3008}


@pytest.fixture
def sides(monkeypatch):
    """Commands of processes that are not started; theirs fails at 64 tokens, and is five times as slow."""
    commands = []

    def fake(command):
        commands.append(command and list(map(str, command)))
        if command is None:
            return Side(None)
        ours = "experiments.generate_worker" in command
        contexts = commands[-1][commands[-1].index(bench_generate.NONE) + 1 :]
        told = (0.1, 0) if ours else (0.5, 64)
        code = FAKE.replace("{rounds}", str(ROUNDS))
        return Side([sys.executable, "-c", code, "fake", *told, *contexts])

    monkeypatch.setattr(bench_generate, "Side", fake)
    monkeypatch.setattr(bench_generate, "_weights", lambda name, sizes, python, folder: None)
    folder = type("Folder", (), {"__enter__": lambda self: bench_generate.NONE, "__exit__": lambda *_: None})
    monkeypatch.setattr(bench_generate.tempfile, "TemporaryDirectory", folder)
    here = dataclasses.replace(PEERS["mamba"], packages=("pytest", "jax"))
    monkeypatch.setattr(bench_generate, "PEERS", {"mamba": here})
    return commands


def test_table(sides, tmp_path, capsys):
    options = ["--layers", "mamba,attention", "--lengths", "32,64,128", "--out", str(tmp_path)]
    assert bench.main(["generate", "--small", "--peer-python", sys.executable, *options]) == 0
    with (tmp_path / "generate_small.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["context"]) for row in rows] == [
        (name, context) for name in ("mamba", "attention") for context in ("32", "64", "128")
    ]
    assert float(rows[0]["ratio"]) == pytest.approx(5) and float(rows[0]["memory_MB"]) == 2
    assert float(rows[0]["tokens_per_second"]) == pytest.approx(
        1 / (0.1 * (ROUNDS + 1) / 2)
    )  # of the median round
    # Theirs says its first token with the prompt, ours with the others.
    assert rows[0]["same_tokens"] == f"1 of {2 * ROUNDS}" and float(rows[0]["busy_ratio"]) == pytest.approx(5)
    # Who failed has no further rows; the others go on.
    assert "out of order" in capsys.readouterr().out
    assert [row["theirs_per_second"] != "" for row in rows] == [True] + 5 * [False]
    assert all(row["tokens_per_second"] for row in rows) and "pytest" in rows[0]["theirs"]
    assert [command[-3:] for command in sides[:2]] == 2 * [["32", "64", "128"]]
    assert [command and command[-1] for command in sides[2:]] == [None, "32", None, "64", None, "128"]


def test_no_context_that_would_take_too_long(sides, monkeypatch):
    monkeypatch.setattr(bench_generate, "PATIENCE", 0.3)  # theirs would take 1 s for 64 tokens, ours 0.2
    found = bench_generate.rows("mamba", SMALL, [32, 64, 128], [sys.executable])
    assert [(row["context"], row["theirs_prefill_s"]) for row in found] == [
        (32, 0.5),
        (64, None),
        (128, None),
    ]


def test_sides_that_take_too_long_are_ended(monkeypatch, capsys):
    monkeypatch.setattr(bench_generate, "PATIENCE", 0.2)
    assert Side([sys.executable, "-c", "import time; time.sleep(60)"]).said("memory") == []
    assert "ended by -9" in capsys.readouterr().out


def test_the_answers_are_json():
    """What a side says of itself counts in every row that it brings to its end."""
    script = 'print("""{"about": 3}"""); input(); print("""{"memory": 1}""")'
    side = Side([sys.executable, "-c", script])
    side.begin()
    assert side.said("about") == side.said("memory") == []
    side.ask()
    assert (side.said("about"), side.said("memory")) == ([3], [1])
    side.end()
