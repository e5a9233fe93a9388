"""Gradients through the scores of `gpu_channels`, as Hopper kernels."""

from collections.abc import Callable, Iterator, Sequence
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
from pallas_kernels.gpu_chunk_work import Look
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
    product,
    put,
    row_numbers,
    settled,
    shared_tile,
    zeros,
)
from pallas_kernels.gpu_steps import LEVELS, Run, now, of_document, send, square
from pallas_kernels.gpu_stream import call, loop, nothing, stages_for, stream


class Cotangents(NamedTuple):
    """What flows back into a reader's part of a chunk."""

    pairs: Sequence[tuple[Array, Array]]  # of `gpu_pair_gradients`, for each key
    from_state: Array  # [B,T,H,K] float32: the query's gradient through the state, without the decay
    keys_from_state: Sequence[Array]  # the same of each key; () where another reader's call has them


class Gradients(NamedTuple):
    query: Array  # [B,T,H,K]
    keys: list[Array]  # [B,T,H,K]
    decay: Array  # [B,T,H,K] float32, of log decay, from the chunk itself


# What a sum over levels is made of: numbers of operands, and the cotangents of the scores that they are in.
Terms = dict[int, Array]
QUERY = 0  # keys come after it


def _through_levels(look: Look, wanted: Sequence[Terms], sums: list[Array]) -> list[Array]:
    """`sums` with gradients added from those of scores, all but the diagonals."""

    def add(level, sums):
        tiles, scratch = look()
        decay, operands = level_decay(tiles, scratch, level), [tiles["query"], *tiles["keys"]]
        rooms, spares = iter(scratch["right"]), iter(scratch.get("left", ()))
        rights, after = {}, []
        for terms, before in zip(wanted, sums, strict=True):
            products = []
            for n, pairs in terms.items():
                if n not in rights:
                    rights[n] = turn_of(next(rooms), level)
                    put(rights[n], get(operands[n]) * decay)
                chosen = jnp.where(square(scratch["numbers"], level, turn=n == QUERY), pairs, 0)
                left = as_left(chosen.astype(F32), len(rights[n]), next(spares, None))
                products += product(left, rights[n])
            plgpu.commit_smem()
            (added,) = multiply(products)
            after.append(settled(before + decay * added))
        return after

    return loop(LEVELS, add, sums)


def _diagonal(look: Look, of_pairs: Callable[[int, int], Array], number: int) -> Array:
    """What the diagonals of scores add to a gradient."""
    tiles, scratch = look()
    same, sums = down(row_numbers()) == column_numbers(scratch["numbers"]), []
    for n in range(1, len(tiles["keys"]) + 1) if number == QUERY else [number]:
        own = down(jnp.sum(jnp.where(same, of_pairs(n, 0), 0), 1))
        sums.append(own * get(tiles["keys"][n - 1] if number == QUERY else tiles["query"]))
    return sum(sums[1:], sums[0])


def _sums(look: Look, of_pairs: Callable[[int, int], Array], gradients: dict[int, list[int]]) -> list[Array]:
    """Gradients, by number, from scores with the operands named, all but the diagonals."""

    def terms(number: int, operands: list[int]) -> Terms:
        return {n: of_pairs(max(n, number), int(n == QUERY)) for n in operands}

    if len(look()[0]["query"]) == 1:
        wanted = [terms(*gradient) for gradient in gradients.items()]
        wanted = [{n: x.astype(BF16) for n, x in some.items()} for some in wanted]
        return _through_levels(look, wanted, [zeros() for _ in wanted])
    sums = []  # one operand after the other: registers do not suffice for two
    for number, operands in gradients.items():
        x = zeros()
        for n in operands:
            [x] = _through_levels(look, [terms(number, [n])], [x])
        sums.append(x)
    return sums


def _within(
    look: Look, of_pairs: Callable[[int, int], Array], *, strict: bool
) -> Iterator[tuple[int, Array]]:
    """Gradients from within the chunk and their numbers; `of_pairs(n, side)` are those of the scores of key
    n, on side 1 transposed."""
    keys = list(range(1, len(look()[0]["keys"]) + 1))
    # As much at once as registers suffice for.
    first: dict = {n: [QUERY] for n in keys}
    for gradients in [{QUERY: keys} | first] if len(keys) == 1 else [first, {QUERY: keys}]:
        for number, x in zip(gradients, _sums(look, of_pairs, gradients), strict=True):
            yield number, x if strict else settled(x + _diagonal(look, of_pairs, number))


def _sum_after(look: Look, value: Array) -> Array:
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


def _gradient_kernel(refs: dict, outputs: dict, scratch: dict, run: Run, reader: Reader) -> None:
    put_masks(scratch, reader.before)
    block = lax.axis_index("channels")
    names = "query", "keys", "decay"
    sources = {name: jax.tree.map(lambda ref: run.source(ref, block), refs[name]) for name in names}
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])
    from_state = [refs["from_state"], *refs.get("keys_from_state", ())]
    targets = [outputs["query"], *outputs["keys"]]

    def step(i, tiles, carry):
        chunk, _ = run.step(i)

        def look():
            return tiles(), now(scratch, SEVERAL)

        def of_pairs(n, side):
            return _load(run.per_head(refs["pairs"][n - 1][side], chunk))

        def emit(target, value):
            buffer = look()[1]["wide" if target.dtype == F32 else "narrow"]
            send([buffer], [run.tokens(target, chunk, block)], value)

        balance = None
        for n, x in _within(look, of_pairs, strict=reader.strict):
            if n < len(from_state):
                through = _load(run.tokens(from_state[n], chunk, block))
                x = settled(x + through * state_decay(*look(), READ if n == QUERY else WRITE))
            emit(targets[n], x)
            at, _ = look()
            x = x * get(at["query"]) if n == QUERY else -x * get(at["keys"][n - 1])
            balance = settled(x if balance is None else balance + x)
        emit(outputs["decay"], _sum_after(look, balance))
        plgpu.commit_smem()
        return carry

    blocks = run.blocks * refs["from_state"].shape[3] // BLOCK
    stream(run.steps, stages_for(scratch, sources, blocks), sources, step, ())
    plgpu.wait_smem_to_gmem(0)


def score_gradients(
    reader: Reader,
    keys: Sequence[tuple],
    decay: tuple,
    marks: Array | None,
    back: Cotangents,
    dtypes: tuple[Any, Any],
) -> Gradients:
    """Gradients of one reader's query and the keys, which have `dtypes`, and of log decay.

    To that of the log decay a reader `before` the decay of its token adds the product of its query and the
    query's gradient: to be taken off again in the end (see `decay_gradient`, which needs the sum with it).
    """
    batch, length, heads, width = decay[0].shape
    parts, run = len(keys[0]), Run.of(batch, heads, length, times=width // BLOCK)
    query, key, own = (jax.ShapeDtypeStruct((batch, length, heads, width), x) for x in (*dtypes, F32))
    outputs = {"query": query, "keys": [key for _ in keys], "decay": own}
    scratch = channel_scratch(2, parts) | {"right": rights(parts, 2)}
    scratch["wide"] = shared_tile(BLOCK, BLOCK, F32)
    if BF16 in dtypes:
        scratch["narrow"] = shared_tile(BLOCK, BLOCK)
    inputs = {"query": reader.query, "keys": keys, "decay": decay, "marks": marks, **back._asdict()}

    def kernel(ins, outs, scratch):
        _gradient_kernel(ins, outs, scratch, run, reader)

    grid = {"channels": width // BLOCK, **run.grid}
    return Gradients(**call(kernel, "channel_gradients", grid, inputs, outputs, scratch))
