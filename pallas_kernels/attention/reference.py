"""The definition: one query against the ring buffer, and its scan."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import cache as caches
from pallas_kernels.chunks import scan_tokens


def step(cache: caches.Cache, q: Array, k: Array, v: Array, position: Array, extra=None):
    """One token. `q [B,H,K]`, `k [B,G,K]`, `v [B,G,V]`, `position [B]` in its document; `extra [P,G,.]`."""
    cache = caches.write(cache, k[:, None], v[:, None], position[:, None], jnp.ones((q.shape[0], 1), bool))
    keys, values = cache.k, cache.v
    age = position[:, None] - cache.slots
    visible = (age >= 0) & (age < cache.slots.shape[1])
    if extra is not None:
        keys, values = (
            jnp.concatenate([x, jnp.broadcast_to(e, (x.shape[0], *e.shape))], 1)
            for x, e in zip((keys, values), extra, strict=True)
        )
        visible = jnp.pad(visible, ((0, 0), (0, extra[0].shape[0])), constant_values=True)
    keys, values = (jnp.repeat(x, q.shape[1] // k.shape[1], 2) for x in (keys, values))
    logits = jnp.where(visible[:, None], jnp.einsum("bhk,bshk->bhs", q, keys), -jnp.inf)
    return cache, jnp.einsum("bhs,bshv->bhv", jax.nn.softmax(logits, -1), values)


def attention(q, k, v, cache, segment_ids=None, extra=None):
    """Token by token."""
    where = caches.positions(cache.length, segment_ids, q.shape[1])
    fresh = dataclasses.replace(
        cache, slots=jnp.full_like(cache.slots, caches.EMPTY), length=jnp.zeros_like(cache.length)
    )
    return scan_tokens(lambda c, x: step(c, *x, extra), cache, (q, k, v, where), segment_ids, fresh)
