"""Chunks that belong to the document, worked on in blocks that need not start where they do.

Some layers change their rule at the end of every chunk of C tokens, counted from the start of the document:
the grid is part of the maths and survives any cut of the sequence. A block of at most C tokens then holds
tokens of the chunk it was entered in, tokens of the next one if that one fills up, and tokens of documents
that begin here. Each kind is one pass over the block with the others masked; passes that have no token in
any row are skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, join_time, split_time

# Tokens worked on at once, where chunks are not shorter.
BLOCK = 64


class Group(NamedTuple):
    """The tokens of a block that are worked on in one pass; stacked over passes, in order."""

    members: Array  # [B,C]
    pairs: Array  # [B,C+1,C] whom each token sees and, in the last row, who reaches the end
    begins: Array  # [] starts from the memory of a new document, not from the present one

    @property
    def reaches(self) -> Array:
        """`[B,C]`: tokens of the document, and of the chunk, that the memory stands in afterwards."""
        return self.pairs[..., -1, :]

    @property
    def total(self) -> Array:
        """`[B]` int32: how many reach the end."""
        return jnp.sum(self.reaches, -1, dtype=jnp.int32)

    @property
    def rank(self) -> Array:
        """`[B,C]` int32: how many tokens of its pass and document came before each token."""
        return jnp.sum(self.pairs[:, :-1], -1, dtype=jnp.int32) - 1


def select(rows: Array, yes, no):
    """`yes` where `rows [B]`, else `no`; pytrees of `[B, ...]`."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


def last_tokens(past: Array, tokens: Array, group: Group) -> Array:
    """The last w of `past [B,w,...]` followed by the tokens `[B,C,...]` that reach the end."""
    first = jnp.argmax(group.reaches, 1)[:, None]
    place = group.total[:, None] + jnp.arange(past.shape[1])
    place = jnp.where(place < past.shape[1], place, place + first)
    place = place.reshape(*place.shape, *[1] * (past.ndim - 2))
    return jnp.take_along_axis(jnp.concatenate([past, tokens], 1), place, 1)


def _pairs(members: Array, run: Array | None = None) -> Array:
    """`[B,C+1,C]` from `members [B,C]`; with `run [B,C]` tokens see their own document only."""
    causal = jnp.tril(jnp.ones((members.shape[1],) * 2, bool))
    sees = causal & members[:, :, None] & members[:, None, :]
    reaches = members
    if run is not None:
        sees = sees & (run[:, :, None] == run[:, None, :])
        reaches = members & (run == run[:, -1:])
    return jnp.concatenate([sees, reaches[:, None]], 1)


def _groups(real: Array, run: Array | None, carry_run: Array | None, room: Array) -> Group:
    """`real [B,C]`: not padding; `room [B]`: tokens left in the chunk that the block is entered in."""
    continuing = real if run is None or carry_run is None else real & (run == carry_run[:, None])
    in_chunk = jnp.arange(real.shape[1]) < room[:, None]
    members = [continuing & in_chunk, continuing & ~in_chunk]
    pairs = [_pairs(m) for m in members]
    if run is not None:
        members.append(real & ~continuing)
        pairs.append(_pairs(members[-1], run))
    return Group(jnp.stack(members), jnp.stack(pairs), jnp.arange(len(members)) == 2)


def _visit(result, group: Group, advance: Callable, fresh: Any, tokens: Any):
    """Advance one group, if it has any token, and merge it into `result`: memory, outputs."""

    def visit(result):
        memory, out = result
        source = jax.tree.map(lambda a, b: jnp.where(group.begins, a, b), fresh, memory)
        new, new_out = advance(source, tokens, group)
        here = group.members.reshape(-1, *group.members.shape[1:])

        def merge(a, b):
            return jnp.where(here.reshape(*here.shape, *[1] * (a.ndim - 2)), a, b)

        return select(jnp.any(group.reaches, -1), new, memory), jax.tree.map(merge, new_out, out)

    return jax.lax.cond(jnp.any(group.members), visit, lambda result: result, result), None


def _block(carry, inputs, advance: Callable, fresh: Any, chunk: int, aligned: bool):
    """One block. `aligned`: every block is entered where no chunk ends, and there is one document."""
    (memory, carry_run), (tokens, run, real) = carry, inputs
    if aligned:
        real = jnp.broadcast_to(real, (memory.phase.shape[0], real.shape[1]))
        memory, out = advance(memory, tokens, Group(real, _pairs(real), jnp.zeros((), bool)))
        return (memory, carry_run), out
    groups = _groups(real, run, carry_run, chunk - memory.phase)
    out = jax.eval_shape(lambda g: advance(memory, tokens, g)[1], jax.tree.map(lambda g: g[0], groups))
    out = jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), out)
    visit = partial(_visit, advance=advance, fresh=fresh, tokens=tokens)
    (memory, out), _ = jax.lax.scan(visit, (memory, out), groups)
    return (memory, carry_run if run is None else run[:, -1]), out


def scan_blocks(
    advance: Callable,
    fresh: Any,
    memory: Any | None,
    tokens: Any,
    segment_ids: Array | None,
    chunk: int,
    largest: int = BLOCK,
):
    """`advance(memory, tokens, group) -> (memory, outputs)` over `[B, T, ...]` tokens, block by block.

    `fresh` is the memory at the start of a document, `memory` the carried one or None; both have a field
    `phase [B]`, the tokens of the chunk already seen, which `advance` sets to 0 when the chunk is full. It
    gets tokens and gives outputs `[B, C, ...]`. Returns `(outputs [B, T, ...], memory)`.
    """
    length = jax.tree.leaves(tokens)[0].shape[1]
    block = chunk_length(length, min(chunk, largest))
    real = split_time(jnp.ones((1, length), bool), block)
    run = carry_run = None
    if segment_ids is not None:
        run, carry_run = split_time(segment_ids, block, edge=True), segment_ids[:, 0]
    aligned = memory is None and segment_ids is None and (chunk % block == 0 or length <= block)
    body = jax.checkpoint(partial(_block, advance=advance, fresh=fresh, chunk=chunk, aligned=aligned))
    carry = (fresh if memory is None else memory, carry_run)
    blocks = jax.tree.map(lambda x: split_time(x, block), tokens)
    (memory, _), out = jax.lax.scan(body, carry, (blocks, run, real))
    return jax.tree.map(lambda x: join_time(x, length), out), memory


class Plan(NamedTuple):
    """What `scan_blocks` would do, known before the tokens are: passes over n blocks."""

    groups: Group  # [n,passes,B,...]
    full: Array  # [n,passes,B] the chunk of the document that reaches the end of the block is full there
    phase: Array  # [B] int32 after the last block


def plan(
    length: int, block: int, chunk: int, batch: int, phase: Array | None, segment_ids: Array | None
) -> Plan:
    """For blocks of `block <= chunk` tokens, from a carried `phase [B]` or a document's start (None).

    One pass a block where no chunk ends inside of one and there is one document, else two, or three with
    documents: the same passes in the same order as in `scan_blocks`.
    """
    real = jnp.broadcast_to(
        split_time(jnp.ones((1, length), bool), block), (-(-length // block), batch, block)
    )
    run = None if segment_ids is None else split_time(segment_ids, block, edge=True)
    aligned = phase is None and run is None and (chunk % block == 0 or length <= block)

    def body(carry, inputs):
        (phase, carry_run), (run, real) = carry, inputs
        if aligned:
            groups = Group(real[None], _pairs(real)[None], jnp.zeros(1, bool))
        else:
            groups = _groups(real, run, carry_run, chunk - phase)
        phase, full = jax.lax.scan(partial(_advance_phase, chunk=chunk), phase, groups)
        return (phase, None if run is None else run[:, -1]), (groups, full)

    first = jnp.zeros(batch, jnp.int32) if phase is None else phase
    carry = first, None if segment_ids is None else segment_ids[:, 0]
    (last, _), (groups, full) = jax.lax.scan(body, carry, (run, real))
    return Plan(groups, full, last)


def _advance_phase(phase: Array, group: Group, *, chunk: int) -> tuple[Array, Array]:
    """The phase after a group, and whether the chunk is full there."""
    after = jnp.where(group.begins, 0, phase) + group.total
    full = after == chunk
    return jnp.where(jnp.any(group.reaches, -1), jnp.where(full, 0, after), phase), full
