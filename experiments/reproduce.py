"""Published findings, trained again and held against what was claimed.

    zoo reproduce cpu       about an hour on two cores, by estimate
    zoo reproduce gpu       within a day on one H200; --only FINDING for one of them

A finding is a config among `experiments/configs` with CLAIMS beside its `config`: figures that should come
out above or below a bound. What does not come out is a line like any other. Where a finding needs more than
one comparison, MORE beside `config` has the others by name, all labels different, and claims are about the
models of all of them. Each comparison has a folder of its name, and goes on where it stopped.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments import overrides, timing
from experiments.compare import Arm, Comparison, compare
from experiments.reports.numbers import spread
from experiments.sweep import write_rows
from layers.checks import require

TIERS = {
    "cpu": ("mqar_mini", "parity", "swaps", "induction", "mnist1d", "selective_copying"),
    "gpu": ("induction_long", "state_collapse", "expanded_memory", "mqar_state_size", "mad"),
}
Arms = dict[str, Arm]
Figure = Callable[[Arms], float]


@dataclass(frozen=True)
class Claim:
    """`text`, and the figure of it that should lie in [least, most]."""

    text: str
    figure: Figure
    least: float = float("-inf")
    most: float = float("inf")

    @classmethod
    def near(cls, text: str, figure: Figure, published: float, tolerance: float) -> "Claim":
        """That a figure is the published one, up to `tolerance`."""
        return cls(text, figure, least=published - tolerance, most=published + tolerance)

    def wanted(self) -> str:
        bounds = []
        if self.least > float("-inf"):
            bounds.append(f"at least {self.least:g}")
        if self.most < float("inf"):
            bounds.append(f"at most {self.most:g}")
        return ", ".join(bounds)

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


def of(model: str, part: str = "test", figure: str = "accuracy") -> Figure:
    """The mean over seeds of a figure of the test split or a probe; NaN, within no bounds, without one."""

    def over_seeds(arms: Arms) -> float:
        return spread(arms[model].values(figure, part))[0] if arms[model].tested else float("nan")

    return over_seeds


def mean(*figures: Figure) -> Figure:
    """Of figures that count alike."""
    return lambda arms: fmean(figure(arms) for figure in figures)


def difference(figure: Figure, less: Figure) -> Figure:
    """By how much `figure` is above `less`."""
    return lambda arms: figure(arms) - less(arms)


def drop(model: str, other: str) -> Figure:
    """By how much `other` stays below `model`."""
    return difference(of(model), of(other))


def finding(name: str) -> tuple[dict[str, Comparison], tuple[Claim, ...]]:
    """The comparisons of the finding of that name, its own first, and its claims."""
    module = overrides.module(name)
    require(hasattr(module, "CLAIMS"), f"config {name!r} claims nothing")
    return {name: module.config, **getattr(module, "MORE", {})}, module.CLAIMS


def _worked() -> float:
    """Minutes that cores have worked for this process and for those of its workers that are done."""
    return sum(os.times()[:4]) / 60


def _rows(name: str, home: Path, workers: int | None) -> list[dict]:
    """Train what is missing of a finding; a row for each of its claims, printed as well."""
    comparisons, claims = finding(name)
    arms: Arms = {}
    start, worked = time.perf_counter(), _worked()
    for each, comparison in comparisons.items():
        arms |= compare(comparison, home / each, workers=workers)
    minutes, worked = (time.perf_counter() - start) / 60, _worked() - worked
    rows = []
    for claim in claims:
        value = claim.figure(arms)
        rows.append(
            {
                "finding": name,
                "claim": claim.text,
                "seen": f"{value:.3f}",
                "wanted": claim.wanted(),
                "holds": "yes" if claim.holds(value) else "no",
                "seeds": len(comparisons[name].seeds),
                "minutes": f"{minutes:.1f}",
                "core_minutes": f"{worked:.1f}",
            }
        )
        print(f"{claim.text}: {value:.3f}, {claim.wanted()}: {rows[-1]['holds']}", flush=True)
    return rows


def reproduce(tier: str, home: Path, *, only: str | None = None, workers: int | None = None) -> list[dict]:
    """Train what is missing of a tier, write `home/reproduce_TIER.md` and `.csv`; a row for each claim.

    `only`: one of the tier's findings. ValueError for a tier or finding that does not exist.
    """
    require(tier in TIERS, f"no tier {tier!r}; choose from {', '.join(TIERS)}")
    names = TIERS[tier]
    require(
        only is None or only in names, f"no finding {only!r} in tier {tier}; choose from {', '.join(names)}"
    )
    began, worked = time.perf_counter(), _worked()
    rows = [row for name in (names if only is None else (only,)) for row in _rows(name, home, workers)]
    write_rows(rows, home / f"reproduce_{tier}.csv")
    total = (time.perf_counter() - began) / 60
    note = (
        f"`zoo reproduce {tier}`: {sum(row['holds'] == 'yes' for row in rows)} of {len(rows)} claims hold. "
        f"{total:.0f} minutes and {_worked() - worked:.0f} minutes of cores' work (of this call: what was "
        f"there already was not trained again). "
        f"{timing.machine()}."
    )
    (home / f"reproduce_{tier}.md").write_text(timing.markdown(rows, note))
    return rows
