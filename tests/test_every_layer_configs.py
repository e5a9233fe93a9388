"""The two comparisons that train every layer: nobody is left out, and nobody is treated otherwise."""

import dataclasses
import re

import pytest

from experiments import compare, overrides
from experiments.train import Result
from zoo import registry

NAMES = ("every_layer_recall", "every_layer_text")


@pytest.fixture(params=NAMES)
def comparison(request):
    return overrides.load(request.param)[0]


def test_every_layer_once_with_its_defaults(comparison):
    assert [label for label, _ in comparison.runs] == list(registry.LAYERS)
    for label, run in comparison.runs:
        assert run.model.pattern == (registry.config(label, run.model.width),)


def test_nothing_but_the_layer_differs(comparison):
    """Same data, batches, optimiser and steps."""
    first = comparison.runs[0][1]
    for _, run in comparison.runs:
        model = dataclasses.replace(run.model, pattern=first.model.pattern)
        assert dataclasses.replace(run, model=model) == first


def test_overrides_reach_every_run(comparison):
    changed = comparison.override({"steps": "3", "optimizer.lr": "0.5", "model.depth": "1"})
    assert len(changed.runs) == len(registry.LAYERS)
    for _, run in changed.runs:
        assert (run.steps, run.optimizer.lr, run.model.depth) == (3, 0.5, 1)


def results(count):
    """Made-up runs of 40 steps, whose losses fall from 4 by 0.05 a step."""
    rows = [{"kind": "train", "step": step, "loss": 4 - 0.05 * (step - 1)} for step in range(1, 41)]
    rows.insert(1, {"kind": "train", "step": 2, "loss": None})  # a skipped step has no loss
    summary = {
        "loss": 2.5,
        "accuracy": 0.5,
        "params": 1234,
        "state_bytes": 100,
        "bad_steps": 1,
        "tokens_per_second": 10_000.0,
        "compile_seconds": None,
    }
    evaluation = {"kind": "eval", "step": 40, "loss": 2.5}
    return {f"run{i}": Result(summary, None, [*rows, evaluation]) for i in range(count)}


def test_numbers_are_of_the_first_step_and_of_the_last_twenty():
    values = compare.numbers(results(1)["run0"])
    assert values["first_loss"] == 4
    assert values["last_loss"] == pytest.approx(4 - 0.05 * (20 + 39) / 2)


def test_markdown_has_a_row_for_every_run_and_counts_skipped_steps():
    text = compare.markdown("a title", results(3))
    assert "a title" in text
    assert "3 in 3 runs" in text
    assert re.findall(r"^\| (run\d) \|", text, re.MULTILINE) == ["run0", "run1", "run2"]
    assert "| run0 | 4.000 | 2.525 | 0.500 | 2.500 | 1,234 | 100 | 10,000 | – |" in text


@pytest.mark.parametrize("count", [2, compare.FEW + 1])
def test_plot_of_few_and_of_many(count, tmp_path):
    compare.plot("a title", results(count), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
