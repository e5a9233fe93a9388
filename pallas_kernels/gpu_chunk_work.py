"""What a block does with a chunk of tokens and its columns of the state: linear attention, the delta rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_decay import ENDS, FIRST, IDS, LAST
from pallas_kernels.gpu_math import (
    BLOCK,
    COLUMNS,
    F32,
    ROWS,
    accumulate,
    across,
    as_left,
    column_numbers,
    columns,
    down,
    get,
    multiply,
    product,
    put,
    row_numbers,
    rows,
    settled,
    turned,
)

# Tiles of the chunk in work and shared memory beside them, at the moment (see `gpu_stream.nothing`).
Look = Callable[[], tuple[dict, dict]]


class Form(NamedTuple):
    """What the kernel computes."""

    reverse: bool = False
    strict: bool = False  # j < i
    keep_columns: bool = False  # `keep` is per column of the state
    kept: bool = False  # states are wanted every KEPT_EVERY chunks
    dtype: Any = F32  # of o


def _visible(tiles: dict, scratch: dict, form: Form) -> Array:
    """Which tokens of a chunk (columns) each of them (rows) sees."""
    own, other = row_numbers(), column_numbers(scratch["numbers"])
    if form.reverse:
        visible = other > down(own) if form.strict else other >= down(own)
    else:
        visible = other < down(own) if form.strict else other <= down(own)
    if "marks" not in tiles:
        return visible
    edge = down(plgpu.load(tiles["marks"].at[LAST if form.reverse else FIRST], layout=ROWS))
    return visible & (other <= edge if form.reverse else other >= edge)


def pair_decay(tiles: dict, scratch: dict, form: Form) -> Array:
    """Decay between tokens of a chunk, 0 where one does not see the other."""
    coarse, fine = (
        down(plgpu.load(total, layout=ROWS)) - across(plgpu.load(total, layout=COLUMNS))
        for total in (tiles["total"].at[n] for n in (0, 1))
    )
    exponent = coarse + fine
    visible = _visible(tiles, scratch, form)
    return jnp.exp(jnp.where(visible, -exponent if form.reverse else exponent, -jnp.inf))


class StateDecay(NamedTuple):
    read: Array  # of what tokens read from the state, [64]
    write: Array  # of what they write to it, [64]
    keep: Array  # of itself


def state_decay(tiles: dict, form: Form) -> StateDecay:
    coarse, fine = (plgpu.load(tiles["total"].at[n], layout=ROWS) for n in (0, 1))
    ends = [tiles["total"][n, BLOCK - 1] for n in (0, 1)]
    write = jnp.exp((ends[0] - coarse) + (ends[1] - fine))
    read, keep = jnp.exp(coarse + fine), jnp.exp(ends[0] + ends[1])
    if form.reverse:
        read, write = write, read
    if "marks" in tiles:
        ids = plgpu.load(tiles["marks"].at[IDS], layout=ROWS)
        enter, leave = tiles["marks"][ENDS, 0], tiles["marks"][ENDS, 1]
        if form.reverse:
            enter, leave = leave, enter
        read, write = jnp.where(ids == enter, read, 0), jnp.where(ids == leave, write, 0)
        keep = jnp.where(enter == leave, keep, 0)
    return StateDecay(read, write, keep)


def _kept_part(tiles: dict, form: Form, block: int) -> Array:
    """What stays of block number `block` of the state, with decay per channel."""
    if form.keep_columns:
        return across(plgpu.load(tiles["keep"], layout=COLUMNS))
    return down(plgpu.load(tiles["keep"].at[pl.ds(BLOCK * block, BLOCK)], layout=ROWS))


def write_state(
    look: Look, form: Form, state: list[Array], keep: Array | None, writers: dict[str, Callable[[], list]]
) -> list[Array]:
    """The state that leaves: what stays, and the products of keys, by name in `writers`, with their values.

    `keep` is for the whole state with decay per head, None with decay per channel.
    """
    after = []
    for n, block in enumerate(state):
        tiles, _ = look()
        stays = _kept_part(tiles, form, n) if keep is None else keep
        written: list = []
        for name, values in writers.items():
            written += product(turned(columns(tiles[name], n)), values())
        after.append(accumulate(block * stays, written))
    return after


def put_state(scratch: dict, state: list[Array]) -> None:
    for n, block in enumerate(state):
        put(rows(scratch["state"], n), block)


def head_output(look: Look, form: Form, state: list[Array]) -> Array:
    """`o` of one chunk with decay per head."""
    tiles, scratch = look()
    put_state(scratch, state)
    (scores,) = multiply(product(tiles["query"], turned(tiles["key"])))
    scores = scores * pair_decay(tiles, scratch, form)
    left = as_left(scores, len(tiles["value"]), scratch.get("left"))
    plgpu.commit_smem()
    tiles, scratch = look()
    carried, within = multiply(product(tiles["query"], scratch["state"]), product(left, tiles["value"]))
    return settled(carried * down(state_decay(tiles, form).read) + within)


def channel_output(look: Look, form: Form, state: list[Array]) -> Array:
    """The same with decay per channel, which q, k and the scores of pairs hold already."""
    tiles, scratch = look()
    put_state(scratch, state)
    plgpu.commit_smem()
    sums = product(tiles["query"], scratch["state"])
    for pairs, values in (("pairs", "value"), ("other_pairs", "other_value")):
        if pairs in tiles:
            left = turned(tiles[pairs]) if form.reverse else tiles[pairs]
            sums += product(left, tiles[values])
    return multiply(sums)[0]


def linear_chunk(look: Look, form: Form, state: list[Array], emit: Callable) -> list[Array]:
    """The state that leaves a chunk of linear attention; `emit` takes o, where there is a query, and what
    puts more into shared memory."""
    tiles, _ = look()
    head, out = "total" in tiles, None
    if "query" in tiles:
        out = (head_output if head else channel_output)(look, form, state)
    if not head:
        emit(out, lambda: None)
        writers = {"key": lambda: look()[0]["value"]}
        if "other_key" in tiles:
            writers["other_key"] = lambda: look()[0]["other_value"]
        return write_state(look, form, state, None, writers)
    decay = state_decay(look()[0], form)

    def write():
        tiles, scratch = look()
        put(scratch["write"], get(tiles["value"]) * down(decay.write))

    emit(out, write)
    return write_state(look, form, state, decay.keep, {"key": lambda: look()[1]["write"]})


def _solve(look: Look, wrong: Array, *, turn: bool = False) -> Array:
    """`(I + A)^{-1} wrong`, or with its transpose."""
    tiles, scratch = look()
    right = scratch["wrong"][: len(tiles["inverse"])]
    put(right, wrong)
    plgpu.commit_smem()
    return settled(multiply(product(turned(tiles["inverse"]) if turn else tiles["inverse"], right))[0])


def _written(look: Look, first: int) -> list:
    """Values as they are written to the state, in what `_solve` has left."""
    tiles, scratch = look()
    parts = len(tiles["value"])
    return scratch["wrong"][first * parts : (first + 1) * parts]


def correct_chunk(look: Look, form: Form, state: list[Array], emit: Callable) -> list[Array]:
    """The state that leaves a chunk of the delta rule: q is what recalls, v the values; the corrections go to
    `emit`, D = (I + A)^{-1} (v - (p e^G) S).

    With another key it is that one that writes v, of which `pairs` is what p recalls from within the chunk:
    D = -(I + A)^{-1} (A_pk v + (p e^G) S), with decay per channel.
    """
    recalled = channel_output(look, form, state)
    tiles, _ = look()
    decay = state_decay(tiles, form) if "total" in tiles else None
    if decay is not None:
        recalled = recalled * down(decay.read)
    tiles, _ = look()
    apart = "other_key" in tiles
    delta = _solve(look, -recalled if apart else settled(get(tiles["value"]) - recalled))
    emit(delta, lambda: put(_written(look, 0), delta if decay is None else delta * down(decay.write)))
    writers = {"key": lambda: _written(look, 0)}
    if apart:
        writers["other_key"] = lambda: look()[0]["value"]
    return write_state(look, form, state, None if decay is None else decay.keep, writers)


def correct_back_chunk(look: Look, form: Form, state: list[Array], emit: Callable) -> list[Array]:
    """From the right, with k, q and do for q, k and v, and p for what recalls: dU = (I + A)^{-T} dD goes to
    `emit`, and the state's cotangent is that of linear attention less (p e^G)^T dU."""
    head = "total" in look()[0]
    out = (head_output if head else channel_output)(look, form, state)
    back = _solve(look, out, turn=True)
    decay = state_decay(look()[0], form) if head else None

    def write():
        if decay is None:
            put(_written(look, 0), -back)
            return
        put(_written(look, 0), back * down(-decay.write))
        put(_written(look, 1), get(look()[0]["value"]) * down(decay.write))

    emit(back, write)
    values = (lambda: look()[0]["value"]) if decay is None else (lambda: _written(look, 1))
    writers = {"key": values, "recall": lambda: _written(look, 0)}
    return write_state(look, form, state, None if decay is None else decay.keep, writers)
