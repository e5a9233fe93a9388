"""Log decays: their common form, and the triangle of decayed scores inside a chunk."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import accumulation_dtype, masked_exp

# Below this size pairs are formed explicitly: matrix products of that size do not pay.
SMALLEST_BLOCK = 4


def full_decay(log_decay: Array | None, v: Array) -> Array:
    """The decay as `[..., H, K or 1]`, for `v [..., H, V]`, from None, `[H]`, `[..., H]` or the full form."""
    if log_decay is None:
        return jnp.zeros((*v.shape[:-1], 1), accumulation_dtype(v))
    if log_decay.ndim == v.ndim:
        return log_decay
    return jnp.broadcast_to(log_decay, v.shape[:-1])[..., None]


def pair_decay(total: Array) -> Array:
    """`e^{total_i - total_j}` for j <= i, else 0: `[..., C, 1] -> [..., C, C]`."""
    size = total.shape[-2]
    visible = jnp.tril(jnp.ones((size, size), bool))
    return masked_exp(total - jnp.swapaxes(total, -1, -2), visible)


def decayed_scores(q: Array, k: Array, query_sum: Array, key_sum: Array, *, strict: bool = False) -> Array:
    """`A_ij = sum_k q_ik k_jk e^{query_sum_ik - key_sum_jk}` for j <= i (`strict`: j < i), else 0.

    `q, k, query_sum, key_sum`: `[..., C, K]`, C a power of two (or at most 4); the result is `[..., C, C]`.
    The sums decrease in time and `query_sum_i <= key_sum_j` for j < i.

    A product e^{G_i} e^{-G_j} would overflow, so the triangle is halved again and again: the square
    below the diagonal of each block factors around the decay R at its first row, both exponents
    G_i - R and R - G_j being <= 0; the small blocks on the diagonal are formed pair by pair.
    """
    lead = q.shape[:-2]
    blocks = (x if lead else x[None] for x in (q, k, query_sum, key_sum))
    return _triangles(*blocks, strict=strict).reshape(*lead, *[q.shape[-2]] * 2)


def decayed_scores_flops(chunk: int, key_dim: int) -> int:
    """Of `decayed_scores`, one token of a chunk of C and one head: `K (C + 16 + 2 log2(C / 4))`.

    Halves of s tokens are a product (s K / 2 each, C - 4 in all) between keys and queries that had their
    exponents subtracted and were scaled (2); the 4 pairs on the diagonal take five (difference, mask, two
    products, sum).
    """
    halvings = (chunk // SMALLEST_BLOCK).bit_length() - 1
    return key_dim * (chunk - SMALLEST_BLOCK + 2 * halvings + 5 * SMALLEST_BLOCK)


def _triangles(q: Array, k: Array, query_sum: Array, key_sum: Array, *, strict: bool) -> Array:
    """`decayed_scores` with the blocks along the first axis.

    Not along new ones, nor with a product over pairs: XLA's CPU aborts at matrix products of rank 8, which
    halving 32 tokens under `vmap` would reach.
    """
    size = q.shape[-2]
    if size <= SMALLEST_BLOCK:
        pairs = query_sum[..., :, None, :] - key_sum[..., None, :, :]
        visible = jnp.tril(jnp.ones((size, size), bool), -1 if strict else 0)[..., None]
        return jnp.sum(q[..., :, None, :] * k[..., None, :, :] * masked_exp(pairs, visible), -1)
    half = size // 2
    early, late = slice(None, half), slice(half, None)
    pivot = query_sum[..., half : half + 1, :]
    below = jnp.einsum(
        "...ik,...jk->...ij",
        q[..., late, :] * jnp.exp(query_sum[..., late, :] - pivot),
        k[..., early, :] * jnp.exp(pivot - key_sum[..., early, :]),
    )
    # Both halves at once, so that the depth of the recursion is the only thing that grows.
    halves = [jnp.concatenate([x[..., early, :], x[..., late, :]]) for x in (q, k, query_sum, key_sum)]
    first, second = jnp.split(_triangles(*halves, strict=strict), 2)
    top = jnp.concatenate([first, jnp.zeros_like(below)], -1)
    return jnp.concatenate([top, jnp.concatenate([below, second], -1)], -2)
