"""Published findings, trained again and held against what was claimed.

    zoo reproduce cpu

A finding is a comparison among `experiments/configs` with CLAIMS beside its `config`: figures that should
come out above or below a bound. What does not come out is a line like any other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import overrides, timing
from experiments.compare import Arm, Comparison, compare
from experiments.reports.numbers import spread
from experiments.sweep import write_rows
from layers.checks import require

TIERS = {
    "cpu": ("mqar_mini", "parity", "swaps", "induction", "mnist1d", "selective_copying"),
    "gpu": ("induction_long",),
}
Arms = dict[str, Arm]


@dataclass(frozen=True)
class Claim:
    """`text`, and the figure of it that should lie in [least, most]."""

    text: str
    figure: Callable[[Arms], float]
    least: float = float("-inf")
    most: float = float("inf")

    def wanted(self) -> str:
        bounds = []
        if self.least > float("-inf"):
            bounds.append(f"at least {self.least:g}")
        if self.most < float("inf"):
            bounds.append(f"at most {self.most:g}")
        return ", ".join(bounds)

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


def of(model: str, part: str = "test", figure: str = "accuracy") -> Callable[[Arms], float]:
    """The mean over seeds of a figure of the test split or a probe; NaN, within no bounds, without one."""

    def mean(arms: Arms) -> float:
        return spread(arms[model].values(figure, part))[0] if arms[model].tested else float("nan")

    return mean


def drop(model: str, other: str) -> Callable[[Arms], float]:
    """By how much `other` stays below `model`."""
    return lambda arms: of(model)(arms) - of(other)(arms)


def finding(name: str) -> tuple[Comparison, tuple[Claim, ...]]:
    """The comparison of that name and its claims."""
    module = overrides.module(name)
    require(hasattr(module, "CLAIMS"), f"config {name!r} claims nothing")
    return module.config, module.CLAIMS


def reproduce(tier: str, home: Path, *, only: str | None = None, workers: int | None = None) -> list[dict]:
    """Train what is missing of a tier, write `home/reproduce_TIER.md` and `.csv`; a row for each claim.

    `only`: one of the tier's findings. ValueError for a tier or finding that does not exist.
    """
    require(tier in TIERS, f"no tier {tier!r}; choose from {', '.join(TIERS)}")
    names = TIERS[tier]
    require(
        only is None or only in names, f"no finding {only!r} in tier {tier}; choose from {', '.join(names)}"
    )
    rows, began = [], time.perf_counter()
    for name in names if only is None else (only,):
        comparison, claims = finding(name)
        start = time.perf_counter()
        arms = compare(comparison, home / name, workers=workers)
        minutes = (time.perf_counter() - start) / 60
        for claim in claims:
            value = claim.figure(arms)
            rows.append(
                {
                    "finding": name,
                    "claim": claim.text,
                    "seen": f"{value:.3f}",
                    "wanted": claim.wanted(),
                    "holds": "yes" if claim.holds(value) else "no",
                    "seeds": len(comparison.seeds),
                    "minutes": f"{minutes:.1f}",
                }
            )
            print(f"{claim.text}: {value:.3f}, {claim.wanted()}: {rows[-1]['holds']}", flush=True)
    write_rows(rows, home / f"reproduce_{tier}.csv")
    total = (time.perf_counter() - began) / 60
    note = (
        f"`zoo reproduce {tier}`: {sum(row['holds'] == 'yes' for row in rows)} of {len(rows)} claims hold. "
        f"{total:.0f} minutes (of this call: what was there already was not trained again). "
        f"{timing.machine()}."
    )
    (home / f"reproduce_{tier}.md").write_text(timing.markdown(rows, note))
    return rows
