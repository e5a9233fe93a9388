"""Least squares by variable projection: for given exponents the law is linear in (E, A, B).

    min over alpha, beta of  min over E, A, B >= 0 of  sum_i (L_i - E - A n_i^-alpha - B d_i^-beta)^2

The inner minimum is one of non-negative least squares, solved exactly. The outer one has two dimensions,
searched on a grid, then by Gauss-Newton from its best cells. Newton's method in parameters that are not at
0 finds the last digits. Units are the geometric means of N and D and the mean loss: those of the data change
nothing.

Golub & Pereyra, SIAM J. Numer. Anal. 10 (1973); the five-dimensional problem is far worse conditioned.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import nnls

from experiments.scaling.data import Runs, require_determined
from experiments.scaling.law import Law
from experiments.scaling.newton import Evaluation, descend

SEARCH = (0.01, 4.0)  # exponents that are looked for; beyond, a minimum lies on the edge
FINE, COARSE = 24, 8  # points a side of the grid
STARTS = 4  # cells of the grid that descents start from


@dataclass(frozen=True)
class Problem:
    """`n`, `d` [R]: log N and log D less means; `y` [R]: losses over their mean. `tied`: alpha = beta."""

    n: np.ndarray
    d: np.ndarray
    y: np.ndarray
    means: tuple[float, float, float]  # of log N, log D and the loss
    tied: bool = False

    @classmethod
    def of(cls, runs: Runs, tied: bool = False) -> "Problem":
        n, d = np.log(runs.params), np.log(runs.tokens)
        means = float(n.mean()), float(d.mean()), float(runs.loss.mean())
        return cls(n - means[0], d - means[1], runs.loss / means[2], means, tied)

    def powers(self, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.exp(-exponents[0] * self.n), np.exp(-exponents[-1] * self.d)

    def project(self, exponents: np.ndarray) -> tuple[np.ndarray, float]:
        """The best (E, A, B) [3] at `exponents`, and the norm of what is left."""
        basis = np.stack([np.ones_like(self.n), *self.powers(exponents)], 1)
        scale = np.linalg.norm(basis, axis=0)
        coefficients, rest = nnls(basis / scale, self.y)
        return coefficients / scale, rest

    def reduced(self, logs: np.ndarray) -> Evaluation:
        """Half the sum of squares at exponents `exp(logs)`, its gradient and Gauss-Newton matrix."""
        exponents = np.exp(logs)
        best, _ = self.project(exponents)
        u, v = self.powers(exponents)
        basis = np.stack([np.ones_like(u), u, v], 1)
        rest = basis @ best - self.y
        slopes = np.stack([-best[1] * self.n * u, -best[2] * self.d * v], 1)
        slopes = (slopes.sum(1, keepdims=True) if self.tied else slopes) * exponents
        # What the linear part can follow is no change of the residual (Kaufman's approximation).
        span, _ = np.linalg.qr(basis[:, best > 0])
        own = slopes - span @ (span.T @ slopes)
        return float(rest @ rest) / 2, rest @ slopes, own.T @ own

    def full(self, x: np.ndarray) -> Evaluation:
        """Half the sum of squares in x = (E, A, B, exponents), its gradient and Hessian."""
        exponents = x[3:]
        u, v = self.powers(exponents)
        nu, dv = self.n * u, self.d * v
        # The last column of each is for beta, which may be alpha.
        rest = x[0] + x[1] * u + x[2] * v - self.y
        jacobian = np.stack([np.ones_like(u), u, v, -x[1] * nu, -x[2] * dv], 1)
        curvature = np.zeros((5, 5))
        curvature[1, 3] = curvature[3, 1] = -rest @ nu
        curvature[2, 4] = curvature[4, 2] = -rest @ dv
        curvature[3, 3] = x[1] * rest @ (self.n * nu)
        curvature[4, 4] = x[2] * rest @ (self.d * dv)
        merge = np.eye(5)[:, : len(x)]
        merge[4, -1] = 1.0
        hessian = merge.T @ (jacobian.T @ jacobian + curvature) @ merge
        return float(rest @ rest) / 2, merge.T @ (jacobian.T @ rest), hessian

    def law(self, x: np.ndarray) -> Law:
        """(E, A, B, exponents) in the units of the data."""
        alpha, beta = float(x[3]), float(x[-1])
        log_n, log_d, loss = self.means
        scales = (1.0, math.exp(alpha * log_n), math.exp(beta * log_d))
        offset, a, b = (float(c) * loss * s for c, s in zip(x[:3], scales, strict=True))
        return Law(offset, a, b, alpha, beta)


def _grid(problem: Problem, side: int) -> list[np.ndarray]:
    """Logarithms of the exponents of the cells that no neighbour undercuts, the best first."""
    logs = np.log(np.geomspace(SEARCH[0], SEARCH[1], side))
    dimensions = 1 if problem.tied else 2
    cells = np.array(list(product(logs, repeat=dimensions)))
    values = np.array([problem.project(np.exp(cell))[1] for cell in cells])
    field = np.pad(values.reshape((side,) * dimensions), 1, constant_values=np.inf)
    shifts = product((-1, 0, 1), repeat=dimensions)
    axes = tuple(range(dimensions))
    around = np.min([np.roll(field, shift, axes) for shift in shifts if any(shift)], axis=0)
    valleys = (field <= around)[(slice(1, -1),) * dimensions].ravel()
    order = [i for i in np.argsort(values, kind="stable") if valleys[i]]
    return [cells[i] for i in order]


def _finish(problem: Problem, logs: np.ndarray) -> np.ndarray:
    """(E, A, B, exponents) from exponents: Newton's method in what is neither 0 nor at a wall."""
    exponents = np.exp(logs)
    x = np.concatenate([problem.project(exponents)[0], exponents])
    free = np.concatenate([x[:3] > 0, np.full(len(exponents), True)])
    powered = free[1:3].any(keepdims=True) if problem.tied else free[1:3]
    low, high = np.log(SEARCH)
    free[3:] &= powered & (logs > low) & (logs < high)

    def evaluate(part: np.ndarray) -> Evaluation:
        whole = x.copy()
        whole[free] = part
        value, gradient, hessian = problem.full(whole)
        return value, gradient[free], hessian[np.ix_(free, free)]

    lows, highs = np.zeros(len(x)), np.full(len(x), np.inf)
    lows[3:], highs[3:] = SEARCH
    x[free] = descend(evaluate, x[free], (lows[free], highs[free]))
    return x


def fit(runs: Runs, *, tied: bool = False, start: Law | None = None) -> Law:
    """The law of least squares of the losses. `tied`: with alpha = beta; `start`: a fit of similar runs.

    Raises ValueError where the runs do not determine it.
    """
    require_determined(runs, tied=tied)
    problem = Problem.of(runs, tied)
    cells = _grid(problem, FINE if start is None else COARSE)[: STARTS if start is None else 2]
    if start is not None:
        exponents = [start.alpha] if tied else [start.alpha, start.beta]
        cells.append(np.log(np.clip(exponents, *SEARCH)))
    low, high = np.log(SEARCH)
    walls = np.full(len(cells[0]), low), np.full(len(cells[0]), high)
    found = [_finish(problem, descend(problem.reduced, cell, walls, most=15)) for cell in cells]
    return problem.law(min(found, key=lambda x: problem.full(x)[0]))


def flags(law: Law, runs: Runs) -> list[str]:
    """What makes the parameters of a fit doubtful, one line each."""
    found = []
    low, high = SEARCH[0] * (1 + 1e-5), SEARCH[1] * (1 - 1e-5)
    if law.E <= 0:
        found.append("edge: E = 0, no irreducible loss is visible in these runs")
    for scale, exponent, size in (("A", "alpha", "params"), ("B", "beta", "tokens")):
        value = getattr(law, exponent)
        if getattr(law, scale) <= 0:
            found.append(f"edge: {scale} = 0, the loss does not fall with {size}; {exponent} means nothing")
        elif not low < value < high:
            found.append(f"edge: {exponent} = {value:.3g} is at the edge of the search, {SEARCH}")
    return found + _hardly_determined(law, runs)


def _hardly_determined(law: Law, runs: Runs, most: float = 0.5) -> list[str]:
    """A line for each exponent whose standard error, to first order, is above `most` of it."""
    errors = standard_errors(law, runs)
    if errors is None:
        return [
            "underdetermined: five parameters and no more than five distinct (params, tokens), no error left"
        ]
    pairs = (("alpha", law.alpha, errors[3], law.A), ("beta", law.beta, errors[4], law.B))
    return [
        f"underdetermined: {name} = {value:.3g} has a standard error of {100 * error / value:.0f} %"
        for name, value, error, scale in pairs
        if scale > 0 and not error <= most * value
    ]


def standard_errors(law: Law, runs: Runs) -> np.ndarray | None:
    """Of (E, A, B, alpha, beta) [5] in normal units, from the Jacobian; None without degrees of freedom."""
    problem = Problem.of(runs)
    freedom = len(set(zip(runs.params, runs.tokens, strict=True))) - 5
    if freedom <= 0:
        return None
    u, v = problem.powers(np.array([law.alpha, law.beta]))
    log_n, log_d, loss = problem.means
    a = law.A * math.exp(-law.alpha * log_n) / loss
    b = law.B * math.exp(-law.beta * log_d) / loss
    jacobian = np.stack([np.ones_like(u), u, v, -a * problem.n * u, -b * problem.d * v], 1)
    rest = (runs.loss - law.loss(runs.params, runs.tokens)) / loss
    inverse = np.linalg.pinv(jacobian, rcond=1e-13)
    variance = rest @ rest / max(1, len(runs) - 5)
    return np.sqrt(variance * (inverse**2).sum(1))
