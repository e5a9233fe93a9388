"""The robust fit: Huber's loss of the differences of log-losses, minimised over all five parameters.

    min over e, a, b, alpha, beta of  sum_i huber_delta(LSE(e, a - alpha log n_i, b - beta log d_i) - log L_i)

E = exp(e), A = exp(a), B = exp(b). A sum, not a mean: with delta = 1e-3 a mean is so small that the
tolerances of an optimiser stop it early (Besiroglu et al., arXiv 2404.10102, on Hoffmann et al., 2203.15556).
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from experiments.scaling import varpro
from experiments.scaling.data import Runs, require_determined
from experiments.scaling.law import Law
from experiments.scaling.newton import Evaluation, descend

DELTA = 1e-3
STARTS = 16  # best points of the grid that are optimised, beside the least-squares fit
FINISHES = 6  # of the ends of those, how many are followed to the last digits
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
SHARES = (0.02, 0.1, 0.3, 0.6)  # of the mean loss, for each of E, A and B at mean N and D


class Objective:
    """Sum of Huber losses in x = (e, a, b, alpha, beta) [5], in the units of `varpro.Problem`."""

    def __init__(self, problem: varpro.Problem, delta: float):
        self.n, self.d, self.logs, self.delta = problem.n, problem.d, np.log(problem.y), delta

    def _rest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences of log-losses [..., R], and what part of the law each of its terms is [3, ..., R]."""
        e, a, b, alpha, beta = (x[..., i, None] for i in range(5))
        terms = np.stack(np.broadcast_arrays(e, a - alpha * self.n, b - beta * self.d))
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        return top + np.log(total) - self.logs, parts / total

    def losses(self, rest: np.ndarray) -> np.ndarray:
        """Huber's loss of each difference."""
        inside = np.minimum(np.abs(rest), self.delta)
        return inside * (np.abs(rest) - inside / 2)

    def value(self, x: np.ndarray) -> np.ndarray:
        """Of many x [..., 5] at once."""
        return self.losses(self._rest(x)[0]).sum(-1)

    def __call__(self, x: np.ndarray) -> Evaluation:
        """Value, gradient and Hessian, over delta."""
        rest, parts, slope, jacobian = self._slopes(x)
        weights = (np.abs(rest) <= self.delta) / self.delta - slope
        hessian = (jacobian * weights[:, None]).T @ jacobian + self._curvature(parts * slope)
        return float(self.losses(rest).sum()) / self.delta, slope @ jacobian, hessian

    def reweighted(self, x: np.ndarray) -> Evaluation:
        """The same with the matrix of reweighted least squares: slower to converge, from further away."""
        rest, _, slope, jacobian = self._slopes(x)
        weights = 1 / np.maximum(np.abs(rest), self.delta)
        matrix = (jacobian * weights[:, None]).T @ jacobian
        return float(self.losses(rest).sum()) / self.delta, slope @ jacobian, matrix

    def _slopes(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        rest, parts = self._rest(x)
        jacobian = np.stack([*parts, -parts[1] * self.n, -parts[2] * self.d], 1)
        return rest, parts, np.clip(rest / self.delta, -1, 1), jacobian

    def _curvature(self, weighted: np.ndarray) -> np.ndarray:
        """Sum over runs and terms of weight times the outer square of the term's derivative in x."""
        found = np.diag([*weighted.sum(1), weighted[1] @ self.n**2, weighted[2] @ self.d**2])
        found[1, 3] = found[3, 1] = -weighted[1] @ self.n
        found[2, 4] = found[4, 2] = -weighted[2] @ self.d
        return found


def _starts(objective: Objective) -> list[np.ndarray]:
    """The best points of a grid in five dimensions."""
    shares = np.log(SHARES)
    grid = np.array(list(product(shares, shares, shares, EXPONENTS, EXPONENTS)))
    return list(grid[np.argsort(objective.value(grid), kind="stable")[:STARTS]])


def _from_above(problem: varpro.Problem, delta: float, x: np.ndarray, walls) -> np.ndarray:
    """From `x` through the minima for larger deltas, which have fewer minima of their own."""
    for larger in (100 * delta, 10 * delta):
        x = descend(Objective(problem, larger).reweighted, x, walls, most=20)
    return x


def _from_law(law: Law, problem: varpro.Problem) -> np.ndarray:
    log_n, log_d, loss = problem.means
    tiny = 1e-6 * loss  # where least squares leave a term at 0
    a, b = law.A * np.exp(-law.alpha * log_n), law.B * np.exp(-law.beta * log_d)
    logs = np.log(np.maximum([law.E, a, b], tiny) / loss)
    return np.array([*logs, law.alpha, law.beta])


def fit(runs: Runs, *, delta: float = DELTA, starts: Sequence[Law] = (), grid: bool = True) -> Law:
    """The law of the smallest sum of Huber losses. `starts`: where to begin (none: at least squares).

    Raises ValueError where the runs do not determine it.
    """
    require_determined(runs)
    problem = varpro.Problem.of(runs)
    objective = Objective(problem, delta)
    # Terms and exponents that run away stop at these walls, and are flagged.
    walls = np.array([-30.0] * 3 + [varpro.SEARCH[0]] * 2), np.array([5.0] * 3 + [varpro.SEARCH[1]] * 2)
    first = [_from_law(law, problem) for law in starts or [varpro.fit(runs)]]
    first += [*_starts(objective), _from_above(problem, delta, first[0], walls)] if grid else []
    ends = [descend(objective.reweighted, np.clip(x, *walls), walls, most=40) for x in first]
    nearest = sorted(ends, key=objective.value)[:FINISHES]
    best = min((descend(objective, end, walls) for end in nearest), key=objective.value)
    return problem.law(np.concatenate([np.exp(best[:3]), best[3:]]))


def flags(law: Law, runs: Runs) -> list[str]:
    """A line for each parameter that has run into the edge of the search."""
    shares = _from_law(law, varpro.Problem.of(runs))[:3]
    found = [f"{name} = 0" for name, share in zip("EAB", shares, strict=True) if share < np.log(1e-5)]
    for name, exponent in (("alpha", law.alpha), ("beta", law.beta)):
        if not varpro.SEARCH[0] < exponent < varpro.SEARCH[1]:
            found.append(f"{name} = {exponent:.3g}")
    return [f"edge: {text} in the Huber fit" for text in found]


def value(law: Law, runs: Runs, delta: float = DELTA) -> float:
    """The sum of Huber losses of `law` over `runs`."""
    return float(Objective(varpro.Problem.of(runs), delta).losses(law.residuals(runs)).sum())
