"""The definition: one token, and its scan."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


def step(state: Array, x: Array, dt: Array, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """One token. `state [B,D,N]`, `x, dt [B,D]`, `a [D,N]`, `b, c [B,N]`."""
    decay = jnp.exp(dt[..., None] * a)
    state = decay * state + (dt * x)[..., None] * b[:, None, :]
    return state, jnp.einsum("bdn,bn->bd", state, c)


def selective_scan(x, dt, a, b, c, state, segment_ids=None):
    """Token by token, without the skip connection `d`; shapes as in `api.py`."""

    def token(state, inputs):
        x_t, dt_t, b_t, c_t = inputs
        return step(state, x_t, dt_t, a, b_t, c_t)

    return scan_tokens(token, state, (x, dt, b, c), segment_ids)
