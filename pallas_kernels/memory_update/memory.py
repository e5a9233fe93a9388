"""What both implementations are told (the rule), what they are fed and what they carry (the memory)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pallas_kernels.phases import select

Weights = tuple[Array, ...]  # one [B, H, in, out] per layer of the inner network

# Gradients at the start of the document: a chunk that no document fills.
ENDLESS = 2**30


@dataclass(frozen=True)
class Rule:
    """The static part of the update."""

    chunk: int  # tokens that share the weights their gradients are taken at
    activation: Callable[[Array], Array]  # between the inner layers
    residual: bool  # the inner network is x + MLP(x)
    clip: float | None  # soft bound on the norm of one token's gradient, per layer
    loss: Callable  # of the error [..., V] and the threshold [...] or None: [...]
    retention: Callable | None  # weights that are used, of those that are accumulated; None: the same
    window: int  # gradients of the last tokens that enter each write
    norm_eps: float  # added to the variance in the network's LayerNorm
    newton_schulz: tuple[tuple[float, float, float], ...]  # coefficients of an orthogonal step
    floor: float  # of the norm that it divides by


def square(error: Array, threshold: Array | None) -> Array:
    """The loss of an error `[...,V]`, for `Rule.loss`."""
    return jnp.sum(error**2, -1)


class Tokens(NamedTuple):
    """The streams `[B,T,H,.]` and gates `[B,T,H]`; None where the rule has none."""

    q: Array
    k: Array
    v: Array
    rate: Array
    log_keep: Array
    log_momentum: Array | None = None
    read_scale: Array | None = None
    threshold: Array | None = None
    gain: Array | None = None
    orthogonal: Array | None = None

    def map(self, f: Callable[[Array], Array]) -> "Tokens":
        """`f` of every stream that is there."""
        return jax.tree.map(f, self)


@struct.dataclass
class Memory:
    """The inner network of every sequence and head, in the middle of a chunk."""

    start: Weights  # weights at the start of the chunk, where gradients are taken
    weights: Weights  # weights after the last token
    momentum: Weights  # empty without momentum
    phase: Array  # [B] int32: tokens of the chunk already seen, < chunk
    past: tuple[Array, ...] = ()  # k, v, gain of the last window - 1 tokens, [B, window - 1, H, ...]


def shift(memory: Memory, initial: Weights, sign: int) -> Memory:
    """Add (+1) or subtract (-1) the initial weights `[H, in, out]`."""

    def shifted(weights: Weights) -> Weights:
        return tuple(w + sign * w0 for w, w0 in zip(weights, initial, strict=True))

    return replace(memory, start=shifted(memory.start), weights=shifted(memory.weights))


def scaled(start: Weights, weights: Weights, scale: Array | None) -> Weights:
    """`start + scale (weights - start)`, `scale [B,H]`."""
    if scale is None:
        return weights
    r = scale[..., None, None]
    return tuple(s + r * (w - s) for s, w in zip(start, weights, strict=True))


def close_chunk(memory: Memory, chunk: int, scale: Array | None = None) -> Memory:
    """Where the chunk is full, the next one starts from the weights that were read last."""
    full = memory.phase == chunk
    weights = scaled(memory.start, memory.weights, scale)
    closed = replace(memory, start=weights, weights=weights, phase=jnp.zeros_like(memory.phase))
    return select(full, closed, memory)


def affine(x: Array, w: Array, times: Callable) -> tuple[Array, Array]:
    """`(x, x w)`, with a 1 appended to x where `w` has one row more than x columns: its bias."""
    if w.shape[-2] == x.shape[-1] + 1:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    return x, times(x, w)


def head(z: Array, x: Array, norm: tuple[Array, Array] | None, rule: Rule) -> Array:
    """What the network makes of its last layer's `z`: `[x +] [LayerNorm] z`; `norm` is broadcast."""
    if norm is not None:
        z = z - jnp.mean(z, -1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True) + rule.norm_eps) * norm[0] + norm[1]
    return x + z if rule.residual else z
