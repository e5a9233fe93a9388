"""Descent to the last digits of a minimum: Newton's method, damped where it would not descend.

Not L-BFGS: there are at most five dimensions, and its last digits are lost where values no longer differ.
"""

from collections.abc import Callable

import numpy as np

Evaluation = tuple[float, np.ndarray, np.ndarray]  # value, gradient [P], Hessian [P, P]

MOST_DAMPING = 1e5  # times the curvature: a step so short that does not descend is the end


def _step(gradient: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray | None:
    """The damped Newton step in units of the curvature, or None where that is not positive definite."""
    scale = np.sqrt(np.abs(np.diag(hessian)))
    scale[scale == 0] = 1.0
    matrix = hessian / np.outer(scale, scale) + damping * np.eye(len(scale))
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    half = np.linalg.solve(factor, -gradient / scale)
    return np.linalg.solve(factor.T, half) / scale


def descend(
    evaluate: Callable[[np.ndarray], Evaluation],
    x: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    most: int = 200,
) -> np.ndarray:
    """A minimum of `evaluate` near `x [P]`, to the last digits that its gradient has; steps stop at `bounds`.

    `evaluate` may give any positive definite matrix for the Hessian; the exact one converges fast. Where
    values differ by no more than rounding, the gradient decides whether a step is kept.
    """
    now, damping = evaluate(x), 0.0
    # Where a Hessian jumps, as Huber's does, gradients stay comparable in units of the first one.
    unit = np.sqrt(np.abs(np.diag(now[2])))
    unit[unit == 0] = 1.0
    for _ in range(most):
        step = _step(now[1], now[2], damping)
        if step is not None:
            there = x + step if bounds is None else np.clip(x + step, *bounds)
            new = evaluate(there)
            flatter = np.linalg.norm(new[1] / unit) < 0.9 * np.linalg.norm(now[1] / unit)
            if new[0] < now[0] * (1 - 1e-13) or (flatter and new[0] <= now[0] * (1 + 1e-13)):
                x, now, damping = there, new, damping / 100 if damping > 1e-5 else 0.0
                continue
            if np.abs(step * unit).max() <= 1e-15 * np.abs(x * unit).max():
                break
        if damping > MOST_DAMPING:
            break
        damping = max(100 * damping, 1e-6)
    return x
