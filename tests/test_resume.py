"""Every layer file: 2N steps == N steps, stop, resume, N more: bit-identical parameters and metrics."""

import jax
import numpy as np
import pytest
from rows import FIRST_ROWS, ROWS, WIDTH

from experiments.config import Run
from experiments.text import TextData
from experiments.train import train
from zoo import lm


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("what is done twice is the same as what is done once and taken up again. " * 30)
    return path


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


NAMES = [name for name in ROWS if name in FIRST_ROWS]
# Compiling a training step costs half as much again for its optimiser and loss: some layers share them.
GROUPS = ["+".join(NAMES[i : i + 4]) for i in range(0, len(NAMES), 4)]


@pytest.fixture
def quick_random():
    """Initial values from the generator that is quickest to compile."""
    with jax.default_prng_impl("rbg"):
        yield


@pytest.mark.deep
@pytest.mark.parametrize("names", GROUPS)
def test_resumed_training_is_uninterrupted_training(names, text, tmp_path, float32, quick_random):
    pattern = tuple(ROWS[name] for name in names.split("+"))
    model = lm.Config(vocab_size=64, width=WIDTH, depth=2 * len(pattern), pattern=pattern, mlp="none")
    data = TextData(path=str(text), tokenizer="char", length=12, mode="packed", documents="joined")
    run = Run(model=model, data=data, steps=6, batch_size=2, log_every=1, eval_batches=1, seed=3)
    straight = train(run, tmp_path / "straight", progress=False)
    first = train(run, tmp_path / "parts", progress=False, until=3)
    assert first.stopped == "until"
    resumed = train(run, tmp_path / "parts", progress=False)
    assert untimed(resumed.rows) == untimed(straight.rows)
    assert [row["step"] for row in resumed.rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(straight.params), strict=True):
        np.testing.assert_array_equal(a, b)
