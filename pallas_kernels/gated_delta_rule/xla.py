"""The chunkwise matmul form: the corrections of a whole chunk come out of one triangular inverse.

With G the running sum of log decays inside a chunk and S the state that enters it,

    A_ij  = sum_k p_ik k_jk e^{G_ik - G_jk}  (j < i),    Q_ij = sum_k q_ik k_jk e^{G_ik - G_jk}  (j <= i),
    Delta = (I + A)^{-1} (v - (p e^G) S),
    o     = (q e^G) S + Q Delta,
    S'    = e^{G_C} S + (k e^{G_C - G})^T Delta.

Every exponent is a difference of a later and an earlier G, hence <= 0: nothing overflows.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, chunk_segments, join_time, split_time
from pallas_kernels.decay import SMALLEST_BLOCK, decayed_scores, pair_decay
from pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


def _scores(q: Array, p: Array, k: Array, total: Array) -> tuple[Array, Array]:
    """Q and A of the module docstring, `[B,H,C,C]`."""
    if total.shape[-1] > 1:
        return decayed_scores(q, k, total, total), decayed_scores(p, k, total, total, strict=True)
    decay = pair_decay(total)
    keys = jnp.swapaxes(k, -1, -2)
    return q @ keys * decay, jnp.tril(p @ keys * decay, -1)


def _chunk(carry, inputs):
    """One chunk: `q, k, p [B,H,C,K]`, `v [B,H,C,V]`, `log_decay [B,H,C,K or 1]`, `ids [B,C]` or None."""
    state, carry_id = carry
    q, k, v, p, log_decay, ids = inputs
    total = jnp.cumsum(log_decay, -2)
    scores, correction = _scores(q, p, k, total)
    decay = jnp.exp(total)
    read, recall = q * decay, p * decay
    write = k * jnp.exp(total[..., -1:, :] - total)
    keep = jnp.exp(total[..., -1, :])[..., None]
    if ids is not None:
        segments = chunk_segments(ids, carry_id)
        same, seen = segments.same[:, None], segments.from_carry[:, None, :, None]
        # Documents are diagonal blocks of I + A: their inverses do not mix.
        scores, correction = jnp.where(same, scores, 0), jnp.where(same, correction, 0)
        read, recall = jnp.where(seen, read, 0), jnp.where(seen, recall, 0)
        write = jnp.where(segments.into_carry[:, None, :, None], write, 0)
        keep = jnp.where(segments.keep[:, None, None, None], keep, 0)
        carry_id = ids[:, -1]
    delta = unit_lower_inverse(correction) @ (v - recall @ state)
    out = read @ state + scores @ delta
    state = keep * state + jnp.swapaxes(write, -1, -2) @ delta
    return (state, carry_id), out


def gated_delta_rule(q, k, v, p, log_decay, state, segment_ids=None):
    """Chunk by chunk; arguments as in `api.py`, decay `[B,T,H,K or 1]`."""
    length = v.shape[1]
    chunk = chunk_length(length, CHUNK, SMALLEST_BLOCK)
    heads_first = [jnp.swapaxes(split_time(x, chunk), 2, 3) for x in (q, k, v, p, log_decay)]
    ids = None if segment_ids is None else split_time(segment_ids, chunk, edge=True)
    carry = (state, None if segment_ids is None else segment_ids[:, 0])
    (state, _), out = jax.lax.scan(jax.checkpoint(_chunk), carry, (*heads_first, ids))
    return join_time(jnp.swapaxes(out, 2, 3), length), state
