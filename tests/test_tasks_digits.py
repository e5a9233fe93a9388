"""Digits as curves and as pixels: solvable in order, harder out of it, splits fixed by content."""

import hashlib
import sys

import numpy as np
import pytest

from experiments.sources import ClassificationSource
from experiments.tasks import digits, mnist1d
from experiments.tasks.digits import DigitsData
from experiments.tasks.mnist1d import Mnist1dData


@pytest.fixture(scope="module")
def curves():
    """A thousand training examples and the test split."""
    source = Mnist1dData(eval_examples=400).build()
    return source, source.batch(0, 0, 1_000), next(source.eval_batches("test", 400))


def logistic_regression(train, test, steps=400):
    """Accuracy of a linear classifier, by gradient descent with momentum."""
    a, b = (np.concatenate([x["inputs"][..., 0], np.ones((len(x["targets"]), 1))], 1) for x in (train, test))
    weights, momentum, hot = np.zeros((a.shape[1], 10)), 0.0, np.eye(10)[train["targets"]]
    for _ in range(steps):
        p = np.exp(a @ weights)
        momentum = 0.9 * momentum + a.T @ (p / p.sum(1, keepdims=True) - hot) / len(a) + 1e-3 * weights
        weights = weights - 0.3 * momentum
    return ((b @ weights).argmax(1) == test["targets"]).mean()


def best_fit(source, batch):
    """The template that leaves the least, over a grid of places and stretches.

    Height and slope by weighted least squares: little noise inside the template, more of it outside.
    """
    x, time = batch["inputs"][..., 0] / mnist1d.GAIN, np.linspace(-0.5, 0.5, mnist1d.LENGTH)
    best, answer = np.full(len(x), np.inf), np.full(len(x), -1)
    grid = np.meshgrid(np.linspace(1.0, 1.5, 6), np.arange(0.0, 48.0, 0.5))
    stretch, start = (axis.reshape(-1, 1) for axis in grid)
    for kind in range(10):
        signals, places = source.render(np.full(len(start), kind), stretch, start)
        signals, places = mnist1d._sample(signals), mnist1d._sample(places.astype(float))
        for signal, inside in zip(signals, places > 0.99, strict=True):
            weight = np.where(inside, 1 / 0.04, 1 / 0.1)
            basis = weight[:, None] * np.stack([signal, time], 1)
            fit = (weight * x) @ np.linalg.pinv(basis).T
            cost = np.square(weight * x - fit @ basis.T).sum(1) - 2 * np.log(weight).sum()
            cost += np.square((fit[:, 0] - 1) / 0.15)
            answer, best = np.where(cost < best, kind, answer), np.minimum(cost, best)
    return (answer == batch["targets"]).mean()


def test_curves_can_be_told_apart_but_not_place_by_place(curves):
    source, train, test = curves
    linear = logistic_regression(train, test)
    part = {name: x[:200] for name, x in test.items()}
    assert 0.2 < linear < 0.4
    assert best_fit(source, part) > 0.9


def test_templates_are_ten_of_equal_height(curves):
    source = curves[0]
    assert source.templates.shape == (10, 12) and (source.templates[:, 0] == 0).all()
    np.testing.assert_allclose(source.templates.std(1), mnist1d.HEIGHT, rtol=1e-12)
    across = np.corrcoef(source.templates) - np.eye(10)
    assert across.max() < 0.93  # no two of the same form
    assert source.chance == 0.1 and isinstance(source, ClassificationSource)


def test_a_curve_is_what_its_definition_says():
    """Without noise: the template, stretched, at its place, zero elsewhere."""
    source = Mnist1dData().build()
    signal, inside = source.render(np.array([2]), np.array([[1.5]]), np.array([[10.0]]))
    assert signal.shape == inside.shape == (1, 72)
    assert not signal[0, :10].any() and not signal[0, 27:].any() and inside[0, 10:27].all()
    np.testing.assert_allclose(signal[0, [10, 13, 16, 19]], source.templates[2, [0, 2, 4, 6]], rtol=1e-12)
    np.testing.assert_allclose(signal[0, 11], source.templates[2, 1] * 2 / 3, rtol=1e-12)
    noise = np.random.default_rng(0).normal(size=(4_000, 72))
    smooth = mnist1d._low_pass(noise)
    np.testing.assert_allclose(smooth.var(), (4 * np.pi * mnist1d.BLUR**2) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(mnist1d._low_pass(np.ones((1, 72))), 1.0, rtol=1e-12)
    ramp = np.arange(72.0)[None]
    np.testing.assert_allclose(mnist1d._sample(ramp)[0], np.linspace(0, 71, 40), rtol=1e-12)


def test_curves_are_pure_apart_and_the_same_bits_everywhere(curves):
    source, train, test = curves
    again = Mnist1dData(eval_examples=400).build()
    np.testing.assert_array_equal(again.batch(3, 2, 8)["inputs"], source.batch(3, 2, 8)["inputs"])
    assert train["inputs"].shape == (1_000, 40, 1) and train["inputs"].dtype == np.float32
    assert 0.9 < train["inputs"].std() < 1.1
    (validation,) = source.eval_batches("validation", 400)
    rows = [x.tobytes() for part in (train, validation, test) for x in part["inputs"]]
    assert len(set(rows)) == len(rows)
    batch = Mnist1dData(train_examples=0).build().batch(11, 3, 64)
    digest = hashlib.sha256(
        batch["inputs"].astype("<f4").tobytes() + batch["targets"].astype("<i4").tobytes()
    )
    assert digest.hexdigest() == "4285190fab931718f9568e9a0d213b0491b9c99a3e0e017dfa957196ae14acf1"


def test_shuffled_curves_have_the_same_values_in_another_order():
    plain, mixed = (Mnist1dData(shuffled=s, eval_examples=50).build() for s in (False, True))
    a, b = (next(source.eval_batches("test", 50))["inputs"] for source in (plain, mixed))
    np.testing.assert_array_equal(np.sort(a, 1), np.sort(b, 1))
    order = mixed._time
    np.testing.assert_array_equal(a[:, order], b)
    assert sorted(order) == list(range(40)) and list(order) != list(range(40))
    assert plain.fingerprint != mixed.fingerprint and "shuffled" in mixed.describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mnist1dData(train_examples=-1), "Mnist1dData: train_examples=-1 must be at least 0"),
        (lambda: Mnist1dData(eval_examples=0), "Mnist1dData: eval_examples=0 must be at least 1"),
        (lambda: Mnist1dData(shuffled=1), "Mnist1dData: shuffled=1 must be of type bool"),
        (lambda: DigitsData(data_seed=-1), "DigitsData: data_seed=-1 must be at least 0"),
        (lambda: DigitsData(shuffled="yes"), "DigitsData: shuffled='yes' must be of type bool"),
    ],
)
def test_configs_refuse_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


# ---- images; scikit-learn is an optional dependency


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"^DigitsData: [^\n]*pip install scikit-learn[^\n]*$"):
        DigitsData().build()


def stand_in(monkeypatch):
    """Images to split, as many and as large, where scikit-learn is not at hand."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 17, (900, 64)), rng.integers(0, 10, 900)
    pixels[1], labels[1] = pixels[0], labels[0]
    monkeypatch.setattr(digits, "_load", lambda: (pixels, labels))
    return pixels, labels


def test_an_image_belongs_to_one_split_whatever_the_order(monkeypatch):
    pixels, labels = stand_in(monkeypatch)

    def contents(source):
        parts = {"train": source.batch(0, 0, len(source._parts["train"]["targets"]))}
        parts |= {split: next(source.eval_batches(split, 200)) for split in source.splits}
        keep = {name: part["targets"] >= 0 for name, part in parts.items()}
        return {
            name: sorted(
                (x.argsort(kind="stable").tobytes(), int(y))
                for x, y in zip(part["inputs"][keep[name], :, 0], part["targets"][keep[name]], strict=True)
            )
            for name, part in parts.items()
        }

    first = contents(DigitsData().build())
    assert (
        sum(map(len, first.values())) == 900 and 80 < len(first["validation"]) < 145 > len(first["test"]) > 80
    )
    assert not {x for x, _ in first["train"]} & {x for x, _ in first["test"] + first["validation"]}
    order = np.random.default_rng(1).permutation(900)
    monkeypatch.setattr(digits, "_load", lambda: (pixels[order], labels[order]))
    assert contents(DigitsData().build()) == first


def test_digits_are_what_scikit_learn_has():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    source = DigitsData().build()
    assert (source.length, source.features, source.classes, source.chance) == (64, 1, 10, 0.1)
    train = source.batch(0, 0, 1_360)
    test = next(source.eval_batches("test", 228))
    assert (test["targets"] >= 0).all() and "1,360 train, 209 validation, 228 test" in source.describe()
    mean, deviation = train["inputs"].mean(), train["inputs"].std()
    assert abs(mean) < 1e-5 and abs(deviation - 1) < 1e-5
    shades = np.unique(np.concatenate([train["inputs"], test["inputs"]]))
    assert len(shades) == 17 and len(data.data) == 1_797
    assert logistic_regression(train, test) > 0.9
    mixed = DigitsData(shuffled=True).build()
    shuffled = next(mixed.eval_batches("test", 228))
    np.testing.assert_array_equal(np.sort(shuffled["inputs"], 1), np.sort(test["inputs"], 1))
    assert (shuffled["inputs"] != test["inputs"]).any() and mixed.fingerprint != source.fingerprint
