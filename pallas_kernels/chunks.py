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


class Grid(NamedTuple):
    """Time cut into chunks that are worked on in groups: chunks of a group at once, groups in turn.

    One chunk at a time leaves a machine idle, all at once fill its memory.
    """

    chunk: int
    group: int  # chunks of a group

    def split(self, x: Array, *, edge: bool = False) -> Array:
        """`[B, T, ...] -> [n, group, B, chunk, ...]`, the tail padded as by `split_time`."""
        x = split_time(x, self.chunk * self.group, edge=edge)
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.group, self.chunk, *x.shape[3:]), 2, 1)

    def split_heads(self, x: Array) -> Array:
        """`[B, T, H, ...] -> [n, group, B, H, chunk, ...]`."""
        return jnp.swapaxes(self.split(x), 3, 4)

    def join_heads(self, x: Array, length: int) -> Array:
        """Inverse of `split_heads`: `[B, length, H, ...]`."""
        x = jnp.moveaxis(jnp.swapaxes(x, 3, 4), 1, 2)
        return join_time(x.reshape(*x.shape[:2], -1, *x.shape[4:]), length)

    def segments(self, ids: Array | None) -> "ChunkSegments | None":
        """Masks of all chunks, `[n, group, B, ...]`; the state that enters belongs to the first token."""
        if ids is None:
            return None
        cut = self.split(ids, edge=True)
        last = jnp.concatenate([ids[None, :, 0], cut[..., -1].reshape(-1, ids.shape[0])[:-1]])
        return chunk_segments(cut, last.reshape(cut.shape[:-1]))


# Rows (of all samples and heads) of a group: what a CPU's caches hold, what keeps an accelerator busy.
ROWS = {"cpu": 1 << 12}
OTHER_ROWS = 1 << 18


def grid(v: Array, largest: int, smallest: int) -> Grid:
    """The grid for `v [B, T, H, V]` and chunks of at most `largest` tokens; groups are filled evenly."""
    batch, length, heads = v.shape[:3]
    chunk = chunk_length(length, largest, smallest)
    chunks = -(-length // chunk)
    room = max(ROWS.get(jax.default_backend(), OTHER_ROWS) // (batch * heads * chunk), 1)
    groups = -(-chunks // room)
    return Grid(chunk, -(-chunks // groups))


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
    """Which pairs of a chunk may interact. Built by `chunk_segments` from ids `[..., C]`."""

    same: Array  # [..., C, C] tokens i and j belong to one segment
    from_carry: Array  # [..., C] token i belongs to the carried state's segment
    into_carry: Array  # [..., C] token j belongs to the last token's segment
    keep: Array  # [...] the carried state survives this chunk


def chunk_segments(ids: Array, carry_id: Array) -> ChunkSegments:
    """Masks for chunks with segment `ids [..., C]`, entered by a state of segment `carry_id [...]`."""
    last = ids[..., -1:]
    return ChunkSegments(
        same=ids[..., :, None] == ids[..., None, :],
        from_carry=ids == carry_id[..., None],
        into_carry=ids == last,
        keep=last[..., 0] == carry_id,
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
