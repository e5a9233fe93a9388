"""The definition: one token, and its scan."""

from jax import Array

from pallas_kernels.chunks import scan_tokens


def step(state: Array, a: Array, b: Array) -> Array:
    """One token. `state, b [B,...]`, `a [B,...]` or `[...]`."""
    return a * state + b


def diagonal_scan(a, b, state, segment_ids=None):
    """Token by token; `b [B,T,...]`, `a` of b's shape or without B and T."""
    constant = a.ndim == b.ndim - 2

    def token(state, inputs):
        state = step(state, a if constant else inputs[1], inputs[0])
        return state, state

    return scan_tokens(token, state, (b,) if constant else (b, a), segment_ids)
