"""The definition: one token, and its scan."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_update.fast_weights import FastWeights, Rule, Tokens, close_chunk, network
from pallas_kernels.chunks import scan_tokens


def step(fast: FastWeights, token: Tokens, *, fresh: FastWeights, rule: Rule):
    """`q, k [B,H,K]`, `v [B,H,V]`, `rate [B,H,3]`, `momentum [B,H]` or None."""
    out = network(fast.weights, token.q[:, :, None])[:, :, 0]

    def agreement(weights):
        return jnp.sum(network(weights, token.k[:, :, None])[:, :, 0] * token.v)

    gradient = tuple(
        old + token.rate[..., i, None, None] * g
        for i, (old, g) in enumerate(zip(fast.gradient, jax.grad(agreement)(fast.weights), strict=True))
    )
    momentum = () if token.momentum is None else (fast.momentum[0] + token.momentum,)
    fast = replace(fast, gradient=gradient, momentum=momentum, phase=fast.phase + 1)
    return close_chunk(fast, fresh, rule), out


def chunk_update(fresh, tokens: Tokens, fast, segment_ids, rule: Rule):
    """Token by token; `fresh` is the state at the start of a document, `fast` the carried one or None."""
    body = partial(step, fresh=fresh, rule=rule)
    return scan_tokens(body, fresh if fast is None else fast, tokens, segment_ids, fresh)
