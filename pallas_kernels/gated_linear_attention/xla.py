"""The chunkwise matmul form: work within a chunk is dense, only the state crosses chunks.

With G the running sum of log decays inside a chunk and S the state that enters it,

    A_ij = sum_k q_ik k_jk e^{G_ik - G_jk}  (j <= i),    o = (q e^G) S + A v,
    S'   = e^{G_C} S + (k e^{G_C - G})^T v.

Every exponent is a difference of a later and an earlier G, hence <= 0: nothing overflows.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, chunk_segments, join_time, split_time
from pallas_kernels.decay import SMALLEST_BLOCK, decayed_scores, pair_decay

# 2 CPU cores, B=4 T=2048 H=8 K=V=64: C=32 was the fastest of 16..128, forward and backward.
CHUNK = 32


def _scores(q: Array, k: Array, total: Array) -> Array:
    """Masked scores `[B,H,C,C]`; one product per key head where the decay has no channels."""
    if total.shape[-1] > 1:
        repeat = total.shape[1] // q.shape[1]
        return decayed_scores(jnp.repeat(q, repeat, 1), jnp.repeat(k, repeat, 1), total, total)
    plain = jnp.einsum("bgik,bgjk->bgij", q, k)
    return jnp.repeat(plain, total.shape[1] // q.shape[1], 1) * pair_decay(total)


def _chunk(carry, inputs):
    """One chunk: `q, k [B,G,C,K]`, `v [B,H,C,V]`, `log_decay [B,H,C,K or 1]`, `ids [B,C]` or None."""
    state, carry_id = carry
    q, k, v, log_decay, ids = inputs
    repeat = v.shape[1] // q.shape[1]
    total = jnp.cumsum(log_decay, -2)
    scores = _scores(q, k, total)
    read = jnp.repeat(q, repeat, 1) * jnp.exp(total)
    write = jnp.repeat(k, repeat, 1) * jnp.exp(total[..., -1:, :] - total)
    keep = jnp.exp(total[..., -1, :])[..., None]
    if ids is not None:
        segments = chunk_segments(ids, carry_id)
        scores = jnp.where(segments.same[:, None], scores, 0)
        read = jnp.where(segments.from_carry[:, None, :, None], read, 0)
        write = jnp.where(segments.into_carry[:, None, :, None], write, 0)
        keep = jnp.where(segments.keep[:, None, None, None], keep, 0)
        carry_id = ids[:, -1]
    out = jnp.einsum("bhik,bhkv->bhiv", read, state) + jnp.einsum("bhij,bhjv->bhiv", scores, v)
    state = keep * state + jnp.einsum("bhik,bhiv->bhkv", write, v)
    return (state, carry_id), out


def gated_linear_attention(q, k, v, log_decay, state, segment_ids=None):
    """Chunk by chunk; `q, k` may have fewer heads than `v`; decay `[B,T,H,K or 1]`."""
    length = v.shape[1]
    chunk = chunk_length(length, CHUNK, SMALLEST_BLOCK)
    heads_first = [jnp.swapaxes(split_time(x, chunk), 2, 3) for x in (q, k, v, log_decay)]
    ids = None if segment_ids is None else split_time(segment_ids, chunk, edge=True)
    carry = (state, None if segment_ids is None else segment_ids[:, 0])
    (state, _), out = jax.lax.scan(jax.checkpoint(_chunk), carry, (*heads_first, ids))
    return join_time(jnp.swapaxes(out, 2, 3), length), state
