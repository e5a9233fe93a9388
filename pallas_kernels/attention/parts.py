"""One softmax over keys from several sources: each source gives its own mean and the log of its sum."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Part(NamedTuple):
    """What queries read from one source of keys; zeros and -inf where they see none."""

    out: Array  # [..., H, V] softmax-weighted mean of its values
    lse: Array  # [..., H] log of the sum of exponentials of its logits


def weigh(logits: Array) -> tuple[Array, Array]:
    """Softmax over the last axis and the log of its sum; zeros and -inf where every logit is -inf."""
    some = jnp.any(logits > -jnp.inf, -1, keepdims=True)
    # Masked before the exponential: no gradient is 0 times inf.
    logits = jnp.where(some, logits, 0)
    weights = jnp.where(some, jax.nn.softmax(logits, -1), 0)
    return weights, jnp.where(some[..., 0], jax.nn.logsumexp(logits, -1), -jnp.inf)


def combine(parts: Sequence[Part]) -> Part:
    """The softmax over all keys of all parts together, as one part."""
    weights, lse = weigh(jnp.stack([part.lse for part in parts], -1))
    return Part(jnp.einsum("...p,...pv->...v", weights, jnp.stack([part.out for part in parts], -2)), lse)


def merge(parts: Sequence[Part], null: Array | None = None) -> Array:
    """`[..., H, V]`: the softmax over all keys of all parts together.

    `null [H]` is one more logit per head, with a value of zero. Some part, or `null`, must have seen a key.
    """
    lse = [part.lse for part in parts]
    if null is not None:
        lse.append(jnp.broadcast_to(null.astype(lse[0].dtype), lse[0].shape))
    weights = jax.nn.softmax(jnp.stack(lse, -1), -1)
    out = jnp.stack([part.out for part in parts], -2)
    return jnp.einsum("...p,...pv->...v", weights[..., : len(parts)], out)
