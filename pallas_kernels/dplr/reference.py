"""The definition: one token, and its scan."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


def step(
    state: Array, q: Array, k: Array | None, v: Array, a: Array, b: Array, log_decay: Array
) -> tuple[Array, Array]:
    """One token. `state [B,H,K,V]`, `q, k, a, b [B,H,K]`, `v [B,H,V]`, `log_decay [B,H,K]` or `[B,H,1]`."""
    recalled = jnp.einsum("bhkv,bhk->bhv", state, a)
    state = jnp.exp(log_decay)[..., None] * state + b[..., None] * recalled[..., None, :]
    state = state + (b if k is None else k)[..., None] * v[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q)


def dplr(q, k, v, a, b, log_decay, state, segment_ids=None):
    """Token by token; shapes as in `api.py` after its normalisation (decay `[B,T,H,K or 1]`)."""
    return scan_tokens(lambda s, x: step(s, *x), state, (q, k, v, a, b, log_decay), segment_ids)
