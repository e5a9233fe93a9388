"""Decays and documents, outside of the GPU kernels: what they read, and the gradient of the decay."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gpu_math import BLOCK, F32, part_count, parts_of

# Chunks between the states that are kept for the gradient of the decay.
KEPT_EVERY = 8
IDS, FIRST, LAST, ENDS = range(4)  # rows of marks


def marks_of(ids: Array) -> Array:
    """`[B,T] -> [B,n,4,64]` int32, of a chunk's tokens: their documents; the first and the last token of the
    chunk in the same one; and the documents of the token before the chunk and of its last.
    """
    ids = ids.reshape(ids.shape[0], -1, BLOCK).astype(jnp.int32)
    place = jnp.broadcast_to(jnp.arange(BLOCK, dtype=jnp.int32), ids.shape)
    changes = ids[..., 1:] != ids[..., :-1]
    starts = jnp.pad(jnp.where(changes, place[..., 1:], 0), ((0, 0), (0, 0), (1, 0)))
    stops = jnp.where(changes, place[..., :-1], BLOCK - 1)
    stops = jnp.pad(stops, ((0, 0), (0, 0), (0, 1)), constant_values=BLOCK - 1)
    last = ids[..., -1:]
    before = jnp.concatenate([ids[:, :1, :1], last[:, :-1]], 1)
    ends = jnp.pad(jnp.concatenate([before, last], -1), ((0, 0), (0, 0), (0, BLOCK - 2)))
    return jnp.stack([ids, lax.cummax(starts, axis=2), lax.cummin(stops, axis=2, reverse=True), ends], 2)


def running_sums(log_decay: Array) -> Array:
    """`[B,T,H,1] -> [B,H,n,2,64]`, within chunks: of log decay in multiples of 1/64, and of the rest.

    The first are exact and the second small, so that differences of either are good where a gate has closed
    before. Of e^-120 nothing is left in float32.
    """
    x = jnp.maximum(jnp.moveaxis(log_decay[..., 0].astype(F32), 1, 2), -120)
    x = x.reshape(*x.shape[:2], -1, BLOCK)
    coarse = jnp.round(x * 64) / 64
    return jnp.cumsum(jnp.stack([coarse, x - coarse], 3), -1)


def kept_by_chunks(log_decay: Array, marks: Array | None) -> Array:
    """What stays of a state through each chunk, `[B,T,H,K] -> [B,H,n,K]`."""
    batch, _, heads, keys = log_decay.shape
    total = jnp.sum(log_decay.astype(F32).reshape(batch, -1, BLOCK, heads, keys), 2)
    keep = jnp.exp(jnp.moveaxis(total, 2, 1))
    if marks is None:
        return keep
    one = marks[:, :, ENDS, 0] == marks[:, :, ENDS, 1]
    return jnp.where(one[:, None, :, None], keep, 0)


def decay_parts(log_decay: Array, dtype) -> tuple[Array, ...]:
    """Log decays that multiply exactly with 0 and 1: to 16 bits where tokens have 8, else to 24."""
    return parts_of(log_decay.astype(F32), 2 if part_count(dtype) == 1 else 3)


def summed_after(own: Array, marks: Array | None) -> Array:
    """`[B,H,T]`: sums over the tokens from each on that are in its document and its chunk."""
    i, j = jnp.arange(BLOCK)[:, None], jnp.arange(BLOCK)
    later = j >= i
    if marks is not None:
        later = later & (j <= marks[:, None, :, LAST, :, None])
    chunks = own.reshape(*own.shape[:2], -1, 1, BLOCK)
    return jnp.sum(jnp.where(later, chunks, 0), -1).reshape(own.shape)


def _beyond(own: Array, ends: Array, marks: Array | None) -> Array:
    """What flows back into the state that leaves each chunk, `[B,H,n,W]`: from `ends [B,H,blocks,W]`, the
    same of the last of each block, and `own [B,H,n,64,W]`."""
    batch, heads, blocks, width = ends.shape

    def cut(x, fill):
        x = jnp.pad(x, ((0, 0),) * 2 + ((0, blocks * KEPT_EVERY - chunks), (0, 0)), constant_values=fill)
        return x.reshape(*x.shape[:2], blocks, KEPT_EVERY, -1)

    chunks = own.shape[2]
    first = own[:, :, :, 0]
    through = jnp.ones((1, 1, chunks, 1), bool)
    if marks is not None:
        before = marks[:, None, :, ENDS, :1]
        first = jnp.where(marks[:, None, :, IDS, :1] == before, first, 0)
        through = before == marks[:, None, :, ENDS, 1:2]
    first, through = cut(first, 0), cut(through, True)
    leaving = [ends]
    for chunk in range(KEPT_EVERY - 1, 0, -1):
        leaving.append(first[:, :, :, chunk] + jnp.where(through[:, :, :, chunk], leaving[-1], 0))
    return jnp.stack(leaving[::-1], 3).reshape(batch, heads, -1, width)[:, :, :chunks]


def decay_gradient(own: Array, after: Array, back: Array, marks: Array | None) -> Array:
    """The gradient of log decay, `[B,H,T,W]`, from `own`: of each token, q . dq - k . dk summed over the rest
    of its chunk and document.

    To it comes what flows back into the state that leaves the chunk, S . dS, if that is of the token's
    document. This is known at the ends of blocks of KEPT_EVERY chunks, from `after` and `back`, the states
    that leave them and their cotangents, `[B,H,blocks,V,K]`; in between it is summed up, chunk by chunk. Sums
    over a whole sequence would gather the errors of all its tokens.
    """
    ends = jnp.sum(after * back, -2)
    if own.shape[3] == 1:
        ends = jnp.sum(ends, -1, keepdims=True)
    chunks = own.reshape(*own.shape[:2], -1, BLOCK, own.shape[3])
    leaving = _beyond(chunks, ends, marks)[:, :, :, None]
    if marks is not None:
        stays = marks[:, :, IDS] == marks[:, :, ENDS, 1:2]
        leaving = jnp.where(stays[:, None, ..., None], leaving, 0)
    return (chunks + leaving).reshape(own.shape)
