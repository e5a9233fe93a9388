"""Decay per key channel inside a chunk, as a Hopper kernel: scores of pairs of tokens.

    A_ij = sum_k q_ik k_jk e^{G_ik - G_jk},  j <= i

With a decay of its own for every channel the exponent stays inside the sum, and e^{G_i} e^{-G_j} would
overflow. The triangle is halved again and again instead: the square below the diagonal of a block of two
halves factors around the last token of the early one, both factors being e to a sum of log decays between a
token and that one. Such sums are products with matrices of 0 and 1, which stay in shared memory, so that
none is a difference; each of the six levels is then one product of whole 64 x 64 tiles, of which the squares
count.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chunk_work import Look
from pallas_kernels.gpu_decay import ENDS, IDS
from pallas_kernels.gpu_math import (
    BF16,
    BLOCK,
    F32,
    ROWS,
    as_left,
    column_numbers,
    down,
    get,
    left_scratch,
    multiply,
    number,
    product,
    put,
    row_numbers,
    settled,
    shared_tile,
    turned,
    zeros,
)
from pallas_kernels.gpu_steps import LEVELS, Run, now, of_document, send, square
from pallas_kernels.gpu_stream import call, loop, nothing, stages_for, stream

READ, WRITE = LEVELS, LEVELS + 1  # numbers of the masks after those of the levels
SEVERAL = "masks", "right"  # in the scratch


class Reader(NamedTuple):
    """Who reads: q of linear attention, q and p of the delta rule. Parts as in `gpu_math`."""

    query: tuple[Array, ...]  # [B,T,Hq,K]
    strict: bool = False  # not what is written at the same token
    before: bool = False  # before the decay of its token: G_i without that one


class Scored(NamedTuple):
    """Operands for `gpu_chunks.attend`."""

    pairs: list[tuple[Array, ...]]  # [B,H,T,64] of each reader with each key
    queries: list[tuple[Array, ...]]  # [B,T,H,K] with the decay since the chunk's beginning
    keys: list[tuple[Array, ...]]  # [B,T,H,K] with the decay until the chunk's end; [] if not wanted


def put_masks(scratch: dict, before: bool) -> None:
    """Which tokens (columns) lie between each token (row) and its pivot, level by level; which are not after
    it; which are. Readers that read `before` their token's decay leave out that token."""
    number(scratch["numbers"])

    def seen(i, t):
        return t < i if before else t <= i

    def put_level(level, carry):
        i, t = down(row_numbers()), column_numbers(now(scratch, SEVERAL)["numbers"])
        half = lax.shift_left(jnp.int32(1), level)
        pivot = lax.bitwise_or(i, 2 * half - 1) - half
        between = ((t > pivot) & seen(i, t)) | ((t > i) & (t <= pivot))
        put([scratch["masks"].at[level]], between.astype(F32))
        return carry

    loop(LEVELS, put_level, ())
    i, t = down(row_numbers()), column_numbers(now(scratch, SEVERAL)["numbers"])
    put([scratch["masks"].at[READ]], seen(i, t).astype(F32))
    put([scratch["masks"].at[WRITE]], (t > i).astype(F32))
    plgpu.commit_smem()


def level_decay(tiles: dict, scratch: dict, level: Any) -> Array:
    (total,) = multiply(product([scratch["masks"].at[level + nothing()]], tiles["decay"]))
    return jnp.exp(total)


def state_decay(tiles: dict, scratch: dict, mask: int) -> Array:
    """Decay since the chunk's beginning (READ) or until its end (WRITE), 0 for tokens that the state on that
    side is not of."""
    decay = level_decay(tiles, scratch, mask)
    if "marks" not in tiles:
        return decay
    own = plgpu.load(tiles["marks"].at[IDS], layout=ROWS) == tiles["marks"][ENDS, 0 if mask == READ else 1]
    return decay * down(own.astype(F32))


def turn_of(rooms: Sequence[Any], level: Array) -> list:
    """Room for a level's right operand: what the last level wrote there may still be in use."""
    count = rooms[0].shape[0]
    if count == 1:
        plgpu.commit_smem()
    return [room.at[lax.rem(level, jnp.int32(count)) + nothing()] for room in rooms]


def rights(parts: int, operands: int) -> list:
    """Room for the right operands of two levels, or of one where there is no more: that of one operand."""
    if parts == 1:
        return [[shared_tile(BLOCK, BLOCK, count=2)] for _ in range(operands)]
    return [[shared_tile(BLOCK, BLOCK)] * parts]


def channel_scratch(lefts: int, parts: int) -> dict:
    scratch: dict = {
        "numbers": plgpu.SMEM((1, BLOCK), jnp.int32),
        "masks": shared_tile(BLOCK, BLOCK, count=LEVELS + 2),
    }
    if left_scratch(parts):
        scratch["left"] = [left_scratch(parts) for _ in range(lefts)]
    return scratch


def _add_levels(look: Look, keys: Sequence[int], pairs: list[Array]) -> list[Array]:
    """`pairs` with the scores of 64 channels of some `keys` added, all but the diagonals."""

    def add(level, pairs):
        tiles, scratch = look()
        decay, early = level_decay(tiles, scratch, level), []
        for n, rooms in zip(keys, scratch["right"], strict=True):
            early.append(turn_of(rooms, level))
            put(early[-1], get(tiles["keys"][n]) * decay)
        lefts = [
            as_left(get(query) * decay, len(query), scratch["left"][m] if "left" in scratch else None)
            for m, query in enumerate(tiles["queries"])
        ]
        plgpu.commit_smem()
        products = multiply(*[product(left, turned(right)) for right in early for left in lefts])
        chosen = square(scratch["numbers"], level)
        return [x + jnp.where(chosen, y, 0) for x, y in zip(pairs, products, strict=True)]

    return loop(LEVELS, add, pairs)


def _add_diagonals(tiles: dict, scratch: dict, pairs: list[Array], strict: Sequence[bool]) -> list[Array]:
    same, after = down(row_numbers()) == column_numbers(scratch["numbers"]), []
    for n, x in enumerate(pairs):
        key, m = divmod(n, len(strict))
        if not strict[m]:
            (plain,) = multiply(product(tiles["queries"][m], turned(tiles["keys"][key])))
            x = settled(x + jnp.where(same, plain, 0))
        after.append(x)
    return after


def _score_kernel(refs: dict, outputs: dict, scratch: dict, run: Run, readers: Sequence[Reader]) -> None:
    put_masks(scratch, readers[0].before)
    strict = [reader.strict for reader in readers]
    keys, at_once = range(len(refs["keys"])), len(scratch["right"])
    sources = {name: jax.tree.map(run.source, refs[name]) for name in ("queries", "keys", "decay")}
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])

    def step(i, tiles, pairs):
        chunk, block = run.step(i)

        def look():
            return tiles(), now(scratch, SEVERAL)

        pairs = [x * (block > 0).astype(F32) for x in pairs]
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            own = slice(first * len(strict), (first + len(some)) * len(strict))
            pairs[own] = _add_levels(look, some, pairs[own])
        pairs = _add_diagonals(*look(), pairs, strict)
        _send_operands(look, outputs, run, chunk, block)

        @pl.when(block == run.width // BLOCK - 1)
        def _():
            tiles, own = look()
            for x, target in zip(pairs, outputs["pairs"], strict=True):
                x = of_document(tiles, own["numbers"], x, turn=False)
                send(own["out"][: len(target)], [run.per_head(y, chunk) for y in target], x)

        plgpu.commit_smem()
        return pairs

    stages = stages_for(scratch, sources, run.blocks)
    stream(run.steps, stages, sources, step, [zeros() for _ in outputs["pairs"]])
    plgpu.wait_smem_to_gmem(0)


def _send_operands(look: Look, outputs: dict, run: Run, chunk: Array, block: Array) -> None:
    """Queries and keys as the state meets them."""
    for name, mask in (("queries", READ), ("keys", WRITE)):
        if not outputs[name]:
            continue
        tiles, own = look()
        decay = state_decay(tiles, own, mask)
        for operand, target in zip(tiles[name], outputs[name], strict=True):
            places = [run.tokens(x, chunk, block) for x in target]
            send(own["out"][: len(target)], places, get(operand) * decay)


def score(
    readers: Sequence[Reader],
    keys: Sequence[tuple],
    decay: tuple,
    marks: Array | None,
    *,
    keys_wanted: bool = True,
) -> Scored:
    """Scores of every chunk, and queries and keys as the state meets them; `decay [B,T,H,K]` in parts.

    Readers agree on `before`, and there is one of them or one key. Scores of a strict reader with the first
    key, which are going to be inverted, come in as many parts as the decay.
    """
    batch, length, heads, width = decay[0].shape
    parts, run = len(keys[0]), Run.of(batch, heads, length, width)
    wide = [jax.ShapeDtypeStruct((batch, length, heads, width), BF16)] * parts
    pair = jax.ShapeDtypeStruct((batch, heads, length, BLOCK), BF16)
    scores = [
        [pair] * (len(decay) if reader.strict and n == 0 else parts)
        for n in range(len(keys))
        for reader in readers
    ]
    outputs = {
        "pairs": scores,
        "queries": [wide for _ in readers],
        "keys": [wide for _ in keys] if keys_wanted else [],
    }
    scratch = channel_scratch(len(readers), parts) | {"right": rights(parts, len(keys))}
    scratch["out"] = [shared_tile(BLOCK, BLOCK)] * max(map(len, scores))
    inputs = {"queries": [reader.query for reader in readers], "keys": keys, "decay": decay, "marks": marks}

    def kernel(ins, outs, scratch):
        _score_kernel(ins, outs, scratch, run, readers)

    results = call(kernel, "channel_scores", run.grid, inputs, outputs, scratch)
    return Scored(*([tuple(x) for x in results[name]] for name in ("pairs", "queries", "keys")))
