"""`python -m experiments.soak`; see the package."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

Outcome = tuple[list[dict[str, Any]], list[str]]
CASES = {"damage": 1_000, "inputs": 10_000, "kills": 200, "long": 20}
MEANING = {
    "damage": "Damage to one or two of three checkpoints: each is to be reported in one line, and the newest "
    "of the others to be restored bit for bit.",
    "inputs": "Damaged and hostile files, read under an audit hook: each is to be read or refused in one "
    "line, nothing executed, no file changed, none opened outside.",
    "kills": "kill -9 of a training run of {steps} steps with a checkpoint every {interval}: by the clock, "
    "on entering a phase, or up to 50 ms later. Every restart is to find an intact checkpoint at most one "
    "interval back, and every run to end bit for bit as one that was not killed.",
    "long": "{steps} steps in three lengths with a checkpoint every {interval}, in one life and in several.",
}
STEPS, INTERVALS = {"kills": 200, "long": 10_000}, {"kills": 5, "long": 100}


def _of(name: str, options: argparse.Namespace) -> Callable[[Path], Outcome]:
    from experiments.soak import damage, inputs, kills, lives, long

    if name in ("damage", "inputs"):
        return partial({"damage": damage.soak, "inputs": inputs.soak}[name], options.cases, options.seed)

    def of_runs(place: Path) -> Outcome:
        run = lives.run_of(place, options.steps, INTERVALS[name])
        if name == "kills":  # of one length: nearly all of a restart is making the program
            return kills.soak(replace(run, data=run.data.text), options.cases, options.seed, place)
        return long.soak(run, options.cases, options.seed, place)

    return of_runs


def main(arguments: list[str] | None = None) -> int:
    """Run one soak; its exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m experiments.soak", description=__doc__)
    parser.add_argument("name", choices=list(CASES))
    parser.add_argument("--cases", type=int, help=f"how many: {CASES} unless told")
    parser.add_argument("--steps", type=int, help=f"of a run: {STEPS} unless told")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the figures in experiments/results")
    options = parser.parse_args(arguments)
    options.cases = options.cases or CASES[options.name]
    options.steps = options.steps or STEPS.get(options.name, 0)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a kill is no power cut: no disk is needed
    with tempfile.TemporaryDirectory(dir=memory) as place:
        rows, broken = _of(options.name, options)(Path(place))
    for line in broken:
        print(line)
    if options.write:
        _write(options, rows)
    return 1 if broken else 0


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from experiments import timing

    meaning = MEANING[options.name].format(steps=options.steps, interval=INTERVALS.get(options.name))
    command = f"`python -m experiments.soak {options.name} --cases {options.cases} --seed {options.seed}`"
    table = Path(__file__).parents[1] / "results" / f"soak_{options.name}"
    timing.write(rows, table, [f"{timing.machine()}; {command}", meaning])


if __name__ == "__main__":
    sys.exit(main())
