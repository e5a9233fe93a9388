"""Findings: what is claimed, what was seen; a claim that fails is told as plainly as one that holds."""

import csv
import dataclasses
import math
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sweep import run

from experiments import cli, measure, overrides, reproduce, train
from experiments.compare import Arm, Comparison
from experiments.reproduce import Claim, difference, drop, mean, of
from layers import mixture_of_memories
from zoo import lm


def arm(label, *accuracies, probe=0.5):
    tested = [{"test": {"accuracy": x}, "far": {"accuracy": probe}} for x in accuracies]
    return Arm(label, {}, run(), None, [Path("x")], [], tested=tested)


ARMS = {"good": arm("good", 0.9, 1.0), "bad": arm("bad", 0.2), "none": arm("none")}


def test_figures_are_means_over_seeds_of_test_or_a_probe():
    assert of("good")(ARMS) == pytest.approx(0.95)
    assert of("good", "far")(ARMS) == 0.5
    assert drop("good", "bad")(ARMS) == pytest.approx(0.75)


def test_bounds_are_met_or_not_and_nothing_meets_none():
    claim = Claim("x", of("good"), least=0.9, most=0.99)
    assert claim.wanted() == "at least 0.9, at most 0.99"
    assert claim.holds(0.95)
    assert not claim.holds(0.89)
    assert not claim.holds(1.0)
    assert not claim.holds(of("none")(ARMS))


def test_figures_combine():
    assert mean(of("good"), of("bad"))(ARMS) == pytest.approx(0.575)
    assert difference(of("good", "far"), of("bad"))(ARMS) == pytest.approx(0.3)
    assert math.isnan(mean(of("good"), of("none"))(ARMS))
    near = Claim.near("x", of("good"), 0.93, 0.03)
    assert near.wanted() == "at least 0.9, at most 0.96"
    assert near.holds(0.95) and not near.holds(0.97) and not near.holds(0.89)


class Watched(dict):
    """Arms that remember who was asked for."""

    def __init__(self, comparisons):
        self.asked = set()
        for comparison in comparisons:
            parts = ["test", *(label for label, _ in comparison.probes)]
            figures = {part: {"accuracy": 0.5, "loss": 0.5} for part in parts}
            for label, _ in comparison.runs:
                assert label not in self, "two models of one finding share a label"
                self[label] = arm(label)
                self[label].tested = [figures]

    def __getitem__(self, label):
        self.asked.add(label)
        return super().__getitem__(label)


@pytest.mark.parametrize("name", [name for names in reproduce.TIERS.values() for name in names])
def test_every_finding_has_claims_about_all_models_it_trains_and_no_other(name):
    comparisons, claims = reproduce.finding(name)
    assert next(iter(comparisons)) == name
    arms = Watched(comparisons.values())
    assert claims
    for claim in claims:
        assert claim.wanted()
        assert 0 <= claim.figure(arms) <= 0.6  # nothing is above what went in, but for a class all get right
    assert arms.asked == arms.keys()


def test_claims_that_fail_stand_in_the_table(tmp_path, monkeypatch, capsys):
    claims = (Claim("it is good", of("good"), 0.9), Claim("it is better", of("bad"), least=0.9))
    comparison = Comparison(title="t", runs=(("good", run()), ("bad", run())))
    fake = types.SimpleNamespace(config=comparison, CLAIMS=claims)
    monkeypatch.setattr(reproduce.overrides, "module", lambda name: fake)
    monkeypatch.setattr(reproduce, "compare", lambda *_, **__: ARMS)
    monkeypatch.setattr(reproduce, "TIERS", {"cpu": ("one",)})
    reproduce.reproduce("cpu", tmp_path)
    with (tmp_path / "reproduce_cpu.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["seen"], row["holds"]) for row in rows] == [("0.950", "yes"), ("0.200", "no")]
    assert "1 of 2 claims hold" in (tmp_path / "reproduce_cpu.md").read_text()
    assert "it is better: 0.200, at least 0.9: no" in capsys.readouterr().out


SMALLER = {
    "train_examples": 256,
    "eval_examples": 8,
    "eval_limit": 1,
    "train": ((64, 4, 16),),
    "evaluation": ((64, 4, 4),),
}


def smaller(data):
    """The same data, as little of them as there can be."""
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    inner = {"data": smaller(data.data)} if "data" in fields else {}
    fewer = {name: value for name, value in SMALLER.items() if name in fields}
    return dataclasses.replace(data, **inner, **fewer)


# How many kinds of model a finding trains: of one name, for one kind of task.
KINDS = {"induction_long": 1, "state_collapse": 2, "expanded_memory": 2, "mqar_state_size": 4, "mad": 8}


def kinds(name):
    """Of every kind of model the first run, the smallest, and a probe: `[(label, run, probes)]`."""
    found = {}
    for comparison in reproduce.finding(name)[0].values():
        for label, one in comparison.runs:
            key = type(one.model).__module__, label.partition(",")[0]
            found.setdefault(key, (label, one, comparison.probes[:1]))
    return list(found.values())


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, count in KINDS.items() for n in range(count)]
)
def test_what_is_for_gpus_trains_and_is_tested(name, number, tmp_path, float32):
    assert KINDS.keys() == set(reproduce.TIERS["gpu"])
    assert len(kinds(name)) == KINDS[name]
    label, whole, probes = kinds(name)[number]
    few = dataclasses.replace(whole, data=smaller(whole.data), steps=2, batch_size=4, eval_batch_size=4)
    result = train.train(few, tmp_path / label, progress=False)
    assert result.summary["bad_steps"] == 0
    found = measure.tested(tmp_path / label, few, tuple((part, smaller(data)) for part, data in probes))
    assert found.keys() == {"test", *(part for part, _ in probes)}
    assert all(math.isfinite(numbers["loss"]) and numbers["tokens"] for numbers in found.values())


def test_the_sizes_of_published_states_are_those_of_the_models():
    found = overrides.module("mqar_state_size")
    for name, width, state, size, _ in found.POINTS:
        assert found.memory_bytes(found.model(name, width, state)) == pytest.approx(size, rel=0.02)
        assert found.memory_bytes(found.model(name, width, state)) < 2**20
    source = found.DATA.build()
    drawn = [source._drawn(0, step, found.BATCH) for step in range(found.EPOCH + 1)]
    assert len(set(drawn[:-1])) == found.EPOCH  # every batch of an epoch once
    assert all(within < examples // found.BATCH for (number, within), (_, _, examples)
               in ((d, found.DATA.train[d[0]]) for d in drawn[:-1]))  # fmt: skip
    number, within = drawn[-1]
    assert within >= found.DATA.train[number][2] // found.BATCH  # and then the next epoch


def test_memories_are_compared_at_equal_active_parameters():
    found = overrides.module("expanded_memory")
    mixture, single = (cfg.layers[1] for cfg in (found.MIXTURE, found.SINGLE))
    assert found.active_params(found.SINGLE) == lm.param_count(found.SINGLE)
    # Counted once more, array by array: two of the four routed memories stand idle.
    params = jax.eval_shape(lambda: mixture_of_memories.init(jax.random.key(0), mixture))
    per_memory = sum(params[n].size / mixture.all_memories for n in ("w_kv", "w_decay", "w_beta"))
    idle = lm.param_count(found.MIXTURE) - found.active_params(found.MIXTURE)
    assert idle == 2 * per_memory
    embedding = found.WIDTH * found.DATA.vocab_size
    active = [found.active_params(cfg) - embedding for cfg in (found.MIXTURE, found.SINGLE)]
    assert active[0] == pytest.approx(active[1], rel=0.02)
    assert single.K > mixture.K


def test_accuracies_of_mad_as_published():
    found = overrides.module("mad")
    words = found.VARIATIONS["compression", "vocab_size=32"]
    assert found.as_published(words, lambda arms: 0.4)({}) == pytest.approx((31 * 0.4 + 1) / 32)
    keys = found.VARIATIONS["memorization", "vocab_size=8192"]
    drawn = np.random.default_rng(0).integers(0, keys.keys, (20, 256 * 16))
    shown = np.mean([len(set(row)) / keys.keys for row in drawn.tolist()])
    assert found.as_published(keys, lambda arms: 1.0)({}) == pytest.approx(shown, abs=0.005)
    other = found.VARIATIONS["noisy_recall", "noise=0.8"]
    assert found.as_published(other, lambda arms: 0.3)({}) == 0.3
    assert len(found.VARIATIONS) == 66


def test_a_finding_of_several_comparisons(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(
        config=Comparison(title="one", runs=(("good", run()),), seeds=(0, 1)),
        MORE={"other": Comparison(title="two", runs=(("bad", run()),))},
        CLAIMS=(Claim("both", drop("good", "bad"), least=0.7),),
    )
    asked = []

    def compare(comparison, home, workers):
        asked.append((comparison.title, home, workers))
        return {label: ARMS[label] for label, _ in comparison.runs}

    monkeypatch.setattr(reproduce.overrides, "module", lambda name: fake)
    monkeypatch.setattr(reproduce, "compare", compare)
    monkeypatch.setattr(reproduce, "TIERS", {"gpu": ("pair",)})
    (row,) = reproduce.reproduce("gpu", tmp_path, workers=3)
    assert asked == [("one", tmp_path / "pair", 3), ("two", tmp_path / "other", 3)]
    assert (row["seen"], row["holds"], row["seeds"]) == ("0.750", "yes", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abacus"], "no tier 'abacus'; choose from cpu, gpu"),
        (["cpu", "--only", "luck"], "no finding 'luck' in tier cpu; choose from mqar_mini"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(arguments, message, capsys, tmp_path):
    assert cli.main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_that_claims_nothing_is_no_finding():
    with pytest.raises(ValueError, match="claims nothing"):
        reproduce.finding("quickstart")
