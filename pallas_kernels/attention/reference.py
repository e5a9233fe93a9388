"""The definition: one query against the ring buffer, and its scan; one query against keys chosen for it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import cache as caches
from pallas_kernels.attention.parts import Part, weigh
from pallas_kernels.chunks import scan_tokens


def step(cache: caches.Cache, q: Array, k: Array, v: Array, position: Array, extra=None, delay=0):
    """One token. `q [B,H,K]`, `k [B,G,K]`, `v [B,G,V]`, `position [B]` in its document; `extra [P,G,.]`."""
    cache = caches.write(cache, k[:, None], v[:, None], position[:, None], jnp.ones((q.shape[0], 1), bool))
    keys, values = jax.lax.optimization_barrier((cache.k, cache.v))
    age = position[:, None] - cache.slots
    visible = (age >= delay) & (age < cache.slots.shape[1])
    if extra is not None:
        keys, values = (
            jnp.concatenate([x, jnp.broadcast_to(e, (x.shape[0], *e.shape))], 1)
            for x, e in zip((keys, values), extra, strict=True)
        )
        visible = jnp.pad(visible, ((0, 0), (0, extra[0].shape[0])), constant_values=True)
    return cache, read(q, keys, values, visible)


def read(q: Array, keys: Array, values: Array, visible: Array) -> Part:
    """`q [B,H,K]` against `keys [B,S,G,K]`, `values [B,S,G,V]` where `visible [B,S]`."""
    B, H, G = *q.shape[:2], keys.shape[2]
    # Heads that share keys are one product with them: copies of the keys would be all the time of a step.
    # Keys come first: where they are second, they are transposed for every token.
    logits = jnp.einsum("bsgk,bgrk->bgsr", keys, q.reshape(B, G, H // G, -1)).swapaxes(2, 3)
    weights, lse = weigh(jnp.where(visible[:, None, None], logits, -jnp.inf))
    out = jnp.einsum("bgrs,bsgv->bgrv", weights, values)
    return Part(out.reshape(B, H, -1), lse.reshape(B, H))


def attention(q, k, v, cache, segment_ids=None, extra=None, *, delay=0):
    """Token by token."""
    where = caches.positions(cache.length, segment_ids, q.shape[1])
    fresh = dataclasses.replace(
        cache, slots=jnp.full_like(cache.slots, caches.EMPTY), length=jnp.zeros_like(cache.length)
    )
    return scan_tokens(lambda c, x: step(c, *x, extra, delay), cache, (q, k, v, where), segment_ids, fresh)


def chosen_attention(q, keys, values, index):
    """Token by token; shapes as in `api.py`."""
    rows = jnp.arange(q.shape[0])[:, None]

    def one(state, token):
        q, index = token
        return state, read(q, keys[rows, index], values[rows, index], index >= 0)

    return scan_tokens(one, (), (q, index))[0]
