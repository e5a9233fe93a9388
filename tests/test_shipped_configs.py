"""Every run of every shipped config is one that can begin: its model reads its data."""

import pytest

from experiments import overrides
from experiments.budget import build
from experiments.config import Run
from experiments.sweep import Sweep
from experiments.train import check

# They ask for a text that the user brings; their tests bring one.
BROUGHT = ("continued", "shakespeare", "state_passing")


def runs_of(config) -> list[Run]:
    if isinstance(config, Run):
        return [config]
    if isinstance(config, Sweep):
        return [cell.run for cell in config.cells]
    return [run for _, run in config.runs]


@pytest.mark.parametrize("name", [name for name in overrides.config_names() if name not in BROUGHT])
def test_models_read_their_data(name):
    module = overrides.module(name)
    runs = [
        run for config in (module.config, *getattr(module, "MORE", {}).values()) for run in runs_of(config)
    ]
    assert runs
    for run in runs:
        check(run, build(run.data))
