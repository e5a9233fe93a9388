"""Fixed sizes: for every amount of compute, the size whose runs have the lowest loss there.

Approach 1 of Hoffmann et al., arXiv 2203.15556, section 3.1, with one difference: their losses are points of
training curves, ours are ends of runs, because a run that stops before its learning rate has decayed is worse
than a run that was meant to be short. Between the runs of a size, log-loss is a monotone cubic of log C. A
point counts only where the best size has both a smaller and a larger rival: best at the edge means little.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from experiments.scaling.data import Runs
from experiments.scaling.law import compute_of
from experiments.scaling.profiles import PowerLaw

POINTS = 1500  # of compute, evenly in its logarithm


@dataclass(frozen=True)
class Envelope:
    """Best `params` and `tokens` [P] at `compute` [P], power laws through them if two sizes are ever best."""

    compute: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    params_law: PowerLaw | None
    tokens_law: PowerLaw | None

    def flags(self) -> list[str]:
        if self.params_law is None:
            return ["edge minima: fewer than two sizes are best between others, no power law of fixed sizes"]
        return []


def _curves(runs: Runs) -> dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """log C, log loss and log D of each size that was trained for two lengths or more; seeds are averaged."""
    curves = {}
    for size in np.unique(runs.params):
        of_size = runs.params == size
        lengths = np.unique(runs.tokens[of_size])
        if len(lengths) < 2:
            continue
        groups = [of_size & (runs.tokens == length) for length in lengths]
        means = [[np.log(x[g]).mean() for g in groups] for x in (compute_of(runs), runs.loss, runs.tokens)]
        if np.all(np.diff(means[0]) > 0):
            curves[float(size)] = tuple(np.array(mean) for mean in means)
    return curves  # type: ignore[return-value]


def fit(runs: Runs) -> Envelope:
    """Approach 1; no envelope is no error."""
    curves = _curves(runs)
    logs = np.log(compute_of(runs))
    grid = np.linspace(logs.min(), logs.max(), POINTS)
    sizes = sorted(curves)
    losses = np.full((len(sizes), POINTS), np.nan)
    lengths = np.full((len(sizes), POINTS), np.nan)
    for row, size in enumerate(sizes):
        compute, loss, tokens = curves[size]
        inside = (grid >= compute[0]) & (grid <= compute[-1])
        losses[row, inside] = PchipInterpolator(compute, loss)(grid[inside])
        lengths[row, inside] = np.interp(grid[inside], compute, tokens)
    return _envelope(grid, np.array(sizes), losses, lengths)


def _envelope(grid: np.ndarray, sizes: np.ndarray, losses: np.ndarray, lengths: np.ndarray) -> Envelope:
    there = np.isfinite(losses)
    columns = np.flatnonzero(there.any(0))
    best = np.array([np.nanargmin(losses[:, c]) for c in columns], int)
    between = [there[:k, c].any() and there[k + 1 :, c].any() for k, c in zip(best, columns, strict=True)]
    columns, best = columns[between], best[between]
    compute, params, tokens = np.exp(grid[columns]), sizes[best], np.exp(lengths[best, columns])
    if len(set(best)) < 2:
        return Envelope(compute, params, tokens, None, None)
    laws = [PowerLaw.through(compute, x) for x in (params, tokens)]
    return Envelope(compute, params, tokens, laws[0], laws[1])
