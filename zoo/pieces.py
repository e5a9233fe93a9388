"""A long sequence piece by piece: the backward pass keeps states, not what a layer makes of its tokens.

Every layer goes on where its state stopped, so T tokens are T/P times P tokens. With each piece under
`jax.checkpoint`, only the states between pieces and the inputs are kept; the rest is computed again when
its gradient is due, one piece at a time (Chen et al. 2016, arXiv 1604.06174). Values and gradients are those
of the whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import join_time, split_time
from pallas_kernels.phases import select

Run = Callable[[Any, Any, Array | None], tuple[Array, Any, dict[str, Array]]]


def _visit(run: Run, empty, state, last: Array | None, x: Any, ids: Array | None):
    """One piece after the token of segment `last [B]`: `(state, y, aux)`."""
    if ids is not None and last is not None:
        state = select(ids[:, 0] != last, empty, state)
    y, state, aux = run(x, state, ids)
    return state, y, aux


def apply(run: Run, empty, x: Any, state, segment_ids: Array | None, piece: int):
    """`run` over `x [B,T,...]` in pieces of `piece` tokens, the last one shorter: `(y, state, aux)`.

    x is an array, or a tree of them.
    `run(x, state, segment_ids) -> (y, state, aux)` is a layer's or a block's `apply`, `empty` its empty
    state, which `state` None stands for; states have leaves `[B, ...]`. What a document leaves behind at the
    end of a piece is dropped where the next piece begins with another id. `aux` is the pieces' mean, weighed
    by their tokens: a load-balancing loss is balanced within each piece.
    """
    length = jax.tree.leaves(x)[0].shape[1]
    whole = length - length % piece
    visit = jax.checkpoint(lambda *inputs: _visit(run, empty, *inputs))
    last = None if segment_ids is None else segment_ids[:, 0]

    def body(carry, inputs):
        state, y, aux = visit(*carry, *inputs)
        ids = inputs[1]
        return (state, None if ids is None else ids[:, -1]), (y, aux)

    cut = jax.tree.map(lambda a: split_time(a[:, :whole], piece), (x, segment_ids))
    carry, (y, aux) = jax.lax.scan(body, (empty if state is None else state, last), cut)
    y = jax.tree.map(lambda a: join_time(a, whole), y)
    aux = jax.tree.map(lambda a: jnp.mean(a, 0), aux)
    if whole == length:
        return y, carry[0], aux
    rest = jax.tree.map(lambda a: a[:, whole:], (x, segment_ids))
    state, y_rest, aux_rest = visit(*carry, *rest)
    share = whole / length
    aux = jax.tree.map(lambda a, b: share * a + (1 - share) * b, aux, aux_rest)
    y = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), y, y_rest)
    return y, state, aux
