"""Rows of documents: best-fit packing and lengths that change, nothing lost or doubled, any step at once."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import step as training_step
from experiments.config import Run
from experiments.curriculum import Curriculum
from experiments.packing import best_fit
from experiments.text import TextData
from experiments.train import train
from zoo import lm

LENGTH = 16
SIZES = [3, 40, 16, 15, 9, 1, 25, 7, 7, 32, 12, 5]  # of the documents, in characters


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Documents in which no character comes twice, so that a target says where it is from."""
    letters = iter(chr(0x4E00 + i) for i in range(sum(SIZES)))
    lines = ["".join(next(letters) for _ in range(size)) for size in SIZES]
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def text(path, **changes):
    fields = {"path": path, "tokenizer": "char", "documents": "lines", "length": LENGTH, "validation": path}
    return TextData(**fields | {"mode": "packed"} | changes)


def stages(path, **changes):
    fields = {"text": text(path), "lengths": (4, 8, 16), "steps": (3, 2, 5)}
    return Curriculum(**fields | changes)


def all_targets(source):
    """Every (token, target) of the training documents, once."""
    tokens = source._parts["train"].tokens
    return Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


def scored(tokens, targets):
    known = targets >= 0
    return Counter(zip(tokens[known].tolist(), targets[known].tolist(), strict=True))


# --- best fit -------------------------------------------------------------------------------------------


def slow_best_fit(sizes, room):
    """The definition: the spaces left, and the smallest that fits."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        fits = [s for s in spaces if s >= size]
        if fits:
            spaces.remove(min(fits))
        spaces.append((min(fits) if fits else room) - size)
    return sorted(spaces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.randoms())
def test_best_fit_is_its_definition_in_any_order(sizes, random):
    bins = best_fit(np.array(sizes), 20)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert sorted(20 - sum(sizes[i] for i in items) for items in bins) == slow_best_fit(sizes, 20)
    random.shuffle(sizes)
    assert len(best_fit(np.array(sizes), 20)) == len(bins)


def test_best_fit_rows_hold_every_target_once_an_epoch(path):
    source = text(path, mode="best_fit").build()
    per_epoch = source._bins(0, 0).rows
    epochs = [source.batch(0, epoch, per_epoch) for epoch in range(3)]
    for batch in epochs:
        assert scored(batch["tokens"], batch["targets"]) == all_targets(source)
    assert any((epochs[0][name] != epochs[1][name]).any() for name in epochs[0])
    total = sum(size + 1 for size in SIZES)
    assert per_epoch == -(-total // LENGTH) == 12  # not one row more than the text takes


def test_best_fit_cuts_only_what_is_longer_than_a_row(path):
    source = text(path, mode="best_fit").build()
    separator = source.tokenizer.separator
    batch = source.batch(0, 0, source._bins(0, 0).rows)
    whole, parts = Counter(), 0
    for tokens, segments, targets in zip(
        batch["tokens"], batch["segment_ids"], batch["targets"], strict=True
    ):
        assert (np.diff(segments) >= 0).all() and (np.diff(segments) <= 1).all() and segments[0] == 0
        for segment in range(segments[-1] + 1):
            here = (segments == segment) & (targets >= 0)
            if not here.any():  # padding is the last segment
                assert segment == segments[-1]
                continue
            begins, ends = tokens[here][0] == separator, targets[here][-1] == separator
            whole.update([int(here.sum())] if begins and ends else [])
            parts += not (begins and ends)
    assert whole == Counter(size + 1 for size in SIZES if size + 1 <= LENGTH)
    assert parts == sum(-(-(size + 1) // LENGTH) for size in SIZES if size + 1 > LENGTH)


# --- curriculum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycle", [False, True])
def test_lengths_follow_the_steps(path, cycle):
    source = stages(path, cycle=cycle).build()
    lengths = [source.batch(0, step, 2)["tokens"].shape for step in range(13)]
    end = [(2, 4)] * 3 if cycle else [(2, 16)] * 3
    assert lengths == [(2, 4)] * 3 + [(2, 8)] * 2 + [(2, 16)] * 5 + end
    counted = source.alike(0, 13, 2)
    assert [count for count, _ in counted] == ([6, 2, 5] if cycle else [3, 2, 8])
    assert [lengths[step][1] for _, step in counted] == [4, 8, 16]


@pytest.mark.parametrize("size", [1, 3])
def test_a_curriculum_reads_the_text_on_and_every_target_once_an_epoch(path, size):
    """The rows of all batches, end to end, are one stream of epochs: lengths are only where it is cut."""
    source = stages(path, cycle=True).build()
    batches = [source.batch(0, step, size) for step in range(70 // size)]
    tokens, targets = (np.concatenate([b[name].ravel() for b in batches]) for name in ("tokens", "targets"))
    positions = -(-source._parts["train"].size // LENGTH) * LENGTH
    assert len(tokens) > 2 * positions
    for epoch in range(2):
        here = slice(epoch * positions, (epoch + 1) * positions)
        assert scored(tokens[here], targets[here]) == all_targets(source)


def test_segments_of_a_curriculum_are_documents(path):
    source = stages(path).build()
    separator = source.tokenizer.separator
    for step in range(10):
        batch = source.batch(0, step, 3)
        tokens, targets, segments = (batch[name] for name in ("tokens", "targets", "segment_ids"))
        begins = np.diff(segments, axis=1) == 1
        assert (segments[:, 0] == 0).all() and np.isin(np.diff(segments, axis=1), (0, 1)).all()
        # Within a document the next token is the target; where the text goes on elsewhere a segment begins.
        follows = (tokens[:, 1:] == targets[:, :-1]) & (tokens[:, 1:] != separator)
        assert (begins | follows | (targets[:, :-1] < 0)).all()
        assert begins[tokens[:, 1:] == separator].all()


@pytest.mark.parametrize("data", [stages, lambda path: text(path, mode="best_fit")])
def test_any_batch_at_once_and_in_any_order(path, data):
    first, second = data(path).build(), data(path).build()
    assert first.fingerprint == second.fingerprint
    wanted = {step: first.batch(3, step, 4) for step in range(30)}
    for step in (29, 3, 17, 0, 16):
        for name, x in second.batch(3, step, 4).items():
            np.testing.assert_array_equal(x, wanted[step][name])
    others = first.batch(4, 3, 4)
    assert any((others[name] != x).any() for name, x in wanted[3].items())


def test_fingerprints_differ(path):
    made = [stages(path), stages(path, cycle=True), stages(path, steps=(3, 2, 6)), text(path)]
    made.append(text(path, mode="best_fit"))
    assert len({cfg.build().fingerprint for cfg in made}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (4, 5, 16)}, r"length \[5\] does not divide that of text, 16"),
        ({"steps": (3, 2)}, "3 lengths for 2 numbers of steps"),
        ({"steps": (3, 0, 1)}, "must be integers >= 1"),
        ({"lengths": (), "steps": ()}, "must be integers >= 1"),
    ],
)
def test_curricula_that_make_no_sense_are_refused(path, changes, message):
    with pytest.raises(ValueError, match=message):
        stages(path, **changes)
    with pytest.raises(ValueError, match="mode='best_fit', not 'packed'"):
        stages(path, text=text(path, mode="best_fit"))


# --- training on them -----------------------------------------------------------------------------------


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["curriculum", "best_fit"])
def test_a_run_goes_on_in_the_middle_of_a_stage_or_an_epoch(path, tmp_path, float32, kind):
    """Stopped within a stage and between the rows of an epoch; one compilation for every length."""
    data = stages(path) if kind == "curriculum" else text(path, mode="best_fit")
    vocabulary = data.build().vocab_size
    model = lm.Config(vocab_size=vocabulary, width=8, depth=1, pattern=("min_gru",), mlp="none", remat=False)
    run = Run(model=model, data=data, steps=9, batch_size=3, log_every=1, eval_batches=1, prefetch=0)
    training_step._shared.cache_clear()  # programs are of all runs of one shape, whatever their data
    straight = train(run, tmp_path / "straight", progress=False)
    ahead = replace(run, prefetch=3)
    for until in (4, 7, 9):
        parts = train(ahead, tmp_path / "parts", progress=False, until=until)
    assert untimed(parts.rows) == untimed(straight.rows)
    jax.tree.map(np.testing.assert_array_equal, parts.params, straight.params)
    assert len(training_step.programs(run).step.made) == {"curriculum": 3, "best_fit": 1}[kind]
