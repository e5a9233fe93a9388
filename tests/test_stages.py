"""Tasks one after the other are the tasks themselves, batch for batch, in every part of the loop."""

import dataclasses

import numpy as np
import pytest

from experiments.budget import costs
from experiments.config import Optimizer, Run, from_dict, to_dict
from experiments.stages import Stages
from experiments.tasks.copying import CopyingData
from experiments.tasks.mnist1d import Mnist1dData
from experiments.train import train
from zoo import lm, registry

SHORT, LONG = (CopyingData(context=context, copied=3, eval_examples=8) for context in (5, 9))
DATA = Stages(tasks=(SHORT, LONG), steps=(3, 2))


def test_each_stage_is_its_task_from_the_beginning():
    source, short, long = DATA.build(), SHORT.build(), LONG.build()
    of = [(short, 0), (short, 1), (short, 2), (long, 0), (long, 1), (long, 2), (long, 3)]
    for step, (task, within) in enumerate(of):
        found, expected = source.batch(7, step, 4), task.batch(7, within, 4)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])


def test_evaluation_is_that_of_the_last():
    source, long = DATA.build(), LONG.build()
    for split in source.splits:
        found, expected = list(source.eval_batches(split, 3)), list(long.eval_batches(split, 3))
        assert len(found) == len(expected) == 3
        np.testing.assert_array_equal(found[1]["tokens"], expected[1]["tokens"])
    assert (source.chance, source.vocab_size, source.length) == (long.chance, 16, 12)
    assert source.describe() == f"{SHORT.build().describe()}, then {long.describe()}"


def run(steps: int, **changes) -> Run:
    layer = registry.config("min_gru", 8)
    model = lm.Config(vocab_size=16, width=8, depth=1, pattern=(layer,), mlp="none", remat=False)
    return Run(model=model, data=DATA, optimizer=Optimizer(lr=1e-2), steps=steps, batch_size=4, **changes)


@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_costs_count_the_tokens_of_every_stage(steps):
    assert costs(run(steps)).tokens == 4 * (8 * min(steps, 3) + 12 * max(steps - 3, 0))


def test_a_run_goes_on_in_the_stage_where_it_stopped(tmp_path, float32):
    whole = train(run(6, log_every=1), tmp_path / "whole", progress=False)
    train(run(6, log_every=1), tmp_path / "cut", progress=False, until=4)
    cut = train(run(6, log_every=1), tmp_path / "cut", progress=False)
    assert cut.summary["loss"] == whole.summary["loss"]
    assert from_dict(to_dict(run(6))) == run(6)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"^Stages: 1 numbers of steps for 2 tasks$"):
        dataclasses.replace(DATA, steps=(3,))
    with pytest.raises(ValueError, match=r"^Stages: steps=\(3, 0\) must be integers >= 1$"):
        dataclasses.replace(DATA, steps=(3, 0))
    with pytest.raises(ValueError, match=r"^Stages: tasks with vocab_size=16 and vocab_size=20$"):
        Stages(tasks=(SHORT, dataclasses.replace(LONG, vocab_size=20)), steps=(1, 1)).build()
    with pytest.raises(ValueError, match=r"^Stages: tasks with kind=language and kind=classification$"):
        Stages(tasks=(SHORT, Mnist1dData()), steps=(1, 1)).build()


def test_another_order_of_stages_is_other_data():
    prints = {
        stages.build().fingerprint
        for stages in (
            DATA,
            Stages(tasks=(LONG, SHORT), steps=(3, 2)),
            dataclasses.replace(DATA, steps=(4, 2)),
        )
    }
    assert len(prints) == 3
