"""The chunkwise matmul form: work within a chunk is dense, only the state crosses chunks.

With G the running sum of log decays inside a chunk and S the state that enters it,

    A_ij = sum_k q_ik k_jk e^{G_ik - G_jk}  (j <= i),    o = (q e^G) S + A v,
    S'   = e^{G_C} S + (k e^{G_C - G})^T v.

Every exponent is a difference of a later and an earlier G, hence <= 0: nothing overflows.
A group of chunks is worked on at once; in turn go only the states, which is a product and a sum each.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import grid
from pallas_kernels.decay import SMALLEST_BLOCK, decayed_scores, pair_decay

# 2 CPU cores, H=4 K=16 V=32, forward and backward of 1,024 tokens in one group: chunks of 32 take 3 ms,
# of 64 and of 128 4 ms; with 4 to 16 chunks of 32 in a group it is 4.5 to 5 ms.
CHUNK = 32


def _scores(q: Array, k: Array, total: Array) -> Array:
    """Masked scores `[...,H,C,C]`; one product per key head where the decay has no channels."""
    repeat = total.shape[-3] // q.shape[-3]
    if total.shape[-1] > 1:
        return decayed_scores(jnp.repeat(q, repeat, -3), jnp.repeat(k, repeat, -3), total, total)
    plain = jnp.einsum("...ik,...jk->...ij", q, k)
    return jnp.repeat(plain, repeat, -3) * pair_decay(total)


def _pass_on(state, chunk):
    """The state from chunk to chunk; out comes what entered."""
    keep, written = chunk
    return keep * state + written, state


def _group(state, inputs):
    """`q, k [n,B,G,C,K]`, `v [n,B,H,C,V]`, `log_decay [n,B,H,C,K or 1]`, masks `[n,B,...]` or None."""
    q, k, v, log_decay, segments = inputs
    repeat = v.shape[-3] // q.shape[-3]
    total = jnp.cumsum(log_decay, -2)
    scores = _scores(q, k, total)
    read = jnp.repeat(q, repeat, -3) * jnp.exp(total)
    write = jnp.repeat(k, repeat, -3) * jnp.exp(total[..., -1:, :] - total)
    keep = jnp.exp(total[..., -1, :])[..., None]
    if segments is not None:
        scores = jnp.where(segments.same[..., None, :, :], scores, 0)
        read = jnp.where(segments.from_carry[..., None, :, None], read, 0)
        write = jnp.where(segments.into_carry[..., None, :, None], write, 0)
        keep = jnp.where(segments.keep[..., None, None, None], keep, 0)
    state, entering = jax.lax.scan(_pass_on, state, (keep, jnp.einsum("...ik,...iv->...kv", write, v)))
    return state, read @ entering + scores @ v


def gated_linear_attention(q, k, v, log_decay, state, segment_ids=None):
    """Group by group; `q, k` may have fewer heads than `v`; decay `[B,T,H,K or 1]`."""
    cut = grid(v, CHUNK, SMALLEST_BLOCK)
    inputs = (*(cut.split_heads(x) for x in (q, k, v, log_decay)), cut.segments(segment_ids))
    state, out = jax.lax.scan(jax.checkpoint(_group), state, inputs)
    return cut.join_heads(out, v.shape[1]), state
