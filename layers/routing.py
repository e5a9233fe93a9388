"""Routing: every token goes to a few of several memories or experts, with weights that sum to one."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import sequence


def route(logits: Array, k: int, renormalise: bool = True) -> tuple[Array, Array, Array]:
    """Weights, choices and probabilities of one token or many, each `[..., M]` as the logits are.

    With p = softmax(logits) the k largest p are chosen and, unless told otherwise, scaled to sum to one; the
    other weights are 0.
    """
    probabilities = jax.nn.softmax(logits)
    weights, chosen = chosen_weights(probabilities, probabilities, k, renormalise)
    return weights, chosen, probabilities


def chosen_weights(p: Array, scores: Array, k: int, renormalise: bool = True) -> tuple[Array, Array]:
    """p where one of the k largest `scores` is, else 0, and where that is; all `[..., M]`."""
    _, best = jax.lax.top_k(scores, k)
    chosen = jnp.any(best[..., None] == jnp.arange(p.shape[-1]), -2)
    weights = jnp.where(chosen, p, 0)
    return weights / jnp.sum(weights, -1, keepdims=True) if renormalise else weights, chosen


def balance(chosen: Array, probabilities: Array) -> tuple[Array, Array, Array]:
    """`M * sum_m f_m p_m`, f and p `[M]`, over all tokens of `chosen` and `probabilities`, `[..., M]`.

    f_m is the fraction of tokens that chose m, p_m its mean probability; at even load the loss is the number
    of choices of a token. Only p has a gradient. Shazeer et al. 2017 (arXiv 1701.06538), Fedus et al. 2021
    (arXiv 2101.03961) eq. 4-6.
    """
    tokens = tuple(range(chosen.ndim - 1))
    load, share = (
        sequence.mean(jnp.mean(x, tokens, dtype=probabilities.dtype)) for x in (chosen, probabilities)
    )
    return probabilities.shape[-1] * jnp.sum(load * share), load, share
