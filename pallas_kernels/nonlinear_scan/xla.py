"""Chunks that are recomputed in the backward pass: only the states at their starts are kept.

A chunk of about sqrt(T) tokens balances the states kept against what one chunk's cells keep for themselves.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import join_time, scan_tokens, split_time

SMALLEST = 16


def chunk_for(length: int) -> int:
    """About sqrt(T) tokens, a power of two; short sequences are one chunk."""
    return length if length <= SMALLEST else max(SMALLEST, 1 << ((length - 1).bit_length() + 1) // 2)


def nonlinear_scan(cell, state, inputs, segment_ids=None, reset_state=None):
    """Chunk by chunk; arguments as those of `scan_tokens`."""
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    chunk = chunk_for(length)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    real = jnp.ones((batch, length), bool)
    fresh = jax.tree.map(jnp.zeros_like, state) if reset_state is None else reset_state

    def where(mask, yes, no):
        return jax.tree.map(lambda y, n: jnp.where(mask.reshape(-1, *[1] * (n.ndim - 1)), y, n), yes, no)

    def token(state, inputs_t):
        new, y = cell(state, inputs_t[0])
        # Padding leaves the state as it is.
        return where(inputs_t[1], new, state) if length % chunk else new, y

    @jax.checkpoint
    def run_chunk(carry, chunk_inputs):
        state, last_id = carry
        inputs, real, ids = chunk_inputs
        if segment_ids is not None:
            state = where(ids[:, 0] != last_id, fresh, state)
        y, state = scan_tokens(token, state, (inputs, real), None if segment_ids is None else ids, fresh)
        return (state, ids[:, -1]), y

    cut = jax.tree.map(lambda x: split_time(x, chunk), (inputs, real))
    (state, _), y = jax.lax.scan(run_chunk, (state, ids[:, 0]), (*cut, split_time(ids, chunk, edge=True)))
    return jax.tree.map(lambda y: join_time(y, length), y), state
