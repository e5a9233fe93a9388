"""States handed from batch to batch: exact, permuted, drawn, out of the gradient, the same after a stop."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config, state_passing, train
from experiments import step as training_step
from experiments.config import Optimizer, Run
from experiments.losses import continued_losses, model_losses
from experiments.tasks.recall import RecallData
from zoo import autoencoder, classifier, lm

LENGTH = 7


@dataclass(frozen=True)
class Scrolls:
    """Row i of every batch goes on where row i of the batch before stopped."""

    vocab_size: int = 8
    length: int = LENGTH
    kind = "language"
    splits = ("validation",)
    tokenizer = None
    fingerprint = "scrolls"

    def build(self):
        return self

    def batch(self, seed, step, size):
        rng = np.random.default_rng(seed)
        scroll = rng.integers(0, self.vocab_size, (size, 20 * self.length + 1), dtype=np.int32)
        here = slice(step * self.length, (step + 1) * self.length)
        return {"tokens": scroll[:, :-1][:, here], "targets": scroll[:, 1:][:, here]}

    def eval_batches(self, split, size):
        yield self.batch(10**6, 0, size)


TRUNK = {"width": 8, "pattern": ("lru",), "depth": 2, "mlp": "none", "remat": False}
MODEL = lm.Config(vocab_size=8, **TRUNK)
HYBRID = replace(MODEL, pattern=("mamba2", "attention", "lru"), depth=4)
RUN = Run(
    model=MODEL,
    data=Scrolls(),
    optimizer=Optimizer(lr=1e-2),
    steps=6,
    batch_size=6,
    accumulate=2,
    log_every=1,
    initial_state="carried",
)
# No update is large enough to be one.
STILL = replace(RUN, optimizer=Optimizer(lr=1e-200, schedule="constant", weight_decay=0.0))


@pytest.fixture
def exact(monkeypatch):
    """Activations in float64 as well."""
    monkeypatch.setattr(config, "DTYPES", ("float64",))
    return lambda run, **settings: replace(run, compute_dtype="float64", **settings)


def two_steps(run):
    """The training state and the losses after two batches."""
    state = jax.jit(partial(training_step.init_state, run))(jax.random.key(0))
    step, losses = jax.jit(training_step.make_train_step(run)), []
    for number in (0, 1):
        state, metrics = step(state, run.data.batch(run.seed, number, run.batch_size))
        losses.append(float(metrics["loss"]))
    return state, losses


def whole_batch():
    first, second = (RUN.data.batch(0, number, 6) for number in (0, 1))
    return {name: np.concatenate([x, second[name]], 1) for name, x in first.items()}


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_two_carried_batches_are_one_long_one(exact):
    run = exact(STILL, model=HYBRID)
    state, losses = two_steps(run)
    whole = jax.jit(lambda p, b: continued_losses(p, HYBRID, b))
    sums, _, last = whole(state.params, whole_batch())
    np.testing.assert_allclose(np.mean(losses), sums["loss"] / sums["tokens"], rtol=1e-12)
    assert_close(state.passed.last, last)
    _, alone = two_steps(replace(run, initial_state="zero"))
    assert losses[0] == alone[0]
    assert abs(losses[1] - alone[1]) > 1e-6


def test_no_gradient_passes_from_one_batch_to_the_one_before(exact):
    run = exact(RUN)
    params = jax.jit(lambda: lm.init(jax.random.key(0), MODEL))()
    first, second = (RUN.data.batch(0, number, 6) for number in (0, 1))

    @jax.jit
    def handed_on(params):
        grads, _, _, _, last = training_step.accumulated_gradient(run, params, first, lm.init_state(MODEL, 6))
        return grads, training_step.accumulated_gradient(run, params, second, last)[0]

    def both(params, cut):
        sums, _, last = continued_losses(params, MODEL, first)
        last = jax.tree.map(jax.lax.stop_gradient, last) if cut else last
        return (sums["loss"] + continued_losses(params, MODEL, second, last)[0]["loss"]) / (6 * LENGTH)

    separate = jax.tree.map(jnp.add, *handed_on(params))
    cut, through = (jax.jit(jax.grad(partial(both, cut=cut)))(params) for cut in (True, False))
    assert_close(separate, cut)
    far = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (cut, through)), strict=True)]
    assert max(far) > 1e-6


@pytest.mark.parametrize("mode", ["carried", "shuffled", "gaussian"])
def test_micro_batches_change_nothing(mode, exact):
    # With so large an eps Adam's first update is the gradient itself, not its sign.
    optimizer = Optimizer(lr=1.0, eps=1.0, schedule="constant")
    run = exact(RUN, initial_state=mode, optimizer=optimizer)
    (one, first), (three, second) = (two_steps(replace(run, accumulate=k)) for k in (1, 3))
    np.testing.assert_allclose(first, second, rtol=1e-10)
    assert_close((one.params, one.passed.last), (three.params, three.passed.last))


def numbered_state():
    """A state that says in every number which row it is of."""
    rows = jnp.arange(6.0)
    shape = {"a": (2, 6, 3), "b": (1, 6), "c": (1, 6, 2, 2)}
    return {n: jnp.broadcast_to(rows.reshape(1, 6, *[1] * (len(s) - 2)), s) for n, s in shape.items()}


def test_shuffled_states_are_the_same_in_another_order():
    run = replace(RUN, initial_state="shuffled")
    passed = state_passing.first(run, jax.random.key(3)).replace(last=numbered_state())
    orders = []
    for step in range(8):
        begun = state_passing.begin(run, passed, jnp.array(step))
        order = np.asarray(begun["a"][0, :, 0])
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        for x in begun.values():  # whole rows: the parts of a state stay together
            assert (np.moveaxis(np.asarray(x), 1, -1) == order).all()
        orders.append(tuple(order))
    assert len(set(orders)) > 4
    other = state_passing.first(run, jax.random.key(4)).replace(last=numbered_state())
    assert any(
        tuple(np.asarray(state_passing.begin(run, other, jnp.array(step))["a"][0, :, 0])) != order
        for step, order in enumerate(orders)
    )


def test_cut_and_join_keep_rows_in_their_order():
    state = numbered_state()
    apart = state_passing.cut(state, 3)
    assert apart["c"].shape == (3, 1, 2, 2, 2)
    assert apart["b"][:, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert_close(state_passing.join(apart), state)


def test_gaussian_states_have_the_stated_moments():
    model = replace(HYBRID, width=64)
    run = replace(RUN, model=model, initial_state="gaussian", state_scale=0.3, batch_size=24)
    passed = state_passing.first(run, jax.random.key(0))
    draw = jax.jit(partial(state_passing.begin, run))
    first, second = (jax.tree.leaves(draw(passed, step)) for step in (0, 1))
    kinds = set()
    for x, again, empty in zip(first, second, jax.tree.leaves(lm.init_state(model, 24)), strict=True):
        kinds.add(x.dtype.kind)
        assert x.shape == empty.shape and x.dtype == empty.dtype
        if x.dtype.kind == "i" or not x.size:
            np.testing.assert_array_equal(x, empty)
            continue
        error = 0.3 / np.sqrt(x.size)
        assert abs(np.mean(x)) < 5 * error
        assert abs(np.sqrt(np.mean(np.abs(x) ** 2)) - 0.3) < 5 * error
        assert abs(np.mean(x * np.conj(again))) < 5 * 0.3 * error  # another draw
    assert kinds == {"f", "c", "i"}


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


@pytest.mark.parametrize("mode", ["carried", "shuffled", "gaussian"])
def test_a_resumed_run_is_an_uninterrupted_one(mode, tmp_path, float32):
    run = replace(RUN, initial_state=mode)
    straight = train.train(run, tmp_path / "straight", progress=False)
    assert train.train(run, tmp_path / "parts", progress=False, until=3).stopped == "until"
    resumed = train.train(run, tmp_path / "parts", progress=False)
    assert untimed(resumed.rows) == untimed(straight.rows)
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(straight.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    without = train.train(replace(run, initial_state="zero"), progress=False)
    assert without.rows[1]["loss"] != straight.rows[1]["loss"]


@pytest.mark.parametrize("mode", ["carried", "shuffled"])
def test_after_a_bad_batch_comes_the_empty_state(mode, monkeypatch):
    plain = continued_losses

    def poisoned(params, model, batch, *args, **kwargs):
        sums, aux, last = plain(params, model, batch, *args, **kwargs)
        bad = (batch["targets"] < 0).any()
        return {**sums, "loss": jnp.where(bad, jnp.nan, sums["loss"])}, aux, last

    monkeypatch.setattr(training_step, "continued_losses", poisoned)
    run = replace(STILL, initial_state=mode, accumulate=1)
    state = jax.jit(partial(training_step.init_state, run))(jax.random.key(0))
    step = jax.jit(training_step.make_train_step(run))
    good = run.data.batch(0, 0, 6)
    bad = {**good, "targets": np.where(np.arange(LENGTH) == 2, -1, good["targets"]).astype(np.int32)}
    after_good, _ = step(state, good)
    after_bad, metrics = step(after_good, bad)
    assert int(metrics["bad_in_row"]) == 1
    empty = jax.tree.leaves(lm.init_state(MODEL, 6))
    changed = [
        np.abs(x - e).max() for x, e in zip(jax.tree.leaves(after_good.passed.last), empty, strict=True)
    ]
    assert max(changed) > 1e-3
    for x, e in zip(jax.tree.leaves(after_bad.passed.last), empty, strict=True):
        np.testing.assert_array_equal(x, e)


def test_of_packed_documents_only_the_first_meets_the_state():
    batch = RUN.data.batch(0, 1, 6)
    ids = np.broadcast_to(np.arange(LENGTH) // 3, (6, LENGTH)).astype(np.int32)
    first = np.where(ids == 0, batch["targets"], -1)
    rest = np.where(ids == 0, -1, batch["targets"])
    state = state_passing.noise(jax.random.key(1), lm.init_state(MODEL, 6), 1.0)
    params = jax.jit(lambda: lm.init(jax.random.key(0), MODEL))()
    losses = jax.jit(lambda b, s: continued_losses(params, MODEL, b, s)[0]["loss"])
    for targets, same in ((first, False), (rest, True)):
        part = {"tokens": batch["tokens"], "targets": targets, "segment_ids": ids}
        gap = abs(losses(part, state) - losses(part, lm.init_state(MODEL, 6)))
        assert (gap < 1e-9) == same


def test_without_it_nothing_is_kept_and_losses_are_those_of_evaluation():
    state = jax.eval_shape(
        lambda: training_step.init_state(replace(RUN, initial_state="zero"), jax.random.key(0))
    )
    assert state.passed is None
    params = jax.jit(lambda: lm.init(jax.random.key(0), MODEL))()
    batch = RUN.data.batch(0, 0, 6)
    carried = jax.jit(lambda: continued_losses(params, MODEL, batch, lm.init_state(MODEL, 6))[0])()
    assert_close(carried, jax.jit(lambda: model_losses(params, MODEL, batch)[0])())


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (classifier.Config(features=2, classes=2, **TRUNK), "classifier"),
        (autoencoder.Config(vocab_size=8, **TRUNK), "autoencoder"),
    ],
)
def test_models_without_a_past_are_refused_in_one_line(model, kind):
    with pytest.raises(
        ValueError, match=f"^initial_state='shuffled' is for language models.*{kind} have no past$"
    ):
        train.check(replace(RUN, model=model, initial_state="shuffled"), RUN.data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_state": "warm"}, "initial_state='warm'"),
        ({"state_scale": 0.0}, "state_scale=0.0 must be > 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        replace(RUN, **settings)


def test_runs_from_before_keep_their_fingerprints():
    model = lm.Config(vocab_size=64, width=8, depth=1, pattern=("gla",))
    old = Run(model=model, data=RecallData(vocab_size=64, length=32))
    assert config.fingerprint(old) == "d21d1f52ed84ba8b"  # of results that are there
    zero = replace(RUN, initial_state="zero")
    assert not {"initial_state", "state_scale"} & config.to_dict(zero).keys()
    passing = replace(RUN, initial_state="gaussian", state_scale=0.5)
    saved = config.to_dict(passing)
    assert (saved["initial_state"], saved["state_scale"]) == ("gaussian", 0.5)
    assert config.from_dict(config.to_dict(passing)) == passing
    assert config.from_dict(config.to_dict(zero)) == zero
    assert config.fingerprint(zero) != config.fingerprint(replace(zero, initial_state="carried"))
