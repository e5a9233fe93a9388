"""Blocks of tokens at once: the weights stand still within a chunk."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunk_update.fast_weights import (
    FastWeights,
    Rule,
    Tokens,
    Weights,
    close_chunk,
    network,
)
from pallas_kernels.phases import Group, scan_blocks


def _gradient(weights: Weights, k: Array, v: Array, rate: Array) -> Weights:
    """Sum over tokens of the gradient of `<f(k), v>`, each matrix with its own rate `[B,H,T,3]`."""
    a, up = (jnp.einsum("bhti,bhio->bhto", k, w) for w in weights[:2])
    gate, slope = jax.jvp(jax.nn.silu, (a,), (jnp.ones_like(a),))
    back = jnp.einsum("bhto,bhio->bhti", v, weights[2])

    def summed(x: Array, delta: Array, which: int) -> Array:
        return jnp.einsum("bhti,bhto->bhio", x * rate[..., which, None], delta)

    return summed(k, back * up * slope, 0), summed(k, back * gate, 1), summed(gate * up, v, 2)


def _advance(fast: FastWeights, tokens: Tokens, group: Group, *, fresh: FastWeights, rule: Rule):
    q, k, v, rate = (jnp.swapaxes(x, 1, 2) for x in tokens[:4])
    out = jnp.swapaxes(network(fast.weights, q), 1, 2)
    mask = group.reaches[:, None, :]
    new = _gradient(fast.weights, k, v, jnp.where(mask[..., None], rate, 0))
    momentum: Weights = ()
    if tokens.momentum is not None:
        momentum = (fast.momentum[0] + jnp.sum(jnp.where(group.reaches[..., None], tokens.momentum, 0), 1),)
    fast = replace(
        fast,
        gradient=tuple(old + g for old, g in zip(fast.gradient, new, strict=True)),
        momentum=momentum,
        phase=fast.phase + group.total,
    )
    return close_chunk(fast, fresh, rule), out


def chunk_update(fresh, tokens: Tokens, fast, segment_ids, rule: Rule):
    """Block by block; `fresh` is the state at the start of a document, `fast` the carried one or None."""
    body = partial(_advance, fresh=fresh, rule=rule)
    return scan_blocks(body, fresh, fast, tokens, segment_ids, rule.chunk)
