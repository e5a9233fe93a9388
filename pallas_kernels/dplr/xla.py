"""The chunkwise matmul form: what a whole chunk recalls comes out of one triangular inverse.

With G the running sum of log decays inside a chunk, G' the same without the token's own, S the state that
enters the chunk, and z_t = a_t^T S_{t-1} what token t recalls,

    A^xy_ij = sum_k x_ik y_jk e^{X_ik - G_jk},    X = G and j <= i for x = q,    X = G' and j < i for x = a
    z  = (I - A^ab)^{-1} ( (a e^G') S + A^ak v ),
    o  = (q e^G) S + A^qk v + A^qb z,
    S' = e^{G_C} S + (k e^{G_C - G})^T v + (b e^{G_C - G})^T z.

Every exponent is a difference of a later and an earlier sum, hence <= 0: nothing overflows. With k = b the
terms of v and z are one, of u = v + z = (I - A^ab)^{-1} (v + (a e^G') S).
A group of chunks is worked on at once; in turn go z (or u) and the states.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import grid, masked_exp
from pallas_kernels.decay import SMALLEST_BLOCK, decayed_scores
from pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


def _scores(x: Array, y: Array, query_sum: Array, key_sum: Array, *, strict: bool) -> Array:
    """A^xy of the module docstring, `[...,H,C,C]`."""
    if key_sum.shape[-1] > 1:
        return decayed_scores(x, y, query_sum, key_sum, strict=strict)
    size = x.shape[-2]
    visible = jnp.tril(jnp.ones((size, size), bool), -1 if strict else 0)
    decay = masked_exp(query_sum - jnp.swapaxes(key_sum, -1, -2), visible)
    return x @ jnp.swapaxes(y, -1, -2) * decay


def _pass_on(state, chunk):
    """The state from chunk to chunk; out come what entered and z (or u)."""
    value, recall, write, keep, written = chunk
    z = value + recall @ state
    new = keep * state + jnp.swapaxes(write, -1, -2) @ z
    return new if written is None else new + written, (state, z)


def _group(state, inputs):
    """`q, k, a, b [n,B,H,C,K]`, k or None, `v [n,B,H,C,V]`, `log_decay [n,B,H,C,K or 1]`, masks or None."""
    q, k, v, a, b, log_decay, segments = inputs
    total = jnp.cumsum(log_decay, -2)
    # Shifted, not total - log_decay: rounding could leave a positive exponent there.
    before = jnp.pad(total[..., :-1, :], [(0, 0)] * (total.ndim - 2) + [(1, 0), (0, 0)])

    def scores(y: Array) -> list[Array]:
        pairs = [_scores(q, y, total, total, strict=False), _scores(a, y, before, total, strict=True)]
        # Documents are diagonal blocks of I - A: their inverses do not mix.
        return pairs if segments is None else [jnp.where(segments.same[..., None, :, :], x, 0) for x in pairs]

    read, recall = q * jnp.exp(total), a * jnp.exp(before)
    left = jnp.exp(total[..., -1:, :] - total)
    keep = jnp.exp(total[..., -1, :])[..., None]
    if segments is not None:
        seen = segments.from_carry[..., None, :, None]
        read, recall = jnp.where(seen, read, 0), jnp.where(seen, recall, 0)
        left = jnp.where(segments.into_carry[..., None, :, None], left, 0)
        keep = jnp.where(segments.keep[..., None, None, None], keep, 0)
    queried, recalled = scores(b)
    inverse = unit_lower_inverse(-recalled)
    own, value, written = jnp.zeros_like(v), v, None
    if k is not None:
        own, value = (x @ v for x in scores(k))
        written = jnp.swapaxes(k * left, -1, -2) @ v
    chunks = (inverse @ value, inverse @ recall, b * left, keep, written)
    state, (entering, z) = jax.lax.scan(_pass_on, state, chunks)
    return state, read @ entering + own + queried @ z


def dplr(q, k, v, a, b, log_decay, state, segment_ids=None):
    """Group by group; arguments as in `api.py`, decay `[B,T,H,K or 1]`."""
    cut = grid(v, CHUNK, SMALLEST_BLOCK)
    tokens = jax.tree.map(cut.split_heads, (q, k, v, a, b, log_decay))
    state, out = jax.lax.scan(jax.checkpoint(_group), state, (*tokens, cut.segments(segment_ids)))
    return cut.join_heads(out, v.shape[1]), state
