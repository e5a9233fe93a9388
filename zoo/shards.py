"""A layer on one shard of the time: in its parallel form where it has one for this, else by taking turns.

Turns: the state goes from device to device along the sequence, and each runs its tokens when the state
arrives. Rows are independent, so the batch is cut into M groups, and at tick t device d works on group t - d:
a pipeline over P devices that takes M + P - 1 ticks (as Huang et al. 2018, arXiv 1811.06965, over layers).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import get_abstract_mesh

from pallas_kernels import sequence
from pallas_kernels.phases import select
from zoo import registry
from zoo.pieces import Run

# Groups for each device: of M + P - 1 ticks a device idles in P - 1.
GROUPS = 4


def way(cfg: Any) -> str:
    """How a layer's Config works on a sequence cut over devices.

    "scan": summaries of all shards are gathered; "halo": a window comes from the left neighbour (or farther,
    then by "ring"); "ring": keys and values go round; "relay": devices take turns. The first three are for
    layers whose parts know how (`sequence_way` of the Config); everything else is relayed.
    """
    return getattr(cfg, "sequence_way", "relay")


def apply(
    run: Callable[..., Any], cfg: Any, x: Any, state: Any, **how: Any
) -> tuple[Any, Any, dict[str, Array]]:
    """`run(x, state, **how) -> (y, state, aux)` of the whole sequence, of which `x [B,T/P,...]` is a shard.

    `run` is the `apply` of a layer with the Config `cfg`, and x, y are what it takes and gives, arrays or
    trees of them. `state` is the same on all devices and enters the first shard; the one returned is what
    this shard leaves. Losses and diagnostics are means over all shards.
    """
    if sequence.current() is None:
        return run(x, state, **how)
    if way(cfg) == "relay":
        rest = {name: value for name, value in how.items() if name != "segment_ids"}

        def alone(x, state, ids):
            return run(x, state, segment_ids=ids, **rest)

        empty = registry.module(cfg).init_state(cfg, _rows(x))
        return relay(alone, empty, x, state, how.get("segment_ids"))
    y, state, aux = run(x, state, **how)
    return y, state, sequence.mean(aux)


def _rows(x: Any) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def in_turn(run: Run, empty: Any, x: Any, state: Any, segment_ids: Array | None):
    """`run(x, state, segment_ids)`, relayed where `x` is a shard."""
    if sequence.current() is None:
        return run(x, state, segment_ids)
    return relay(run, empty, x, state, segment_ids)


def groups_of(batch: int, devices: int) -> int:
    """Row groups of a batch: as many as divide it, up to `GROUPS` for each device.

    Rows that XLA cuts over other axes of the mesh stay together, one of each part.
    """
    mesh = get_abstract_mesh()
    together = math.gcd(batch, math.prod(mesh.shape[name] for name in mesh.auto_axes))
    return max(m for m in range(1, min(batch, GROUPS * devices) + 1) if batch // together % m == 0)


def _deal(x: Array, count: int) -> Array:
    """`[B,...]` as `[count, B / count, ...]`: group g has the rows g, g + count, ..."""
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _collect(x: Array) -> Array:
    """Inverse of `_deal`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def relay(run: Run, empty: Any, x: Any, state: Any, segment_ids: Array | None):
    """`run(x, state, segment_ids) -> (y, state, aux)` over shards in turn; arguments as in `pieces.apply`.

    A row group's tick is computed again in the backward pass, which keeps the states between the ticks.
    `aux` is the mean over groups and shards: a load-balancing loss is balanced within each.
    """
    axis = sequence.current()
    assert axis is not None
    count = groups_of(_rows(x), axis.size)
    begins = None if segment_ids is None else ~sequence.continues(segment_ids)
    rows = (x, empty if state is None else state, empty, segment_ids, begins)
    rows = jax.tree.map(lambda a: _deal(a, count), rows)

    @jax.checkpoint
    def tick(rows, carried, group, active):
        x, first, fresh, ids, begins = jax.tree.map(lambda a: a[group], rows)
        entered = jax.tree.map(lambda f, c: jnp.where(axis.index == 0, f, c), first, carried)
        entered = entered if begins is None else select(begins, fresh, entered)
        return _if(active, partial(_alone, run), x, entered, ids)

    def body(carry, time):
        carried, kept, total = carry
        group = jnp.clip(time - axis.index, 0, count - 1)
        active = group == time - axis.index
        *out, aux = tick(rows, carried, group, active)
        total = jax.tree.map(jnp.add, total, aux)
        return (axis.from_left(out[1]), _put(kept, tuple(out), group, active), total), None

    first = jax.tree.map(lambda a: a[0], rows)
    *out, aux = _zeros(partial(_alone, run), first[0], first[1], first[3])
    kept = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), tuple(out))
    ticks = jnp.arange(count + axis.size - 1)
    (_, (y, state), total), _ = jax.lax.scan(body, (out[1], kept, aux), ticks)
    y, state = jax.tree.map(_collect, (y, state))
    return y, state, sequence.mean(jax.tree.map(lambda a: a / count, total))


def _alone(run: Run, *inputs):
    """`run` on tokens that are all there is to it."""
    with sequence.along(None):
        return run(*inputs)


def _zeros(run: Callable, *inputs):
    """What `run(*inputs)` would give, as zeros."""
    return jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(run, *inputs))


def _if(active: Array, run: Callable, *inputs):
    """`run(*inputs)`, or zeros at no cost."""
    return jax.lax.cond(active, run, partial(_zeros, run), *inputs)


def _put(kept: Any, new: Any, group: Array, active: Array) -> Any:
    """`kept [M,...]` with `new` as its entry `group` where `active`."""

    def one(a, b):
        return jax.lax.dynamic_update_index_in_dim(a, jnp.where(active, b, a[group]), group, 0)

    return jax.tree.map(one, kept, new)
