"""The dual form of `xla.py` as a TPU kernel: the inner network stays on the chip from block to block.

What depends on gates and document boundaries alone, the coefficients, is made beforehand and streams in with
the tokens; the kernel does what needs the weights. Its backward pass reads the weights that entered each
block. All products are in float32 with Precision.HIGHEST, for bfloat16 streams too: a network is trained.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length
from pallas_kernels.memory_update.memory import Memory, Rule, affine, head
from pallas_kernels.memory_update.passes import passes
from pallas_kernels.memory_update.xla import Keys, Layer, Linear, gradients, linear_read
from pallas_kernels.tpu_chunks import cut, join, scan_chunks
from pallas_kernels.tpu_math import F32, column, row

# Tokens of a block, where chunks are not shorter: scores and coefficients grow with it, the states written
# out for the backward pass shrink. Compiled, not timed.
BLOCK = 64
# Numbers in the inner weights of one head: their start, end and momentum, of value and gradient, share VMEM.
LARGEST = 1 << 17


def _turned(c: Linear, turn: Callable[[Array], Array]) -> Linear:
    """`turn` of what is a column of C numbers: they travel as rows."""
    m = c.moving
    if m is not None:
        m = m._replace(in_weights=turn(m.in_weights), end_gradient=turn(m.end_gradient))
    return c._replace(keep=turn(c.keep), end_gradient=turn(c.end_gradient), moving=m)


def _advance(memory, q, k, v, c: Linear, norm, rule: Rule):
    """One pass over a block: `(weights, momentum, y, surprise)`."""
    start, weights, momentum = memory
    inputs, deltas, surprise = gradients(start, Keys(k, v, None), norm, rule)
    z, ends, moves = q, [], []
    for i, (w, x, delta) in enumerate(zip(weights, inputs, deltas, strict=True)):
        hidden, _ = affine(rule.activation(z) if i else z, w, lambda x, w: x)
        z, end, move = linear_read(
            hidden, Layer(start[i], w, momentum[i] if momentum else None, x, delta), c, None
        )
        ends.append(end)
        moves += [] if move is None else [move]
    return tuple(ends), tuple(moves), head(z, q, norm, rule), row(surprise[:, None])


def _select(flag, yes, no):
    """`yes` where `flag`, 0 or 1 in float32 and broadcast, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(flag, a.shape) > 0.5, a, b), yes, no)


def _chunk(state, tokens, shared, marks, rule: Rule):
    """`q, k [C,K]`, `v [C,V]` and coefficients for each pass; `state`: start, weights, momentum."""
    (q, k, v, passes), (initial, norm) = tokens, shared
    narrow = v.dtype
    q, k, v = (x.astype(F32) for x in (q, k, v))
    y, surprise = jnp.zeros_like(v), jnp.zeros_like(marks[0][0])
    with jax.default_matmul_precision("highest"):
        for number, (c, (members, reaches, full)) in enumerate(zip(passes, marks, strict=True)):
            # The third pass is over documents that begin in this block.
            empty = tuple(jnp.zeros_like(m) for m in state[2])
            source = (initial, initial, empty) if number == 2 else state
            weights, momentum, own_y, own_surprise = _advance(source, q, k, v, _turned(c, column), norm, rule)
            after = _select(full, weights, source[0]), weights, momentum
            state = _select(reaches, after, state)
            y, surprise = _select(column(members), own_y, y), _select(members, own_surprise, surprise)
    return state, (y.astype(narrow), surprise)


def _streams(c: Linear) -> tuple[Linear, ...]:
    """`[n,P,B,H,...]` to one of `[B,H,n,...]` per pass, columns as rows."""
    c = _turned(c, lambda x: jnp.swapaxes(x, -1, -2))
    passes = c.keep.shape[1]
    return tuple(jax.tree.map(lambda x, p=p: jnp.moveaxis(x[:, p], 0, 2), c) for p in range(passes))


def _marks(steps) -> tuple:
    """Per pass: its tokens `[B,1,n,1,C]`, whether any reaches the end, whether the chunk is full then."""

    def mark(x):
        return jnp.moveaxis(x.astype(F32), 0, 1)[:, None, :, None]

    reaches = jnp.any(steps.groups.reaches, -1, keepdims=True)
    streams = steps.groups.members, reaches, steps.full[..., None]
    return tuple(tuple(mark(x[:, p]) for x in streams) for p in range(reaches.shape[1]))


def memory_update(fresh, tokens, norm, memory, segment_ids, rule: Rule):
    """Block by block; `fresh` is the memory at the start of a document, `memory` the carried one or None."""
    length = tokens.q.shape[1]
    block = chunk_length(length, min(rule.chunk, BLOCK), min(rule.chunk, 8))
    steps, c = passes(fresh, memory, tokens, segment_ids, rule, block)
    streams = (*(cut(x, block) for x in tokens[:3]), _streams(c))
    initial = tuple(w[0].astype(F32) for w in fresh.weights)
    shared = initial, None if norm is None else tuple(x[:, None].astype(F32) for x in norm)
    entering = fresh if memory is None else memory
    state = jax.tree.map(lambda w: w.astype(F32), (entering.start, entering.weights, entering.momentum))
    run = partial(_chunk, rule=rule)
    (y, surprise), (start, weights, momentum) = scan_chunks(
        run, "memory_update", state, streams, shared, _marks(steps)
    )
    surprise = join(jnp.swapaxes(surprise, 3, 4), length)[..., 0]
    return (join(y, length), surprise), Memory(start, weights, momentum, steps.phase)


def refusal(fresh, tokens, norm, memory, segment_ids, rule: Rule) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if rule.retention is not None or rule.window > 1:
        return "takes linear retention and window=1 only"
    for name in ("read_scale", "threshold", "orthogonal"):
        if getattr(tokens, name) is not None:
            return f"takes no {name}"
    size = sum(w.shape[-2] * w.shape[-1] for w in fresh.weights)
    return None if size <= LARGEST else f"takes inner weights of at most {LARGEST} numbers a head, not {size}"
