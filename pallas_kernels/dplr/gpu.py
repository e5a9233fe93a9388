"""The chunkwise form (see `xla.py`) as Hopper kernels.

With p = -a this is the delta rule whose p recalls the memory before its decay, and whose corrections, z or u,
are written with b. A separate key writes v beside them: everything that is linear attention in
`gated_delta_rule/gpu.py` has two keys and two values here, z with b and v with k, and from the right the
cotangents do with q and -dz with p. Decay per head is taken as decay per channel.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu_channel_gradients import Cotangents, Gradients, score_gradients
from pallas_kernels.gpu_channels import Reader, Scored, score
from pallas_kernels.gpu_chunk_work import Form
from pallas_kernels.gpu_chunks import Operands, Results, attend, flipped, leaving
from pallas_kernels.gpu_decay import decay_gradient, decay_parts, kept_by_chunks, marks_of
from pallas_kernels.gpu_delta import correction_gradients, corrections, inverses
from pallas_kernels.gpu_math import BF16, F32, on_blocks, part_count, parts_of
from pallas_kernels.gpu_pair_gradients import pair_gradients

Parts = tuple[Array, ...]


class _Tokens(NamedTuple):
    """Arguments as the kernels take them."""

    query: Parts
    recall: Parts
    keys: list[Parts]  # b, and k where that is another one
    value: Parts
    marks: Array | None

    @property
    def dtype(self) -> Any:
        return BF16 if len(self.value) == 1 else F32


class _Kept(NamedTuple):
    """What the backward pass takes from the forward one."""

    late: list[Parts]  # q and p as the state meets them
    early: list[Parts]  # the keys so
    read: list[Parts]  # scores of q with each key
    recalled: list[Parts]  # scores of p with k
    inverse: Parts
    delta: Array  # z, or u


def _tokens(q: Array, k: Array | None, p: Array, b: Array, v: Array, ids: Array | None) -> _Tokens:
    parts = partial(parts_of, count=part_count(v.dtype))
    keys = [parts(b)] if k is None else [parts(b), parts(k)]
    return _Tokens(parts(q), parts(p), keys, parts(v), None if ids is None else marks_of(ids))


def _pairs(names: tuple[str, ...], *lists: list[Parts]) -> dict[str, Parts]:
    """`Operands` of one key or of two: the first of each list under its name, a second as the other."""
    every = zip(names, lists, strict=True)
    return {f"{'other_' if n else ''}{name}": x for name, some in every for n, x in enumerate(some)}


@jax.custom_vjp
def _dplr(q, k, p, b, v, log_decay, state, ids):
    return _fwd(q, k, p, b, v, log_decay, state, ids)[0]


def _scores(tokens: _Tokens, log_decay: Array) -> tuple[Scored, Scored]:
    """Of q and of p with every key."""
    decay = decay_parts(log_decay, tokens.dtype)
    read = score([Reader(tokens.query)], tokens.keys, decay, tokens.marks)
    recall = Reader(tokens.recall, strict=True, before=True)
    return read, score([recall], tokens.keys, decay, tokens.marks, keys_wanted=False)


def _fwd(q, k, p, b, v, log_decay, state, ids):
    tokens, dtype = _tokens(q, k, p, b, v, ids), v.dtype
    keep = kept_by_chunks(log_decay, tokens.marks)
    read, recalled = _scores(tokens, log_decay)
    first, *rest = recalled.pairs
    inverse = inverses((v.shape[0], v.shape[2], v.shape[1]), dtype, pairs=first)
    operands = Operands(recalled.queries[0], read.keys[0], tokens.value, keep=keep)
    if k is not None:
        operands = operands._replace(pairs=rest[0], other_key=read.keys[1])
    delta = corrections(operands, inverse, state, dtype).out
    pairs = _pairs(("key", "value", "pairs"), read.keys, _written(delta, tokens), read.pairs)
    results = attend(Operands(query=read.queries[0], keep=keep, **pairs), state, Form(dtype=dtype))
    kept = _Kept(read.queries + recalled.queries, read.keys, read.pairs, rest, inverse, delta)
    return (results.out, results.final), (q, k, p, b, v, log_decay, state, ids, kept)


def _written(delta: Array, tokens: _Tokens) -> list[Parts]:
    """What is written with each key."""
    return [parts_of(delta, len(tokens.value)), tokens.value][: len(tokens.keys)]


def _bwd(saved, cotangents):
    q, k, p, b, v, log_decay, state, ids, kept = saved
    dout, dfinal = cotangents
    tokens = _tokens(q, k, p, b, v, ids)
    parts, keep = partial(parts_of, count=len(tokens.value)), kept_by_chunks(log_decay, tokens.marks)
    written, back = _written(kept.delta, tokens), parts(dout.astype(v.dtype))
    operands = Operands(kept.early[0], kept.late[0], back, keep=keep, pairs=kept.read[0])
    dz = correction_gradients(operands, kept.inverse, kept.late[1], dfinal, v.dtype)
    dv, backs = dz.out, [back, parts(-dz.out)]
    if k is not None:
        pairs = _pairs(("key", "value", "pairs"), kept.late, backs, [kept.read[1], *kept.recalled])
        form = Form(reverse=True, dtype=v.dtype)
        dv = attend(Operands(query=kept.early[1], keep=keep, **pairs), dfinal, form).out
    through = _through_state(kept, keep, written, backs, (state, dfinal))
    of_q, of_p = _through_scores(tokens, log_decay, through, backs, written)
    ends = leaving(through.queries[0]), through.keys[0].kept
    dg = decay_gradient(jnp.moveaxis(of_q.decay + of_p.decay, 2, 1), *ends, tokens.marks)
    dg = jnp.moveaxis(dg, 2, 1) - p.astype(F32) * of_p.query.astype(F32)
    db, *dk = ((x + y).astype(b.dtype) for x, y in zip(of_q.keys, of_p.keys, strict=True))
    dk = dk[0] if dk else None
    return of_q.query, dk, of_p.query, db, dv, dg.astype(log_decay.dtype), dz.final, None


class _Through(NamedTuple):
    """Gradients through the state, without the decays."""

    queries: list[Results]  # of q and p
    keys: list[Results]


def _through_state(
    kept: _Kept, keep: Array, written: list[Parts], backs: list[Parts], ends: tuple
) -> _Through:
    def gradients(of: list[Parts], keys: list[Parts], values: list[Parts], end: Array, form: Form):
        pairs: dict[str, Any] = _pairs(("key", "value"), keys, values)
        forms = (form._replace(kept=n == 0) for n in range(len(of)))
        return [
            attend(Operands(query=x, keep=keep, **pairs), flipped(end), form)
            for x, form in zip(of, forms, strict=True)
        ]

    form, (state, dfinal) = Form(keep_columns=True), ends
    return _Through(
        gradients(backs, written, kept.early, state, form),
        gradients(written, backs, kept.late, dfinal, form._replace(reverse=True)),
    )


def _through_scores(
    tokens: _Tokens, log_decay: Array, through: _Through, backs: list[Parts], written: list[Parts]
) -> list[Gradients]:
    """Gradients of q and of p, each with those of the keys and the decay."""
    decay, gradients = decay_parts(log_decay, tokens.dtype), []
    readers = Reader(tokens.query), Reader(tokens.recall, strict=True, before=True)
    keys: list[Any] = [x.out for x in through.keys]
    queries: list[Any] = [x.out for x in through.queries]
    for reader, back, query in zip(readers, backs, queries, strict=True):
        pairs = [pair_gradients(back, x, tokens.marks) for x in written]
        flows = Cotangents(pairs, query, keys)
        dtypes = tokens.dtype, F32
        gradients.append(score_gradients(reader, tokens.keys, decay, tokens.marks, flows, dtypes))
        keys = []  # they are in the first
    return gradients


_dplr.defvjp(_fwd, _bwd)

# Channels of q, k, a and b for which shared memory holds what is needed of a chunk, as compiled for sm_90a;
# no register spills in bfloat16 at 64, 128 and 256. Nothing has been timed on a GPU.
MOST_KEYS = {jnp.dtype(jnp.bfloat16): 256, jnp.dtype(jnp.float32): 64}


def refusal(q, k, v, a, b, log_decay, state, segment_ids=None) -> str | None:
    """Why these arguments cannot be taken, or None."""
    if len({x.dtype for x in (q, k, v, a, b) if x is not None}) > 1 or v.dtype not in MOST_KEYS:
        return "takes q, k, v, a and b of one dtype, bfloat16 or float32"
    if q.shape[3] > MOST_KEYS[v.dtype]:
        return f"takes {v.dtype} keys of at most {MOST_KEYS[v.dtype]} channels"
    if v.shape[3] > 256:
        return "takes values of at most 256 channels"
    return None


def dplr(q, k, v, a, b, log_decay, state, segment_ids=None):
    """Arguments as in `api.py`, decay `[B,T,H,K or 1]`. Channels are padded to multiples of 64."""
    log_decay = jnp.broadcast_to(log_decay, q.shape)
    return on_blocks(_dplr, (q, k, -a, b), v, log_decay, state, segment_ids)
