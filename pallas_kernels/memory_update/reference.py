"""The definition: one gradient step on one token, and its scan."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens
from pallas_kernels.memory_update.memory import (
    Memory,
    Rule,
    Tokens,
    Weights,
    affine,
    close_chunk,
    head,
    scaled,
)
from pallas_kernels.orthogonal import orthogonalize


def used(weights: Weights, rule: Rule) -> Weights:
    return weights if rule.retention is None else tuple(rule.retention(w) for w in weights)


def read(weights: Weights, x: Array, norm, rule: Rule) -> Array:
    """The inner network: `weights` of `[B,H,in,out]`, `x [B,H,K] -> [B,H,V]`."""
    y = x
    for i, w in enumerate(weights):
        y = affine(rule.activation(y) if i else y, w, partial(jnp.einsum, "bhi,bhio->bho"))[1]
    return head(y, x, norm, rule)


def _clipped(gradient: Array, clip: float | None) -> Array:
    if clip is None:
        return gradient
    square = jnp.sum(gradient**2, (-2, -1), keepdims=True)
    return gradient * jax.lax.rsqrt(1 + square / clip**2)


def _gradient(weights: Weights, k: Array, v: Array, gain, threshold, norm, rule: Rule):
    """Of one token's loss, clipped and times its gain; and the loss `[B,H]`."""

    def surprise(weights):
        each = rule.loss(read(weights, k, norm, rule) - v, threshold)
        return jnp.sum(each), each

    gradient, each = jax.grad(surprise, has_aux=True)(weights)
    size = jnp.ones_like(each) if gain is None else gain
    return tuple(size[..., None, None] * _clipped(g, rule.clip) for g in gradient), each


def _windowed(memory: Memory, token: Tokens, gradient: Weights, norm, rule: Rule) -> tuple[Weights, Memory]:
    """The sum of the window's gradients at the start weights, and the memory with this token in it."""
    k, v, gain = memory.past
    at = partial(_gradient, used(memory.start, rule), threshold=None, norm=norm, rule=rule)
    older, _ = jax.vmap(lambda k, v, gain: at(k, v, gain), in_axes=1)(k, v, gain)
    total = tuple(jnp.sum(o, 0) + g for o, g in zip(older, gradient, strict=True))
    new = jax.tree.leaves((token.k, token.v, token.gain))
    past = tuple(jnp.concatenate([p, x[:, None]], 1)[:, 1:] for p, x in zip(memory.past, new, strict=True))
    return total, replace(memory, past=past)


def step(memory: Memory, token: Tokens, *, norm, rule: Rule):
    """One token: `q, k [B,H,K]`, `v [B,H,V]`, gates `[B,H]`. Returns `(memory, (y, surprise))`."""
    start = used(memory.start, rule)
    gradient, each = _gradient(start, token.k, token.v, token.gain, token.threshold, norm, rule)
    if rule.window > 1:
        gradient, memory = _windowed(memory, token, gradient, norm, rule)
    change = tuple(-token.rate[..., None, None] * g for g in gradient)
    if token.log_momentum is not None:
        stay = jnp.exp(token.log_momentum)[..., None, None]
        change = tuple(stay * m + c for m, c in zip(memory.momentum, change, strict=True))
        memory = replace(memory, momentum=change)
    if token.orthogonal is not None:
        size = token.orthogonal[..., None, None]
        change = tuple(size * orthogonalize(c, rule.newton_schulz, rule.floor) for c in change)
    keep = jnp.exp(token.log_keep)[..., None, None]
    weights = tuple(keep * w + c for w, c in zip(memory.weights, change, strict=True))
    y = read(used(scaled(memory.start, weights, token.read_scale), rule), token.q, norm, rule)
    memory = replace(memory, weights=weights, phase=memory.phase + 1)
    return close_chunk(memory, rule.chunk, token.read_scale), (y, each)


def memory_update(fresh, tokens: Tokens, norm, memory, segment_ids, rule: Rule):
    """Token by token; `fresh` is the memory at the start of a document, `memory` the carried one or None."""
    body = partial(step, norm=norm, rule=rule)
    return scan_tokens(body, fresh if memory is None else memory, tokens, segment_ids, fresh)
