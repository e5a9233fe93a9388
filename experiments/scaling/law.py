"""The law L(N, D) = E + A / N^alpha + B / D^beta, what a run costs, and the best use of a budget.

N parameters, D tokens, losses in the units of the data (nats). The form: Hoffmann et al., arXiv 2203.15556,
section 3.3 ("approach 3").
"""

import math
from dataclasses import dataclass

import numpy as np

from experiments.scaling.data import Runs
from layers.checks import require


@dataclass(frozen=True)
class Law:
    """The five parameters, in the units of the data."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params, tokens) -> np.ndarray:
        """L at `params` and `tokens`, arrays of one shape."""
        return self.E + self.term("N", params) + self.term("D", tokens)

    def term(self, of: str, x) -> np.ndarray:
        """`A / N^alpha` or `B / D^beta`."""
        scale, exponent = (self.A, self.alpha) if of == "N" else (self.B, self.beta)
        return scale * np.exp(-exponent * np.log(np.asarray(x, float)))

    def residuals(self, runs: Runs) -> np.ndarray:
        """log loss - log L of every run, so that 0.01 is one per cent."""
        return np.log(runs.loss) - np.log(self.loss(runs.params, runs.tokens))

    def to_dict(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in ("E", "A", "B", "alpha", "beta")}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a training run, `C = factor N^power D`: 6 N D, or what fits a column of FLOPs best."""

    factor: float = 6.0
    power: float = 1.0
    column: str | None = None  # where it was fitted to
    misfit: float = 0.0  # largest relative difference between the column and the formula

    def flops(self, params, tokens) -> np.ndarray:
        return self.factor * np.asarray(params, float) ** self.power * np.asarray(tokens, float)

    def exponents(self, law: Law) -> tuple[float, float]:
        """(a, b) of N* ~ C^a and D* ~ C^b."""
        both = law.alpha + self.power * law.beta
        return law.beta / both, law.alpha / both

    def optimum(self, law: Law, compute) -> tuple[np.ndarray, np.ndarray]:
        """(N*, D*) that minimise `law` at a cost of `compute`, in closed form; NaN where a term of it is 0.

        With C = k N^p D, the slopes of both terms along the budget balance:
        alpha A N^-alpha = p beta B D^-beta.
        """
        compute = np.asarray(compute, float)
        if law.A <= 0 or law.B <= 0:
            return np.full_like(compute, math.nan), np.full_like(compute, math.nan)
        balance = math.log(law.alpha * law.A) - math.log(self.power * law.beta * law.B)
        budget = np.log(compute) - math.log(self.factor)
        log_params = (balance + law.beta * budget) / (law.alpha + self.power * law.beta)
        return np.exp(log_params), np.exp(budget - self.power * log_params)

    def __str__(self) -> str:
        if self.column is None:
            return "6 N D"
        power = "N" if abs(self.power - 1) < 5e-5 else f"N^{self.power:.4g}"
        within = f"{100 * max(self.misfit, 1e-4):.2g} %"
        return f"column {self.column!r}; for optima {self.factor:.4g} {power} D, within {within} of it"


def compute_of(runs: Runs) -> np.ndarray:
    """C of every run: its FLOPs where they are given, else 6 N D."""
    return 6 * runs.params * runs.tokens if runs.flops is None else runs.flops


def cost_of(runs: Runs, column: str = "flops") -> Cost:
    """6 N D, or the power of N that fits the FLOPs per token best (what is linear in tokens is certain).

    Raises ValueError where FLOPs are given and no power of N with a positive exponent fits them.
    """
    if runs.flops is None:
        return Cost()
    n, per_token = np.log(runs.params), np.log(runs.flops / runs.tokens)
    power, offset = 1.0, float(np.mean(per_token - n))
    if np.ptp(n) > 0:
        power, offset = (float(x) for x in np.polyfit(n - n.mean(), per_token, 1))
        offset -= power * n.mean()
    require(power > 0, f"column {column!r}: FLOPs per token fall with params, as (N)^{power:.3g}")
    misfit = float(np.abs(np.expm1(per_token - power * n - offset)).max())
    return Cost(math.exp(offset), power, column, misfit)
