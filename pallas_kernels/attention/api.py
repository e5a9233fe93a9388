"""Public entry of the op."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.attention import cache as caches
from pallas_kernels.attention import reference, ring, xla
from pallas_kernels.attention.cache import Cache
from pallas_kernels.attention.parts import Part
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.dispatch import choose


def _reference(q, k, v, cache, segment_ids, extra, *, fresh, delay, part):
    del fresh  # an empty cache needs no special treatment there
    out, cache = reference.attention(q, k, v, cache, segment_ids, extra, delay=delay)
    return out if part else out.out, cache


IMPLEMENTATIONS = {"reference": _reference, "xla": xla.attention}
CHOSEN = {"reference": reference.chosen_attention, "xla": xla.chosen_attention}


def empty_cache(batch: int, span: int, heads: int, key_dim: int, value_dim: int) -> Cache:
    """A ring buffer of `span` slots without a token in it."""
    return Cache(
        k=jnp.zeros((batch, span, heads, key_dim)),
        v=jnp.zeros((batch, span, heads, value_dim)),
        slots=jnp.full((batch, span), caches.EMPTY, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
    )


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    span: int,
    cache: Cache | None = None,
    *,
    extra: tuple[Float[Array, "P G K"], Float[Array, "P G V"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Cache]:
    """`o_i = sum_j softmax_j(q_i . k_j) v_j` over the document's tokens j with `0 <= i - j < span`.

    `q` arrives scaled; query head h reads key head h // (H/G); `cache` (with `span` slots) holds what came
    before. `extra` keys and values are seen by every query of every document. Raises ValueError when H is
    not a multiple of G or for an unknown implementation. The output has v's dtype, softmax and cache are at
    least float32.
    """
    out, cache = _run(
        q, k, v, span, cache, 0, False, extra=extra, segment_ids=segment_ids, implementation=implementation
    )
    return out.astype(v.dtype), cache


def attention_part(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    span: int,
    cache: Cache | None = None,
    *,
    delay: int = 0,
    extra: tuple[Float[Array, "P G K"], Float[Array, "P G V"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Part, Cache]:
    """`attention` as one source of keys among others, to be put together by `merge`; at least float32.

    Tokens j with `delay <= i - j < span` are seen.
    """
    return _run(
        q, k, v, span, cache, delay, True, extra=extra, segment_ids=segment_ids, implementation=implementation
    )


def _run(q, k, v, span, cache, delay, part, *, extra, segment_ids, implementation):
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads over {k.shape[2]} key heads")
    run = choose("attention", implementation, IMPLEMENTATIONS)
    dtype = accumulation_dtype(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    extra = jax.tree.map(lambda x: x.astype(dtype), extra)
    fresh = cache is None
    if cache is None:
        cache = empty_cache(q.shape[0], span, k.shape[2], k.shape[3], v.shape[3])
    if sequence.current() is not None:
        where = positions(cache.length, segment_ids, q.shape[1])
        if not ring.reaches_neighbour_only(span, q.shape[1]):
            how = {"fresh": fresh, "delay": delay}
            out, cache = ring.attention(q, k, v, cache, where, segment_ids, extra, **how)
            return out if part else out.out, cache
        cache, fresh = ring.halo(cache, k, v, where, segment_ids), False
    return run(q, k, v, cache, number_runs(segment_ids), extra, fresh=fresh, delay=delay, part=part)


def positions(length: Array, segment_ids: Array | None, steps: int) -> Array:
    """`[B, T]` position of each token in its document; the first segment continues at `length`."""

    def summary(start):
        return None, caches.positions(start, segment_ids, steps)[:, -1] + 1

    length = sequence.carried(length, segment_ids, summary, lambda _, length: length)
    return caches.positions(length, segment_ids, steps)


def chosen_attention(
    q: Float[Array, "B T H K"],
    keys: Float[Array, "B N G K"],
    values: Float[Array, "B N G V"],
    index: Int[Array, "B T S"],
    *,
    implementation: str | None = None,
) -> Part:
    """Attention of every query to S keys of its own choice: `index` into N, or -1 for none; at least float32.

    `q` arrives scaled. Raises ValueError when H is not a multiple of G or for an unknown implementation.
    """
    if q.shape[2] % keys.shape[2]:
        raise ValueError(f"chosen_attention: {q.shape[2]} query heads over {keys.shape[2]} key heads")
    run = choose("chosen_attention", implementation, CHOSEN)
    dtype = accumulation_dtype(q, keys, values)
    return run(q.astype(dtype), keys.astype(dtype), values.astype(dtype), index)


def attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    cache: Cache,
    *,
    extra: tuple[Float[Array, "P G K"], Float[Array, "P G V"]] | None = None,
) -> tuple[Float[Array, "B H V"], Cache]:
    """One token of `attention`: `O(span)`."""
    part, cache = attention_part_step(q, k, v, cache, extra=extra)
    return part.out.astype(v.dtype), cache


def attention_part_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    cache: Cache,
    *,
    delay: int = 0,
    extra: tuple[Float[Array, "P G K"], Float[Array, "P G V"]] | None = None,
) -> tuple[Part, Cache]:
    """One token of `attention_part`."""
    dtype = cache.k.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    extra = jax.tree.map(lambda x: x.astype(dtype), extra)
    cache, part = reference.step(cache, q, k, v, cache.length, extra, delay)
    return part, cache


def flops_per_token(
    length: int, span: int, heads: int, key_dim: int, value_dim: int, *, part: bool = False
) -> int:
    """Forward FLOPs of one token of the blockwise form: masked pairs are computed too.

    A pair costs its two products, and six for the mask and the softmax; as a `part` it costs eight more, for
    the log of the sum and for queries that see nothing.
    """
    block = min(xla.QUERY_BLOCK, length)
    # A block finds its window at one static size; a single one has nothing before it.
    seen = block + (min(span, length) - 1 if length > block else 0)
    return heads * seen * (2 * (key_dim + value_dim) + (14 if part else 6))
