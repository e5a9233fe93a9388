"""The dual form: the weights after each token are never written out, unless reads are not linear in them.

While the gradients of a chunk are taken at its start weights W_c, the update is linear in them. Write
`x_u, d_u` for the input and the output gradient of an inner layer at key u, so that `grad_u = x_u d_u^T`,
and let W, S be weights and momentum where a run of tokens begins. With

    P[t,s] = prod_{s<j<=t} (1 - a_j),   E[t,s] = prod_{s<j<=t} e_j   (s <= t),   p, e the same from the start,
    R[t,u] = rate_t gain_u where 0 <= t - u < window, else 0,

    S_t = e_t S - sum_u M[t,u] x_u d_u^T,                        M = E R,
    W_t = p_t W + f_t S - sum_u G[t,u] x_u d_u^T,      f = P e,  G = P M,

and a query goes through the inner network layer by layer with

    h W_t = p_t (h W) + f_t (h S) - sum_u G[t,u] (h . x_u) d_u.

Where what is read is a nonlinear function of W_t (retention), or what is written one of S_t (orthogonal
steps), the same sums give the matrices of all tokens of a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import masked_exp
from pallas_kernels.memory_update.memory import (
    Memory,
    Rule,
    Tokens,
    Weights,
    affine,
    close_chunk,
    head,
)
from pallas_kernels.memory_update.reference import used
from pallas_kernels.orthogonal import orthogonalize
from pallas_kernels.phases import Group, last_tokens, scan_blocks


class Coefficients(NamedTuple):
    """How states and gradients enter the weights and the momentum; rows are the C tokens and the end."""

    keep: Array  # [B,H,C+1,1] of the weights that enter
    between: Array  # [B,H,C+1,C] of each token's write
    gradient: Array  # [B,H,C+1,U] of each gradient
    stay: Array | None  # [B,H,C+1,1] of the momentum that enters, in the momentum
    in_weights: Array | None  # [B,H,C+1,1] of the momentum that enters, in the weights
    momentum: Array  # [B,H,C+1,U] of each gradient, in the momentum (or in the write)


class Keys(NamedTuple):
    """What gradients are taken of: U tokens of the past and of the block."""

    k: Array  # [B,H,U,K]
    v: Array
    threshold: Array | None  # [B,H,U]


class Moving(NamedTuple):
    """How the momentum that enters goes on, where reads and writes are linear."""

    in_weights: Array  # [...,C,1]
    end_in_weights: Array  # [...,1,1]
    end_stay: Array  # [...,1,1]
    end_gradient: Array  # [...,U,1] of each gradient, in the momentum


class Linear(NamedTuple):
    """The coefficients where reads and writes are linear: for the tokens, and for the end."""

    keep: Array  # [...,C,1]
    gradient: Array  # [...,C,U]
    end_keep: Array  # [...,1,1]
    end_gradient: Array  # [...,U,1]
    moving: Moving | None


def linear(c: Coefficients) -> Linear:
    moving = None
    if c.stay is not None and c.in_weights is not None:
        end = c.in_weights[..., -1:, :], c.stay[..., -1:, :], c.momentum[..., -1, :, None]
        moving = Moving(c.in_weights[..., :-1, :], *end)
    tokens = c.keep[..., :-1, :], c.gradient[..., :-1, :]
    return Linear(*tokens, c.keep[..., -1:, :], c.gradient[..., -1, :, None], moving)


def _decays(log_gate: Array, pairs: Array) -> tuple[Array, Array]:
    """Products of a gate from the start of the run, `[B,H,C+1]`, and between tokens, `[B,H,C+1,C]`."""
    pairs = pairs[:, None]
    total = jnp.sum(jnp.where(pairs, log_gate[..., None, :], 0), -1)
    return jnp.exp(total), masked_exp(total[..., None] - total[..., None, :-1], pairs)


def _window_weights(memory: Memory, tokens: Tokens, group: Group, rule: Rule) -> Array:
    """gain_u in the window of t, `[B,H,C,U]`: the past first, then the block."""
    size, length = rule.window - 1, group.members.shape[1]
    age = jnp.arange(length)[:, None] - jnp.arange(length)
    near = group.pairs[:, :-1] & (age < rule.window)
    past = group.members[..., None] & (group.rank[..., None] + size - jnp.arange(size) < rule.window)
    own = jnp.ones_like(tokens.rate) if tokens.gain is None else tokens.gain
    gain = jnp.concatenate([jnp.swapaxes(memory.past[2], 1, 2), own], -1)
    return jnp.where(jnp.concatenate([past, near], -1)[:, None], gain[..., None, :], 0)


def coefficients(memory: Memory, tokens: Tokens, group: Group, rule: Rule) -> Coefficients:
    keep, between = _decays(tokens.log_keep, group.pairs)
    band = _window_weights(memory, tokens, group, rule) if rule.window > 1 else None

    def written(decays: Array) -> Array:
        """`decays R`."""
        decays = decays * tokens.rate[..., None, :]
        return decays if band is None else decays @ band

    if tokens.log_momentum is None:
        alone = group.pairs[:, None] * jnp.eye(group.pairs.shape[1], group.pairs.shape[2], dtype=keep.dtype)
        momentum = written(alone) if tokens.orthogonal is not None else between
        return Coefficients(keep[..., None], between, written(between), None, None, momentum)
    stay, momentum = _decays(tokens.log_momentum, group.pairs)
    momentum = written(momentum)
    return Coefficients(
        keep=keep[..., None],
        between=between,
        gradient=between @ momentum[..., :-1, :],
        stay=stay[..., None],
        in_weights=between @ stay[..., :-1, None],
        momentum=momentum,
    )


def _times(x: Array, w: Array) -> Array:
    return jnp.einsum("...ti,...io->...to", x, w)


def gradients(weights: Weights, keys: Keys, norm, rule: Rule) -> tuple[list, list, Array]:
    """Per inner layer its inputs x and output gradients d at the keys, and the loss `[B,H,U]`.

    The slope of the activation comes from forward mode, so that the whole can be differentiated again.
    """
    x, z = affine(keys.k, weights[0], _times)
    inputs, slopes = [x], []
    for w in weights[1:]:
        x, slope = jax.jvp(rule.activation, (z,), (jnp.ones_like(z),))
        x, z = affine(x, w, _times)
        inputs.append(x)
        slopes.append(slope)

    each, pull = jax.vjp(lambda z: rule.loss(head(z, keys.k, norm, rule) - keys.v, keys.threshold), z)
    (delta,) = pull(jnp.ones_like(each))
    deltas = [delta]
    for w, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
        w = w[..., : slope.shape[-1], :]  # without the bias
        deltas.insert(0, jnp.einsum("...to,...io->...ti", deltas[0], w) * slope)
    if rule.clip is not None:
        deltas = [_clipped(x, d, rule.clip) for x, d in zip(inputs, deltas, strict=True)]
    return inputs, deltas, each


def _clipped(x: Array, delta: Array, clip: float) -> Array:
    """`|x d^T| = |x| |d|` softly bounded by `clip`."""
    square = jnp.sum(x**2, -1, keepdims=True) * jnp.sum(delta**2, -1, keepdims=True)
    return delta * jax.lax.rsqrt(1 + square / clip**2)


class Layer(NamedTuple):
    """One inner layer: what it starts from, and its gradients `x_u d_u^T`."""

    start: Array
    weights: Array
    momentum: Array | None
    x: Array
    delta: Array


def linear_read(hidden: Array, layer: Layer, c: Linear, read_scale: Array | None):
    """`(h W_t, W_end, S_end)` without the W_t."""
    scores = c.gradient * jnp.einsum("...ti,...ui->...tu", hidden, layer.x)
    z = c.keep * _times(hidden, layer.weights) - _times(scores, layer.delta)
    end = c.end_keep * layer.weights - _outer(layer, c.end_gradient)
    momentum = None
    if layer.momentum is not None and c.moving is not None:
        m = c.moving
        z = z + m.in_weights * _times(hidden, layer.momentum)
        end = end + m.end_in_weights * layer.momentum
        momentum = m.end_stay * layer.momentum - _outer(layer, m.end_gradient)
    if read_scale is not None:
        before = _times(hidden, layer.start)
        z = before + read_scale[..., None] * (z - before)
    return z, end, momentum


def _written_out(hidden: Array, layer: Layer, c: Coefficients, orthogonal: Array | None, rule: Rule):
    """The same by way of the W_t."""
    momentum = None
    if orthogonal is None and layer.momentum is None:
        every = _every(c.keep, layer.weights) - _outers(layer, c.gradient)
    else:
        every_s = -_outers(layer, c.momentum)
        if layer.momentum is not None and c.stay is not None:
            every_s = every_s + _every(c.stay, layer.momentum)
            momentum = every_s[:, :, -1]
        write = every_s[:, :, :-1]
        if orthogonal is not None:
            write = orthogonal[..., None, None] * orthogonalize(write, rule.newton_schulz, rule.floor)
        every = _every(c.keep, layer.weights) + jnp.einsum("bhts,bhsio->bhtio", c.between, write)
    reads = every[:, :, :-1]
    z = jnp.einsum("bhti,bhtio->bhto", hidden, reads if rule.retention is None else rule.retention(reads))
    return z, every[:, :, -1], momentum


def _every(coefficient: Array, w: Array) -> Array:
    return coefficient[..., None] * w[:, :, None]


def _outer(layer: Layer, coefficient: Array) -> Array:
    return jnp.einsum("...ui,...uo->...io", layer.x * coefficient, layer.delta)


def _outers(layer: Layer, coefficient: Array) -> Array:
    each = layer.x[..., :, None] * layer.delta[..., None, :]
    return jnp.einsum("bhtu,bhuio->bhtio", coefficient, each)


def _keys(memory: Memory, tokens: Tokens, rule: Rule) -> Keys:
    if rule.window == 1:
        return Keys(tokens.k, tokens.v, tokens.threshold)
    k, v = (jnp.swapaxes(x, 1, 2) for x in memory.past[:2])
    return Keys(jnp.concatenate([k, tokens.k], 2), jnp.concatenate([v, tokens.v], 2), None)


def advance(memory: Memory, tokens: Tokens, group: Group, *, norm, rule: Rule):
    """All tokens of one group: `(memory, (y, surprise))`."""
    raw, length = tokens, tokens.q.shape[1]
    tokens = tokens.map(lambda x: jnp.swapaxes(x, 1, 2))
    if norm is not None:
        norm = tuple(x[:, None] for x in norm)
    c = coefficients(memory, tokens, group, rule)
    inputs, deltas, surprise = gradients(used(memory.start, rule), _keys(memory, tokens, rule), norm, rule)
    z, weights, momentum = tokens.q, [], []
    for i, (start, w, x, delta) in enumerate(zip(memory.start, memory.weights, inputs, deltas, strict=True)):
        layer = Layer(start, w, memory.momentum[i] if memory.momentum else None, x, delta)
        hidden, _ = affine(rule.activation(z) if i else z, w, lambda x, w: x)
        if rule.retention is None and tokens.orthogonal is None:
            z, end, s = linear_read(hidden, layer, linear(c), tokens.read_scale)
        else:
            z, end, s = _written_out(hidden, layer, c, tokens.orthogonal, rule)
        weights.append(end)
        momentum += [] if s is None else [s]
    past: Weights = ()
    if rule.window > 1:
        streams = jax.tree.leaves((raw.k, raw.v, raw.gain))
        past = tuple(last_tokens(p, x, group) for p, x in zip(memory.past, streams, strict=True))
    phase = memory.phase + group.total
    memory = Memory(memory.start, tuple(weights), tuple(momentum), phase, past)
    y = jnp.swapaxes(head(z, tokens.q, norm, rule), 1, 2)
    scale = (
        None if raw.read_scale is None else last_tokens(raw.read_scale[:, :1], raw.read_scale, group)[:, 0]
    )
    surprise = jnp.swapaxes(surprise[..., -length:], 1, 2)
    return close_chunk(memory, rule.chunk, scale), (y, surprise)


def memory_update(fresh, tokens: Tokens, norm, memory, segment_ids, rule: Rule):
    """Block by block; `fresh` is the memory at the start of a document, `memory` the carried one or None."""
    body = partial(advance, norm=norm, rule=rule)
    return scan_blocks(body, fresh, memory, tokens, segment_ids, rule.chunk)
