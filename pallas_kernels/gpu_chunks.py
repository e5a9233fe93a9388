"""Linear attention over chunks of 64 tokens as a Hopper kernel: the recurrence behind its gradients, too.

    o_i = q_i^T S + sum_{j <= i} (q_i . k_j) e^{G_i - G_j} v_j
    S'  = e^{G_C} S + sum_j k_j e^{G_C - G_j} v_j^T

and the same from right to left, where j >= i and the exponent is G_j - G_i. With decay per head, out and do
for o and its cotangent: dq is this recurrence of (do, v, k), dv that of (k, q, do) from the right and dk that
of (v, do, q) from the right, states transposed. One kernel serves all four.

A block takes a sample, a head and 64 columns of v and goes through the chunks with its columns of the state
in registers, while the next chunk is on its way. It reads q, k and v and writes o: nothing else but a state
per span of chunks leaves the chip. Where samples times heads times columns leave the GPU idle, time is cut
into spans: a first run finds what each adds to a zero state, and a second runs all of them from their true
ones.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu_chunk_kernel import Plan, run
from pallas_kernels.gpu_chunk_work import Form
from pallas_kernels.gpu_decay import ENDS
from pallas_kernels.gpu_math import BLOCK, F32
from pallas_kernels.gpu_stream import MULTIPROCESSORS

# Where the blocks of a run are fewer than multiprocessors, time is cut into spans, but into no more than
# MOST_SPANS and none under SHORTEST_SPAN chunks. Counted, not timed.
MOST_SPANS, SHORTEST_SPAN = 8, 4
# Channels of q and k for which a run's memory and registers suffice, by parts of an operand: as compiled for
# sm_90a, without spilling.
MOST_KEYS = {1: 256, 3: 64}


class Operands(NamedTuple):
    """What a run reads. Parts as in `gpu_math`; T a multiple of 64, n = T / 64 chunks."""

    query: tuple[Array, ...]  # [B,T,Hq,K] of all operands, heads of which divide H; () if no output is wanted
    key: tuple[Array, ...]  # [B,T,Hk,K]
    value: tuple[Array, ...]  # [B,T,Hv,V]
    total: Array | None = None  # [B,H,n,2,64] `running_sums` of log decay: decay per head
    keep: Array | None = None  # [B,H,n,K or V] what stays: decay per channel, folded into q and k
    pairs: tuple[Array, ...] = ()  # [B,H,T,64] scores, where they are not the products of q and k
    marks: Array | None = None  # [B,n,4,64] documents, of `marks_of`
    partner: tuple[Array, ...] = ()  # [B,T,Hp,V]: products of o with it are wanted, one per token
    # With decay per channel, a second key with values and scores: o and the state are sums over both.
    other_key: tuple[Array, ...] = ()
    other_value: tuple[Array, ...] = ()
    other_pairs: tuple[Array, ...] = ()


class Results(NamedTuple):
    out: Array | None  # [B,T,H,V]
    final: Array  # [B,H,K,V]
    kept: Array | None  # [B,H,blocks,K,V] the state that enters each block of KEPT_EVERY chunks
    dots: Array | None  # [B,H,T] o . partner


def spans_of(blocks: int, chunks: int) -> int:
    """Into how many spans `chunks` are cut, where a run of one span has so many blocks."""
    spans = 1
    while (
        blocks * spans < MULTIPROCESSORS
        and spans < MOST_SPANS
        and chunks % (2 * spans) == 0
        and chunks // (2 * spans) >= SHORTEST_SPAN
    ):
        spans *= 2
    return spans


def _span_keep(operands: Operands, plan: Plan, form: Form) -> Array:
    """What stays of a state through each span, `[B,H,spans,K or 1,V or 1]`."""

    def cut(x):
        return x.reshape(*x.shape[:2], plan.spans, -1, *x.shape[3:])

    if operands.keep is not None:
        keep = jnp.prod(cut(operands.keep), 3)
        return keep[..., None, :] if form.keep_columns else keep[..., None]
    assert operands.total is not None
    keep = jnp.exp(jnp.sum(cut(operands.total[..., -1]), (-2, -1)))
    if operands.marks is not None:
        ends = operands.marks[:, :, ENDS, :2].reshape(plan.batch, plan.spans, -1, 2)
        keep = jnp.where((ends[:, :, 0, 0] == ends[:, :, -1, 1])[:, None], keep, 0)
    return keep[..., None, None]


def _entering(operands: Operands, initial: Array, plan: Plan, form: Form) -> Array:
    """States at the beginnings of spans, `[B,H,spans,K,V]`; spans are numbered as they are walked."""
    if plan.spans == 1:
        return initial[:, :, None]
    unseen = operands._replace(query=(), pairs=(), partner=(), other_pairs=())
    added = run(unseen._asdict(), plan, form._replace(kept=False), "linear_attention_states")["final"]
    keep, states = _span_keep(operands, plan, form), [initial]
    keep = jnp.flip(keep, 2) if form.reverse else keep
    for span in range(plan.spans - 1):
        states.append(keep[:, :, span] * states[-1] + added[:, :, span])
    return jnp.stack(states, 2)


def attend(operands: Operands, initial: Array, form: Form) -> Results:
    """The recurrence from `initial [B,H,K,V]`, K and V multiples of 64. T is what `value` has."""
    keys, most = initial.shape[2], MOST_KEYS[len(operands.value)]
    if keys <= most:
        return _attend(operands, initial, form)
    parts = [
        _attend(_some_keys(operands, slice(at, at + most), form), initial[:, :, at : at + most], wide)
        for at, wide in ((at, form._replace(dtype=F32)) for at in range(0, keys, most))
    ]
    out, final, kept, dots = zip(*parts, strict=True)
    return Results(
        None if out[0] is None else sum(out).astype(form.dtype),
        jnp.concatenate(final, 2),
        jnp.concatenate(kept, 3) if form.kept else None,
        None if dots[0] is None else sum(dots),
    )


def _some_keys(operands: Operands, some: slice, form: Form) -> Operands:
    """A run over `some` channels of q and k: its o is one term of the whole. Scores go with the first."""
    keep = operands.keep
    return operands._replace(
        query=tuple(x[..., some] for x in operands.query),
        key=tuple(x[..., some] for x in operands.key),
        keep=keep if keep is None or form.keep_columns else keep[..., some],
        pairs=operands.pairs if some.start == 0 else (),
        other_key=tuple(x[..., some] for x in operands.other_key),
        other_pairs=operands.other_pairs if some.start == 0 else (),
    )


def _attend(operands: Operands, initial: Array, form: Form) -> Results:
    batch, heads, keys, values = initial.shape
    chunks = operands.value[0].shape[1] // BLOCK
    spans = spans_of(batch * heads * values // BLOCK, chunks)
    plan = Plan(batch, heads, chunks, keys, values, spans)
    entering = _entering(operands, initial.astype(F32), plan, form)
    results = run(operands._asdict() | {"initial": entering}, plan, form, "linear_attention")
    dots = results.get("dots")
    return Results(
        results.get("out"),
        results["final"][:, :, -1],
        results.get("kept"),
        None if dots is None else jnp.sum(dots, 0),
    )


def leaving(results: Results) -> Array:
    """The states that leave the blocks of KEPT_EVERY chunks, of a run from the left."""
    assert results.kept is not None
    return jnp.concatenate([results.kept[:, :, 1:], results.final[:, :, None]], 2)


def flipped(state: Array) -> Array:
    """`[B,H,K,V] -> [B,H,V,K]`"""
    return jnp.swapaxes(state, 2, 3)
