"""The dual form: the weights after each token are never written out.

While the gradients of a chunk are taken at its start weights W_c, the update is linear in them. Write
`x_u, d_u` for the input and the output gradient of an inner layer at key u, so that `grad_u = x_u d_u^T`,
and let W, S be weights and momentum where a run of tokens begins. With

    P[t,s] = prod_{s<j<=t} (1 - a_j),   E[t,s] = prod_{s<j<=t} e_j   (s <= t),   p, e the same from the start,

    W_t = p_t W + f_t S - sum_u G[t,u] x_u d_u^T,      G = P E diag(r),   f = P e,
    S_t = e_t S - sum_u E[t,u] r_u x_u d_u^T,

and a query goes through the inner network layer by layer with

    h W_t = p_t (h W) + f_t (h S) - sum_u G[t,u] (h . x_u) d_u.

Time is cut into blocks no longer than a chunk. The chunks of a document need not start where blocks do:
a block holds tokens of the chunk it was entered in, tokens of the next one if that one fills up, and tokens
of documents that begin here. Each kind is one pass over the block with the others masked; passes that
have no token in any row are skipped.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import (
    chunk_length,
    join_time,
    masked_exp,
    split_time,
)
from pallas_kernels.memory_update.memory import Memory, Rule, Weights, close_chunk, select


class Tokens(NamedTuple):
    """One block, heads first: `q, k, v [B,H,C,.]`, gates `[B,H,C]`."""

    q: Array
    k: Array
    v: Array
    rate: Array
    log_keep: Array
    log_momentum: Array | None


class MomentumCoefficients(NamedTuple):
    in_weights: Array  # [B,H,C+1,1] of the momentum that enters, in the weights
    keep: Array  # [B,H,1,1] of the momentum that enters, in the momentum at the end
    gradient: Array  # [B,H,C] of each gradient, in the momentum at the end


class Coefficients(NamedTuple):
    """How states and gradients enter the weights; rows are the C tokens and the end of the run."""

    keep: Array  # [B,H,C+1,1] of the weights that enter
    gradient: Array  # [B,H,C+1,C] of each gradient
    momentum: MomentumCoefficients | None


def _decays(log_gate: Array, pairs: Array) -> tuple[Array, Array]:
    """Products of a gate from the start of the run, `[B,H,C+1]`, and between tokens, `[B,H,C+1,C]`."""
    pairs = pairs[:, None]
    total = jnp.sum(jnp.where(pairs, log_gate[..., None, :], 0), -1)
    return jnp.exp(total), masked_exp(total[..., None] - total[..., None, :-1], pairs)


def _coefficients(tokens: Tokens, pairs: Array) -> Coefficients:
    keep, between = _decays(tokens.log_keep, pairs)
    rate = tokens.rate[..., None, :]
    if tokens.log_momentum is None:
        return Coefficients(keep[..., None], between * rate, None)
    stay, momentum = _decays(tokens.log_momentum, pairs)
    momentum = momentum * rate
    return Coefficients(
        keep=keep[..., None],
        gradient=jnp.einsum("bhts,bhsu->bhtu", between, momentum[..., :-1, :]),
        momentum=MomentumCoefficients(
            in_weights=jnp.sum(between * stay[..., None, :-1], -1, keepdims=True),
            keep=stay[..., -1:, None],
            gradient=momentum[..., -1, :],
        ),
    )


def _times(x: Array, w: Array) -> Array:
    return jnp.einsum("bhti,bhio->bhto", x, w)


def _gradients(weights: Weights, k: Array, v: Array, rule: Rule) -> tuple[list, list, Array]:
    """Per inner layer its inputs x and output gradients d at the keys, and the loss `[B,H,C]`.

    The slope of the activation comes from forward mode, so that the whole can be differentiated again.
    """
    inputs, slopes = [k], []
    for w in weights[:-1]:
        z = _times(inputs[-1], w)
        x, slope = jax.jvp(rule.activation, (z,), (jnp.ones_like(z),))
        inputs.append(x)
        slopes.append(slope)
    error = _times(inputs[-1], weights[-1]) + (k if rule.residual else 0) - v
    deltas = [2 * error]
    for w, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
        deltas.insert(0, jnp.einsum("bhto,bhio->bhti", deltas[0], w) * slope)
    if rule.clip is not None:
        deltas = [_clipped(x, d, rule.clip) for x, d in zip(inputs, deltas, strict=True)]
    return inputs, deltas, jnp.sum(error**2, -1)


def _clipped(x: Array, delta: Array, clip: float) -> Array:
    """`|x d^T| = |x| |d|` softly bounded by `clip`."""
    square = jnp.sum(x**2, -1, keepdims=True) * jnp.sum(delta**2, -1, keepdims=True)
    return delta * jax.lax.rsqrt(1 + square / clip**2)


def _advance(memory: Memory, tokens: Tokens, pairs: Array, rule: Rule) -> tuple[Memory, Array, Array]:
    """All tokens of one run; `pairs [B,C+1,C]` says which token sees which, its last row who is written."""
    c = _coefficients(tokens, pairs)
    inputs, deltas, surprise = _gradients(memory.start, tokens.k, tokens.v, rule)
    last = len(deltas) - 1
    hidden, weights, momentum = tokens.q, [], []
    for i, (w, x, delta) in enumerate(zip(memory.weights, inputs, deltas, strict=True)):
        scores = c.gradient[..., :-1, :] * jnp.einsum("bhti,bhui->bhtu", hidden, x)
        z = c.keep[..., :-1, :] * _times(hidden, w) - _times(scores, delta)
        new = c.keep[..., -1:, :] * w - _outer(x, c.gradient[..., -1, :], delta)
        if c.momentum is not None:
            s = memory.momentum[i]
            z = z + c.momentum.in_weights[..., :-1, :] * _times(hidden, s)
            new = new + c.momentum.in_weights[..., -1:, :] * s
            momentum.append(c.momentum.keep * s - _outer(x, c.momentum.gradient, delta))
        weights.append(new)
        hidden = z if i == last else rule.activation(z)
    phase = memory.phase + jnp.sum(pairs[:, -1], -1, dtype=memory.phase.dtype)
    memory = Memory(memory.start, tuple(weights), tuple(momentum), phase)
    out = tokens.q + hidden if rule.residual else hidden
    return close_chunk(memory, rule.chunk), out, surprise


def _outer(x: Array, coefficient: Array, delta: Array) -> Array:
    return jnp.einsum("bhui,bhuo->bhio", x * coefficient[..., None], delta)


def _pairs(members: Array, run: Array | None = None) -> Array:
    """`[B,C+1,C]` from `members [B,C]`: whom each token sees and, in the last row, who reaches the end.

    With `run [B,C]` tokens see their own document only, and the end is that of the last one.
    """
    causal = jnp.tril(jnp.ones((members.shape[1],) * 2, bool))
    sees = causal & members[:, :, None] & members[:, None, :]
    reaches = members
    if run is not None:
        sees = sees & (run[:, :, None] == run[:, None, :])
        reaches = members & (run == run[:, -1:])
    return jnp.concatenate([sees, reaches[:, None]], 1)


class Groups(NamedTuple):
    """The tokens of a block by the weights their gradients are taken at; G groups, in order."""

    members: Array  # [G,B,C]
    pairs: Array  # [G,B,C+1,C]
    begins: Array  # [G] starts from the memory of a new document, not from the present one


def _groups(real: Array, run: Array | None, carry_run: Array | None, room: Array) -> Groups:
    """`real [B,C]`: not padding; `room [B]`: tokens left in the chunk that the block is entered in."""
    continuing = real if run is None or carry_run is None else real & (run == carry_run[:, None])
    in_chunk = jnp.arange(real.shape[1]) < room[:, None]
    members = [continuing & in_chunk, continuing & ~in_chunk]
    pairs = [_pairs(m) for m in members]
    if run is not None:
        members.append(real & ~continuing)
        pairs.append(_pairs(members[-1], run))
    return Groups(jnp.stack(members), jnp.stack(pairs), jnp.arange(len(members)) == 2)


def _visit(result, group: Groups, fresh: Memory, tokens: Tokens, rule: Rule):
    """Advance one group, if it has any token, and merge it into `result`: memory, y, surprise."""

    def advance(result):
        memory, out, surprise = result
        source = jax.tree.map(lambda a, b: jnp.where(group.begins, a, b), fresh, memory)
        new, new_out, new_surprise = _advance(source, tokens, group.pairs, rule)
        here = group.members[:, None, :]
        return (
            select(jnp.any(group.pairs[:, -1], -1), new, memory),
            jnp.where(here[..., None], new_out, out),
            jnp.where(here, new_surprise, surprise),
        )

    return jax.lax.cond(jnp.any(group.members), advance, lambda result: result, result), None


def _block(carry, inputs, fresh: Memory, aligned: bool, rule: Rule):
    """One block. `aligned`: every block is entered at the start of a chunk, and there is one document."""
    (memory, carry_run), (tokens, run, real) = carry, inputs
    if aligned:
        memory, out, surprise = _advance(memory, tokens, _pairs(real), rule)
        return (memory, carry_run), (out, surprise)
    groups = _groups(real, run, carry_run, rule.chunk - memory.phase)
    empty = (jnp.zeros_like(tokens.v), jnp.zeros_like(tokens.rate))
    visit = partial(_visit, fresh=fresh, tokens=tokens, rule=rule)
    (memory, out, surprise), _ = jax.lax.scan(visit, (memory, *empty), groups)
    return (memory, carry_run if run is None else run[:, -1]), (out, surprise)


def memory_update(fresh, q, k, v, rate, log_keep, log_momentum, memory, segment_ids, rule):
    """Block by block; `fresh` is the memory at the start of a document, `memory` the carried one or None."""
    length = q.shape[1]
    block = chunk_length(length, rule.chunk)

    def cut(x):
        return None if x is None else jnp.swapaxes(split_time(x, block), 2, 3)

    tokens = Tokens(*(cut(x) for x in (q, k, v, rate, log_keep, log_momentum)))
    real = split_time(jnp.ones((1, length), bool), block)
    run = carry_run = None
    if segment_ids is not None:
        run, carry_run = split_time(segment_ids, block, edge=True), segment_ids[:, 0]
    aligned = memory is None and segment_ids is None
    body = jax.checkpoint(partial(_block, fresh=fresh, aligned=aligned, rule=rule))
    carry = (fresh if memory is None else memory, carry_run)
    (memory, _), (out, surprise) = jax.lax.scan(body, carry, (tokens, run, real))
    return tuple(join_time(jnp.swapaxes(x, 2, 3), length) for x in (out, surprise)), memory
