"""The definition: one gradient step on one token, and its scan."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens
from pallas_kernels.memory_update.memory import Memory, Rule, Weights, close_chunk


def read(weights: Weights, x: Array, rule: Rule) -> Array:
    """The inner network: `weights` of `[B,H,in,out]`, `x [B,H,K] -> [B,H,V]`."""
    y = jnp.einsum("bhi,bhio->bho", x, weights[0])
    for w in weights[1:]:
        y = jnp.einsum("bhi,bhio->bho", rule.activation(y), w)
    return x + y if rule.residual else y


def _clipped(gradient: Array, clip: float | None) -> Array:
    if clip is None:
        return gradient
    square = jnp.sum(gradient**2, (-2, -1), keepdims=True)
    return gradient * jax.lax.rsqrt(1 + square / clip**2)


def step(memory: Memory, q, k, v, rate, log_keep, log_momentum, *, rule: Rule):
    """One token: `q, k [B,H,K]`, `v [B,H,V]`, gates `[B,H]`. Returns `(memory, (y, surprise))`."""

    def surprise(weights):
        each = jnp.sum((read(weights, k, rule) - v) ** 2, -1)
        return jnp.sum(each), each

    gradient, each = jax.grad(surprise, has_aux=True)(memory.start)
    change = tuple(-rate[..., None, None] * _clipped(g, rule.clip) for g in gradient)
    if log_momentum is not None:
        stay = jnp.exp(log_momentum)[..., None, None]
        change = tuple(stay * m + c for m, c in zip(memory.momentum, change, strict=True))
        memory = replace(memory, momentum=change)
    keep = jnp.exp(log_keep)[..., None, None]
    weights = tuple(keep * w + c for w, c in zip(memory.weights, change, strict=True))
    out = read(weights, q, rule), each
    return close_chunk(replace(memory, weights=weights, phase=memory.phase + 1), rule.chunk), out


def memory_update(fresh, q, k, v, rate, log_keep, log_momentum, memory, segment_ids, rule):
    """Token by token; `fresh` is the memory at the start of a document, `memory` the carried one or None."""

    def body(state, inputs):
        gates = inputs if log_momentum is not None else (*inputs, None)
        return step(state, *gates, rule=rule)

    inputs = (q, k, v, rate, log_keep) + (() if log_momentum is None else (log_momentum,))
    return scan_tokens(body, fresh if memory is None else memory, inputs, segment_ids, fresh)
