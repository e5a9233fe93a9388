"""Cutting time into chunks, and the segment bookkeeping that every chunkwise op shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of states and sums: float32, or float64 where an input has it."""
    return jnp.result_type(jnp.float32, *(a.dtype for a in arrays))


def chunk_length(length: int, largest: int, smallest: int = 1) -> int:
    """The chunk for `length` tokens: `largest` (a power of two), or less when the sequence is short."""
    return min(largest, max(smallest, 1 << (length - 1).bit_length()))


def split_time(x: Array, chunk: int, *, edge: bool = False) -> Array:
    """`[B, T, ...] -> [n, B, chunk, ...]`, the tail padded with zeros (or with its last entry)."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), mode="edge" if edge else "constant")
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def join_time(x: Array, length: int) -> Array:
    """Inverse of `split_time`: `[n, B, chunk, ...] -> [B, length, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def segment_starts(segment_ids: Array) -> Array:
    """`[B, T]` bool: true at the first token of each segment, but never at t = 0.

    The initial state belongs to the first token's segment, so t = 0 continues it.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def number_runs(segment_ids: Array | None) -> Array | None:
    """Ids that count the runs of equal ids: an id that comes again later is another segment.

    Inside the ops two tokens then share a segment exactly when their ids are equal.
    """
    return None if segment_ids is None else jnp.cumsum(segment_starts(segment_ids), 1, dtype=jnp.int32)


class ChunkSegments(NamedTuple):
    """Which pairs of one chunk may interact. Built by `chunk_segments` from ids `[B, C]`."""

    same: Array  # [B, C, C] tokens i and j belong to one segment
    from_carry: Array  # [B, C] token i belongs to the carried state's segment
    into_carry: Array  # [B, C] token j belongs to the last token's segment
    keep: Array  # [B] the carried state survives this chunk


def chunk_segments(ids: Array, carry_id: Array) -> ChunkSegments:
    """Masks for one chunk with segment `ids [B, C]`, entered by a state of segment `carry_id [B]`."""
    last = ids[:, -1:]
    return ChunkSegments(
        same=ids[:, :, None] == ids[:, None, :],
        from_carry=ids == carry_id[:, None],
        into_carry=ids == last,
        keep=last[:, 0] == carry_id,
    )


def masked_exp(x: Array, mask: Array) -> Array:
    """`exp(x)` where `mask`, else 0: masked inside the exponent, so that gradients stay finite."""
    return jnp.exp(jnp.where(mask, x, -jnp.inf))


def scan_tokens(step, state, inputs, segment_ids: Array | None = None, reset_state=None):
    """The definition of every op: `step(state, inputs_t) -> (state, output_t)` over `[B, T, ...]` inputs.

    At each segment start the state is replaced by `reset_state` (zeros unless given).
    Returns `(outputs [B, T, ...], final state)`.
    """
    length = jax.tree.leaves(inputs)[0].shape[1]
    batch = jax.tree.leaves(inputs)[0].shape[0]
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)
    fresh = jax.tree.map(jnp.zeros_like, state) if reset_state is None else reset_state

    def body(state, token):
        start, inputs_t = token
        state = jax.tree.map(
            lambda s, z: jnp.where(start.reshape(-1, *[1] * (s.ndim - 1)), z, s), state, fresh
        )
        return step(state, inputs_t)

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (starts, inputs))
    state, outputs = jax.lax.scan(body, state, time_first)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), outputs), state
