"""The kernel behind `gpu_chunks` and `gpu_delta`: chunk after chunk, with the state in registers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chunk_work import Form, Look, linear_chunk
from pallas_kernels.gpu_decay import KEPT_EVERY
from pallas_kernels.gpu_math import (
    BF16,
    BLOCK,
    F32,
    TILE,
    get,
    left_scratch,
    number,
    quotient,
    rows,
    shared_tile,
    store,
    swizzled,
    zeros,
)
from pallas_kernels.gpu_stream import Source, Zero, call, nothing, stages_for, stream

# Channels of keys up to which a column of the state leaves registers for addresses held through a run.
MOST_HELD = 128


class Plan(NamedTuple):
    """Sizes of a run."""

    batch: int
    heads: int
    chunks: int
    keys: int
    values: int
    spans: int

    @property
    def blocks(self) -> int:
        """Of one span."""
        return self.batch * self.heads * self.values // BLOCK

    def chunk(self, i: Array, span: Array, form: Form) -> Array:
        """Number of the chunk that comes i-th in a span."""
        i = i + span * (self.chunks // self.spans)
        return self.chunks - 1 - i if form.reverse else i


def _place(plan: Plan, zero: Callable[[], Array]) -> tuple[Array, Array, Array, Array]:
    """Sample, head, columns of v and span of this block; neighbours share q and k."""
    work, width = lax.axis_index("work") + zero(), plan.values // BLOCK
    row = quotient(work, width)
    batch = quotient(row, plan.heads)
    return batch, row - batch * plan.heads, work - row * width, lax.axis_index("span")


def _sources(refs: dict, plan: Plan, form: Form, zero: Callable[[], Array]) -> dict:
    """How each operand is cut into tiles of a chunk."""

    def tokens(ref, width: int, own_columns: bool) -> Source:
        def view(i):
            batch, head, column, span = _place(plan, zero)
            own = quotient(head, plan.heads // ref.shape[2])
            channels = pl.ds(column * BLOCK if own_columns else 0, width)
            return ref.at[batch, pl.ds(plan.chunk(i, span, form) * BLOCK, BLOCK), own, channels]

        return Source(view, (BLOCK, width), BF16, swizzled(BF16))

    def pairs(ref) -> Source:
        def view(i):
            batch, head, _, span = _place(plan, zero)
            return ref.at[batch, head, pl.ds(plan.chunk(i, span, form) * BLOCK, BLOCK)]

        return Source(view, (BLOCK, BLOCK), BF16, swizzled(BF16))

    def keep(ref) -> Source:
        width, own_columns = (BLOCK, True) if form.keep_columns else (plan.keys, False)

        def view(i):
            batch, head, column, span = _place(plan, zero)
            channels = pl.ds(column * BLOCK if own_columns else 0, width)
            return ref.at[batch, head, plan.chunk(i, span, form), channels]

        return Source(view, (width,), F32)

    def total(ref) -> Source:
        def view(i):
            batch, head, _, span = _place(plan, zero)
            return ref.at[batch, head, plan.chunk(i, span, form)]

        return Source(view, (2, BLOCK), F32)

    def marks(ref) -> Source:
        def view(i):
            batch, _, _, span = _place(plan, zero)
            return ref.at[batch, plan.chunk(i, span, form)]

        return Source(view, (4, BLOCK), jnp.int32)

    def whole(ref) -> Source:
        return tokens(ref, plan.keys, False)

    def columns(ref) -> Source:
        return tokens(ref, BLOCK, True)

    cut = {"total": total, "keep": keep, "marks": marks}
    cut |= dict.fromkeys(("query", "key", "recall", "other_key"), whole)
    cut |= dict.fromkeys(("value", "partner", "other_value"), columns)
    cut |= dict.fromkeys(("pairs", "inverse", "other_pairs"), pairs)
    return {name: jax.tree.map(cut[name], ref) for name, ref in refs.items()}


def _emit(
    look: Look, outputs: dict, out: Array, place: tuple, chunk: Array, write: Callable[[], None]
) -> None:
    """Send o on its way, through the state's memory if it fits, and its products with the partner; `write`
    writes to more of shared memory."""
    tiles, scratch = look()
    batch, head, column, _ = place
    time = pl.ds(chunk * BLOCK, BLOCK)
    target = outputs["out"].at[batch, time, head, pl.ds(column * BLOCK, BLOCK)]
    buffer = scratch["out"] if "out" in scratch else rows(scratch["state"], 0)[0]
    plgpu.commit_smem()  # all have multiplied with what it held
    if target.dtype == buffer.dtype:
        buffer[...] = out.astype(buffer.dtype)
    else:
        store(target, out)
    if "partner" in tiles:
        dots = jnp.sum(out * get(tiles["partner"]), 1)
        store(outputs["dots"].at[column, batch, head, time], dots)
    write()
    plgpu.commit_smem()
    if target.dtype == buffer.dtype:
        plgpu.copy_smem_to_gmem(buffer, target)


def _blocks(ref: Any, plan: Plan, column: Array) -> list:
    """The 64 x 64 blocks of `ref [K,V]` in columns number `column`."""
    width = pl.ds(column * BLOCK, BLOCK)
    return [ref.at[pl.ds(BLOCK * n, BLOCK), width] for n in range(plan.keys // BLOCK)]


def _keep_states(ref: Any, plan: Plan, form: Form, state: list[Array], place: tuple, i: Array) -> None:
    """The state that enters a block of chunks, at its first, or its last from the right."""
    batch, head, column, span = place
    chunk = plan.chunk(i, span, form)
    block = quotient(chunk, KEPT_EVERY)
    within = chunk - block * KEPT_EVERY
    first = (within == KEPT_EVERY - 1) | (chunk == plan.chunks - 1) if form.reverse else within == 0

    @pl.when(first)
    def _():
        for target, value in zip(_blocks(ref.at[batch, head, block], plan, column), state, strict=True):
            store(target, value)


def _kernel(refs: dict, outputs: dict, scratch: dict, plan: Plan, form: Form, chunk: Callable) -> None:
    initial = refs.pop("initial", None)
    if "zero" in scratch:
        Zero.begin(scratch["zero"])
    shared = {name: ref for name, ref in scratch.items() if name != "zero"}

    def zero():
        return Zero(scratch["zero"])() if "zero" in scratch else nothing()

    sources = _sources(refs, plan, form, zero)
    batch, head, column, span = _place(plan, zero)
    if "numbers" in scratch:
        number(scratch["numbers"])
    if initial is None:
        state = [zeros() for _ in range(plan.keys // BLOCK)]
    else:
        blocks = _blocks(initial.at[batch, head, span], plan, column)
        state = [plgpu.load(block, layout=TILE, optimized=False) for block in blocks]

    def step(i, tiles, state):
        def look():
            now = zero()
            return tiles(), jax.tree.map(lambda ref: ref.at[now], shared)

        def emit(out, write):
            if out is None:
                write()
                plgpu.commit_smem()
            else:
                place = _place(plan, zero)  # not held since the step began
                _emit(look, outputs, out, place, plan.chunk(i, place[3], form), write)

        if form.kept:
            _keep_states(outputs["kept"], plan, form, state, _place(plan, zero), i)
        if "out" in outputs:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # before the memory of the last o is written to
        state = chunk(look, form, state, emit)
        plgpu.commit_smem()
        return state

    stages = stages_for(scratch, sources, plan.blocks * plan.spans)
    state = stream(plan.chunks // plan.spans, stages, sources, step, state, zero)
    batch, head, column, span = _place(plan, zero)
    targets = _blocks(outputs["final"].at[batch, head, span], plan, column)
    for target, block in zip(targets, state, strict=True):
        store(target, block)
    plgpu.wait_smem_to_gmem(0)


def _scratch(inputs: dict, plan: Plan, form: Form) -> dict:
    """Shared memory beside the tiles in flight."""
    parts = len(inputs["value"])
    scratch: dict = {}
    outputs, head = "query" in inputs, "total" in inputs
    if plan.keys > MOST_HELD:
        scratch["zero"] = Zero.room
    if head and outputs:
        scratch["numbers"] = plgpu.SMEM((1, BLOCK), jnp.int32)
    if head and "inverse" not in inputs:
        scratch["write"] = [shared_tile(BLOCK, BLOCK)] * parts
    if outputs:
        scratch["state"] = [shared_tile(plan.keys, BLOCK)] * parts
    if outputs and form.dtype != BF16 and parts == 1:
        scratch["out"] = shared_tile(BLOCK, BLOCK, form.dtype)
    if outputs and head and left_scratch(parts):
        scratch["left"] = left_scratch(parts)
    if "inverse" in inputs:
        room = max(len(inputs["inverse"]), 2 * parts if "recall" in inputs else parts)
        scratch["wrong"] = [shared_tile(BLOCK, BLOCK)] * room
    return scratch


def run(inputs: dict, plan: Plan, form: Form, name: str, chunk: Callable = linear_chunk) -> dict:
    """The kernel on `gpu_chunks.Operands`, by name, and perhaps initial states `[B,H,spans,K,V]`; out comes
    what `_outputs` names."""
    inputs = {name: x for name, x in inputs.items() if jax.tree.leaves(x)}

    def kernel(ins, outs, scratch):
        _kernel(ins, outs, scratch, plan, form, chunk)

    grid = {"span": plan.spans, "work": plan.blocks}  # the last axis goes first, and has no limit
    name += "_reverse" if form.reverse else ""
    return call(kernel, name, grid, inputs, _outputs(inputs, plan, form), _scratch(inputs, plan, form))


def _outputs(inputs: dict, plan: Plan, form: Form) -> dict:
    length, state = plan.chunks * BLOCK, (plan.keys, plan.values)
    lead = plan.batch, plan.heads
    outputs = {"final": jax.ShapeDtypeStruct((*lead, plan.spans, *state), F32)}
    if "query" in inputs:
        outputs["out"] = jax.ShapeDtypeStruct((plan.batch, length, plan.heads, plan.values), form.dtype)
    if "partner" in inputs:
        outputs["dots"] = jax.ShapeDtypeStruct((plan.values // BLOCK, *lead, length), F32)
    if form.kept:
        outputs["kept"] = jax.ShapeDtypeStruct((*lead, -(-plan.chunks // KEPT_EVERY), *state), F32)
    return outputs
