"""The definitions: one token of a diagonal and of a diagonal-plus-low-rank state space, and their scans.

A real system stores all its states. A complex one stores one of each conjugate pair, so that every inner
product over all states is twice the real part of the one over the stored half (`inner`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


def inner(v: Array, x: Array) -> Array:
    """`sum_n v_n x_n` over all states, real: the last axis holds them, or one of each conjugate pair."""
    total = jnp.sum(v * x, -1)
    return 2 * total.real if jnp.iscomplexobj(total) else total


def diagonal_step(state: Array, u: Array, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """One token. `state [B,D,M]`, `u [B,D]`; the discrete system `a, b, c [D,M]`."""
    state = a * state + b * u[..., None]
    return state, inner(c, state)


class Bilinear(NamedTuple):
    """`A = diag(lam) - sum_r p_r p_r*` for `(I - dt/2 A) x_t = (I + dt/2 A) x_{t-1} + dt B u_t`."""

    forward: Array  # [D,M] 1 + dt/2 lam
    inverse: Array  # [D,M] 1 / (1 - dt/2 lam)
    p: Array  # [R,D,M] sqrt(dt/2) p
    correction: Array  # [R,D,M] column r of the solve once the columns before it are in
    b: Array  # [D,M] dt B


def _subtract(x: Array, columns, rows) -> Array:
    """`x - column (row* x)` for one pair after the other; `x [..., D, M]`."""
    for column, row in zip(columns, rows, strict=False):
        x = x - column * inner(jnp.conj(row), x)[..., None]
    return x


def bilinear(lam: Array, p: Array, b: Array, dt: Array) -> Bilinear:
    """Discretise `lam, b [D,M]`, `p [D,M]` or `[R,D,M]` with `dt [D]`.

    The solve is Woodbury's for a diagonal plus rank R, one rank after the other (Sherman-Morrison).
    """
    half = dt[:, None] / 2
    inverse = 1 / (1 - half * lam)
    p = (jnp.sqrt(half) * p).reshape(-1, *lam.shape)
    corrections: list[Array] = []
    for column in p:
        solved = _subtract(inverse * column, corrections, p)
        corrections.append(solved / (1 + inner(jnp.conj(column), solved))[:, None])
    return Bilinear(1 + half * lam, inverse, p, jnp.stack(corrections), dt[:, None] * b)


def dplr_advance(state: Array, system: Bilinear, drive: Array | float = 0.0) -> Array:
    """`(I - dt/2 A)^{-1} ((I + dt/2 A) x + drive)` in linear time; `state`, `drive` `[..., D, M]`."""
    x = system.forward * state
    for column in system.p:
        x = x - column * inner(jnp.conj(column), state)[..., None]
    return _subtract(system.inverse * (x + drive), system.correction, system.p)


def dplr_step(state: Array, u: Array, system: Bilinear, c: Array) -> tuple[Array, Array]:
    """One token. `state [B,D,M]`, `u [B,D]`, `c [D,M]`."""
    state = dplr_advance(state, system, system.b * u[..., None])
    return state, inner(c, state)


def diagonal_ssm(u, a, b, c, state, segment_ids=None):
    """Token by token; shapes as in `api.py`."""
    out, state = scan_tokens(lambda s, x: diagonal_step(s, x, a, b, c), state, u, segment_ids)
    return out, state


def dplr_ssm(u, lam, p, b, c, dt, state, segment_ids=None):
    """Token by token; shapes as in `api.py`."""
    system = bilinear(lam, p, b, dt)
    out, state = scan_tokens(lambda s, x: dplr_step(s, x, system, c), state, u, segment_ids)
    return out, state
