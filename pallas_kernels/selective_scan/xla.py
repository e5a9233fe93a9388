"""Sequential in time with its own adjoint: states live for one chunk only.

The state is held as `[B, N, D]`, so that the long axis is the contiguous one. With e_t = exp(dt_t a),
u_t = dt_t x_t and the decayed state p_t = e_t h_{t-1},

    h_t = p_t + b_t u_t,                                y_t = sum_n c_t h_t,
    l_t = c_t dy_t + e_{t+1} l_{t+1}                    (adjoint of h_t, run backwards),
    du_t = sum_n b_t l_t,   db_t = sum_d u_t l_t,       dc_t = sum_d h_t dy_t,
    dx_t = dt_t du_t,       ddt_t = x_t du_t + sum_n a l_t p_t,       da = sum_t dt_t l_t p_t.

The forward pass keeps the states at chunk starts; the backward pass recomputes p inside a chunk, then goes
through its tokens in reverse. Nothing is divided, and e <= 1: nothing overflows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, join_time, masked_exp, segment_starts, split_time

# 2 CPU cores: the backward pass slows down where a chunk's states leave the cache.
CHUNK_STATES = 1 << 19
LARGEST, SMALLEST = 64, 16


def _decay(dt: Array, a: Array, start: Array | None) -> Array:
    """`exp(dt a) [..., B, N, D]`, 0 at the first token of a segment; `dt [..., B, D]`, `start [..., B]`."""
    exponent = dt[..., None, :] * a
    return jnp.exp(exponent) if start is None else masked_exp(exponent, ~start[..., None, None])


def _outer(b: Array, u: Array) -> Array:
    """`[..., B, N]`, `[..., B, D] -> [..., B, N, D]`."""
    return b[..., None] * u[..., None, :]


def _forward(x, dt, a, b, c, state, start):
    """`(y [n,C,B,D], final state, states at chunk starts [n,B,N,D])`."""

    def token(h, inputs):
        x, dt, b, c, start = inputs
        h = _decay(dt, a, start) * h + _outer(b, dt * x)
        return h, jnp.sum(c[..., None] * h, -2)

    def chunk(h, inputs):
        new, y = jax.lax.scan(token, h, inputs)
        return new, (y, h)

    state, (y, states) = jax.lax.scan(chunk, state, (x, dt, b, c, start))
    return y, state, states


@jax.custom_vjp
def _scan(x, dt, a, b, c, state, start):
    """`x, dt [n,C,B,D]`, `a [N,D]`, `b, c [n,C,B,N]`, `state [B,N,D]`, `start [n,C,B]` or None."""
    return _forward(x, dt, a, b, c, state, start)[:2]


def _scan_fwd(x, dt, a, b, c, state, start):
    y, state, states = _forward(x, dt, a, b, c, state, start)
    return (y, state), (x, dt, a, b, c, start, states)


def _decayed_states(x, dt, a, b, state, start):
    """p_t for the tokens of one chunk, `[C,B,N,D]`."""

    def token(h, inputs):
        x, dt, b, start = inputs
        p = _decay(dt, a, start) * h
        return p + _outer(b, dt * x), p

    return jax.lax.scan(token, state, (x, dt, b, start))[1]


def _chunk_bwd(carry, inputs, a):
    """The adjoint of the state that enters a chunk and da with the chunk's part; the chunk's other gradients.

    Each token's sums are taken while its adjoint is at hand: only p is kept for a whole chunk, in the cache.
    """
    adjoint, da = carry
    *inputs, state = inputs
    x, dt, b, _, start, _ = inputs
    p = _decayed_states(x, dt, a, b, state, start)

    def token(carry, inputs):
        adjoint, da = carry
        x, dt, b, c, start, dy, p = inputs
        u, l = dt * x, adjoint + _outer(c, dy)
        through_decay = l * p
        du = jnp.sum(l * b[..., None], -2)
        ddt = x * du + jnp.sum(through_decay * a, -2)
        db = jnp.sum(l * u[..., None, :], -1)
        dc = jnp.sum(p * dy[..., None, :], -1) + b * jnp.sum(u * dy, -1, keepdims=True)
        da = da + jnp.sum(through_decay * dt[..., None, :], 0)
        return (_decay(dt, a, start) * l, da), (dt * du, ddt, db, dc)

    begin = (adjoint, jnp.zeros_like(da))
    (adjoint, part), gradients = jax.lax.scan(token, begin, (*inputs, p), reverse=True)
    return (adjoint, da + part), gradients


def _scan_bwd(saved, cotangents):
    x, dt, a, b, c, start, states = saved
    dy, adjoint = cotangents
    inputs = (x, dt, b, c, start, dy, states)
    carry = (adjoint, jnp.zeros_like(a))
    chunk = partial(_chunk_bwd, a=a)
    (dstate, da), (dx, ddt, db, dc) = jax.lax.scan(chunk, carry, inputs, reverse=True)
    return dx, ddt, da, db, dc, dstate, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def chunk_for(length: int, state_size: int) -> int:
    """Tokens per chunk, so that `CHUNK_STATES` numbers hold the states (`state_size` each) of a chunk."""
    fitting = max(CHUNK_STATES // state_size, 1)
    largest = min(max(1 << (fitting.bit_length() - 1), SMALLEST), LARGEST)
    return chunk_length(length, largest)


def selective_scan(x, dt, a, b, c, state, segment_ids=None):
    """Chunk by chunk, without the skip connection `d`; shapes as in `api.py`."""
    length = x.shape[1]
    chunk = chunk_for(length, state.size)

    def time_first(z):
        return jnp.swapaxes(split_time(z, chunk), 1, 2)

    # Padding has dt = 0: its decay is 1 and it writes nothing.
    x, dt, b, c = (time_first(z) for z in (x, dt, b, c))
    start = None if segment_ids is None else time_first(segment_starts(segment_ids))
    y, state = _scan(x, dt, a.T, b, c, jnp.swapaxes(state, 1, 2), start)
    return join_time(jnp.swapaxes(y, 1, 2), length), jnp.swapaxes(state, 1, 2)
