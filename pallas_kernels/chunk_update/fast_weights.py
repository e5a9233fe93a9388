"""The state, what closes a chunk, and the network."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pallas_kernels.orthogonal import VARIED, orthogonalize
from pallas_kernels.phases import select

Weights = tuple[Array, ...]  # gate and up [B,H,K,E], down [B,H,E,V]


@dataclass(frozen=True)
class Rule:
    """The static part of the update."""

    chunk: int
    orthogonal: bool  # singular values of every step near 1
    step_size: float  # of orthogonal steps
    normalize: bool  # every unit's incoming weights keep their initial norm


class Tokens(NamedTuple):
    """`q, k [B,T,H,K]`, `v [B,T,H,V]`, `rate [B,T,H,3]`, `momentum [B,T,H]` or None."""

    q: Array
    k: Array
    v: Array
    rate: Array
    momentum: Array | None

    def map(self, f: Callable[[Array], Array]) -> "Tokens":
        """`f` of every stream that is there."""
        return jax.tree.map(f, self)


@struct.dataclass
class FastWeights:
    """Weights of the present chunk, and what its tokens seen so far will make of them."""

    weights: Weights
    gradient: Weights  # sum over the chunk's tokens
    step: tuple[Array, ...]  # the last chunk's, before it was made orthogonal; empty without momentum
    momentum: tuple[Array, ...]  # ([B,H],), sum over the chunk's tokens; empty without momentum
    phase: Array  # [B] int32: tokens of the chunk already seen, < chunk


def shift(fast: FastWeights, initial: tuple, sign: int) -> FastWeights:
    """Add (+1) or subtract (-1) the initial weights `[H, in, out]`."""
    weights = tuple(w + sign * w0 for w, w0 in zip(fast.weights, initial, strict=True))
    return replace(fast, weights=weights)


def network(weights: Weights, x: Array) -> Array:
    """`(silu(x W_gate) * (x W_up)) W_down` for `x [B,H,T,K]`."""
    gate, up = (jnp.einsum("bhti,bhio->bhto", x, w) for w in weights[:2])
    return jnp.einsum("bhti,bhio->bhto", jax.nn.silu(gate) * up, weights[2])


def _norm(w: Array) -> Array:
    return jnp.sqrt(jnp.sum(w**2, -2, keepdims=True) + 1e-10)


def close_chunk(fast: FastWeights, fresh: FastWeights, rule: Rule) -> FastWeights:
    """Where the chunk is full, the weights move and the next one begins."""
    full = fast.phase == rule.chunk

    def closed(fast: FastWeights) -> FastWeights:
        move = fast.gradient
        if fast.momentum:
            echo = (fast.momentum[0] / rule.chunk)[..., None, None]
            move = tuple(g + echo * s for g, s in zip(move, fast.step, strict=True))
        kept = move if fast.momentum else ()
        if rule.orthogonal:
            move = tuple(rule.step_size * orthogonalize(m, VARIED) for m in move)
        weights = tuple(w + m for w, m in zip(fast.weights, move, strict=True))
        if rule.normalize:
            pairs = zip(weights, fresh.weights, strict=True)
            weights = tuple(w * (_norm(w0) / _norm(w)) for w, w0 in pairs)
        new = replace(fresh, weights=weights, step=kept)
        return select(full, new, fast)

    return jax.lax.cond(jnp.any(full), closed, lambda fast: fast, fast)
