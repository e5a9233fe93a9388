"""The chunkwise form of `xla.py` as a TPU kernel: what a chunk makes never leaves VMEM."""

import jax.numpy as jnp

from pallas_kernels.chunks import chunk_length
from pallas_kernels.tpu_chunks import cut, cut_decay, cut_segments, join, scan_chunks
from pallas_kernels.tpu_math import F32, column, dot, scores, sums

CHUNK = 128


def _chunk(state, tokens, shared, marks):
    """`q, k [C,K]`, `v [C,V]`, `log_decay [1,C]` or `[C,K]`; `state [K,V]` float32."""
    q, k, v, log_decay = tokens
    pairs = scores(q, k, log_decay)
    read = jnp.exp(sums(log_decay, lambda i, t: t <= i))
    write = jnp.exp(sums(log_decay, lambda i, t: t > i))
    total = jnp.sum(log_decay, 1 if log_decay.shape[0] == 1 else 0, keepdims=True)
    keep = jnp.exp(total if total.shape[1] == 1 else column(total))
    if marks is not None:
        same, seen, into, one = marks.masks()
        pairs, read, write, keep = pairs * same, read * seen, write * into, keep * one
    entering = state.astype(q.dtype)
    out = dot((q.astype(F32) * read).astype(q.dtype), entering) + dot(pairs.astype(v.dtype), v)
    return keep * state + dot((k.astype(F32) * write).astype(v.dtype), v, 0, 0), out.astype(v.dtype)


def gated_linear_attention(q, k, v, log_decay, state, segment_ids=None):
    """Chunk by chunk; `q, k` may have fewer heads than `v`; decay `[B,T,H,K or 1]` float32."""
    length = v.shape[1]
    chunk = chunk_length(length, CHUNK, 8)
    tokens = (*(cut(x, chunk) for x in (q, k, v)), cut_decay(log_decay, chunk))
    marks = cut_segments(segment_ids, chunk)
    out, state = scan_chunks(_chunk, "gated_linear_attention", state.astype(F32), tokens, (), marks)
    return join(out, length), state
