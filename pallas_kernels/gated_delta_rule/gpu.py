"""The chunkwise form (see `xla.py`) as Hopper kernels: corrections in turn, then linear attention of them.

With D the corrections and dU their gradient (`pallas_kernels.gpu_delta`), every other gradient is linear
attention too: dq that of (do, D, k) and dp that of (-dU, D, k) before each token, dk that of (D, do, q) and
of (D, -dU, p) from the right. The inverses and the corrections are kept for the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu_channel_gradients import Cotangents, score_gradients
from pallas_kernels.gpu_channels import Reader, score
from pallas_kernels.gpu_chunk_work import Form
from pallas_kernels.gpu_chunks import Operands, attend, flipped, leaving
from pallas_kernels.gpu_decay import (
    decay_gradient,
    decay_parts,
    kept_by_chunks,
    marks_of,
    running_sums,
    summed_after,
)
from pallas_kernels.gpu_delta import correction_gradients, corrections, inverses
from pallas_kernels.gpu_math import F32, on_blocks, part_count, parts_of
from pallas_kernels.gpu_pair_gradients import pair_gradients


class _Tokens(NamedTuple):
    """Arguments as the kernels take them."""

    query: tuple[Array, ...]
    key: tuple[Array, ...]
    value: tuple[Array, ...]
    recall: tuple[Array, ...]
    marks: Array | None


def _tokens(q: Array, k: Array, v: Array, p: Array, ids: Array | None) -> _Tokens:
    parts = partial(parts_of, count=part_count(v.dtype))
    return _Tokens(parts(q), parts(k), parts(v), parts(p), None if ids is None else marks_of(ids))


def _shape(v: Array) -> tuple[int, int, int]:
    return v.shape[0], v.shape[2], v.shape[1]


@jax.custom_vjp
def _by_head(q, k, p, v, log_decay, state, ids):
    return _head_fwd(q, k, p, v, log_decay, state, ids)[0]


def _head_fwd(q, k, p, v, log_decay, state, ids):
    query, key, value, recall, marks = _tokens(q, k, v, p, ids)
    common = {"total": running_sums(log_decay), "marks": marks}
    inverse = inverses(_shape(v), v.dtype, recall=recall, key=key, **common)
    delta = corrections(Operands(recall, key, value, **common), inverse, state, v.dtype).out
    written = parts_of(delta, len(value))
    results = attend(Operands(query, key, written, **common), state, Form(dtype=v.dtype))
    return (results.out, results.final), (q, k, p, v, log_decay, state, ids, inverse, delta)


def _head_bwd(saved, cotangents):
    q, k, p, v, log_decay, state, ids, inverse, delta = saved
    dout, dfinal = cotangents
    query, key, value, recall, marks = _tokens(q, k, v, p, ids)
    parts = partial(parts_of, count=len(value))
    written, back = parts(delta), parts(dout.astype(v.dtype))
    run = partial(Operands, total=running_sums(log_decay), marks=marks)
    dv = correction_gradients(run(key, query, back), inverse, recall, dfinal, v.dtype)
    less = parts(-dv.out)
    forward, reverse = Form(kept=True, dtype=v.dtype), Form(reverse=True, kept=True)
    start, end = flipped(state), flipped(dfinal)
    dq = attend(run(back, written, key, partner=query), start, forward)
    dp = attend(run(less, written, key, partner=recall), start, forward._replace(strict=True, kept=False))
    read = attend(run(written, back, query, partner=key), end, reverse)
    recalled = attend(
        run(written, less, recall, partner=key), jnp.zeros_like(end), reverse._replace(strict=True)
    )
    own = dq.dots + dp.dots - read.dots - recalled.dots
    dg = decay_gradient(summed_after(own, marks)[..., None], leaving(dq), read.kept + recalled.kept, marks)
    dg = jnp.moveaxis(dg, 2, 1).astype(log_decay.dtype)
    return dq.out, (read.out + recalled.out).astype(k.dtype), dp.out, dv.out, dg, dv.final, None


_by_head.defvjp(_head_fwd, _head_bwd)


@jax.custom_vjp
def _by_channel(q, k, p, v, log_decay, state, ids):
    return _channel_fwd(q, k, p, v, log_decay, state, ids)[0]


def _channel_fwd(q, k, p, v, log_decay, state, ids):
    query, key, value, recall, marks = _tokens(q, k, v, p, ids)
    scored = score([Reader(query), Reader(recall, True)], [key], decay_parts(log_decay, v.dtype), marks)
    keep = kept_by_chunks(log_decay, marks)
    inverse = inverses(_shape(v), v.dtype, pairs=scored.pairs[1])
    late, late_recall = scored.queries
    delta = corrections(Operands(late_recall, scored.keys[0], value, keep=keep), inverse, state, v.dtype).out
    written = parts_of(delta, len(value))
    operands = Operands(late, scored.keys[0], written, keep=keep, pairs=scored.pairs[0])
    results = attend(operands, state, Form(dtype=v.dtype))
    scored = scored._replace(pairs=scored.pairs[:1])
    return (results.out, results.final), (q, k, p, v, log_decay, state, ids, scored, inverse, delta)


def _channel_bwd(saved, cotangents):
    q, k, p, v, log_decay, state, ids, scored, inverse, delta = saved
    dout, dfinal = cotangents
    query, key, value, recall, marks = _tokens(q, k, v, p, ids)
    parts, keep = partial(parts_of, count=len(value)), kept_by_chunks(log_decay, marks)
    written, back = parts(delta), parts(dout.astype(v.dtype))
    late, late_recall = scored.queries
    for_dv = Operands(scored.keys[0], late, back, keep=keep, pairs=scored.pairs[0])
    dv = correction_gradients(for_dv, inverse, late_recall, dfinal, v.dtype)
    less = parts(-dv.out)
    forward = Form(kept=True, keep_columns=True)
    reverse, start, end = forward._replace(reverse=True), flipped(state), flipped(dfinal)
    dq = attend(Operands(back, written, scored.keys[0], keep=keep), start, forward)
    dp = attend(Operands(less, written, scored.keys[0], keep=keep), start, forward._replace(kept=False))
    read = attend(Operands(written, back, late, keep=keep), end, reverse)
    recalled = attend(Operands(written, less, late_recall, keep=keep), jnp.zeros_like(end), reverse)
    decay = decay_parts(log_decay, v.dtype)
    of_read = Cotangents([pair_gradients(back, written, marks)], dq.out, [read.out])
    of_recalled = Cotangents([pair_gradients(less, written, marks)], dp.out, [recalled.out])
    one = score_gradients(Reader(query), [key], decay, marks, of_read, (q.dtype, F32))
    two = score_gradients(Reader(recall, True), [key], decay, marks, of_recalled, (p.dtype, F32))
    own = jnp.moveaxis(one.decay + two.decay, 2, 1)
    dg = decay_gradient(own, leaving(dq), read.kept + recalled.kept, marks)
    dg = jnp.moveaxis(dg, 2, 1).astype(log_decay.dtype)
    dk = (one.keys[0] + two.keys[0]).astype(k.dtype)
    return one.query, dk, two.query, dv.out, dg, dv.final, None


_by_channel.defvjp(_channel_fwd, _channel_bwd)

# Channels of q, k and p for which shared memory holds what is needed of a chunk.
MOST_KEYS = {jnp.dtype(jnp.bfloat16): 256, jnp.dtype(jnp.float32): 64}


def refusal(q, k, v, p, log_decay, state, segment_ids=None) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if len({x.dtype for x in (q, k, v, p)}) > 1 or v.dtype not in MOST_KEYS:
        return "takes q, k, v and p of one dtype, bfloat16 or float32"
    if q.shape[3] > MOST_KEYS[v.dtype]:
        return f"takes {v.dtype} keys of at most {MOST_KEYS[v.dtype]} channels"
    if v.shape[3] > 256:
        return "takes values of at most 256 channels"
    return None


def gated_delta_rule(q, k, v, p, log_decay, state, segment_ids=None):
    """Arguments as in `api.py`, decay `[B,T,H,K or 1]`. Channels are padded to multiples of 64."""
    run = _by_head if log_decay.shape[3] == 1 else _by_channel
    return on_blocks(run, (q, k, p), v, log_decay, state, segment_ids)
