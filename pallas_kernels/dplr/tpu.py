"""The chunkwise form of `xla.py` as a TPU kernel: scores, inverse and what is recalled never leave VMEM."""

from pallas_kernels import tpu_chunks
from pallas_kernels.tpu_chunks import chunk_of, cut, cut_decay, cut_segments, decays, join, scan_chunks
from pallas_kernels.tpu_math import F32, dot, scores, unit_lower_inverse

# The inverse costs 4 C^2 log2(C) per token, so that chunks are shorter than for plain linear attention. All
# of these compile for v5e, v6e and v7x (experiments/results/kernels_static.md); none has been timed on a TPU.
CHUNK = {"bfloat16": {128: 64, 256: 64}, "float32": {128: 64, 256: 64}}


def _chunk(state, tokens, shared, marks):
    """`q, k, a, b [C,K]`, k or None, `v [C,V]`, `log_decay [1,C]` or `[C,K]`; `state [K,V]` float32."""
    q, k, v, a, b, log_decay = tokens
    read, write, keep = decays(log_decay)
    recall = decays(log_decay, own=False)[0]
    masks = None if marks is None else marks.masks()
    if masks is not None:
        read, recall, write, keep = read * masks[1], recall * masks[1], write * masks[2], keep * masks[3]
    narrow, entering = v.dtype, state.astype(v.dtype)

    def pairs(x, y, **how):
        # Documents are diagonal blocks of I - A: their inverses do not mix.
        found = scores(x, y, log_decay, **how)
        return found if masks is None else found * masks[0]

    def decayed(x, decay):
        return (x.astype(F32) * decay).astype(narrow)

    z = dot(decayed(a, recall), entering)
    if k is None:
        z = z + v.astype(F32)
    else:
        z = z + dot(pairs(a, k, own=False, diagonal=False).astype(narrow), v)
    # In full: entries of the inverse grow with the correlation of the keys and cancel.
    z = dot(unit_lower_inverse(-pairs(a, b, own=False, diagonal=False)), z).astype(narrow)
    out = dot(decayed(q, read), entering) + dot(pairs(q, b).astype(narrow), z)
    state = keep * state + dot(decayed(b, write), z, 0, 0)
    if k is not None:
        out = out + dot(pairs(q, k).astype(narrow), v)
        state = state + dot(decayed(k, write), v, 0, 0)
    return state, out.astype(narrow)


def dplr(q, k, v, a, b, log_decay, state, segment_ids=None):
    """Chunk by chunk; arguments as in `api.py`, decay `[B,T,H,K or 1]`."""
    chunk = chunk_of(CHUNK, q, v)
    tokens = (*(None if x is None else cut(x, chunk) for x in (q, k, v, a, b)), cut_decay(log_decay, chunk))
    marks = cut_segments(segment_ids, chunk)
    out, state = scan_chunks(_chunk, "dplr", state.astype(F32), tokens, (), marks)
    return join(out, v.shape[1]), state


def refusal(q, k, v, *rest) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return tpu_chunks.refusal(CHUNK, q, v)
