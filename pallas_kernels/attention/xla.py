"""Blocks of queries against the keys they can see: memory linear in T."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import cache as caches
from pallas_kernels.attention.parts import Part, weigh
from pallas_kernels.chunks import join_time, split_time

# Rows of the score matrix formed at once.
QUERY_BLOCK = 128


class Keys(NamedTuple):
    """Keys with their values, positions and documents."""

    k: Array  # [B, J, G, K]
    v: Array  # [B, J, G, V]
    where: Array  # [B, J] int32
    ids: Array  # [B, J] int32: tokens of a document have one number


def _grouped(x: Array, groups: int) -> Array:
    """`[B, C, H, ...] -> [B, C, G, H/G, ...]`."""
    return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _logits(
    q: Array, keys: Array, queries: Array, places: Array, same: Array, sees: tuple[int, int]
) -> Array:
    """`[B, G, H/G, C, J]` for `q [B, C, G, H/G, K]` at positions `queries [B, C]`, -inf where nothing is
    seen: `sees` is (delay, span), `same [B, C, J]` says what is of one document.
    """
    age = queries[:, :, None] - places[:, None, :]
    visible = (age >= sees[0]) & (age < sees[1]) & same
    return jnp.where(visible[:, None, None], jnp.einsum("bigrk,bjgk->bgrij", q, keys), -jnp.inf)


def _pad_front(x: Array, before: int, after: int, value=0) -> Array:
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def attention(q, k, v, cache, segment_ids=None, extra=None, *, fresh=False, delay=0, part=False, span=None):
    """A scan over query blocks, each with the window of new keys before it and the cached ones.

    `fresh`: the cache is known to be empty, so it is not looked at. `part`: with the log of every sum.
    `span`: as many tokens as the cache holds, unless given.
    """
    steps, span = q.shape[1], span or cache.slots.shape[1]
    where = caches.positions(cache.length, segment_ids, steps)
    final = caches.extend(cache, k, v, where, segment_ids)
    ids = jnp.zeros((q.shape[0], steps), jnp.int32) if segment_ids is None else segment_ids
    block = min(QUERY_BLOCK, steps)
    blocks = -(-steps // block)
    # Key j of the call sits at reach + j, so that every block finds its window at one static size.
    reach = min(span - 1, steps - 1) if blocks > 1 else 0
    tail = blocks * block - steps
    keys, values, key_ids = (_pad_front(x, reach, tail) for x in (k, v, ids))
    key_where = _pad_front(where, reach, tail, caches.EMPTY)
    groups, sees = k.shape[2], (delay, span)

    def body(start, inputs):
        q, queries, query_ids = inputs
        q = _grouped(q, groups)
        near = [
            jax.lax.dynamic_slice_in_dim(x, start, reach + block, 1)
            for x in (keys, values, key_where, key_ids)
        ]
        first = query_ids == ids[:, :1]  # the cache belongs to the first token's document
        same = query_ids[:, :, None] == near[3][:, None, :]
        logits = _logits(q, near[0], queries, near[2], same, sees)
        if not fresh:
            cached = _logits(q, cache.k, queries, cache.slots, first[:, :, None], sees)
            logits = jnp.concatenate([logits, cached], -1)
        if extra is not None:
            logits = jnp.concatenate([logits, jnp.einsum("bigrk,pgk->bgrip", q, extra[0])], -1)
        weights, lse = weigh(logits) if part else (jax.nn.softmax(logits, -1), None)
        out = jnp.einsum("bgrij,bjgv->bigrv", weights[..., : reach + block], near[1])
        if not fresh:
            seen = slice(reach + block, reach + block + span)
            out += jnp.einsum("bgrij,bjgv->bigrv", weights[..., seen], cache.v)
        if extra is not None:
            out += jnp.einsum("bgrip,pgv->bigrv", weights[..., -extra[0].shape[0] :], extra[1])
        out = out.reshape(*out.shape[:2], -1, out.shape[-1])
        return start + block, Part(out, jnp.moveaxis(lse, 3, 1).reshape(out.shape[:3])) if part else out

    # Padded queries repeat the last position: they see something, and their output is cut off.
    inputs = (
        split_time(q, block),
        split_time(where, block, edge=True),
        split_time(ids, block, edge=True),
    )
    _, out = jax.lax.scan(jax.checkpoint(body), 0, inputs)
    return jax.tree.map(lambda x: join_time(x, steps), out), final


def seen(q: Array, where: Array, ids: Array, keys: Keys, sees: tuple[int, int]) -> Part:
    """What `q [B,T,H,K]`, at positions `where [B,T]` of documents `ids [B,T]`, reads from `keys`.

    A scan over query blocks; `sees` as in `_logits`.
    """
    groups, block = keys.k.shape[2], min(QUERY_BLOCK, q.shape[1])

    def body(_, inputs):
        q, where, ids = inputs
        same = ids[:, :, None] == keys.ids[:, None, :]
        weights, lse = weigh(_logits(_grouped(q, groups), keys.k, where, keys.where, same, sees))
        out = jnp.einsum("bgrij,bjgv->bigrv", weights, keys.v)
        lse = jnp.moveaxis(lse, 3, 1)
        return None, Part(out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]))

    cut = split_time(q, block), *(split_time(x, block, edge=True) for x in (where, ids))
    _, out = jax.lax.scan(jax.checkpoint(body), None, cut)
    return jax.tree.map(lambda x: join_time(x, q.shape[1]), out)


def weighed(q, where, ids, keys: Keys, sees, lse, direction, offset) -> Array:
    """`sum_ij exp(s_ij - lse_i) (direction_i . v_j + offset_i)` over all that is seen: a scalar whose
    gradient is that of a softmax over more keys than these, given the log of its sum, `lse [B,T,H]`.
    """
    groups, block = keys.k.shape[2], min(QUERY_BLOCK, q.shape[1])
    some = lse > -jnp.inf

    def body(total, inputs):
        q, lse, direction, offset, where, ids = inputs
        same = ids[:, :, None] == keys.ids[:, None, :]
        logits = _logits(_grouped(q, groups), keys.k, where, keys.where, same, sees)
        lse, offset = (jnp.moveaxis(_grouped(x, groups), 1, 3)[..., None] for x in (lse, offset))
        value = jnp.einsum("bigrv,bjgv->bgrij", _grouped(direction, groups), keys.v) + offset
        return total + jnp.sum(jnp.exp(logits - lse) * value), None

    # A query that sees nothing has logits of -inf only; its lse must not be.
    rows = (split_time(x, block) for x in (q, jnp.where(some, lse, 0), direction, offset))
    cut = *rows, *(split_time(x, block, edge=True) for x in (where, ids))
    return jax.lax.scan(jax.checkpoint(body), jnp.zeros((), q.dtype), cut)[0]


def chosen_attention(q, keys, values, index):
    """A scan over query blocks, each of which gathers the keys chosen for its queries."""
    rows = jnp.arange(q.shape[0])[:, None, None]
    groups, block = keys.shape[2], min(QUERY_BLOCK, q.shape[1])

    def body(_, inputs):
        q, index = inputs
        # Where nothing is chosen the index is -1: it gathers something, and the mask drops it.
        k, v = keys[rows, index], values[rows, index]
        logits = jnp.einsum("bigrk,bisgk->bigrs", q.reshape(*q.shape[:2], groups, -1, q.shape[-1]), k)
        weights, lse = weigh(jnp.where((index >= 0)[:, :, None, None], logits, -jnp.inf))
        out = jnp.einsum("bigrs,bisgv->bigrv", weights, v)
        return None, Part(out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]))

    _, out = jax.lax.scan(jax.checkpoint(body), None, (split_time(q, block), split_time(index, block)))
    return jax.tree.map(lambda x: join_time(x, q.shape[1]), out)
