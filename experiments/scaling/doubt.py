"""How far a fit can be trusted: bootstrap over runs, what it depends on, and what it says of unseen runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.scaling import huber, overtraining, profiles, varpro
from experiments.scaling.data import Runs
from experiments.scaling.law import Cost, Law, compute_of

RESAMPLES = 200
DELTAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
HELD_OUT = 0.2  # of the runs, where there are no budgets
FAR = 4.0  # robust standard deviations that make an outlier
MOST_LEFT_OUT = 100  # runs that are left out one by one
_STREAM = 0x5CA11  # of the bootstrap, beside the seed in Philox's key


def resample(count: int, number: int, seed: int) -> np.ndarray:
    """Row numbers [count] of bootstrap sample `number`, with replacement, from the arguments alone."""
    key = np.array([_STREAM, seed], np.uint64)
    words = np.random.Philox(key=key, counter=number << 64).random_raw(count)
    return ((words >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(int)


def bootstrap(
    runs: Runs,
    measure: Callable[[Law], np.ndarray],
    law: Law,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, int]:
    """`measure` [M] of the least-squares law of each resample that has one, [S, M]; how many have none."""
    found, failed = [], 0
    for number in range(resamples):
        try:
            found.append(
                measure(varpro.fit(runs.take(np.sort(resample(len(runs), number, seed))), start=law))
            )
        except ValueError:
            failed += 1
    return np.array(found).reshape(len(found), -1), failed


def intervals(samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of each column of `samples` [S, M] that hold `level` of it."""
    if len(samples) == 0:
        return np.full(samples.shape[1], np.nan), np.full(samples.shape[1], np.nan)
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def by_delta(runs: Runs, starts: Sequence[Law], deltas: Sequence[float] = DELTAS) -> dict[float, Law]:
    """The robust fit for each delta, from `starts` and from that for the delta before."""
    fits: dict[float, Law] = {}
    for delta in deltas:
        fits[delta] = huber.fit(runs, delta=delta, starts=[*starts, *list(fits.values())[-1:]], grid=False)
    return fits


def _refit(runs: Runs, keep: np.ndarray, law: Law) -> Law | None:
    try:
        return varpro.fit(runs.take(keep), start=law)
    except ValueError:
        return None


def without_each(runs: Runs, law: Law) -> dict[int, Law]:
    """The fit without each run, by row; of many runs, without each of those with the largest residuals."""
    rows = np.argsort(-np.abs(law.residuals(runs)), kind="stable")[:MOST_LEFT_OUT]
    fits = {int(row): _refit(runs, np.arange(len(runs)) != row, law) for row in sorted(rows)}
    return {row: fit for row, fit in fits.items() if fit is not None}


def trimmed(runs: Runs, law: Law) -> dict[int, Law]:
    """The fit without the 1, 2, 4 ... largest residuals, up to a tenth of the runs."""
    order = np.argsort(-np.abs(law.residuals(runs)), kind="stable")
    counts = [2**k for k in range(10) if 2**k <= max(1, len(runs) // 10)]
    fits = {count: _refit(runs, np.sort(order[count:]), law) for count in counts}
    return {count: fit for count, fit in fits.items() if fit is not None}


def without_budgets(runs: Runs, law: Law) -> dict[float, Law]:
    """The fit without each isoFLOP budget, by its compute."""
    found = {}
    compute = compute_of(runs)
    for rows in profiles.budgets(runs):
        keep = np.setdiff1d(np.arange(len(runs)), rows)
        fit = _refit(runs, keep, law)
        if fit is not None:
            found[float(np.exp(np.log(compute[rows]).mean()))] = fit
    return found


def outliers(law: Law, runs: Runs) -> list[int]:
    """Rows whose residual is more than FAR robust standard deviations from the median."""
    rest = law.residuals(runs)
    away = np.abs(rest - np.median(rest))
    spread = 1.4826 * np.median(away)
    # Without noise all that is left is rounding.
    return [int(row) for row in np.flatnonzero(away > max(FAR * spread, 1e-9))]


@dataclass(frozen=True)
class HeldOut:
    """Runs that a fit to all others has not seen: their rows, and predicted / measured - 1, by method."""

    rule: str
    rows: np.ndarray
    errors: dict[str, np.ndarray]


def _largest(x: np.ndarray, least: int) -> np.ndarray:
    """Mask of the `least` largest values and of all that equal the smallest of them."""
    return x >= np.sort(x)[-least] * (1 - 1e-12)


def hold_out(
    runs: Runs, rule: str, mask: np.ndarray, *, form: str = "surface", delta: float = huber.DELTA
) -> HeldOut | None:
    """Predict the runs of `mask` from the others, by `form`; None where those do not determine a law."""
    seen, unseen = runs.take(~mask), runs.take(mask)
    laws = {}
    try:
        if form != "overtraining":
            laws["varpro"] = varpro.fit(seen)
            laws["huber"] = huber.fit(seen, delta=delta, starts=[laws["varpro"]])
        if form != "surface":
            laws["overtraining"] = overtraining.fit(seen).law
    except ValueError:
        return None
    errors = {name: law.loss(unseen.params, unseen.tokens) / unseen.loss - 1 for name, law in laws.items()}
    return HeldOut(rule, np.flatnonzero(mask), errors)


def largest_held_out(runs: Runs, *, form: str = "surface", delta: float = huber.DELTA) -> list[HeldOut]:
    """Predictions of the largest budget (else of the fifth with most compute), and of the largest size."""
    compute = compute_of(runs)
    groups = profiles.budgets(runs)
    if groups:
        top = max(groups, key=lambda rows: compute[rows].mean())
        most = compute >= compute[top].min()
        rule = f"compute of {compute[top].min():.3g} and more"
    else:
        most = _largest(compute, max(1, int(HELD_OUT * len(runs))))
        rule = f"most compute ({most.sum()} of {len(runs)} runs)"
    masks = {rule: most, f"largest size, N = {runs.params.max():.4g}": _largest(runs.params, 1)}
    found = [hold_out(runs, name, mask, form=form, delta=delta) for name, mask in masks.items()]
    return [held for held in found if held is not None]


def noise(runs: Runs) -> tuple[float, int] | None:
    """Standard deviation of log loss between runs of one size and length, and its degrees of freedom."""
    points = np.stack([runs.params, runs.tokens], 1)
    _, group = np.unique(points, axis=0, return_inverse=True)
    logs, freedom = np.log(runs.loss), len(runs) - group.max() - 1
    if freedom == 0:
        return None
    means = np.bincount(group, logs) / np.bincount(group)
    return float(np.sqrt(((logs - means[group]) ** 2).sum() / freedom)), int(freedom)


def optima(cost: Cost, compute: np.ndarray) -> Callable[[Law], np.ndarray]:
    """What the bootstrap measures: E, A, B, alpha, beta, a, b, log N* and log D* at each of `compute`."""

    def measure(law: Law) -> np.ndarray:
        params, tokens = cost.optimum(law, compute)
        values = [law.E, law.A, law.B, law.alpha, law.beta, *cost.exponents(law)]
        return np.concatenate([values, np.log(params), np.log(tokens)])

    return measure
