"""The definition: insert one entry after the other into a sorted list."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import scan_tokens


class Top(NamedTuple):
    """The best entries, best first; -1 and -1 in empty places."""

    score: Array  # [..., M]
    place: Array  # [..., M] int32, the index


def insert(top: Top, score: Array, index: Array, there: Array) -> Top:
    """`top` of `[B, M]` with one more entry `[B]`."""
    better = (top.score > score[:, None]) | ((top.score == score[:, None]) & (top.place < index[:, None]))
    place = jnp.sum(better, -1, keepdims=True)
    slot = jnp.arange(top.score.shape[1])

    def put(old, new):
        moved = jnp.concatenate([old[:, :1], old[:, :-1]], 1)
        one_more = jnp.where(slot < place, old, jnp.where(slot == place, new[:, None], moved))
        return jnp.where(there[:, None], one_more, old)

    return Top(put(top.score, score), put(top.place, index))


def running_top(score, index, there, past, segment_ids=None):
    """Token by token; shapes as in `api.py`."""

    def one(top, entry):
        top = insert(top, *entry)
        return top, top

    empty = Top(jnp.full_like(past.score, -1), jnp.full_like(past.place, -1))
    return scan_tokens(one, past, (score, index, there), segment_ids, empty)[0]
