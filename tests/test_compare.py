"""Comparisons: who wins is decided on validation, what is reported is from elsewhere."""

import csv
import dataclasses
import json
import re

import pytest
from test_sweep import DATA, run

from experiments import compare, config, measure
from experiments.budget import Budget
from experiments.cells import Cell, prepare
from experiments.compare import Comparison
from experiments.reports import comparison as comparison_report


def comparison(**settings):
    runs = (("gru", run("min_gru")), ("memory", run("gla")))
    grid = (("optimizer.lr", (1e-3, 1e-2)),)
    probes = (("length 32", dataclasses.replace(DATA, length=32)),)
    return Comparison(
        **{"title": "two", "runs": runs, "seeds": (0, 1), "grid": grid, "probes": probes} | settings
    )


# Made-up accuracies on validation by (model, rate, seed); those on test would choose otherwise.
VALIDATION = {
    ("gru", 1e-3, 0): 0.5,
    ("gru", 1e-3, 1): 0.7,
    ("gru", 1e-2, 0): 0.9,
    ("gru", 1e-2, 1): 0.1,
    ("memory", 1e-3, 0): 0.2,
    ("memory", 1e-3, 1): 0.2,
    ("memory", 1e-2, 0): 0.8,
}


def train_in_words(cells, home, **_):
    """Instead of training: what runs leave behind, with the accuracies of VALIDATION; others failed."""
    prepare(cells, home)
    for cell in cells:
        directory = home / "cells" / cell.address
        key = (cell.point["model"], cell.point["optimizer.lr"], cell.point["seed"])
        if key not in VALIDATION:
            row = {"runner": "r", "error": "NotFiniteError: it diverged", "final": True}
            (directory / "attempts.jsonl").write_text(json.dumps(row) + "\n")
            continue
        summary = {"accuracy": VALIDATION[key], "loss": 1 - VALIDATION[key], "exact": 0.0, "bad_steps": 1}
        (directory / "summary.json").write_text(json.dumps(summary | {"step": 4, "split": "validation"}))
        # Losses of 40 steps fall from 4 by 0.05 a step; the second was skipped.
        rows = [{"kind": "train", "step": step, "loss": 4 - 0.05 * (step - 1)} for step in range(1, 41)]
        rows[1]["loss"] = None
        lines = [*rows, {"kind": "eval", "step": 40, "loss": 2.5}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def figures_of(directory, run, probes):
    """On test, the lower rate would be better."""
    figures = {"accuracy": 1 - run.optimizer.lr, "loss": 2.0 + run.seed, "exact": 0.0, "split": "test"}
    return {"test": figures, **{name: figures | {"accuracy": 0.25} for name, _ in probes}}


@pytest.fixture
def in_words(monkeypatch):
    monkeypatch.setattr(compare, "train_all", train_in_words)
    monkeypatch.setattr(measure, "tested", figures_of)
    monkeypatch.setattr(measure, "speed", lambda directory, run: {"train_tokens_per_second": 100.0})


def rows_of(home, name="results.csv"):
    with (home / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_winner_has_the_best_mean_on_validation_and_all_its_seeds(tmp_path, in_words):
    arms = compare.compare(comparison(), tmp_path, progress=False)
    # 0.6 on average beats 0.5, though the single best seed is at the other rate.
    assert arms["gru"].point == {"optimizer.lr": 1e-3}
    # One seed of the better rate diverged: a rate is not chosen by those that survive it.
    assert arms["memory"].point == {"optimizer.lr": 1e-3}
    assert arms["memory"].failed == ["model=memory, optimizer.lr=0.01, seed=1: NotFiniteError: it diverged"]
    gru, memory = rows_of(tmp_path)
    assert float(gru["validation accuracy"]) == pytest.approx(0.6)
    assert float(gru["test accuracy"]) == pytest.approx(1 - 1e-3)
    assert float(gru["test loss"]) == pytest.approx(2.5)
    assert float(gru["test loss s.d."]) == pytest.approx(0.5**0.5)
    assert "diverged" in memory["failed"]
    assert len(rows_of(tmp_path, "cells.csv")) == 8


def test_a_loss_is_better_when_it_is_lower(tmp_path, in_words):
    arms = compare.compare(comparison(select="loss"), tmp_path, progress=False)
    assert arms["gru"].point == {"optimizer.lr": 1e-3}


def test_tables_and_report_say_how_it_was_made(tmp_path, in_words):
    compare.compare(comparison(), tmp_path, progress=False)
    text = (tmp_path / "results.md").read_text()
    for part in (
        "optimizer.lr in 0.001, 0.01; 2 seeds",
        "highest mean accuracy on the validation split",
        "Steps skipped because a loss or a gradient was not finite: 4 in 2 models",
        "| gru | 0.999 ± 0.000 | 0.250 ± 0.000 | 0.600 ± 0.141 |",
        "Failed: model=memory",
    ):
        assert part in text
    page = (tmp_path / "report.html").read_text()
    assert "it diverged" in page
    assert page.count("<svg") >= 3
    assert re.search(r"gru \*.*0\.001.*0\.6000 ± 0\.1414", page, re.DOTALL)
    # A name for the winner's directory.
    first = comparison().cells[0]
    assert (tmp_path / "gru").resolve().name == first.address


def test_losses_are_of_the_first_step_and_of_the_last_twenty(tmp_path, in_words):
    arms = compare.compare(comparison(), tmp_path, progress=False)
    first, last = comparison_report.losses(arms["gru"])
    assert first == 4
    assert last == pytest.approx(4 - 0.05 * (20 + 39) / 2)


def test_a_model_of_which_every_run_failed_is_a_row_without_results(tmp_path, in_words, monkeypatch):
    only = {key: value for key, value in VALIDATION.items() if key[0] == "gru"}
    monkeypatch.setitem(globals(), "VALIDATION", only)
    compare.compare(comparison(), tmp_path, progress=False)
    gru, memory = rows_of(tmp_path)
    assert gru["test accuracy"]
    assert memory["failed"].count("diverged") == 4
    assert not memory.get("test accuracy")


def test_cells_are_all_runs_at_all_points_with_all_seeds():
    made = comparison(budget=Budget("tokens"))
    assert len(made.cells) == 2 * 2 * 2
    assert {(cell.run.optimizer.lr, cell.run.seed) for cell in made.cells} == {
        (lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)
    }
    changed = made.override({"seeds": "3", "steps": "9", "select": "exact"})
    assert (changed.seeds, changed.select, len(changed.cells)) == ((3,), "exact", 4)
    assert {cell.run.steps for cell in changed.cells} == {9}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": ()}, "at least one run"),
        ({"runs": (("a", run()), ("a", run()))}, "share a label"),
        ({"seeds": ()}, "at least one"),
        ({"select": "beauty"}, "select"),
        ({"probes": (("test", DATA),)}, "none 'test'"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        comparison(**settings)
    with pytest.raises(ValueError, match="unknown field 'lr'"):
        _ = comparison(grid=(("lr", (1.0,)),)).cells


def test_what_is_measured_once_is_read_again_and_measured_anew_for_another_config(tmp_path):
    calls = []

    def measured():
        calls.append(1)
        return {"number": len(calls)}

    path = tmp_path / "numbers.json"
    assert measure.once(path, run(), measured) == {"number": 1}
    assert measure.once(path, run(), measured) == {"number": 1}
    assert measure.once(path, run(seed=1), measured) == {"number": 2}


def test_attention_reaches_as_far_as_a_probe_is_long():
    model = run("attention").model
    reaching = measure.reaching(model, 5000)
    assert reaching.layers[0].max_length == 5000
    assert measure.reaching(model, 100) == dataclasses.replace(model, pattern=model.layers)


def test_a_trained_comparison_end_to_end(tmp_path, float32):
    """Test split, a longer probe and speeds of a run that was really trained."""
    made = comparison(runs=(("gru", run("min_gru")),), seeds=(0,), grid=())
    arm = compare.compare(made, tmp_path, workers=0, progress=False)["gru"]
    assert set(arm.tested[0]) == {"test", "length 32"}
    assert arm.tested[0]["test"]["split"] == "test"
    assert 0 <= arm.tested[0]["length 32"]["accuracy"] <= 1
    assert arm.speed["train_tokens_per_second"] > 0
    assert arm.speed["decode_tokens_per_second"] > 0
    cell = Cell({}, made.cells[0].run)
    assert cell.address == config.fingerprint(cell.run) == arm.directories[0].name
