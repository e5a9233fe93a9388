"""The chunkwise matmul form: the corrections of a whole chunk come out of one triangular inverse.

With G the running sum of log decays inside a chunk and S the state that enters it,

    A_ij  = sum_k p_ik k_jk e^{G_ik - G_jk}  (j < i),    Q_ij = sum_k q_ik k_jk e^{G_ik - G_jk}  (j <= i),
    Delta = (I + A)^{-1} (v - (p e^G) S),
    o     = (q e^G) S + Q Delta,
    S'    = e^{G_C} S + (k e^{G_C - G})^T Delta.

Every exponent is a difference of a later and an earlier G, hence <= 0: nothing overflows.
A group of chunks is worked on at once; in turn go Delta and the states, three products each.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import grid
from pallas_kernels.decay import SMALLEST_BLOCK, decayed_scores, pair_decay
from pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


def _scores(q: Array, p: Array, k: Array, total: Array) -> tuple[Array, Array]:
    """Q and A of the module docstring, `[...,H,C,C]`."""
    if total.shape[-1] > 1:
        return decayed_scores(q, k, total, total), decayed_scores(p, k, total, total, strict=True)
    decay = pair_decay(total)
    keys = jnp.swapaxes(k, -1, -2)
    return q @ keys * decay, jnp.tril(p @ keys * decay, -1)


def _pass_on(state, chunk):
    """The state from chunk to chunk; out come what entered and the corrections Delta."""
    value, recall, write, keep = chunk
    delta = value - recall @ state
    return keep * state + jnp.swapaxes(write, -1, -2) @ delta, (state, delta)


def _group(state, inputs):
    """`q, k, p [n,B,H,C,K]`, `v [n,B,H,C,V]`, `log_decay [n,B,H,C,K or 1]`, masks `[n,B,...]` or None."""
    q, k, v, p, log_decay, segments = inputs
    total = jnp.cumsum(log_decay, -2)
    scores, correction = _scores(q, p, k, total)
    decay = jnp.exp(total)
    read, recall = q * decay, p * decay
    write = k * jnp.exp(total[..., -1:, :] - total)
    keep = jnp.exp(total[..., -1, :])[..., None]
    if segments is not None:
        same, seen = segments.same[..., None, :, :], segments.from_carry[..., None, :, None]
        # Documents are diagonal blocks of I + A: their inverses do not mix.
        scores, correction = jnp.where(same, scores, 0), jnp.where(same, correction, 0)
        read, recall = jnp.where(seen, read, 0), jnp.where(seen, recall, 0)
        write = jnp.where(segments.into_carry[..., None, :, None], write, 0)
        keep = jnp.where(segments.keep[..., None, None, None], keep, 0)
    inverse = unit_lower_inverse(correction)
    state, (entering, delta) = jax.lax.scan(_pass_on, state, (inverse @ v, inverse @ recall, write, keep))
    return state, read @ entering + scores @ delta


def gated_delta_rule(q, k, v, p, log_decay, state, segment_ids=None):
    """Group by group; arguments as in `api.py`, decay `[B,T,H,K or 1]`."""
    cut = grid(v, CHUNK, SMALLEST_BLOCK)
    inputs = (*(cut.split_heads(x) for x in (q, k, v, p, log_decay)), cut.segments(segment_ids))
    state, out = jax.lax.scan(jax.checkpoint(_group), state, inputs)
    return cut.join_heads(out, v.shape[1]), state
