"""The chunkwise form of `xla.py` as a TPU kernel: scores, inverse and corrections never leave VMEM."""

from pallas_kernels import tpu_chunks
from pallas_kernels.tpu_chunks import chunk_of, cut, cut_decay, cut_segments, decays, join, scan_chunks
from pallas_kernels.tpu_math import F32, dot, scores, unit_lower_inverse

# The inverse costs 4 C^2 log2(C) per token, so that chunks are shorter than for plain linear attention. All
# of these compile for v5e, v6e and v7x (experiments/results/kernels_static.md); none has been timed on a TPU.
CHUNK = {"bfloat16": {128: 64, 256: 64}, "float32": {128: 64, 256: 64}}


def _chunk(state, tokens, shared, marks):
    """`q, k, p [C,K]`, `v [C,V]`, `log_decay [1,C]` or `[C,K]`; `state [K,V]` float32."""
    q, k, v, p, log_decay = tokens
    pairs, correction = scores(q, k, log_decay), scores(p, k, log_decay, diagonal=False)
    read, write, keep = decays(log_decay)
    if marks is not None:
        same, seen, into, one = marks.masks()
        # Documents are diagonal blocks of I + A: their inverses do not mix.
        pairs, correction = pairs * same, correction * same
        read, write, keep = read * seen, write * into, keep * one
    narrow, entering = v.dtype, state.astype(q.dtype)
    wrong = v.astype(F32) - dot((p.astype(F32) * read).astype(narrow), entering)
    # In full: entries of the inverse grow with the correlation of the keys and cancel.
    delta = dot(unit_lower_inverse(correction), wrong).astype(narrow)
    out = dot((q.astype(F32) * read).astype(narrow), entering) + dot(pairs.astype(narrow), delta)
    return keep * state + dot((k.astype(F32) * write).astype(narrow), delta, 0, 0), out.astype(narrow)


def gated_delta_rule(q, k, v, p, log_decay, state, segment_ids=None):
    """Chunk by chunk; arguments as in `api.py`, decay `[B,T,H,K or 1]`."""
    chunk = chunk_of(CHUNK, q, v)
    tokens = (*(cut(x, chunk) for x in (q, k, v, p)), cut_decay(log_decay, chunk))
    marks = cut_segments(segment_ids, chunk)
    out, state = scan_chunks(_chunk, "gated_delta_rule", state.astype(F32), tokens, (), marks)
    return join(out, v.shape[1]), state


def refusal(q, k, v, *rest) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return tpu_chunks.refusal(CHUNK, q, v)
