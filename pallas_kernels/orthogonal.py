"""Newton-Schulz iterations towards the orthogonal factor of a matrix."""

import jax
import jax.numpy as jnp
from jax import Array

# a, b, c of each step x <- a x + (b x x^T + c (x x^T)^2) x: Muon's, Jordan et al. 2024.
MUON = ((3.4445, -4.7750, 2.0315),) * 5
# Steps that each have their own, which bring singular values nearer to 1; used by LaCT (arXiv 2505.23884).
VARIED = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalize(x: Array, steps: tuple[tuple[float, float, float], ...] = MUON) -> Array:
    """The matrix near `x [..., m, n]` over its norm with all singular values near 1; 0 stays 0."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x * jax.lax.rsqrt(jnp.sum(x**2, (-2, -1), keepdims=True) + 1e-14)
    for a, b, c in steps:
        square = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def flops(rows: int, columns: int, steps: int = 5) -> int:
    """Of `orthogonalize` for one matrix."""
    small = min(rows, columns)
    return steps * 2 * (2 * small * rows * columns + small**3)
