"""A sequence cut over the devices of a mesh axis: what enters a device's own shard of the time.

Inside `jax.shard_map`, within `along(axis)`, ops and layers are called with the tokens of one shard and give
what they would give for the whole sequence. One thing differs: the state they go on from. An op that is
affine in its state, s -> A s + f, computes A and f of its shard (its summary); the summaries of all are
gathered, and each device folds those before its own (`carried`); windows come from the left neighbour
(`passed`). The given initial state is that of the first shard. Everything is differentiable; gradients travel
back by the transposes of the collectives.

Outside of `along` every function here leaves its argument as it is.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import segment_starts
from pallas_kernels.phases import select


@dataclass(frozen=True)
class Axis:
    """The mesh axis that time is cut over, and those, manual too, that rows are cut over."""

    name: str
    size: int
    rows: tuple[str, ...] = ()

    @property
    def index(self) -> Array:
        """Which shard this device holds, `[]`."""
        return jax.lax.axis_index(self.name)

    def from_left(self, x: Any) -> Any:
        """The left neighbour's x; zeros on the first device."""
        pairs = [(i, i + 1) for i in range(self.size - 1)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.name, pairs), x)

    def from_right(self, x: Array) -> Array:
        """The right neighbour's x; zeros on the last device."""
        return jax.lax.ppermute(x, self.name, [(i + 1, i) for i in range(self.size - 1)])

    def of_last(self, x: Any) -> Any:
        """The last device's x, on all."""

        def one(a):
            there = jnp.where(self.index == self.size - 1, a, jnp.zeros_like(a))
            return jax.lax.psum(there, self.name).astype(a.dtype)

        return jax.tree.map(one, x)

    def gather(self, x: Any) -> Any:
        """All devices' x along a new first axis."""
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.name), x)


_axis: ContextVar[Axis | None] = ContextVar("sequence_axis", default=None)


def current() -> Axis | None:
    """The axis that time is cut over here, or None."""
    return _axis.get()


@contextmanager
def along(axis: Axis | None) -> Iterator[None]:
    """Within this context what is called holds one shard of the time; None: all of it."""
    token = _axis.set(axis)
    try:
        yield
    finally:
        _axis.reset(token)


def whole_length(steps: int) -> int:
    """Tokens of all shards, of which one has `steps`."""
    axis = current()
    return steps if axis is None else steps * axis.size


def mean(x: Any) -> Any:
    """The mean over all shards, of the time and of the batch, of each one's own mean."""
    axis = current()
    return x if axis is None else jax.lax.pmean(x, (axis.name, *axis.rows))


def continues(segment_ids: Array) -> Array:
    """`[B]` bool: the shard's first token goes on with the document of the token before; true on the first"""
    axis = current()
    if axis is None:
        return jnp.ones(segment_ids.shape[0], bool)
    return (axis.from_left(segment_ids[:, -1]) == segment_ids[:, 0]) | (axis.index == 0)


def starts(segment_ids: Array) -> Array:
    """`segment_starts`, and true at the first token of a shard whose left neighbour ended a document."""
    begin = segment_starts(segment_ids)
    return begin if current() is None else begin.at[:, 0].set(~continues(segment_ids))


def numbered(begins: Array) -> Array:
    """`[B,T]` int32: the running count of `begins [B,T]` over all shards."""
    count, axis = jnp.cumsum(begins, 1, dtype=jnp.int32), current()
    if axis is None:
        return count
    before = jnp.arange(axis.size)[:, None] < axis.index
    return count + jnp.sum(jnp.where(before, axis.gather(count[:, -1]), 0), 0)[:, None]


def following(x: Array) -> Array:
    """Every token's successor, `[B,T,...]`; zeros after the last one of all."""
    axis = current()
    after = jnp.zeros_like(x[:, 0]) if axis is None else axis.from_right(x[:, 0])
    return jnp.concatenate([x[:, 1:], after[:, None]], 1)


def passed(state: Any, last: Any, segment_ids: Array | None, empty: Any = None) -> Any:
    """The state that enters this shard, where it is `last`, made of the left neighbour's tokens alone.

    `state` enters the first shard, `empty` (zeros unless given) those that begin a document.
    """
    axis = current()
    if axis is None:
        return state
    empty = jax.tree.map(jnp.zeros_like, state) if empty is None else empty
    left = jax.tree.map(lambda a, s: a.astype(s.dtype), axis.from_left(last), state)
    if segment_ids is not None:
        left = select(continues(segment_ids), left, empty)
    return jax.tree.map(lambda s, a: jnp.where(axis.index == 0, s, a), state, left)


def carried(
    state: Any,
    segment_ids: Array | None,
    summary: Callable[[Any], tuple[Any, Any]],
    advance: Callable[[Any, Any], Any] = lambda transition, state: transition * state,
) -> Any:
    """The state that enters this shard, for `state` (leaves `[B,...]`) entering the first one.

    `summary(start) -> (transition, last)` of the shard's tokens: `advance(transition, s) + last` is the state
    after them if s entered and they are of one document, else `last`. On all shards but the first `start` is
    zero, as is the state at the start of a document.
    """
    axis = current()
    if axis is None or axis.size == 1:
        return state
    zero = jax.tree.map(jnp.zeros_like, state)
    start = jax.tree.map(lambda s, z: jnp.where(axis.index == 0, s, z), state, zero)
    one_document, goes_on = None, None
    if segment_ids is not None:
        one_document = ~jnp.any(segment_starts(segment_ids), 1)
        goes_on = continues(segment_ids)
    shards = axis.gather((summary(start), one_document))
    after = jnp.arange(axis.size)

    def visit(carry, inputs):
        place, (transition, last), through, on = inputs
        entered, own = carry
        moved = advance(transition, entered)
        moved = moved if through is None else select(through, moved, zero)
        left = jax.tree.map(lambda m, f, s: (m + f).astype(s.dtype), moved, last, state)
        left = left if on is None else select(on, left, zero)
        mine = axis.index == place + 1
        return (left, jax.tree.map(lambda a, o: jnp.where(mine, a, o), left, own)), None

    on = None if goes_on is None else jnp.roll(axis.gather(goes_on), -1, 0)
    inputs = after, shards[0], shards[1], on
    return jax.lax.scan(visit, (zero, state), jax.tree.map(lambda a: a[:-1], inputs))[0][1]


def with_columns(final: Callable[[Array, Array], Array], v: Array, start: Array) -> tuple[Array, Array]:
    """The summary of an op whose state `[B,H,...,V]` moves by a matrix: `([B,H,R,R], [B,H,...,V])`.

    `final(v, start)` is its last state. R identity columns that nothing is written to, beside V others, say
    where the shard takes each of the state's R rows.
    """
    rows, size = start.shape[2:-1], math.prod(start.shape[2:-1])
    identity = jnp.eye(size, dtype=start.dtype).reshape(*rows, size)
    identity = jnp.broadcast_to(identity, (*start.shape[:-1], size))
    nothing = jnp.zeros((*v.shape[:-1], size), v.dtype)
    last = final(jnp.concatenate([v, nothing], -1), jnp.concatenate([start, identity], -1))
    last, moved = jnp.split(last, [start.shape[-1]], -1)
    return moved.reshape(*moved.shape[:2], size, size), last


def carried_by_matrix(state: Array, segment_ids: Array | None, run: Callable, v: Array) -> Array:
    """`carried` for an op `run(v, state) -> (output, last)` whose state `[B,H,...,V]` moves by a matrix."""

    def summary(start):
        return with_columns(lambda v, start: run(v, start)[1], v, start)

    return carried(state, segment_ids, summary, through_matrix)


def through_matrix(transition: Array, state: Array) -> Array:
    """What `with_columns` says becomes of a state."""
    rows = state.reshape(*transition.shape[:-1], state.shape[-1])
    return jnp.matmul(transition, rows, precision=jax.lax.Precision.HIGHEST).reshape(state.shape)
