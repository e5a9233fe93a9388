"""The definition: a window of the last k tokens, and its scan."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


def step(window: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """One token. `window [B,k-1,D]` oldest first, `x [B,D]`, `weight [k,D]`."""
    window = jnp.concatenate([window, x[:, None]], 1)
    return window[:, 1:], jnp.einsum("bkd,kd->bd", window, weight)


def short_conv(x, weight, state, segment_ids=None, mask=None):
    """Token by token; a masked token leaves the window as it is and yields 0."""
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask

    def masked_step(window, inputs):
        x_t, real = inputs
        new, out = step(window, x_t, weight)
        return jnp.where(real[:, None, None], new, window), jnp.where(real[:, None], out, 0)

    return scan_tokens(masked_step, state, (x, mask), segment_ids)
