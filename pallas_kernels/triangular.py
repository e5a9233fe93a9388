"""The inverse of I + A for strictly lower triangular A: what the delta rules solve in every chunk."""

import jax
import jax.numpy as jnp
from jax import Array

# Up to this size rows are substituted one by one. Of 2, 4, 8, 16 the fastest on CPU.
SMALLEST_BLOCK = 8


def _substitute(a: Array) -> Array:
    """Row j of the inverse is final once rows before it are; then it is taken from all rows below."""
    x = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    for j in range(a.shape[-1] - 1):
        x = x - a[..., :, j, None] * x[..., j, None, :]
    return x


def _inverse(a: Array) -> Array:
    """Blocks go to the first axis, not to new ones: XLA's CPU aborts at matrix products of rank 8."""
    size = a.shape[-1]
    if size <= SMALLEST_BLOCK:
        return _substitute(a)
    half = size // 2
    # Both halves at once, so that the depth of the recursion is the only thing that grows.
    first, second = jnp.split(_inverse(jnp.concatenate([a[..., :half, :half], a[..., half:, half:]])), 2)
    below = -second @ (a[..., half:, :half] @ first)
    top = jnp.concatenate([first, jnp.zeros_like(below)], -1)
    return jnp.concatenate([top, jnp.concatenate([below, second], -1)], -2)


@jax.custom_vjp
def unit_lower_inverse(a: Array) -> Array:
    """`X = (I + A)^{-1}` for strictly lower triangular `a [..., C, C]`, C a power of two (or at most 8).

    Halving: the inverse of [[L1, 0], [A21, L2]] is [[X1, 0], [-X2 A21 X1, X2]], down to blocks of 8 rows,
    which are substituted. Every intermediate is part of the answer, so that it is as exact for equal keys as
    for random ones; the product (I - A)(I + A^2)(I + A^4)... is not: A's powers grow like binomials.
    The gradient is `-strict_lower(X^T dX X^T)`.
    """
    return _forward(a)[0]


def _forward(a: Array) -> tuple[Array, Array]:
    x = _inverse(a if a.ndim > 2 else a[None]).reshape(a.shape)
    return x, x


def _backward(x: Array, dx: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(x, -1, -2)
    return (-jnp.tril(transposed @ dx @ transposed, -1),)


unit_lower_inverse.defvjp(_forward, _backward)
