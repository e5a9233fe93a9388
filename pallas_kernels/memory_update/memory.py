"""What both implementations are told (the rule) and what they carry (the memory)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

Weights = tuple[Array, ...]  # one [B, H, in, out] per layer of the inner network


@dataclass(frozen=True)
class Rule:
    """The static part of the update."""

    chunk: int  # tokens that share the weights their gradients are taken at
    activation: Callable[[Array], Array]  # between the inner layers
    residual: bool  # the inner network is x + MLP(x)
    clip: float | None  # soft bound on the norm of one token's gradient, per layer


@struct.dataclass
class Memory:
    """The inner network of every sequence and head, in the middle of a chunk."""

    start: Weights  # weights at the start of the chunk, where gradients are taken
    weights: Weights  # weights after the last token
    momentum: Weights  # empty without momentum
    phase: Array  # [B] int32: tokens of the chunk already seen, < chunk


def shift(memory: Memory, initial: Weights, sign: int) -> Memory:
    """Add (+1) or subtract (-1) the initial weights `[H, in, out]`."""

    def shifted(weights: Weights) -> Weights:
        return tuple(w + sign * w0 for w, w0 in zip(weights, initial, strict=True))

    return replace(memory, start=shifted(memory.start), weights=shifted(memory.weights))


def select(rows: Array, yes: Memory, no: Memory) -> Memory:
    """`yes` where `rows [B]`, else `no`."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


def close_chunk(memory: Memory, chunk: int) -> Memory:
    """Where the chunk is full, the next one starts from the present weights."""
    full = memory.phase == chunk
    return select(full, replace(memory, start=memory.weights, phase=jnp.zeros_like(memory.phase)), memory)
