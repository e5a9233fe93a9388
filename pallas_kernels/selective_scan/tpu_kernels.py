"""What the TPU kernels do with a block of tokens and channels.

States lie with N along sublanes and channels along lanes: a token's dt and x are rows, its b and c columns.
Rows are stretched as they are read; a column is a masked sum over a tile `[N, tokens]`. The sums over N of
eight tokens are taken together.

No scratch is written while it is read: behind Pallas' plain interpreter XLA's CPU compiler may fuse the two
in place, and then reads what it has just written.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_math import F32
from pallas_kernels.tpu_tokens import ROWS, eight, on_first

UNROLL = 2  # groups of eight tokens


def _halved(rows, distance: int):
    """From each two arrays `[8, lanes]` one: sums over sublanes `distance` apart, of the first where the bit
    `distance` of the sublane is 0, of the second where it is 1."""
    first = (lax.broadcasted_iota(jnp.int32, rows[0].shape, 0) & distance) == 0
    return [
        jnp.where(first, p, q) + pltpu.roll(jnp.where(first, q, p), distance, 0)
        for p, q in zip(rows[::2], rows[1::2], strict=True)
    ]


def _sums(tokens):
    """Eight tokens' arrays `[N, lanes]`: their sums over N, as the rows of one `[8, lanes]`."""
    rows = [sum(x[n : n + ROWS] for n in range(ROWS, x.shape[0], ROWS)) + x[:ROWS] for x in tokens]
    for distance in (1, 2, 4):
        rows = _halved(rows, distance)
    return rows[0]


def _column(tile, t, lane):
    """Column t of `[N, tokens]`."""
    return jnp.sum(jnp.where(lane == t, tile, 0.0), 1, keepdims=True)


def _lanes(tile):
    return lax.broadcasted_iota(jnp.int32, (1, tile.shape[1]), 1)


def _decay(dt, a, starts, t):
    """`exp(dt a) [N, lanes]` of token t, `a` in units of log 2; 0 where a segment starts."""
    exponent = dt * a
    return jnp.exp2(exponent if starts is None else jnp.where(starts[0, t] != 0, -jnp.inf, exponent))


def _groups(tokens: int, group, carry, *, reverse: bool = False):
    """`group(first token, carry)` for each eight tokens."""
    count, unroll = tokens // ROWS, 1 if reverse else UNROLL

    def body(i, carry):
        return group(ROWS * (count - 1 - i if reverse else i), carry)

    return lax.fori_loop(0, count, body, carry, unroll=1 if count % unroll else unroll)


def _row(ref, t):
    return ref[pl.ds(t, 1), :]


def forward_kernel(x, dt, a, b, c, first, starts, y, state, entering, steps, writes, sums):
    on_first(lambda: state.__setitem__(..., first[...]))
    if entering is not None:
        entering[...] = state[...]
    steps[...] = dt[...].astype(F32)
    writes[...] = steps[...] * x[...].astype(F32)
    rate, b, c = a[...], b[...], c[...]
    lane = _lanes(b)

    def group(t0, h):
        read = []
        for t in (t0 + i for i in range(ROWS)):
            h = _decay(_row(steps, t), rate, starts, t) * h + _column(b, t, lane) * _row(writes, t)
            read.append(_column(c, t, lane) * h)
        sums[eight(t0)] = _sums(read)
        return h

    state[...] = _groups(x.shape[0], group, state[...])
    y[...] = sums[...].astype(y.dtype)


def _fill(states, entering, steps, writes, rate, b, starts) -> None:
    """`states [tokens + 1, N, lanes]`: before each token and after the last."""
    lane = _lanes(b)

    def group(t0, h):
        for t in (t0 + i for i in range(ROWS)):
            states[t] = h
            h = _decay(_row(steps, t), rate, starts, t) * h + _column(b, t, lane) * _row(writes, t)
        return h

    tokens = steps.shape[0]
    states[tokens] = _groups(tokens, group, entering[...])


def backward_kernel(
    x, dt, a, b, c, entering, starts, dy, dfinal,
    dx, ddt, da, db, dc, dstate, steps, writes, reads, dwrites, rates, states,
):  # fmt: skip
    def begin():
        dstate[...] = dfinal[...]
        da[...] = jnp.zeros_like(da)

    on_first(begin)
    steps[...] = dt[...].astype(F32)
    writes[...] = steps[...] * x[...].astype(F32)
    reads[...] = dy[...].astype(F32)
    rate, b, c = a[...], b[...], c[...]
    lane = _lanes(b)
    _fill(states, entering, steps, writes, rate, b, starts)

    def group(t0, carry):
        adjoint, da, db, dc = carry
        through_write, through_decay = [], []
        for t in (t0 + i for i in reversed(range(ROWS))):
            step, read = _row(steps, t), _row(reads, t)
            decay = _decay(step, rate, starts, t)
            l = adjoint + _column(c, t, lane) * read
            lp = l * (decay * states[t])
            db = jnp.where(lane == t, jnp.sum(l * _row(writes, t), 1, keepdims=True), db)
            dc = jnp.where(lane == t, jnp.sum(states[t + 1] * read, 1, keepdims=True), dc)
            da = da + step * lp
            adjoint = decay * l
            through_write.append(_column(b, t, lane) * l)
            through_decay.append(rate * lp)
        dwrites[eight(t0)] = _sums(through_write[::-1])
        rates[eight(t0)] = math.log(2) * _sums(through_decay[::-1])  # `rate` is in units of log 2
        return adjoint, da, db, dc

    carry = dstate[...], da[...], jnp.zeros(b.shape, F32), jnp.zeros(c.shape, F32)
    dstate[...], da[...], db[...], dc[...] = _groups(x.shape[0], group, carry, reverse=True)
    dx[...] = (steps[...] * dwrites[...]).astype(dx.dtype)
    ddt[...] = (x[...].astype(F32) * dwrites[...] + rates[...]).astype(ddt.dtype)
