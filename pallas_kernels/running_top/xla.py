"""Merging sorted lists in a parallel prefix: log T rounds."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.running_top.reference import Top


def merge(a: Top, b: Top) -> Top:
    """The M best of two times M, on the last axis."""
    score, index = (jnp.concatenate(pair, -1) for pair in zip(a, b, strict=True))
    descending, index = jax.lax.sort((-score, index), num_keys=2)
    size = a.score.shape[-1]
    return Top(-descending[..., :size], index[..., :size])


def _forget(top: Top, when: Array) -> Top:
    return Top(*(jnp.where(when[..., None], -1, x) for x in top))


def running_top(score, index, there, past, segment_ids=None):
    """Shapes as in `api.py`."""
    first = jnp.where(there, score, -1)[..., None], jnp.where(there, index, -1)[..., None]
    pad = ((0, 0), (0, 0), (0, past.score.shape[1] - 1))
    top = Top(*(jnp.pad(x, pad, constant_values=-1) for x in first))
    run = jnp.zeros_like(index) if segment_ids is None else segment_ids

    def join(a, b):
        return b[0], merge(_forget(a[1], a[0] != b[0]), b[1])

    run, top = jax.lax.associative_scan(join, (run, top), axis=1)
    return merge(_forget(Top(*(x[:, None] for x in past)), run != run[:, :1]), top)
