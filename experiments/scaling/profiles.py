"""IsoFLOP profiles: the best size at each budget from a parabola, and how biased that is.

Approach 2 of Hoffmann et al., arXiv 2203.15556, section 3.2: at each budget C a parabola in log N is fitted
to the losses, whose lowest point is N*; power laws go through these. A profile of the law is no parabola:
unless alpha = beta and the sizes are centred on the optimum, its lowest point is off, the more the wider and
the less centred they are. `bias` measures by how much, on losses without noise at the very same sizes.
"""

from dataclasses import dataclass, replace

import numpy as np

from experiments.scaling.data import Runs
from experiments.scaling.law import Cost, Law, compute_of

SAME_BUDGET = 0.05  # relative gap in compute that separates two budgets
WIDEST_BUDGET = 0.30  # relative spread in compute of one budget
LEAST_SIZES = 3
BIAS_THAT_BITES = 0.05  # relative error of N* or D* from which on a warning is due
BEYOND = 10.0  # times the largest budget: where power laws are compared as well


@dataclass(frozen=True)
class PowerLaw:
    """`x = coefficient C^exponent`, a line through logarithms."""

    coefficient: float
    exponent: float

    def __call__(self, compute) -> np.ndarray:
        return self.coefficient * np.asarray(compute, float) ** self.exponent

    @classmethod
    def through(cls, compute, x) -> "PowerLaw":
        logs, values = np.log(compute), np.log(x)
        slope, offset = np.polyfit(logs - logs.mean(), values, 1)
        return cls(float(np.exp(offset - slope * logs.mean())), float(slope))

    def to_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "exponent": self.exponent}


@dataclass(frozen=True)
class Profile:
    """One budget: its runs, its `parabola` of log N - centre (highest power first), its lowest point."""

    compute: float
    rows: np.ndarray
    parabola: np.ndarray
    centre: float
    params: float
    tokens: float
    loss: float
    problem: str = ""  # why its minimum is not used
    remark: str = ""  # why it is doubtful


@dataclass(frozen=True)
class Profiles:
    """All budgets, and power laws N*(C), D*(C) through the minima, if two or more can be used."""

    budgets: tuple[Profile, ...]
    params: PowerLaw | None = None
    tokens: PowerLaw | None = None

    @property
    def used(self) -> list[Profile]:
        return [profile for profile in self.budgets if not profile.problem]

    def flags(self) -> list[str]:
        """Budgets that are left out or doubtful, one line each."""
        left_out = [
            f"isoFLOP budget {p.compute:.3g} left out: {p.problem}" for p in self.budgets if p.problem
        ]
        return left_out + [f"isoFLOP budget {p.compute:.3g}: {p.remark}" for p in self.used if p.remark]


def budgets(runs: Runs) -> list[np.ndarray]:
    """Rows of each budget, by the column `budget` or by gaps in compute; those of three sizes or more."""
    compute = compute_of(runs)
    if runs.budget is not None:
        groups = [np.flatnonzero(runs.budget == value) for value in np.unique(runs.budget)]
    else:
        order = np.argsort(compute, kind="stable")
        cuts = np.flatnonzero(np.diff(np.log(compute[order])) > np.log1p(SAME_BUDGET)) + 1
        groups = [np.sort(group) for group in np.split(order, cuts)]
        groups = [g for g in groups if compute[g].max() <= (1 + WIDEST_BUDGET) * compute[g].min()]
    return [group for group in groups if len(set(runs.params[group])) >= LEAST_SIZES]


def _problem(curvature: float, vertex: float, x: np.ndarray, loss: np.ndarray) -> str:
    """Why the minimum of a parabola cannot be used: one that no sizes enclose is a guess."""
    if curvature <= 0:
        return "its parabola has no minimum"
    if not x.min() <= vertex <= x.max():
        side = "below the smallest" if vertex < x.min() else "above the largest"
        return f"edge minimum, {side} size that was trained"
    lowest = x[np.argmin(loss)]
    edge = {x.min(): "smallest", x.max(): "largest"}.get(lowest)
    return f"edge minimum, the {edge} size has the lowest loss" if edge else ""


def profile(runs: Runs, rows: np.ndarray) -> Profile:
    """The parabola through the runs `rows` of one budget."""
    log_params, log_tokens = np.log(runs.params[rows]), np.log(runs.tokens[rows])
    centre = float(log_params.mean())
    x = log_params - centre
    parabola = np.polyfit(x, runs.loss[rows], 2)
    curvature, slope, _ = parabola
    vertex = -slope / (2 * curvature) if curvature != 0 else np.inf
    problem = _problem(curvature, vertex, x, runs.loss[rows])
    at = 0.0 if problem and curvature <= 0 else float(vertex)
    # Along a budget log D is all but linear in log N.
    tokens = np.exp(np.polyval(np.polyfit(x, log_tokens, 1), at))
    compute = float(np.exp(np.log(compute_of(runs)[rows]).mean()))
    lowest = float(np.polyval(parabola, at))
    found = (float(np.exp(centre + at)), float(tokens), lowest)
    exact = len(set(x)) == LEAST_SIZES
    remark = "three sizes determine a parabola and leave no error to see" if exact else ""
    return Profile(compute, rows, parabola, centre, *found, problem, remark)


def fit(runs: Runs) -> Profiles:
    """Approach 2 on all budgets that the runs have; none is no error."""
    found = Profiles(tuple(profile(runs, rows) for rows in budgets(runs)))
    used = found.used
    if len(used) < 2:
        return found
    compute = [p.compute for p in used]
    laws = [PowerLaw.through(compute, [getattr(p, name) for p in used]) for name in ("params", "tokens")]
    return replace(found, params=laws[0], tokens=laws[1])


@dataclass(frozen=True)
class Bias:
    """What approach 2 finds on losses of a law without noise, against the law's own optimum.

    `params`, `tokens`: relative errors of N* and D* at each budget in `compute`; `exponents`:
    found less true, of both; `beyond`: those of N* and D* at ten times the largest budget, by power laws.
    """

    compute: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    exponents: tuple[float, float] | None
    beyond: tuple[float, float] | None

    @property
    def largest(self) -> float:
        """The largest relative error, of any of them."""
        errors = [*self.params, *self.tokens, *(self.beyond or ())]
        return float(np.abs(errors).max()) if errors else 0.0

    def flags(self, law: Law) -> list[str]:
        if self.largest < BIAS_THAT_BITES:
            return []
        worst = self.params[np.argmax(np.abs(self.params))]
        text = f"N* is off by up to {100 * worst:+.1f} % at these budgets"
        if self.beyond is not None:
            text += f", by {100 * self.beyond[0]:+.1f} % at {BEYOND:g} times the largest"
        return [
            f"the known bias of isoFLOP parabolas bites (alpha = {law.alpha:.3f}, beta = {law.beta:.3f}, "
            f"wide or uncentred sizes): on the fitted surface without noise {text}"
        ]


def bias(law: Law, cost: Cost, runs: Runs) -> Bias:
    """Approach 2 on the losses of `law` at the very sizes and lengths of `runs`."""
    clean = replace(runs, loss=law.loss(runs.params, runs.tokens), flops=cost.flops(runs.params, runs.tokens))
    # The same groups as those of the runs, whatever their FLOPs are by the formula.
    found = [profile(clean, rows) for rows in budgets(runs)]
    used = [p for p in found if not p.problem]
    compute = np.array([p.compute for p in used])
    params, tokens = cost.optimum(law, compute)
    errors = [
        np.array([getattr(p, n) for p in used]) / x - 1 for n, x in (("params", params), ("tokens", tokens))
    ]
    if len(used) < 2:
        return Bias(compute, errors[0], errors[1], None, None)
    lines = [PowerLaw.through(compute, [getattr(p, n) for p in used]) for n in ("params", "tokens")]
    far = BEYOND * compute.max()
    true = cost.exponents(law)
    return Bias(
        compute,
        errors[0],
        errors[1],
        (lines[0].exponent - true[0], lines[1].exponent - true[1]),
        tuple(float(line(far) / x - 1) for line, x in zip(lines, cost.optimum(law, far), strict=True)),  # type: ignore[arg-type]
    )
