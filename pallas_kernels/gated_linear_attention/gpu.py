"""The chunkwise form (see `xla.py`) as Hopper kernels.

With decay per head every gradient is linear attention itself, and the same kernel
(`pallas_kernels.gpu_chunks`). With decay per channel what happens inside a chunk is a kernel of its own,
forward and backward, and only what passes through the state is linear attention.
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
from pallas_kernels.gpu_math import (
    on_blocks,
    part_count,
    parts_of,
    shared_dtype,
    summed_heads,
)
from pallas_kernels.gpu_pair_gradients import pair_gradients


class _Tokens(NamedTuple):
    """Arguments as the kernels take them."""

    query: tuple[Array, ...]
    key: tuple[Array, ...]
    value: tuple[Array, ...]
    marks: Array | None


def _tokens(q: Array, k: Array, v: Array, ids: Array | None) -> _Tokens:
    parts = partial(parts_of, count=part_count(v.dtype))
    return _Tokens(parts(q), parts(k), parts(v), None if ids is None else marks_of(ids))


@jax.custom_vjp
def _by_head(q, k, v, log_decay, state, ids):
    return _head_fwd(q, k, v, log_decay, state, ids)[0]


def _head_fwd(q, k, v, log_decay, state, ids):
    tokens = _tokens(q, k, v, ids)
    operands = Operands(tokens.query, tokens.key, tokens.value, running_sums(log_decay), marks=tokens.marks)
    results = attend(operands, state, Form(dtype=v.dtype))
    return (results.out, results.final), (q, k, v, log_decay, state, ids)


def _head_bwd(saved, cotangents):
    q, k, v, log_decay, state, ids = saved
    dout, dfinal = cotangents
    query, key, value, marks = _tokens(q, k, v, ids)
    back = parts_of(dout.astype(v.dtype), len(value))
    run = partial(Operands, total=running_sums(log_decay), marks=marks)
    dtype = shared_dtype(q, v.shape[2])
    dv = attend(run(key, query, back), dfinal, Form(reverse=True, dtype=v.dtype))
    dq = attend(run(back, value, key, partner=query), flipped(state), Form(kept=True, dtype=dtype))
    for_dk = run(value, back, query, partner=key)
    dk = attend(for_dk, flipped(dfinal), Form(kept=True, dtype=dtype, reverse=True))
    dg = decay_gradient(summed_after(dq.dots - dk.dots, marks)[..., None], leaving(dq), dk.kept, marks)
    dg = jnp.moveaxis(dg, 2, 1).astype(log_decay.dtype)
    return summed_heads(dq.out, q), summed_heads(dk.out, k), dv.out, dg, dv.final, None


_by_head.defvjp(_head_fwd, _head_bwd)


@jax.custom_vjp
def _by_channel(q, k, v, log_decay, state, ids):
    return _channel_fwd(q, k, v, log_decay, state, ids)[0]


def _channel_fwd(q, k, v, log_decay, state, ids):
    query, key, value, marks = _tokens(q, k, v, ids)
    scored = score([Reader(query)], [key], decay_parts(log_decay, v.dtype), marks)
    keep = kept_by_chunks(log_decay, marks)
    operands = Operands(scored.queries[0], scored.keys[0], value, keep=keep, pairs=scored.pairs[0])
    results = attend(operands, state, Form(dtype=v.dtype))
    return (results.out, results.final), (q, k, v, log_decay, state, ids, scored)


def _channel_bwd(saved, cotangents):
    q, k, v, log_decay, state, ids, scored = saved
    dout, dfinal = cotangents
    query, key, value, marks = _tokens(q, k, v, ids)
    back, keep = parts_of(dout.astype(v.dtype), len(value)), kept_by_chunks(log_decay, marks)
    [late], early = scored.queries, scored.keys[0]
    for_dv = Operands(early, late, back, keep=keep, pairs=scored.pairs[0])
    dv = attend(for_dv, dfinal, Form(reverse=True, dtype=v.dtype))
    through = Form(kept=True, keep_columns=True)
    dq = attend(Operands(back, value, early, keep=keep), flipped(state), through)
    dk = attend(Operands(value, back, late, keep=keep), flipped(dfinal), through._replace(reverse=True))
    cotangents = Cotangents([pair_gradients(back, value, marks)], dq.out, [dk.out])
    dtype = shared_dtype(q, v.shape[2])
    decay = decay_parts(log_decay, v.dtype)
    own = score_gradients(Reader(query), [key], decay, marks, cotangents, (dtype, dtype))
    dg = decay_gradient(jnp.moveaxis(own.decay, 2, 1), leaving(dq), dk.kept, marks)
    dg = jnp.moveaxis(dg, 2, 1).astype(log_decay.dtype)
    return summed_heads(own.query, q), summed_heads(own.keys[0], k), dv.out, dg, dv.final, None


_by_channel.defvjp(_channel_fwd, _channel_bwd)


def refusal(q, k, v, log_decay, state, segment_ids=None) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if len({x.dtype for x in (q, k, v)}) > 1 or v.dtype not in (jnp.bfloat16, jnp.float32):
        return "takes q, k and v of one dtype, bfloat16 or float32"
    if max(q.shape[3], v.shape[3]) > 256:
        return "takes heads of at most 256 channels"
    return None


def gated_linear_attention(q, k, v, log_decay, state, segment_ids=None):
    """`q, k` may have fewer heads than `v`; decay `[B,T,H,K or 1]`. Pads channels to multiples of 64."""
    run = _by_head if log_decay.shape[3] == 1 else _by_channel
    return on_blocks(run, (q, k), v, log_decay, state, segment_ids)
