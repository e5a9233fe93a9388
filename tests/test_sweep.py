"""Sweeps: points, budgets, cells named by content, workers that die, runners that share a directory."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import budget, cells, grid, pool
from experiments.budget import Budget
from experiments.cells import Cell
from experiments.config import Optimizer, Run
from experiments.sweep import Sweep, sweep
from experiments.tasks.recall import RecallData
from experiments.tasks.recall_mixture import RecallMixture
from zoo import lm

DATA = RecallData(vocab_size=34, length=16, pairs=2, train_examples=64, eval_examples=16)


def run(layer="min_gru", width=8, seed=0, lr=1e-3, steps=4, **settings):
    model = lm.Config(vocab_size=34, width=width, depth=1, pattern=(layer,), remat=False, **settings)
    optimizer = Optimizer(lr=lr)
    return Run(
        model=model, data=DATA, optimizer=optimizer, steps=steps, batch_size=4, seed=seed, max_bad_steps=1
    )


def table(home):
    with (home / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# Points


def test_points_combine():
    a, b = grid.axis("a", 1, 2), grid.axis("b", "x", "y")
    assert grid.product(a, b) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert grid.zipped(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert grid.chain(a, b) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert grid.product() == [{}]


def test_points_that_clash_are_refused():
    with pytest.raises(ValueError, match="a varied twice"):
        grid.product(grid.axis("a", 1), grid.axis("a", 2))
    with pytest.raises(ValueError, match="lengths differ: 1, 2"):
        grid.zipped(grid.axis("a", 1), grid.axis("b", 1, 2))
    with pytest.raises(ValueError, match="loss cannot be varied"):
        Sweep.of("x", [{"loss": 1}], lambda loss: run())
    with pytest.raises(ValueError, match="at least one cell"):
        Sweep.of("x", [], run)


# Budgets


def test_runs_are_matched_in_parameters_flops_and_tokens():
    runs = (("large", run("attention", width=16, steps=100)), ("small", run("min_gru", steps=100)))
    for kind in ("params", "flops", "tokens"):
        met = budget.matched(runs, Budget(kind, tolerance=0.1))
        spent = [getattr(budget.costs(each), kind) for _, each in met]
        assert spent[0] == getattr(budget.costs(runs[0][1]), kind)
        assert spent[1] == pytest.approx(spent[0], rel=0.1)
    wide = budget.with_params(runs[0][1].model, 10_000)
    near = [dataclasses.replace(wide, expansion=(wide.hidden + n) / wide.width) for n in (-8, 0, 8)]
    off = [abs(lm.param_count(model) - 10_000) for model in near]
    assert min(off) == off[1]


def test_a_budget_that_is_not_met_names_who_missed_it():
    runs = (("one", run(width=8)), ("two", run(width=16)))
    with pytest.raises(ValueError, match=r"state_bytes is not met within 2% by two \("):
        budget.matched(runs, Budget("state_bytes"))
    with pytest.raises(ValueError, match="kind"):
        Budget("money")


def test_costs_are_those_of_the_config():
    spent = budget.costs(run(steps=3))
    assert spent.tokens == 3 * 4 * 16
    assert spent.inner_params == spent.params - 34 * 8
    assert spent.params == lm.param_count(run().model)


def test_a_mixture_costs_what_its_batches_hold():
    mixture = RecallMixture(vocab_size=66, train=((16, 2, 40), (32, 4, 80)), evaluation=((16, 2, 10),))
    mixed = dataclasses.replace(run(steps=20), data=mixture)
    source = mixture.build()
    tokens = sum(source.batch(0, step, 4)["tokens"].size for step in range(20))
    assert budget.costs(mixed).tokens == tokens
    assert 20 * 4 * 16 < tokens < 20 * 4 * 32


# Cells


def test_a_sweep_trains_what_is_missing_and_nothing_twice(tmp_path, float32):
    points = grid.product(grid.axis("width", 8), grid.axis("seed", 0, 1))
    first = Sweep.of("two", points, run)
    sweep(first, tmp_path, workers=0, progress=False)
    rows = table(tmp_path)
    assert [(row["width"], row["seed"]) for row in rows] == [("8", "0"), ("8", "1")]
    assert {"params", "tokens", "loss", "flops", "state_bytes"} <= rows[0].keys()
    assert float(rows[0]["loss"]) != float(rows[1]["loss"])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    more = Sweep.of("three", [*points, {"width": 8, "seed": 2}], run)
    sweep(more, tmp_path, workers=0, progress=False)
    assert table(tmp_path)[:2] == rows
    assert len(table(tmp_path)) == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_run_that_diverges_is_a_row_and_does_not_stop_the_others(tmp_path, float32):
    config = Sweep.of("rates", grid.axis("lr", 1e-3, 1e38), run)
    outcomes = sweep(config, tmp_path, workers=0, progress=False, retries=3)
    good, bad = (outcomes[cell.address] for cell in config.cells)
    assert good.summary
    assert "NotFiniteError" in bad.error
    assert "not finite" in table(tmp_path)[1]["error"]
    attempts = (tmp_path / "cells" / config.cells[1].address / "attempts.jsonl").read_text()
    assert attempts.count("began") == 1  # it would diverge again


def test_attempts_that_left_no_end_count_and_the_next_runner_begins_anew(tmp_path):
    rows = [{"runner": "a", "began": 1}, {"runner": "a", "began": 2}, {"runner": "b", "began": 3}]
    rows.append({"runner": "b", "stopped": "SIGTERM"})
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut o')
    assert cells.given_up(tmp_path, "a", retries=1)
    assert not cells.given_up(tmp_path, "a", retries=2)
    assert not cells.given_up(tmp_path, "b", retries=0)  # stopped politely: no failure
    assert not cells.given_up(tmp_path, "c", retries=0)


def test_what_cannot_be_trained_is_refused_before_anything_is(tmp_path):
    wrong = dataclasses.replace(run(), data=dataclasses.replace(DATA, vocab_size=66))
    with pytest.raises(ValueError, match="vocab_size=34, but the data have vocab_size=66"):
        sweep(Sweep(title="x", cells=(Cell({}, run()), Cell({}, wrong))), tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_core_sets_cover_the_machine_once():
    sets = pool.core_sets(1)
    assert len(sets) == len(os.sched_getaffinity(0))
    assert len({core for chosen in sets for core in chosen}) == len(sets)
    assert len(pool.core_sets(len(sets))) == 1


# Processes

FILE = '''"""Four small runs."""
from experiments.grid import axis, product
from experiments.sweep import Sweep
from test_sweep import run

config = Sweep.of("four", product(axis("width", 8, 16), axis("seed", 0, 1)), lambda **p: run(steps=300, **p))
'''


@pytest.fixture
def start(tmp_path):
    """Start `zoo sweep` on four small runs in `tmp_path / name`; what is left of it ends with the test."""
    file = tmp_path / "four.py"
    file.write_text(FILE)
    begun = []

    def go(name, *arguments):
        here = os.path.dirname(os.path.abspath(__file__))
        command = [sys.executable, "-m", "experiments.cli", "sweep", str(file), "--out", str(tmp_path / name)]
        begun.append(
            subprocess.Popen(
                [*command, *arguments],
                env=os.environ | {"PYTHONPATH": here, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return begun[-1]

    yield go
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"ended or took too long: {process.poll()}")
        time.sleep(0.05)


def attempts(home):
    lines = [line for path in home.glob("cells/*/attempts.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def ended(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.deep
@pytest.mark.timeout(700)
def test_killed_workers_stopped_runners_and_two_at_once_make_the_same_table(tmp_path, start):
    ended(start("whole", "--workers=1"))
    home = tmp_path / "shared"

    # A worker is killed in the middle of a run: another takes the cell up.
    first = start("shared", "--workers=1")
    wait_for(lambda: any(home.glob("cells/*/metrics.jsonl")), first)
    os.kill(attempts(home)[0]["pid"], signal.SIGKILL)
    wait_for(lambda: sum("began" in row for row in attempts(home)) >= 2, first)
    # The runner itself is asked to stop, which it does with a checkpoint, and then another is killed.
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=100)
    assert first.returncode == 130, output
    second = start("shared", "--workers=1")
    wait_for(lambda: len(list(home.glob("cells/*/summary.json"))) >= 1, second)
    second.kill()

    # Two at once: nobody trains what the other trains.
    pair = [start("shared", "--workers=1") for _ in range(2)]
    for process in pair:
        ended(process)
    assert (home / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()
    for path in home.glob("cells/*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines() if '"train"' in line]
        assert steps == sorted(set(steps))


@pytest.mark.deep
@pytest.mark.timeout(700)
def test_ray_makes_the_same_table(tmp_path, start):
    pytest.importorskip("ray")
    ended(start("local", "--workers=1"))
    ended(start("ray", "--ray", "--workers=2"))
    assert (tmp_path / "ray" / "results.csv").read_bytes() == (
        tmp_path / "local" / "results.csv"
    ).read_bytes()
