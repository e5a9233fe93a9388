"""What every task promises, for every row of `tests/task_rows.py`."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
from task_rows import GOLDEN, ROWS

from experiments.config import from_dict, to_dict
from experiments.sources import IGNORED, ClassificationSource, LanguageSource, Source

# Chance is measured on so many examples, half of them to choose the guess.
MEASURED = 4_000
COMPARED = 400  # examples of each split that are looked for in the others


@pytest.fixture(params=ROWS)
def row(request):
    return request.param


@pytest.fixture
def cfg(row):
    return ROWS[row][0]


@pytest.fixture
def source(cfg):
    return cfg.build()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def whole(source, split, size=50):
    """The batches of a split."""
    return list(source.eval_batches(split, size))


def labelled(batch):
    """Its rows with a label: the others fill up the last batch."""
    keep = (batch["targets"].reshape(len(batch["targets"]), -1) != IGNORED).any(1)
    return {name: x[keep] for name, x in batch.items()}


def test_batch_is_a_pure_function_of_seed_step_and_size(cfg):
    first, second = cfg.build(), cfg.build()
    for step in (0, 9):
        first.batch(3, step, 4)
    assert_same(first.batch(3, 2, 4), second.batch(3, 2, 4))
    for other in (first.batch(4, 2, 4), first.batch(3, 3, 4)):
        if all(x.shape == first.batch(3, 2, 4)[name].shape for name, x in other.items()):
            assert any((first.batch(3, 2, 4)[name] != x).any() for name, x in other.items())


def test_bits_are_the_same_everywhere(row, source):
    digest = hashlib.sha256()
    for batch in (source.batch(11, 3, 8), whole(source, source.splits[-1], 8)[0]):
        for name in sorted(batch):
            x = batch[name]
            digest.update(name.encode() + str(x.shape).encode())
            digest.update(x.astype("<f4" if x.dtype.kind == "f" else "<i4").tobytes())
    assert digest.hexdigest() == GOLDEN.get(row), f'"{row}": "{digest.hexdigest()}",'


def test_shapes_types_and_ranges(source):
    assert isinstance(source, Source)
    language = source.kind != "classification"
    assert isinstance(source, LanguageSource if language else ClassificationSource)
    for batch in (source.batch(0, 0, 6), *whole(source, "validation")):
        size, targets = len(batch["targets"]), batch["targets"]
        assert targets.dtype == np.int32 and targets.min() >= IGNORED
        if not language:
            assert batch["inputs"].shape == (size, source.length, source.features)
            assert batch["inputs"].dtype == np.float32 and np.isfinite(batch["inputs"]).all()
            assert targets.shape == (size,) and targets.max() < source.classes
            continue
        tokens = batch["tokens"]
        assert tokens.dtype == np.int32 and tokens.ndim == 2 and tokens.shape[1] <= source.length
        assert tokens.min() >= 0 and max(tokens.max(), targets.max()) < source.vocab_size
        if "positions" in batch:
            assert batch["positions"].dtype == np.int32 and batch["positions"].shape == targets.shape
            assert batch["positions"].min() >= 0 and batch["positions"].max() < tokens.shape[1]
        else:
            assert targets.shape == tokens.shape


def test_evaluation_repeats_and_does_not_depend_on_the_batch_size(source):
    def rows(split, size):
        # Batches of a mixture differ in shape: rows are compared as bytes.
        parts = [labelled(batch) for batch in source.eval_batches(split, size)]
        return [
            tuple(bytes(part[k][i]) for k in sorted(part))
            for part in parts
            for i in range(len(part["targets"]))
        ]

    for split in source.splits:
        first = rows(split, 7)
        assert first and first == rows(split, 7) == rows(split, 16)


def test_splits_share_no_example(source):
    def examples(batches):
        name = "inputs" if source.kind == "classification" else "tokens"
        return {bytes(x) for batch in batches for x in labelled(batch)[name]}

    steps = [source.batch(0, step, 40) for step in range(COMPARED // 40)]
    train, validation, test = examples(steps), *(examples(whole(source, s)) for s in ("validation", "test"))
    assert train and validation and test
    assert not train & validation and not train & test and not validation & test


def test_the_answer_is_in_the_input(row, cfg, source):
    solve = ROWS[row][1]
    for batch in (source.batch(1, 0, 50), source.batch(1, 1, 50), *whole(source, "test")):
        batch = labelled(batch)
        targets = batch.pop("targets")
        answers = np.asarray(solve(batch, cfg))
        assert answers.shape == targets.shape
        known = targets != IGNORED
        np.testing.assert_array_equal(answers[known], targets[known])


def test_chance_is_what_the_best_guess_gets_that_does_not_look(cfg, source):
    """The best label for each place: what it gets where it was chosen is too much, elsewhere too little.

    Within four standard deviations, of an example as a whole: its labels may depend on each other.
    """
    if getattr(cfg, "train_examples", 0):
        source = dataclasses.replace(cfg, train_examples=0).build()
    targets = source.batch(5, 0, MEASURED)["targets"].reshape(MEASURED, -1)
    seen, unseen = targets[: MEASURED // 2], targets[MEASURED // 2 :]
    counts = [np.bincount(column[column != IGNORED], minlength=1) for column in seen.T]
    guess = np.array([count.argmax() for count in counts])
    chosen = sum(count.max() for count in counts) / (seen != IGNORED).sum()
    elsewhere = (unseen == guess).sum() / (unseen != IGNORED).sum()
    margin = 4 * (source.chance * (1 - source.chance) / (MEASURED // 2)) ** 0.5
    assert elsewhere - margin <= source.chance <= chosen + margin


def test_configs_are_hashable_go_through_json_pickle_and_describe_themselves(cfg, source):
    assert hash(cfg) == hash(pickle.loads(pickle.dumps(cfg)))
    assert from_dict(to_dict(cfg)) == cfg
    assert source.fingerprint == cfg.build().fingerprint and len(source.fingerprint) == 64
    text = source.describe()
    assert "\n" not in text and len(text) > 20 and f"chance {source.chance:.2%}" in text
    with pytest.raises(ValueError, match="no split 'training' here; choose from validation"):
        next(iter(source.eval_batches("training", 2)))


def test_configs_refuse_what_cannot_be(cfg):
    kind = type(cfg).__name__
    for field in dataclasses.fields(cfg):
        bad = [object()]
        bad += [-1, True, "1"] if field.type is int else [float("nan")] if field.type is float else []
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{kind}: [^\n]*\b{field.name}\b[^\n]*$"):
                dataclasses.replace(cfg, **{field.name: value})
