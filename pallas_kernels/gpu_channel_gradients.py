"""Gradients through the scores of `gpu_channels`, as Hopper kernels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_channels import (
    READ,
    SEVERAL,
    WRITE,
    Reader,
    channel_scratch,
    level_decay,
    put_masks,
    rights,
    state_decay,
    turn_of,
)
from pallas_kernels.gpu_math import (
    BF16,
    BLOCK,
    F32,
    TILE,
    as_left,
    column_numbers,
    down,
    get,
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


class Cotangents(NamedTuple):
    """What flows back into a reader's part of a chunk."""

    pairs: tuple[Array, Array]  # of `pair_gradients`
    from_state: Array  # [B,T,H,K] float32: the query's gradient through the state, without the decay
    key_from_state: Array  # [B,T,H,K] float32: the key's


class Gradients(NamedTuple):
    query: Array  # [B,T,H,K]
    key: Array  # [B,T,H,K]
    decay: Array  # [B,T,H,K] float32, of log decay, from the chunk itself


def _pair_kernel(refs: dict, outputs: list, scratch: dict, run: Run) -> None:
    number(scratch["numbers"])
    sources = {
        name: jax.tree.map(lambda ref: run.source(ref, 0, ref.shape[3]), refs[name])
        for name in ("left", "right")
    }
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])

    def step(i, tiles, carry):
        chunk, _ = run.step(i)
        for target, names in zip(outputs, (("left", "right"), ("right", "left")), strict=True):
            at, own = tiles(), now(scratch)
            (pairs,) = multiply(product(at[names[0]], turned(at[names[1]])))
            pairs = of_document(at, own["numbers"], pairs, turn=names[0] == "right")
            send([own["wide"]], [run.per_head(target, chunk)], pairs)
        plgpu.commit_smem()
        return carry

    stream(run.steps, stages_for(scratch, sources, run.blocks), sources, step, ())
    plgpu.wait_smem_to_gmem(0)


def pair_gradients(left: tuple, right: tuple, marks: Array | None) -> tuple[Array, Array]:
    """Of scores, from the cotangent `left [B,T,H,V]` of what is read and `right`, what was written: the
    products of tokens of one chunk and document, `[B,H,T,64]` float32, and the same transposed."""
    batch, length, heads, _ = left[0].shape
    run = Run.of(batch, heads, length)
    scratch = {"numbers": plgpu.SMEM((1, BLOCK), jnp.int32), "wide": shared_tile(BLOCK, BLOCK, F32)}
    outputs = [jax.ShapeDtypeStruct((batch, heads, length, BLOCK), F32)] * 2

    def kernel(ins, outs, scratch):
        _pair_kernel(ins, outs, scratch, run)

    inputs = {"left": left, "right": right, "marks": marks}
    pairs, transposed = call(kernel, "pair_gradients", run.grid, inputs, outputs, scratch)
    return pairs, transposed


def _through_levels(look: Callable[[], tuple[dict, dict]], pairs: Any, sides: Sequence[int]) -> list:
    """Gradients of query (side 0) and key (side 1) from those of their scores, but the diagonal."""

    def add(level, sums):
        tiles, scratch = look()
        decay, after = level_decay(tiles, scratch, level), []
        for side, before in zip(sides, sums, strict=True):
            operand, right = tiles["query" if side else "key"], turn_of(scratch["right"][side], level)
            spare = scratch["left"][side] if "left" in scratch else None
            put(right, get(operand) * decay)
            chosen = jnp.where(square(scratch["numbers"], level, turn=bool(side)), pairs[side], 0)
            left = as_left(chosen.astype(F32), len(right), spare)
            plgpu.commit_smem()
            (added,) = multiply(product(left, right))
            after.append(settled(before + decay * added))
        return after

    return loop(LEVELS, add, [zeros() for _ in sides])


def _within(
    look: Callable[[], tuple[dict, dict]], load: Callable[[int], Array], *, strict: bool
) -> list[Array]:
    """Gradients of query and key from within the chunk; `load(side)` those of their scores."""
    if len(look()[0]["key"]) == 1:
        sums = _through_levels(look, [load(side).astype(BF16) for side in (0, 1)], (0, 1))
    else:  # one after the other: registers do not suffice for both
        sums = [_through_levels(look, {side: load(side)}, (side,))[0] for side in (0, 1)]
    if strict:
        return sums
    tiles, scratch = look()
    same = down(row_numbers()) == column_numbers(scratch["numbers"])
    own = down(jnp.sum(jnp.where(same, load(0), 0), 1))
    return [settled(x + own * get(tiles[name])) for x, name in zip(sums, ("key", "query"), strict=True)]


def _sum_after(look: Callable[[], tuple[dict, dict]], value: Array) -> Array:
    """Sums over the tokens from each on that are in its document and its chunk."""
    plgpu.commit_smem()
    tiles, scratch = look()
    rooms = [room.at[nothing()] for side in scratch["right"] for room in side][: len(tiles["decay"])]
    put(rooms, value)
    later = (column_numbers(scratch["numbers"]) >= down(row_numbers())).astype(F32)
    later = of_document(tiles, scratch["numbers"], later, turn=True)
    [left] = as_left(later, 1, scratch["left"][0][:1] if "left" in scratch else None)
    plgpu.commit_smem()
    return multiply([(left, room) for room in rooms])[0]


def _load(ref: Any) -> Array:
    return plgpu.load(ref, layout=TILE, optimized=False)


def _gradient_kernel(refs: dict, outputs: dict, scratch: dict, run: Run, strict: bool) -> None:
    put_masks(scratch)
    block = lax.axis_index("channels")
    names = "query", "key", "decay"
    sources = {name: jax.tree.map(lambda ref: run.source(ref, block), refs[name]) for name in names}
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])

    def step(i, tiles, carry):
        chunk, _ = run.step(i)

        def look():
            return tiles(), now(scratch, SEVERAL)

        def through_state(name, mask):
            return _load(run.tokens(refs[name], chunk, block)) * state_decay(*look(), mask)

        def emit(name, value):
            target, own = outputs[name], look()[1]
            buffer = own["wide" if target.dtype == F32 else "narrow"]
            send([buffer], [run.tokens(target, chunk, block)], value)

        query, key = _within(
            look, lambda side: _load(run.per_head(refs["pairs"][side], chunk)), strict=strict
        )
        query = settled(query + through_state("from_state", READ))
        emit("query", query)
        key = settled(key + through_state("key_from_state", WRITE))
        emit("key", key)
        at, _ = look()
        emit("decay", _sum_after(look, query * get(at["query"]) - key * get(at["key"])))
        plgpu.commit_smem()
        return carry

    blocks = run.blocks * refs["from_state"].shape[3] // BLOCK
    stream(run.steps, stages_for(scratch, sources, blocks), sources, step, ())
    plgpu.wait_smem_to_gmem(0)


def score_gradients(
    reader: Reader, key: tuple, decay: tuple, marks: Array | None, back: Cotangents, dtypes: Sequence
) -> Gradients:
    """Gradients of one reader's query and the key, which have `dtypes`, and of log decay."""
    batch, length, heads, keys = decay[0].shape
    parts, run = len(key), Run.of(batch, heads, length, times=keys // BLOCK)
    outputs = {
        name: jax.ShapeDtypeStruct((batch, length, heads, keys), dtype)
        for name, dtype in zip(("query", "key", "decay"), (*dtypes, F32), strict=True)
    }
    scratch = channel_scratch(2, parts) | {"right": [rights(parts), rights(parts)]}
    scratch["wide"] = shared_tile(BLOCK, BLOCK, F32)
    if any(dtype == BF16 for dtype in dtypes):
        scratch["narrow"] = shared_tile(BLOCK, BLOCK)
    inputs = {"query": reader.query, "key": key, "decay": decay, "marks": marks, **back._asdict()}

    def kernel(ins, outs, scratch):
        _gradient_kernel(ins, outs, scratch, run, reader.strict)

    grid = {"channels": keys // BLOCK, **run.grid}
    return Gradients(**call(kernel, "channel_gradients", grid, inputs, outputs, scratch))
