"""The state that a language model begins a training batch with: `initial_state` of a `Run`.

    zero        the empty one: no row has a past
    carried     the one the batch before ended with, row by row: where row i of a batch goes on where row i of
                the one before stopped, truncated back-propagation through time; else a past from other text
    shuffled    the same, dealt out to the rows by a permutation drawn anew for every batch
    gaussian    every number in it normal with mean 0 and standard deviation `state_scale`

No gradient passes from a batch to the one before. The first batch, and the one after a batch whose loss or
gradient was not finite, begins with the empty state. Evaluation always does. In packed documents the state
belongs to the first document of a row, and the one passed on to the last.

Models that only ever met the states of short texts can fail on long ones; these are ways to show them others.
Source: Buitrago and Gu 2025 (arXiv 2507.02782), whose state passing begins with the final state of another
sequence: "shuffled" here, or "carried" on rows in random order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from experiments.config import Run
from layers.checks import require
from zoo import lm

ROWS = 1  # the axis of the batch in a model's state: blocks are stacked before it


@struct.dataclass
class Passed:
    """What one batch leaves to the next; part of the training state, and so of every checkpoint."""

    key: Array  # of the run, as plain numbers
    last: Any  # the state the batch before ended with; None where nothing is kept of it


def check(run: Run) -> None:
    """ValueError where a state is to be passed and the model is none of language."""
    ok = run.initial_state == "zero" or isinstance(run.model, lm.Config)
    kind = type(run.model).__module__.rpartition(".")[2]
    require(
        ok, f"initial_state={run.initial_state!r} is for language models: the rows of a {kind} have no past"
    )


def first(run: Run, key: Array) -> Passed | None:
    """Before the first batch of the run whose parameters come of `key`; None where every state is empty."""
    if run.initial_state == "zero":
        return None
    noise = run.initial_state == "gaussian"
    last = None if noise else lm.init_state(run.model, run.batch_size)
    return Passed(jax.random.key_data(jax.random.fold_in(key, 1)), last)


def begin(run: Run, passed: Passed | None, step: Array) -> Any:
    """The state that batch number `step` begins with; None for the empty one."""
    if passed is None:
        return None
    key = jax.random.fold_in(jax.random.wrap_key_data(passed.key), step)
    if run.initial_state == "shuffled":
        order = jax.random.permutation(key, run.batch_size)
        return jax.tree.map(lambda x: jnp.take(x, order, ROWS), passed.last)
    if run.initial_state == "gaussian":
        return noise(key, lm.init_state(run.model, run.batch_size), run.state_scale)
    return passed.last


def noise(key: Array, state: Any, scale: float) -> Any:
    """`state` with normal numbers of standard deviation `scale` in it; whole numbers, which count, stay."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        scale * jax.random.normal(k, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def keep(run: Run, passed: Passed | None, last: Any, ok: Array) -> Passed | None:
    """After a batch that ended with the state `last`, and was fit to learn from if `ok`."""
    if passed is None or passed.last is None:
        return passed
    empty = lm.init_state(run.model, run.batch_size)
    last = jax.tree.map(lambda x, e: jnp.where(ok, x, e).astype(e.dtype), last, empty)
    return Passed(passed.key, last)


def cut(state: Any, parts: int) -> Any:
    """The rows of a state in so many parts, one after the other along a new first axis."""

    def of(x: Array) -> Array:
        before, rows, after = x.shape[:ROWS], x.shape[ROWS], x.shape[ROWS + 1 :]
        return jnp.moveaxis(x.reshape(*before, parts, rows // parts, *after), ROWS, 0)

    return jax.tree.map(of, state)


def join(state: Any) -> Any:
    """What was `cut`, in one again."""

    def of(x: Array) -> Array:
        apart = jnp.moveaxis(x, 0, ROWS)
        rows = apart.shape[ROWS] * apart.shape[ROWS + 1]
        return apart.reshape(*apart.shape[:ROWS], rows, *apart.shape[ROWS + 2 :])

    return jax.tree.map(of, state)
