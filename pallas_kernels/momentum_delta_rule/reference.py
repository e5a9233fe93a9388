"""The definition: one token, and its scan."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


def step(
    state: Array, q: Array, k: Array, v: Array, p: Array, log_decay: Array, log_momentum: Array
) -> tuple[Array, Array]:
    """One token. `state [B,H,2,K,V]`, `q, k, p [B,H,K]`, `v [B,H,V]`, `log_decay, log_momentum [B,H,1]`."""
    weights, momentum = state[:, :, 0], state[:, :, 1]
    delta = v - jnp.einsum("bhkv,bhk->bhv", weights, p)
    momentum = jnp.exp(log_momentum)[..., None] * momentum + k[..., None] * delta[..., None, :]
    weights = jnp.exp(log_decay)[..., None] * weights + momentum
    return jnp.stack([weights, momentum], 2), jnp.einsum("bhkv,bhk->bhv", weights, q)


def momentum_delta_rule(q, k, v, p, log_decay, log_momentum, state, segment_ids=None):
    """Token by token; shapes as in `api.py` after its normalisation (gates `[B,T,H,1]`)."""
    tokens = (q, k, v, p, log_decay, log_momentum)
    return scan_tokens(lambda s, x: step(s, *x), state, tokens, segment_ids)
