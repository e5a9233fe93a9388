"""Findings: what is claimed, what was seen; a claim that fails is told as plainly as one that holds."""

import csv
import types
from pathlib import Path

import pytest
from test_sweep import run

from experiments import cli, reproduce
from experiments.compare import Arm, Comparison
from experiments.reproduce import Claim, drop, of


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


@pytest.mark.parametrize("tier", reproduce.TIERS)
def test_every_finding_of_a_tier_has_claims_about_models_it_trains(tier):
    for name in reproduce.TIERS[tier]:
        comparison, claims = reproduce.finding(name)
        parts = [label for label, _ in comparison.probes]
        arms = {label: arm(label, 0.5) for label, _ in comparison.runs}
        for each in arms.values():
            each.tested = [{"test": {"accuracy": 0.5}, **{part: {"accuracy": 0.5} for part in parts}}]
        assert claims
        for claim in claims:
            assert claim.wanted()
            assert claim.figure(arms) in (0.5, 0.0)


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
