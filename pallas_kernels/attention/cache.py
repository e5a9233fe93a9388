"""The state of attention: a ring buffer of the last `span` keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pallas_kernels.chunks import segment_starts

# A slot that holds nothing; far below any position, so every window excludes it.
EMPTY = -(2**30)


@struct.dataclass
class Cache:
    """Token at position p lives in slot p mod S. Positions count from the start of the document."""

    k: Array  # [B, S, G, K]
    v: Array  # [B, S, G, V]
    slots: Array  # [B, S] int32: position of the token in each slot, EMPTY where there is none
    length: Array  # [B] int32: position of the next token


def positions(length: Array, segment_ids: Array | None, steps: int) -> Array:
    """`[B, T]` position of each token in its document; the first segment continues at `length`."""
    time = jnp.arange(steps)
    if segment_ids is None:
        return length[:, None] + time
    starts = segment_starts(segment_ids)
    start = jax.lax.cummax(jnp.where(starts, time, 0), axis=1)
    in_first = jnp.cumsum(starts, 1) == 0
    return jnp.where(in_first, length[:, None] + time, time - start)


def write(cache: Cache, k: Array, v: Array, where: Array, real: Array) -> Cache:
    """Put tokens at positions `where [B,T]` into their slots; entries that are not `real` are dropped."""
    rows = jnp.arange(k.shape[0])[:, None]
    # An index past the end is dropped by the scatter.
    slot = jnp.where(real, where % cache.slots.shape[1], cache.slots.shape[1])
    return dataclasses.replace(
        cache,
        k=cache.k.at[rows, slot].set(k, mode="drop"),
        v=cache.v.at[rows, slot].set(v, mode="drop"),
        slots=cache.slots.at[rows, slot].set(where.astype(cache.slots.dtype), mode="drop"),
        length=(where[:, -1] + 1).astype(cache.length.dtype),
    )


def extend(cache: Cache, k: Array, v: Array, where: Array, segment_ids: Array | None) -> Cache:
    """The cache after tokens at positions `where [B,T]`: it keeps the last document only."""
    # Of the new tokens only the last S can stay, and then no two share a slot.
    tail = slice(-min(k.shape[1], cache.slots.shape[1]), None)
    real = jnp.ones(where[:, tail].shape, bool)
    if segment_ids is not None:
        kept = segment_ids[:, :1] == segment_ids[:, -1:]
        cache = dataclasses.replace(cache, slots=jnp.where(kept, cache.slots, EMPTY))
        real = segment_ids[:, tail] == segment_ids[:, -1:]
    return write(cache, k[:, tail], v[:, tail], where[:, tail], real)
