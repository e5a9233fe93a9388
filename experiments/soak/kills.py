"""Kill -9: a run is killed over and over, and has to end as one that was left in peace.

After every death the next life looks at what is there. It has to find an intact checkpoint, without a
warning, no older than one interval behind the last step that was made; the rows of metrics up to it; no more
checkpoints than are kept. When a run has ended, its arrays, by their SHA-256, and its rows, but for the
times, are those of the run in peace.
"""

import json
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from experiments.config import Run
from experiments.directory import rows_of
from experiments.soak.lives import PHASES, Plan, Shared, draw, live
from zoo import checkpoint

KILLS_A_RUN = 25


def untimed(home: Path) -> list[dict]:
    """The rows of a run, without what depends on the machine."""
    rows = rows_of(home / "metrics.jsonl", "step")
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def arrays(home: Path) -> dict[str, str]:
    """The digest of every array of the newest checkpoint, as its manifest has them."""
    newest = home / "checkpoints" / f"step_{checkpoint.steps(home / 'checkpoints')[-1]:08d}"
    body = (newest / "manifest").read_bytes().rpartition(b"\n")[0]
    return {name: about["digest"] for name, about in json.loads(body)["leaves"].items()}


@dataclass
class Trial:
    """A run on its way from death to death, and what was wrong after each of them."""

    run: Run
    home: Path
    peace: Path  # the directory of the run that was left alone
    broken: list[str] = field(default_factory=list)
    deaths: Counter = field(default_factory=Counter)  # by phase
    reached: int = 0  # steps made in any life
    lost: int = 0  # the most steps that had to be made again
    lives: int = 0

    def live(self, plan: Plan, shared: Shared, **how: Any) -> bool:
        """One life; whether the run has ended with it."""
        before = self.reached
        status = live(self.run, self.home, plan, shared, **how)
        self.lives += 1
        phase = PHASES[shared["phase"]]
        if status not in (0, -signal.SIGKILL):
            self.broken.append(f"life {self.lives}, {plan}: exit status {status} in {phase}")
        if status == -signal.SIGKILL:
            self.deaths[phase] += 1
        if shared["restored"] >= 0:  # it came so far
            self._restarted(before, shared["restored"])
        self.reached = max(self.reached, shared["done"])
        self._look()
        return status == 0

    def _restarted(self, before: int, restored: int) -> None:
        """A life began at step `restored` after another had reached `before`."""
        self.lost = max(self.lost, before - restored)
        if before - restored > self.run.checkpoint_every:
            self.broken.append(f"life {self.lives}: began at {restored}, though {before} had been reached")

    def _look(self) -> None:
        """At what a death has left."""
        there = checkpoint.steps(self.home / "checkpoints")
        if len(there) > self.run.keep + 1:  # the one too many was about to go
            self.broken.append(f"life {self.lives}: checkpoints {there}, of which {self.run.keep} are kept")
        newest = there[-1] if there else 0
        if (self.home / "metrics.jsonl").exists():
            ours, peace = ([r for r in untimed(h) if r["step"] <= newest] for h in (self.home, self.peace))
            if ours != peace:
                self.broken.append(f"life {self.lives}: the rows up to step {newest} are others")

    def ended(self) -> None:
        """Compare with the run in peace."""
        if untimed(self.home) != untimed(self.peace):
            self.broken.append("rows of metrics differ from the run in peace")
        if arrays(self.home) != arrays(self.peace):
            self.broken.append("parameters differ from the run in peace")
        left = sorted(path.name for path in (self.home / "checkpoints").iterdir())
        kept = checkpoint.steps(self.home / "checkpoints")
        if len(left) != len(kept) or len(kept) > self.run.keep:
            self.broken.append(f"left over in the end: {left}")


def soak(run: Run, kills: int, seed: int, place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows by phase, and a line for every broken promise."""
    random, shared = Random(seed), Shared()
    peace = place / "peace"
    broken, deaths, lost, runs = list[str](), Counter[str](), 0, 0
    program = {"program": place / "program"}
    if live(run, peace, Plan(), shared, **program):
        return [], ["the run in peace did not end"]
    while sum(deaths.values()) < kills and not broken:
        trial = Trial(run, place / f"run-{runs}", peace)
        ended = False
        while not ended and not trial.broken:
            left = min(kills - sum(deaths.values()), KILLS_A_RUN) - sum(trial.deaths.values())
            ended = trial.live(draw(random) if left > 0 else Plan(), shared, **program)
        if ended:
            trial.ended()
        broken += [f"run {runs}: {line}" for line in trial.broken]
        deaths, lost, runs = deaths + trial.deaths, max(lost, trial.lost), runs + 1
        print(f"run {runs}: {sum(trial.deaths.values())} kills, {sum(deaths.values())} in all", flush=True)
    rows: list[dict[str, Any]] = [
        {"killed in": phase, "kills": deaths[phase]} for phase in PHASES if deaths[phase]
    ]
    rows.append({"killed in": "all", "kills": sum(deaths.values())})
    facts = {"runs": runs, "steps lost at most": lost, "broken promises": len(broken)}
    return [row | facts for row in rows], broken
