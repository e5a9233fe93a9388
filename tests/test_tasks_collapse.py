"""The probe for state collapse: in pieces as in one, and right about states that are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.losses import model_losses
from experiments.sources import LanguageSource
from experiments.tasks import collapse
from experiments.tasks.lexicon import LexiconData
from experiments.tasks.recall import RecallData
from zoo import lm

ROWS = 3
SOURCE = LexiconData(length=48, words=60, topics=2, letters=9, shortest=2, longest=4, eval_examples=ROWS)
MODEL = lm.Config(
    vocab_size=SOURCE.vocab_size, width=8, depth=3, pattern=("gla", "mamba", "lru"), mlp="none", remat=False
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lm.init, static_argnums=1)(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def source():
    return SOURCE.build()


def test_pieces_find_what_the_whole_sequence_has(params, source):
    whole = collapse.measure(params, MODEL, source, rows=ROWS, piece=48)
    pieces = collapse.measure(params, MODEL, source, rows=ROWS, piece=20)
    np.testing.assert_array_equal(whole.ends, [48])
    np.testing.assert_array_equal(pieces.ends, [20, 40, 48])
    np.testing.assert_allclose(pieces.loss, whole.loss, rtol=1e-9)
    assert whole.states.keys() == pieces.states.keys()
    for name, end in whole.states.items():
        for value, part in zip(end, pieces.states[name], strict=True):
            assert value.shape[0] == 1 and part.shape[0] == 3
            np.testing.assert_allclose(part[-1], value[0], rtol=1e-9, atol=1e-12)


def test_its_loss_is_the_loss_of_evaluation(params, source):
    probe = collapse.measure(params, MODEL, source, rows=ROWS, piece=20)
    (batch,) = source.eval_batches("validation", ROWS)
    sums = jax.jit(lambda p, b: model_losses(p, MODEL, b)[0])(params, batch)
    assert probe.loss.shape == (48,)
    np.testing.assert_allclose(probe.loss.mean(), sums["loss"] / sums["tokens"], rtol=1e-9)


def test_targets_that_are_ignored_do_not_count(params, source):
    (batch,) = source.eval_batches("validation", ROWS)
    targets = batch["targets"].copy()
    targets[1:, 10], targets[:, 11] = -1, -1
    probe = collapse.measure_batch(params, MODEL, {"tokens": batch["tokens"], "targets": targets}, piece=48)
    first = {name: np.repeat(x[:1], ROWS, 0) for name, x in batch.items()}
    alone = collapse.measure_batch(params, MODEL, first, piece=48)
    np.testing.assert_allclose(probe.loss[10], alone.loss[10], rtol=1e-9)
    assert np.isnan(probe.loss[11]) and np.isfinite(np.delete(probe.loss, 11)).all()


def test_statistics_are_those_of_the_states_themselves(params, source):
    (batch,) = source.eval_batches("validation", ROWS)
    probe = collapse.measure_batch(params, MODEL, batch, piece=48)
    _, state, _ = jax.jit(lambda p, tokens: lm.apply(p, MODEL, tokens))(params, batch["tokens"])
    gla, _, lru = state[0]
    named = {name: s for name, s in probe.states.items() if name.endswith("memory")}
    assert list(named) == ["0.0.memory", "0.1.memory", "0.2.memory"]
    memory = np.asarray(gla.memory)  # [1, B, H, K, V]
    heads = memory.shape[2]
    assert named["0.0.memory"].mean.shape == (1, 1, heads)
    for h in range(heads):
        each = memory[0, :, h].reshape(ROWS, -1)
        expected = each.mean(1).mean(), each.var(1).mean(), np.linalg.norm(each, axis=1).mean()
        found = [x[0, 0, h] for x in named["0.0.memory"]]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    rest = np.asarray(lru.memory)[0]
    assert np.iscomplexobj(rest)
    norm = np.linalg.norm(rest.reshape(ROWS, -1), axis=1).mean()
    np.testing.assert_allclose(named["0.2.memory"].norm, [[[norm]]], rtol=1e-9)


def test_the_table_has_a_row_for_each_doubling():
    loss = np.concatenate([np.full(16, 1.0), np.full(16, 2.0), np.full(40, 5.0)])
    norms = np.array([1.0, 2.0, 3.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0])[:, None, None]
    states = {
        "memory": collapse.Statistics(norms, norms, norms),
        "flat": collapse.Statistics(*[norms**0] * 3),
    }
    table = collapse.Probe(loss, 8 * np.arange(1, 10), states).table(trained=16)
    assert table == [
        {"length": 16, "loss": 1.0, "above": 0.0, "growth": 1.0},
        {"length": 32, "loss": 2.0, "above": 1.0, "growth": 2.0},
        {"length": 64, "loss": 5.0, "above": 4.0, "growth": 4.0},
    ]


def test_a_stretch_scores_the_end_of_a_row_as_the_probe_does(params, source):
    stretch = collapse.Stretch.at(replace(SOURCE, length=16), 48)
    assert (stretch.first, stretch.data) == (42, SOURCE)
    (batch,) = stretch.build().eval_batches("validation", ROWS)
    assert batch["positions"].shape == batch["targets"].shape == (ROWS, 6)
    sums = jax.jit(lambda p, b: model_losses(p, MODEL, b)[0])(params, batch)
    probe = collapse.measure(params, MODEL, source, rows=ROWS, piece=48)
    assert sums["tokens"] == 6 * ROWS
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], probe.loss[42:].mean(), rtol=1e-9)
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], probe.table(6)[-1]["loss"], rtol=1e-9)


def test_a_stretch_is_a_source_of_its_own(source):
    stretch = collapse.Stretch(data=SOURCE, first=40).build()
    assert isinstance(stretch, LanguageSource)
    whole, end = source.batch(3, 1, 2), stretch.batch(3, 1, 2)
    np.testing.assert_array_equal(end["tokens"], whole["tokens"])
    np.testing.assert_array_equal(end["targets"], whole["targets"][:, 40:])
    other = collapse.Stretch(data=SOURCE, first=41).build()
    assert len({source.fingerprint, stretch.fingerprint, other.fingerprint}) == 3
    assert stretch.describe().startswith("places 40 to 48 of: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": SOURCE, "first": 48}, "Stretch: first=48 lies beyond length=48"),
        ({"data": SOURCE, "first": -1}, "Stretch: first=-1 must be at least 0"),
    ],
)
def test_a_stretch_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        collapse.Stretch(**settings)


def test_a_stretch_needs_a_target_for_every_token():
    stretch = collapse.Stretch(data=RecallData(length=48, vocab_size=64), first=40)
    with pytest.raises(ValueError, match=r"^Stretch needs a target for every token$"):
        stretch.build().batch(0, 0, 2)


def test_line_breaks_to_no_end(params):
    batch = collapse.newlines(ROWS, 48, token=3)
    assert (batch["tokens"] == 3).all() and batch["tokens"].shape == (ROWS, 48)
    assert collapse.newlines(1, 3)["targets"].tolist() == [[10, 10, 10]]
    probe = collapse.measure_batch(params, MODEL, batch, piece=48)
    assert probe.loss.shape == (48,) and np.isfinite(probe.loss).all()


def test_a_state_that_only_adds_up_is_seen_to_grow(source):
    model = lm.Config(
        vocab_size=SOURCE.vocab_size, width=8, depth=1, pattern=("linear_attention",), mlp="none"
    )
    table = collapse.measure(lm.init(jax.random.key(1), model), model, source, rows=2, piece=6).table(6)
    assert [row["length"] for row in table] == [6, 12, 24, 48]
    growth = [row["growth"] for row in table]
    assert growth == sorted(growth) and growth[-1] > 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            next(RecallData(length=48, vocab_size=64).build().eval_batches("test", 2)),
            "not for a few positions",
        ),
        ({**collapse.newlines(1, 8), "segment_ids": jnp.zeros((1, 8), int)}, "not packed ones"),
    ],
)
def test_the_probe_refuses_what_it_cannot_read(params, batch, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}$"):
        collapse.measure_batch(params, MODEL, batch)
