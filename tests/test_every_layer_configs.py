"""The two comparisons that train every layer: nobody is left out, and nobody is treated otherwise."""

import dataclasses

import pytest

from experiments import overrides
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
