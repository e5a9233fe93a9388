"""The soaks, a little of each: what they promise by the thousand is true of a few."""

import os
import subprocess
import sys

import pytest

from experiments.soak import long
from experiments.soak.__main__ import main


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arguments",
    [
        ["damage", "--cases", "60"],
        ["inputs", "--cases", "400"],
        ["kills", "--cases", "10", "--steps", "60"],
        ["long", "--cases", "2", "--steps", "1500"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_promise_is_broken(arguments):
    """In a process of its own: lives are forks, and a fork of one that has begun to compute does not live."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.soak", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_promise_is_the_exit_status(monkeypatch, capsys):
    from experiments.soak import damage

    monkeypatch.setattr(damage, "_restored", lambda home, damaged: "nothing was noticed")
    assert main(["damage", "--cases", "6"]) == 1
    assert capsys.readouterr().out.count("nothing was noticed") == 6


def test_growth_is_measured_from_where_a_process_has_settled():
    assert long.growth({500: 10, 1_000: 100, 2_000: 103, 3_000: 101}) == pytest.approx(0.03)
