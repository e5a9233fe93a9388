"""Attention along a sequence that is cut over devices (`pallas_kernels.sequence`).

A window that reaches no farther than the left neighbour's shard comes from there as a cache. Beyond that,
keys and values go round the devices, and each adds what its queries read from them to one softmax (Liu et al.
2023, arXiv 2310.01889). The backward pass sends them round again, with their gradients, so that no device
ever keeps another's: with p_ij = exp(s_ij - lse_i), the gradient in s_ij is
p_ij (do_i . v_j - do_i . o_i + dlse_i).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import sequence
from pallas_kernels.attention import cache as caches
from pallas_kernels.attention import xla
from pallas_kernels.attention.cache import Cache
from pallas_kernels.attention.parts import Part, combine
from pallas_kernels.attention.xla import Keys


class _Rule(NamedTuple):
    axis: sequence.Axis
    sees: tuple[int, int]  # delay, span
    rounds: int  # left neighbours that the span reaches


def reaches_neighbour_only(span: int, steps: int) -> bool:
    """Whether no query of a shard of `steps` tokens sees beyond its left neighbour."""
    return span - 1 <= steps


def halo(cache: Cache, k: Array, v: Array, where: Array, segment_ids: Array | None) -> Cache:
    """The cache that enters this shard, made of the left neighbour's tokens; `cache` enters the first."""
    axis = sequence.current()
    assert axis is not None
    empty = jax.tree.map(jnp.zeros_like, cache)
    empty = dataclasses.replace(empty, slots=jnp.full_like(cache.slots, caches.EMPTY))
    start = jax.tree.map(lambda a, b: jnp.where(axis.index == 0, a, b), cache, empty)
    return sequence.passed(cache, caches.extend(start, k, v, where, segment_ids), segment_ids, empty)


def attention(q, k, v, cache, where, segment_ids, extra, *, fresh, delay) -> tuple[Part, Cache]:
    """`xla.attention` of a span beyond the left neighbour's shard, `where [B,T]` being positions."""
    axis, (steps, span) = sequence.current(), (q.shape[1], cache.slots.shape[1])
    assert axis is not None
    ids = jnp.zeros(q.shape[:2], jnp.int32)
    if segment_ids is not None:
        ids = sequence.numbered(sequence.starts(segment_ids))
    sees, mine = (delay, span), Keys(k, v, where, ids)
    # What `fresh` does not look at: one slot will do.
    empty = Cache(k=cache.k[:, :1], v=cache.v[:, :1], slots=cache.slots[:, :1], length=where[:, 0])
    own, _ = xla.attention(q, k, v, empty, segment_ids, extra, fresh=True, delay=delay, part=True, span=span)
    rule = _Rule(axis, sees, min(-(-(span - 1) // steps), axis.size - 1))
    parts = [own, _past(rule, q, k, v, where, ids)]
    if not fresh:
        old = Keys(cache.k, cache.v, cache.slots, jnp.zeros_like(cache.slots))
        parts.append(xla.seen(q, where, ids, old, sees))
    return combine(parts), _final(axis, cache, mine)


def _final(axis: sequence.Axis, cache: Cache, keys: Keys) -> Cache:
    """The cache after all shards, on all devices: each slot has one owner."""
    length = axis.of_last(keys.where[:, -1] + 1)
    document = axis.of_last(keys.ids[:, -1])
    oldest = length[:, None] - cache.slots.shape[1]
    kept = (axis.index == 0) & (document == 0)[:, None] & (cache.slots >= oldest)
    k, v = (jnp.where(kept[..., None, None], x, 0) for x in (cache.k, cache.v))
    begun = dataclasses.replace(cache, k=k, v=v, slots=jnp.where(kept, cache.slots, caches.EMPTY))
    real = (keys.ids == document[:, None]) & (keys.where >= oldest)
    own = caches.write(begun, keys.k, keys.v, keys.where, real)
    k, v, slots = (jax.lax.psum(x, axis.name) for x in (own.k, own.v, own.slots - caches.EMPTY))
    return Cache(k=k, v=v, slots=slots + caches.EMPTY, length=length.astype(cache.length.dtype))


def _round(rule: _Rule, blocks):
    """Everything one device to the right."""
    pairs = [(i, (i + 1) % rule.axis.size) for i in range(rule.axis.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, rule.axis.name, pairs), blocks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _past(rule: _Rule, q: Array, k: Array, v: Array, where: Array, ids: Array) -> Part:
    """What queries read from the shards before their own."""

    def visit(carry, number):
        blocks, read = carry
        blocks = _round(rule, blocks)

        def add(read):
            return combine([read, xla.seen(q, where, ids, blocks, rule.sees)])

        return (blocks, jax.lax.cond(rule.axis.index >= number, add, lambda read: read, read)), None

    nothing = Part(jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, q.dtype))
    return jax.lax.scan(visit, (Keys(k, v, where, ids), nothing), 1 + jnp.arange(rule.rounds))[0][1]


def _past_forward(rule, *arguments):
    read = _past(rule, *arguments)
    return read, (*arguments, read)


def _past_backward(rule, saved, gradient):
    q, k, v, where, ids, read = saved
    offset = gradient.lse - jnp.sum(gradient.out * read.out, -1)

    def visit(carry, number):
        keys, dq, *sums = carry
        keys, *sums = _round(rule, (keys, *sums))

        def total(q, k, v):
            keys_here = keys._replace(k=k, v=v)
            return xla.weighed(q, where, ids, keys_here, rule.sees, read.lse, gradient.out, offset)

        def add(sums):
            return jax.tree.map(jnp.add, sums, jax.grad(total, (0, 1, 2))(q, keys.k, keys.v))

        sums = jax.lax.cond(rule.axis.index >= number, add, lambda sums: sums, (dq, *sums))
        return (keys, *sums), None

    begin = Keys(k, v, where, ids), *map(jnp.zeros_like, (q, k, v))
    (_, dq, dk, dv), _ = jax.lax.scan(visit, begin, 1 + jnp.arange(rule.rounds))
    size = rule.axis.size
    home = [(i, (i - rule.rounds) % size) for i in range(size)]
    dk, dv = (jax.lax.ppermute(x, rule.axis.name, home) for x in (dk, dv))
    return dq, dk, dv, None, None


_past.defvjp(_past_forward, _past_backward)
