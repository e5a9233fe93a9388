"""The training loop: losses, optimiser, exact continuation, refusals."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import config, evaluate, flops, interrupts, losses, optimizer, record, train
from experiments import step as training_step
from experiments.config import Optimizer, Run
from experiments.directory import Directory, OtherRunError
from experiments.sources import Source
from layers import gated_linear_attention
from zoo import checkpoint, classifier, lm

AT: dict[int, list] = {}  # what happens when a batch is asked for, beside the config on purpose


@dataclass(frozen=True)
class Echo:
    """The target is the token before, except where there is none; a third of the rows end early."""

    vocab_size: int = 8
    length: int = 12
    salt: int = 0
    few: bool = False  # labels at few positions
    kind = "language"
    splits = ("validation",)
    tokenizer = None

    def build(self):
        return self

    @property
    def fingerprint(self) -> str:
        return f"echo-{self.salt}"

    def describe(self) -> str:
        return "echo"

    def batch(self, seed, step, size):
        for event in AT.get(step, []):
            event()
        rng = np.random.default_rng([seed, step, self.salt])
        tokens = rng.integers(0, self.vocab_size, (size, self.length), dtype=np.int32)
        targets = np.roll(tokens, 1, 1)
        targets[:, 0] = -1
        targets[::3, 4:] = -1
        if not self.few:
            return {"tokens": tokens, "targets": targets}
        positions = np.tile(np.array([2, 3, 0], np.int32), (size, 1))
        return {
            "tokens": tokens,
            "positions": positions,
            "targets": np.take_along_axis(targets, positions, 1),
        }

    def eval_batches(self, split, size):
        for number in range(2):
            yield self.batch(10**6, number, size)


@dataclass(frozen=True)
class Waves(Echo):
    """Sums of their inputs above or below zero; from batch `poisoned` on, for `times` batches, not finite."""

    poisoned: int = 10**9
    times: int = 1
    features: int = 2
    classes: int = 2
    kind = "classification"

    def batch(self, seed, step, size):
        rng = np.random.default_rng([seed, step])
        inputs = rng.normal(size=(size, self.length, self.features)).astype(np.float32)
        targets = (inputs.sum((1, 2)) > 0).astype(np.int32)
        if self.poisoned <= step < self.poisoned + self.times:
            inputs[0, 0, 0] = np.nan
        return {"inputs": inputs, "targets": targets}


TRUNK = {"width": 8, "depth": 1, "pattern": ("linear_attention",), "mlp": "none"}
TOKENS = lm.Config(vocab_size=8, **TRUNK)
REALS = classifier.Config(features=2, classes=2, **TRUNK)
RUN = Run(
    model=TOKENS,
    data=Echo(),
    optimizer=Optimizer(lr=1e-2, warmup_steps=2),
    steps=12,
    batch_size=6,
    accumulate=2,
    log_every=3,
    eval_every=6,
    checkpoint_every=4,
    keep=3,
    prefetch=0,  # what AT does is done between steps
)
POISONED = Run(
    model=REALS,
    data=Waves(poisoned=3, times=5),
    steps=8,
    batch_size=4,
    log_every=8,
    checkpoint_every=2,
    max_bad_steps=3,
)


def quiet(run, *args, **kwargs):
    return train.train(run, *args, progress=False, **kwargs)


def bare(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def read_rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock"}


# --- losses ---------------------------------------------------------------------------------------------


def head_problem(positions=37, width=5, vocab=11):
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (2, positions, width))
    w = jax.random.normal(keys[1], (width, vocab))
    targets = jax.random.randint(keys[2], (2, positions), -3, vocab)
    return h, w, targets


def mean_loss(h, w, targets, chunk):
    loss, correct = losses.cross_entropy(lambda rows: rows @ w, h, targets, chunk)
    sums = losses.total(loss, correct, targets)
    return sums["loss"] / sums["tokens"], sums


@pytest.mark.parametrize("chunk", [1, 8, 74, 1000])
def test_chunked_cross_entropy_is_the_dense_one(chunk):
    h, w, targets = head_problem()
    known = targets >= 0

    def dense(h, w):
        log_p = jax.nn.log_softmax(h @ w)
        chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -jnp.sum(chosen * known) / known.sum()

    def chunked(h, w):
        return mean_loss(h, w, targets, chunk)

    (value, sums), got = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(h, w)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(dense, (0, 1)))(h, w)
    assert_close(value, wanted, 1e-12)
    assert sums["tokens"] == known.sum()
    assert sums["correct"] == (known & ((h @ w).argmax(-1) == targets)).sum()
    assert_close(got, wanted_gradient, 1e-12)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program makes, in the programs within it too."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    within = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
    return max(sizes + [largest_array(inner) for inner in within if hasattr(inner, "eqns")], default=0)


def test_logits_of_a_whole_batch_never_exist():
    """In loss and gradient no array has more elements than `chunk` rows of logits, or than h or w."""
    positions, width, vocab, chunk = 512, 4, 1024, 16
    h, w, targets = head_problem(positions, width, vocab)

    def largest(chunk):
        gradient = jax.grad(lambda h, w: mean_loss(h, w, targets, chunk)[0], (0, 1))
        return largest_array(jax.make_jaxpr(gradient)(h, w).jaxpr)

    assert largest(None) == 2 * positions * vocab
    assert largest(chunk) == max(chunk * vocab, h.size, w.size)


def test_sums_count_rows_and_positions():
    targets = jnp.array([[1, -1, 2], [1, 1, -1], [-1, -1, -1]])
    correct = jnp.array([[True, False, True], [True, False, False], [False, False, False]])
    sums = losses.total(jnp.ones((3, 3)) * (targets >= 0), correct, targets)
    assert {k: float(v) for k, v in sums.items()} == {
        "loss": 4, "correct": 3, "tokens": 4, "exact": 1, "sequences": 2,
    }  # fmt: skip


def test_labels_at_positions_equal_labels_everywhere(float32):
    params = jax.jit(lambda: lm.init(jax.random.key(0), TOKENS))()
    sums = jax.jit(lambda batch: losses.model_losses(params, TOKENS, batch)[0])
    few = Echo(few=True).batch(0, 0, 3)
    full = Echo().batch(0, 0, 3)
    chosen = np.full_like(full["targets"], -1)
    np.put_along_axis(chosen, few["positions"], few["targets"], 1)
    assert_close(sums(few), sums({**full, "targets": chosen}), 1e-6)


# --- optimiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"schedule": "constant"}, {0: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 50: 1.0}),
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, {0: 1.0, 50: 0.55, 100: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 20, "min_lr_ratio": 0.0}, {9: 0.5, 20: 1.0, 60: 0.5, 100: 0}),
        ({"schedule": "wsd", "decay_fraction": 0.2, "min_lr_ratio": 0.0}, {0: 1.0, 80: 1.0, 90: 0.5, 100: 0}),
        ({"schedule": "wsd", "warmup_steps": 10, "decay_fraction": 0.5}, {4: 0.5, 9: 1, 75: 0.55, 100: 0.1}),
    ],
)
def test_schedules(settings, wanted):
    cfg = Optimizer(lr=3.0, **settings)
    rate = optimizer.schedule(cfg.schedule, optimizer.numbers(cfg, 100))
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(3 * value, abs=1e-12)


def test_groups_of_parameters():
    """Decay for w_* alone; for ssm_* the smaller learning rate, with the schedule of the others."""
    names = {"w_in": "decay", "ssm_log_a": "ssm", "norm_scale": "plain", "A_log": "plain"}
    params = {"blocks": [[{"mixer": {name: jnp.ones(3) for name in names}}]]}
    cfg = Optimizer(lr=0.5, ssm_lr=0.125, schedule="constant", warmup_steps=2, weight_decay=0.1)
    labels = jax.tree_util.tree_map_with_path(optimizer.group, params)
    assert labels["blocks"][0][0]["mixer"] == names

    def moved(gradient):
        transform = optimizer.make(cfg, optimizer.numbers(cfg, 10))
        grads = jax.tree.map(lambda p: gradient * jnp.ones_like(p), params)
        updates, _ = transform.update(grads, transform.init(params), params)
        return {n: float(u[0]) for n, u in updates["blocks"][0][0]["mixer"].items()}

    still = moved(0.0)
    assert still.pop("w_in") == pytest.approx(-0.25 * 0.1)
    assert set(still.values()) == {0.0}
    first = moved(0.01)  # Adam's first update has the size of the learning rate
    assert first["norm_scale"] == first["A_log"] == pytest.approx(-0.25, rel=1e-4)
    assert first["ssm_log_a"] == pytest.approx(-0.0625, rel=1e-4)


def test_every_layer_parameter_has_a_group():
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), TOKENS))
    labels = jax.tree_util.tree_map_with_path(optimizer.group, params)
    assert labels["w_embed"] == labels["blocks"][0][0]["mixer"]["w_out"] == "decay"
    assert labels["norm_final"] == "plain"


def test_gradients_are_clipped_together():
    params = {"w_a": jnp.zeros(1), "b": jnp.zeros(1)}
    cfg = Optimizer(lr=1.0, schedule="constant", eps=1e6, clip_norm=1.0)
    transform = optimizer.make(cfg, optimizer.numbers(cfg, 10))
    updates, _ = transform.update(
        {"w_a": jnp.array([30.0]), "b": jnp.array([40.0])}, transform.init(params), params
    )
    assert_close(updates, {"w_a": jnp.array([-0.6e-6]), "b": jnp.array([-0.8e-6])}, 1e-9)


# --- one step -------------------------------------------------------------------------------------------


def test_accumulation_is_one_large_batch(float32, monkeypatch):
    """Rows have unequal numbers of labels, and a layer's loss counts by them too."""
    plain = losses.model_losses

    def with_extra(params, model, batch, **kwargs):
        sums, aux = plain(params, model, batch, **kwargs)
        return sums, {**aux, "size_loss": 0.1 * optax.tree.norm(params), "width": jnp.ones(3)}

    monkeypatch.setattr(training_step, "model_losses", with_extra)
    batch = Echo().batch(0, 0, 6)
    # With so large an eps Adam's first update is the gradient itself, not its sign.
    run = replace(RUN, optimizer=Optimizer(lr=1.0, eps=1.0, schedule="constant"))
    state = jax.jit(partial(training_step.init_state, run))(jax.random.key(0))
    results = [
        jax.jit(training_step.make_train_step(replace(run, accumulate=k)))(state, batch) for k in (1, 3)
    ]
    assert_close(results[1][0].params, results[0][0].params, 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)
    assert results[0][1]["width"].shape == (3,)


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(float32):
    programs = training_step.programs(POISONED)
    rates = optimizer.numbers(POISONED.optimizer, POISONED.steps)
    # The third is poisoned.
    batches = [jax.device_put(POISONED.data.batch(0, number, 4)) for number in (0, 1, 3, 2)]

    def after(numbers):
        state = programs.initial(jax.random.key(0))
        for number in numbers:
            state, metrics = programs.step(state, batches[number], numbers=rates)
        return state, metrics

    with_bad, metrics = after([0, 1, 2, 3, 1])
    without, _ = after([0, 1, 3, 1])
    assert_bits((with_bad.params, with_bad.opt_state), (without.params, without.opt_state))
    assert (int(with_bad.step), int(with_bad.bad_steps), int(with_bad.bad_in_row)) == (5, 1, 0)
    assert not np.isfinite(batches[2]["inputs"]).all()
    assert np.isfinite(metrics["loss"])


# --- the loop -------------------------------------------------------------------------------------------


@pytest.fixture
def straight(float32, tmp_path_factory):
    """RUN without interruptions: its directory and result. Cheap after the first: the programs are kept."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, quiet(RUN, directory)


def assert_same_run(directory, straight):
    other, result = straight
    template = jax.eval_shape(lambda: training_step.init_state(RUN, jax.random.key(0)))
    assert_bits(*(checkpoint.restore(d / "checkpoints", template)[1] for d in (directory, other)))
    assert bare(read_rows(directory)) == bare(read_rows(other)) == bare(result.rows)


WORKER = """
import os, signal, sys, {name} as tests
if sys.argv[2] == "kill":
    tests.AT[7] = [lambda: os.kill(os.getpid(), signal.SIGKILL)]
tests.quiet(tests.RUN, sys.argv[1])
"""


def work(directory, what):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WORKER.format(name=__name__), str(directory), what]
    return subprocess.run(command, env=environment, timeout=150).returncode


@pytest.mark.deep
def test_a_killed_run_continues_exactly(straight, tmp_path):
    """SIGKILL after step 7, in one process; the rest in another: all as in a third without interruption."""
    assert work(tmp_path, "kill") == -signal.SIGKILL
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 3, 6, 6]
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')  # a row that was being written
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    assert work(tmp_path, "go on") == 0
    assert_same_run(tmp_path, straight)


def test_run_in_two_parts(straight, tmp_path):
    part = quiet(RUN, tmp_path, until=5)
    assert (part.stopped, part.summary["step"]) == ("until", 5)
    assert not (tmp_path / "summary.json").exists()
    whole = quiet(RUN, tmp_path)
    assert whole.stopped is None
    assert_same_run(tmp_path, straight)


def test_metrics_are_read_one_step_late(straight, tmp_path, monkeypatch):
    """When batch 3 (of step 4) is asked for, step 3 is on the device and its row not yet written."""
    seen = {}
    for index in (3, 4):

        def look(index=index):
            seen[index] = [row["step"] for row in read_rows(tmp_path)]

        monkeypatch.setitem(AT, index, [look])
    quiet(RUN, tmp_path, until=5)
    assert seen == {3: [1], 4: [1, 3]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_within_a_step_and_it_continues(straight, tmp_path, monkeypatch, number):
    monkeypatch.setitem(AT, 5, [lambda: os.kill(os.getpid(), number)])
    before = signal.getsignal(number)
    result = quiet(RUN, tmp_path)
    assert result.stopped == number.name
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == result.summary["step"] == 6
    assert signal.getsignal(number) is before
    monkeypatch.delitem(AT, 5)
    quiet(RUN, tmp_path)
    assert_same_run(tmp_path, straight)


def test_a_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interrupts.signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["SIGTERM"]
        os.kill(os.getpid(), signal.SIGTERM)


def test_damaged_newest_checkpoint_costs_only_time(straight, tmp_path):
    quiet(RUN, tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000012" / "manifest"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="step_00000012 is damaged .*; trying an older one"):
        quiet(RUN, tmp_path)
    assert_same_run(tmp_path, straight)


def test_no_intact_checkpoint_does_not_start_over(float32, tmp_path):
    quiet(RUN, tmp_path, until=1)
    (tmp_path / "checkpoints" / "step_00000001" / "manifest").unlink()
    before = contents(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(checkpoint.CheckpointError, match="no intact checkpoint"):
        quiet(RUN, tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_is_read_not_repeated(straight):
    directory, result = straight
    before = contents(directory)
    again = quiet(RUN, directory)
    assert again.summary == json.loads((directory / "summary.json").read_text())
    assert_bits(again.params, result.params)
    assert contents(directory) == before


def test_summary_and_rows(straight):
    directory, result = straight
    summary = result.summary
    assert summary["params"] == lm.param_count(TOKENS)
    assert summary["state_bytes"] == lm.state_bytes(TOKENS)
    assert summary["tokens_per_second"] > 0
    assert summary["mfu"] > 0
    assert summary["compile_seconds"] > 0
    assert summary["wall_seconds"] > 0
    assert [(r["kind"], r["step"]) for r in result.rows] == [
        ("train", 1), ("train", 3), ("train", 6), ("eval", 6), ("train", 9), ("train", 12), ("eval", 12),
    ]  # fmt: skip
    assert summary["loss"] == result.rows[-1]["loss"]
    source = RUN.data.build()
    assert isinstance(source, Source)
    whole = evaluate.evaluate_directory(directory, "validation")
    assert whole == evaluate.evaluate(RUN, result.params, source)
    assert whole["loss"] == summary["loss"]


def test_seeds_differ_and_share_their_programs(straight):
    other = quiet(replace(RUN, seed=1))
    assert other.summary["loss"] != straight[1].summary["loss"]
    assert training_step.programs(RUN) is training_step.programs(replace(RUN, seed=1))
    assert len(training_step.programs(RUN).step.made) == 1


def test_runs_of_other_rates_and_lengths_share_a_program(straight):
    """Rates are what they say all the same: such a run is that of a program of its own."""
    step = training_step.programs(RUN).step
    other = replace(RUN, steps=5, log_every=1, optimizer=Optimizer(lr=2e-3, warmup_steps=2, weight_decay=0.3))
    shared = quiet(other)
    assert training_step.programs(other).step is step
    assert len(step.made) == 1
    training_step._shared.cache_clear()
    alone = quiet(other)
    assert_bits(shared.params, alone.params)
    rate = optimizer.schedule("cosine", optimizer.numbers(other.optimizer, 5))
    seen = [row["lr"] for row in alone.rows if row["kind"] == "train"]
    np.testing.assert_allclose(seen, [rate(i) for i in range(5)], rtol=1e-6)


def test_without_a_directory_nothing_is_written(float32, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = train.train(RUN)
    assert list(tmp_path.iterdir()) == []
    assert result.rows
    shown = capsys.readouterr().out  # not a terminal: lines
    assert "step 12/12  loss" in shown
    assert "validation loss" in shown
    quiet(RUN)
    assert capsys.readouterr().out == ""


def test_it_learns(float32):
    result = quiet(
        replace(
            RUN,
            model=replace(TOKENS, pattern=("attention",)),
            optimizer=Optimizer(lr=3e-2, warmup_steps=10),
            steps=150,
            batch_size=32,
            accumulate=1,
            compute_dtype="bfloat16",
            eval_every=0,
        )
    )
    assert result.rows[0]["loss"] == pytest.approx(np.log(8), rel=0.1)
    assert result.summary["loss"] < 1.5


def test_bad_steps_are_counted_and_too_many_stop_the_run(float32, tmp_path):
    with pytest.raises(train.NotFiniteError, match=r"stopped at step 6: .* 3 steps running"):
        quiet(POISONED, tmp_path)
    rows = read_rows(tmp_path)
    assert [(row["step"], row["bad_steps"]) for row in rows] == [(1, 0), (4, 1), (5, 2), (6, 3)]
    assert [row["loss"] for row in rows[1:]] == [None] * 3
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4]


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": Optimizer(lr=2e-2, warmup_steps=2)}, "optimizer.lr: 0.01 -> 0.02"),
        ({"model": replace(TOKENS, width=16)}, "model.width: 8 -> 16"),
        (
            {"model": replace(TOKENS, pattern=("min_gru", "attention")), "steps": 13},
            "model.pattern.0: 'linear_attention' -> 'min_gru'; steps: 12 -> 13; "
            "model.pattern.1: 'absent' -> 'attention'",
        ),
        (
            {"model": replace(TOKENS, vocab_size=9), "data": Echo(vocab_size=9)},
            "model.vocab_size: 8 -> 9; data.vocab_size: 8 -> 9",
        ),
        ({"data": Echo(salt=1)}, "data.salt: 0 -> 1; the data themselves: fingerprint echo-0 -> echo-1"),
    ],
)
def test_another_run_is_refused_and_nothing_touched(tmp_path, change, message):
    Directory(tmp_path, RUN, RUN.data.fingerprint).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(tmp_path)
    with pytest.raises(OtherRunError) as error:
        quiet(replace(RUN, **change), tmp_path)
    assert str(error.value) == f"{tmp_path} belongs to another run; changed: {message}"
    assert contents(tmp_path) == before


def test_changed_data_under_the_same_config_are_refused(tmp_path):
    Directory(tmp_path, RUN, "before").close()
    with pytest.raises(OtherRunError, match="changed: the data themselves: fingerprint before -> echo-0"):
        quiet(RUN, tmp_path)


def test_what_is_kept_may_change(tmp_path):
    Directory(tmp_path, RUN, "x").close()
    Directory(tmp_path, replace(RUN, keep=9, checkpoint_every=1, prefetch=7), "x").close()


def test_a_directory_in_use_is_refused(tmp_path):
    home = Directory(tmp_path, RUN, "x")
    with pytest.raises(RuntimeError, match="in use by another process"):
        Directory(tmp_path, RUN, "x")
    home.close()
    Directory(tmp_path, RUN, "x").close()


def test_results_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(OtherRunError, match=r"holds results but no config\.json"):
        Directory(tmp_path, RUN, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Waves()}, "data of kind 'classification' for a model of kind 'language'"),
        ({"data": Echo(vocab_size=9)}, "model: vocab_size=8, but the data have vocab_size=9"),
        (
            {"model": replace(REALS, features=3), "data": Waves()},
            "model: features=3, but the data have features=2",
        ),
        ({"model": REALS, "data": Waves(classes=3)}, "model: classes=2, but the data have classes=3"),
    ],
)
def test_model_and_data_must_fit(change, message):
    with pytest.raises(ValueError, match=message):
        quiet(replace(RUN, **change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer >= 1"),
        ({"accumulate": 4}, "accumulate=4 does not divide batch_size=6"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'; choose from float32, bfloat16"),
        ({"data": 3}, "data=3 is not a data config"),
    ],
)
def test_runs_check_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(RUN, **settings)
    with pytest.raises(ValueError, match=r"optimizer: beta2=1.0 must be in \[0, 1\)"):
        Optimizer(beta2=1.0)


# --- configs and records --------------------------------------------------------------------------------


def test_configs_survive_json():
    layer = gated_linear_attention.Config(width=8, heads=2, decay="head")
    run = replace(RUN, model=replace(TOKENS, pattern=("attention", layer)))
    again = config.from_dict(json.loads(json.dumps(config.to_dict(run))))
    assert again == run
    assert config.fingerprint(again) == config.fingerprint(run) != config.fingerprint(RUN)
    other = replace(layer, heads=4)
    changed = replace(run, model=replace(run.model, pattern=("attention", other)), keep=7)
    assert config.difference(run, changed) == ["model.pattern.1.heads: 2 -> 4"]


def test_configs_of_other_versions():
    saved = config.to_dict(RUN)
    del saved["loss_chunk"]  # from before the field was added
    assert config.from_dict(saved) == RUN
    with pytest.raises(ValueError, match=r"experiments\.config:Run has no field gone"):
        config.from_dict({**saved, "gone": 1})
    with pytest.raises(ValueError, match="no config type 'os:system'"):
        config.from_dict({"type": "os:system"})
    with pytest.raises(ValueError, match="cannot stand in a config"):
        config.to_dict(object())


def test_rows_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    recorder = record.Recorder(path)
    recorder.write("train", 1, {"loss": np.float32("nan"), "load": np.array([0.5, np.inf])}, {"seconds": 1.0})
    recorder.close()
    row = {"kind": "train", "step": 1, "loss": None, "load": [0.5, None], "timing": {"seconds": 1.0}}
    assert json.loads(path.read_text()) == row == recorder.rows[0]


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    recorder = record.Recorder(tmp_path / "metrics.jsonl", tensorboard=True)
    recorder.write("train", 1, {"loss": 0.5})
    recorder.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
    with pytest.raises(ValueError, match="needs a run directory"):
        record.Recorder(tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install recurrent-zoo\[tensorboard\]"):
        record.Recorder(tmp_path / "metrics.jsonl", tensorboard=True)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    screen = record.Screen(0, 10)
    screen.update(10, "loss 1.0")
    screen.say("done")
    screen.close()
    shown = capsys.readouterr().out
    assert "10/10" in shown
    assert "loss 1.0" in shown
    assert "done" in shown


def test_flops_count_the_head_where_it_is_read():
    full, few = Echo().batch(0, 0, 2), Echo(few=True).batch(0, 0, 2)
    difference = flops.train_flops(TOKENS, full) - flops.train_flops(TOKENS, few)
    assert difference == 3 * 2 * (12 - 3) * 2 * 8 * 8
