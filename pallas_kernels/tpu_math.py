"""What chunks are made of inside a TPU kernel: products, sums and triangles of values `[rows, lanes]`.

Mosaic has no cumsum, no gather and no triangular solve; sums over part of a chunk are products with 0/1
matrices here, or masked sums. A column of C numbers costs as much room as C x 128: such numbers come as rows.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

F32 = jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a: Array, b: Array, left: int = 1, right: int = 0) -> Array:
    """The product in float32, over axis `left` of `a [.,.]` and `right` of `b`; float32 operands in full."""
    return _dot(a, b, left, right)


def _dot(a, b, left, right):
    full = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((left,), (right,)), ((), ())), precision=full, preferred_element_type=F32)


def _dot_fwd(a, b, left, right):
    return _dot(a, b, left, right), (a, b)


def _dot_bwd(left, right, saved, ct):
    a, b = saved
    ct = ct.astype(a.dtype)  # narrow operands have narrow cotangents, or the products would be mixed
    da = _dot(ct, b, 1, 1 - right) if left else _dot(b, ct, 1 - right, 1)
    db = _dot(a, ct, 1 - left, 0) if right == 0 else _dot(ct, a, 0, 1 - left)
    return da.astype(a.dtype), db.astype(b.dtype)


dot.defvjp(_dot_fwd, _dot_bwd)


def grid_of(size: int) -> tuple[Array, Array]:
    """Row and column numbers `[size, size]`."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def sums(values: Array, pairs: Callable[[Array, Array], Array]) -> Array:
    """`y_i = sum of values_t where pairs(i, t)`: `[C,K] -> [C,K]`, or a row `[1,C]` to a column `[C,1]`."""
    size = max(values.shape) if values.shape[0] == 1 else values.shape[0]
    chosen = pairs(*grid_of(size))
    if values.shape[0] == 1:
        return jnp.sum(jnp.where(chosen, values, 0), 1, keepdims=True)
    return dot(chosen.astype(F32), values)


def column(row: Array) -> Array:
    """`[1,C] -> [C,1]`."""
    return sums(row, lambda i, t: i == t)


def row(column: Array) -> Array:
    """`[C,1] -> [1,C]`."""
    i, t = grid_of(column.shape[0])
    return jnp.sum(jnp.where(i == t, column, 0), 0, keepdims=True)


def halvings(size: int) -> list[int]:
    """Half sizes of the blocks of a triangle: 1, 2, ... size / 2."""
    return [1 << n for n in range(size.bit_length() - 1)]


def squares(i: Array, j: Array, half: int) -> Array:
    """Pairs below the diagonal of a block of two halves: i in the late one, j in the early one."""
    # Bits, not quotients: integer division lowers only where the chip is known.
    same = (i & -2 * half) == (j & -2 * half)
    return same & ((i & half) != 0) & ((j & half) == 0)


def to_pivot(i: Array, t: Array, half: int, *, own: bool) -> Array:
    """Tokens t between token i and the last one of the early half of i's block.

    For i in the late half those after it, up to i (`own`) or up to the one before i; for i in the early half
    those after i, up to it.
    """
    pivot = (i & -2 * half) + half - 1
    late = (i & half) != 0
    until = t <= i if own else t < i
    # Not jnp.where: Mosaic cannot choose between booleans.
    return (late & (t > pivot) & until) | (~late & (t > i) & (t <= pivot))


def scores(x: Array, y: Array, log_decay: Array, *, own: bool = True, diagonal: bool = True) -> Array:
    """`A_ij = sum_k x_ik y_jk e^{sum of log_decay_t, j < t <= i}`, j <= i (or j < i), else 0: `[C,C]`.

    `x, y [C,K]`, C a power of two; `log_decay` is a row `[1,C]` or `[C,K]`. Without `own` the sum stops
    before i, and the diagonal is left out. Sums of channels are taken from a pivot between the two tokens,
    half by half of the triangle, so that no exponent is positive and none a difference.
    """
    i, j = grid_of(x.shape[0])
    if log_decay.shape[0] == 1:
        late, early = (
            sums(log_decay, f) for f in (lambda i, t: t <= i if own else t < i, lambda i, t: t <= i)
        )
        visible = (i >= j) if diagonal else (i > j)
        return dot(x, y, 1, 1) * jnp.exp(jnp.where(visible, late - row(early), -jnp.inf))
    wide_x, wide_y = x.astype(F32), y.astype(F32)
    total = jnp.zeros_like(i, F32)
    for half in halvings(x.shape[0]):
        decay = jnp.exp(sums(log_decay, partial(to_pivot, half=half, own=own)))
        product = dot((wide_x * decay).astype(x.dtype), (wide_y * decay).astype(y.dtype), 1, 1)
        total = total + jnp.where(squares(i, j, half), product, 0)
    if not diagonal:
        return total
    return total + jnp.where(i == j, jnp.sum(wide_x * wide_y, 1, keepdims=True), 0)


@jax.custom_vjp
def unit_lower_inverse(a: Array) -> Array:
    """`(I + A)^{-1}` of a strictly lower triangular `a [C,C]` float32, C a power of two.

    Block by block as in `pallas_kernels.triangular`, all blocks of a size in one product: with X the inverses
    of the diagonal blocks and A' the squares below the diagonal of the next larger ones, X - X A' X.
    """
    i, j = grid_of(a.shape[0])
    x = (i == j).astype(F32)
    for half in halvings(a.shape[0]):
        x = x - dot(x, dot(jnp.where(squares(i, j, half), a, 0), x))
    return x


def _inverse_fwd(a):
    x = unit_lower_inverse(a)
    return x, x


def _inverse_bwd(x, dx):
    i, j = grid_of(x.shape[0])
    return (jnp.where(i > j, -dot(dot(x, dx, 0, 0), x, 1, 1), 0),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
