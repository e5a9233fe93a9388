"""Sequential in time with its own adjoint: states live for one chunk only.

The state is held as `[B, N, D]`, so that the long axis is the contiguous one. With e_t = exp(dt_t a),
u_t = dt_t x_t and the decayed state p_t = e_t h_{t-1},

    h_t = p_t + b_t u_t,                                y_t = sum_n c_t h_t,
    l_t = c_t dy_t + e_{t+1} l_{t+1}                    (adjoint of h_t, run backwards),
    du_t = sum_n b_t l_t,   db_t = sum_d u_t l_t,       dc_t = sum_d h_t dy_t,
    dx_t = dt_t du_t,       ddt_t = x_t du_t + sum_n a l_t p_t,       da = sum_t dt_t l_t p_t.

The forward pass keeps the states at chunk starts; the backward pass recomputes e and p inside a chunk and
does all sums over its tokens at once. Nothing is divided, and e <= 1: nothing overflows.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, join_time, masked_exp, segment_starts, split_time

# 2 CPU cores: the backward pass slows down where a chunk's states (its three temporaries) leave the cache.
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


def _decayed_states(e, b, u, state):
    """p_t for the tokens of one chunk, `[C,B,N,D]`."""

    def token(h, inputs):
        e, b, u = inputs
        p = e * h
        return p + _outer(b, u), p

    return jax.lax.scan(token, state, (e, b, u))[1]


def _adjoint_states(e, c, dy, adjoint):
    """l_t for the tokens of one chunk, and the adjoint of the state that entered it."""

    def token(carry, inputs):
        e, c, dy = inputs
        l = carry + _outer(c, dy)
        return e * l, l

    return jax.lax.scan(token, adjoint, (e, c, dy), reverse=True)


def _scan_bwd(saved, cotangents):
    x, dt, a, b, c, start, states = saved
    dy, adjoint = cotangents

    def chunk(carry, inputs):
        adjoint, da = carry
        x, dt, b, c, start, state, dy = inputs
        e, u = _decay(dt, a, start), dt * x
        p = _decayed_states(e, b, u, state)
        adjoint, l = _adjoint_states(e, c, dy, adjoint)
        db = jnp.einsum("tbnd,tbd->tbn", l, u)
        dc = jnp.einsum("tbnd,tbd->tbn", p, dy) + b * jnp.sum(u * dy, -1, keepdims=True)
        du = jnp.einsum("tbnd,tbn->tbd", l, b)
        through_decay = l * p
        da = da + jnp.sum(through_decay * dt[..., None, :], (0, 1))
        ddt = x * du + jnp.sum(through_decay * a, -2)
        return (adjoint, da), (dt * du, ddt, db, dc)

    inputs = (x, dt, b, c, start, states, dy)
    carry = (adjoint, jnp.zeros_like(a))
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
