"""Newton-Schulz iterations towards the orthogonal factor of a matrix."""

import jax
import jax.numpy as jnp
from jax import Array

# a, b, c of each step x <- a x + (b x x^T + c (x x^T)^2) x: Muon's, Jordan et al. 2024.
MUON = ((3.4445, -4.7750, 2.0315),) * 5
# The iteration of Newton and Schulz: rises from 0 to 1 and nowhere falls, and converges with the steps.
CLASSICAL = ((1.5, -0.5, 0.0),) * 5
# Steps that each have their own, which bring singular values nearer to 1; used by LaCT (arXiv 2505.23884).
VARIED = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def _step(x: Array, a: float, b: float, c: float) -> Array:
    square = x @ jnp.swapaxes(x, -1, -2)
    return a * x + (b * square + c * square @ square if c else b * square) @ x


def orthogonalize(
    x: Array, steps: tuple[tuple[float, float, float], ...] = MUON, floor: float = 1e-7
) -> Array:
    """The matrix near `x [..., m, n]` / sqrt(|x|^2 + floor^2) with singular values near 1; 0 stays 0.

    Far below the floor it is linear in x, with the product of all a over `floor` as its slope: the product is
    485 for MUON, 7.6 for CLASSICAL.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x * jax.lax.rsqrt(jnp.sum(x**2, (-2, -1), keepdims=True) + floor**2)
    if len(set(steps)) == 1:  # one loop body: the unrolled chain takes several times as long to compile
        x, _ = jax.lax.scan(lambda x, _: (_step(x, *steps[0]), None), x, length=len(steps))
    else:
        for coefficients in steps:
            x = _step(x, *coefficients)
    return jnp.swapaxes(x, -1, -2) if tall else x


def flops(rows: int, columns: int, steps: tuple[tuple[float, float, float], ...] = MUON) -> int:
    """Of `orthogonalize` for one matrix."""
    small = min(rows, columns)
    return sum(2 * (2 * small * rows * columns + (c != 0) * small**3) for _, _, c in steps)
