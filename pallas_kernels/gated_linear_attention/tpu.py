"""The chunkwise form of `xla.py` as a TPU kernel: what a chunk makes never leaves VMEM."""

from pallas_kernels import tpu_chunks
from pallas_kernels.tpu_chunks import chunk_of, cut, cut_decay, cut_segments, decays, join, scan_chunks
from pallas_kernels.tpu_math import F32, dot, scores

# Larger chunks pass the state on less often and fill the 128 x 128 matrix unit; all of these compile for
# v5e, v6e and v7x (experiments/results/kernels_static.md). No time has been measured on a TPU.
CHUNK = {"bfloat16": {128: 128, 256: 128}, "float32": {128: 128, 256: 128}}


def _chunk(state, tokens, shared, marks):
    """`q, k [C,K]`, `v [C,V]`, `log_decay [1,C]` or `[C,K]`; `state [K,V]` float32."""
    q, k, v, log_decay = tokens
    pairs = scores(q, k, log_decay)
    read, write, keep = decays(log_decay)
    if marks is not None:
        same, seen, into, one = marks.masks()
        pairs, read, write, keep = pairs * same, read * seen, write * into, keep * one
    entering = state.astype(q.dtype)
    out = dot((q.astype(F32) * read).astype(q.dtype), entering) + dot(pairs.astype(v.dtype), v)
    return keep * state + dot((k.astype(F32) * write).astype(v.dtype), v, 0, 0), out.astype(v.dtype)


def gated_linear_attention(q, k, v, log_decay, state, segment_ids=None):
    """Chunk by chunk; `q, k` may have fewer heads than `v`; decay `[B,T,H,K or 1]` float32."""
    chunk = chunk_of(CHUNK, q, v)
    tokens = (*(cut(x, chunk) for x in (q, k, v)), cut_decay(log_decay, chunk))
    marks = cut_segments(segment_ids, chunk)
    out, state = scan_chunks(_chunk, "gated_linear_attention", state.astype(F32), tokens, (), marks)
    return join(out, v.shape[1]), state


def refusal(q, k, v, *rest) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return tpu_chunks.refusal(CHUNK, q, v)
