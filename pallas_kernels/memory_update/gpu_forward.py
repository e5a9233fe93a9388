"""The forward kernel of the test-time memory on a GPU; notation and dual form as in `xla.py`."""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_math import BLOCK, F32, settled, store
from pallas_kernels.gpu_stream import Zero, call, nothing, stages_for, stream
from pallas_kernels.memory_update.gpu_blocks import (
    BEGINS,
    END_GRADIENT,
    END_IN_WEIGHTS,
    END_KEEP,
    END_MOVE,
    END_STAY,
    FULL,
    IN_WEIGHTS,
    KEEP,
    PRESENT,
    STREAMS,
    Block,
    Place,
    Work,
    clear,
    copy,
    inputs,
    keys,
    matrices,
    norm_of,
    parts_at,
    raw_gradient,
    stacked,
)
from pallas_kernels.memory_update.gpu_network import activated, clipped, head
from pallas_kernels.memory_update.gpu_tiles import (
    PARTS,
    Desk,
    Matrix,
    Network,
    Slots,
    Stack,
    desk_room,
    first_rows,
    on_chip,
    room_for,
)

State = dict[str, list[Matrix]]


def slots(network: Network) -> Slots:
    """Stacks on the desk: inputs of layers for keys and queries, gradients on their way back, scores."""
    own = {f"x{layer}": (network.tiles[layer], parts_at(layer, network)) for layer in network.layers}
    hidden, back = max(network.tiles[:-1]), max(network.tiles[2:], default=0)
    return own | {"h": (hidden, PARTS), "back": (back, PARTS), "pairs": (1, PARTS)}


def _layer(desk: Desk, state: State, block: Block, layer: int, hidden: Stack, network: Network) -> Stack:
    """What a layer makes of queries; its matrices move on to the end of the block."""
    count = parts_at(layer, network)
    desk.write(h=(hidden, count))
    scores = desk.scores(f"x{layer}", "h", network.tiles[layer], (count, count))
    desk.write(pairs=[scores * block.pairs()])
    out = f"y{layer}"
    desk.begin(out, network.tiles[layer + 1])
    for o, delta in enumerate(desk.by(f"delta{layer}")):
        desk.add(out, o, -desk.times(delta, first_rows(desk.parts("pairs"), network.columns)))
    for o, i in network.blocks(layer):
        h, x = desk.parts("h", i, count), desk.tokens(f"x{layer}", i, count)
        w = state["weights"][layer]
        desk.add(out, o, block.vector(KEEP) * desk.times(w.load(o, i), h))
        end = -desk.times(desk.by(f"delta{layer}")[o] * block.vector(END_GRADIENT), x)
        end = settled(block.end(END_KEEP) * w.load(o, i) + end)
        if network.momentum:
            s = state["momentum"][layer]
            w.store(o, i, end + block.end(END_IN_WEIGHTS) * s.load(o, i))
            desk.add(out, o, block.vector(IN_WEIGHTS) * desk.times(s.load(o, i), h))
            write = desk.times(desk.by(f"delta{layer}")[o] * block.vector(END_MOVE), x)
            s.store(o, i, block.end(END_STAY) * s.load(o, i) - write)
        else:
            w.store(o, i, end)
    return desk.by(out)


def _advance(desk: Desk, state: State, block: Block, norm: Any, network: Network) -> tuple[Stack, Array]:
    """`(y, surprise)`."""
    loss = keys(desk, state["start"], block, norm, network)
    z: Stack = []
    for layer in network.layers:
        delta = clipped(inputs(desk, "x", layer, network), raw_gradient(desk, layer, network), network)
        desk.put_by(**{f"delta{layer}": delta})
        hidden = activated(z, network) if layer else block.tokens("q")
        z = _layer(desk, state, block, layer, hidden, network)
    return head(z, block.tokens("q"), norm, network), loss


def _begin(refs: dict, state: State, place: Place, network: Network) -> None:
    """A new document."""
    fresh = matrices(refs["fresh"], place)
    for name in state:
        if name == "momentum":
            clear(state[name], network)
        else:
            copy(fresh, state[name], network)


def _kernel(refs: dict, outputs: dict, scratch: dict, work: Work, network: Network, chip: tuple) -> None:
    places = slots(network)
    Zero.begin(scratch["zero"])

    def carried(zero):
        place = partial(work.place, zero)
        main = {name: matrices(refs, place, zero) for name, refs in outputs["final"].items()}
        return main | {name: matrices(scratch[name], None, zero) for name in chip}

    state = carried(nothing)
    for name in network.states:
        copy(matrices(refs["initial"][name], work.place), state[name], network)
    sources = work.sources({name: refs[name] for name in STREAMS if name in refs})

    def advance(block, step):
        zero = Zero(scratch["zero"])
        here, state = partial(work.at, step, zero), carried(zero)
        if "fresh" in refs:
            pl.when(block.flag(BEGINS))(lambda: _begin(refs, state, work.place, network))
        if "kept" in outputs:
            for name, own in stacked(outputs["kept"], partial(work.at, step), zero, network).items():
                copy(state[name], own, network)
        desk = Desk(scratch, network, places, zero)
        y, surprise = _advance(desk, state, block, norm_of(refs, work, network), network)
        for n, tile in enumerate(y):
            target = outputs["y"].at[(*here(), pl.ds(BLOCK * n, BLOCK))]
            store(target, tile.astype(target.dtype))
        store(outputs["surprise"].at[here()], surprise)
        pl.when(block.flag(FULL))(lambda: copy(state["weights"], state["start"], network))

    def visit(i, tiles, carry):
        block = Block(tiles, network)
        if work.passes == 1:
            advance(block, work.step(i))
        else:
            pl.when(block.flag(PRESENT))(lambda: advance(block, work.step(i)))
        plgpu.commit_smem()
        return carry

    stream(work.steps, stages_for(scratch, sources, work.batch * work.heads), sources, visit, ())
    for name in chip:
        copy(state[name], matrices(outputs["final"][name], work.place), network)


def run(inputs: dict, work: Work, network: Network, *, keep: bool, dtype: Any) -> dict:
    """`y [B,H,steps,V,C]`, `surprise [B,H,steps,C]`, the `final` states and, to `keep`, those that entered.

    `inputs`: the streams of `Work.sources`, `initial` and (where documents begin) `fresh` states, each a list
    of `[B,H,out,in]` float32, and `scale` and `bias [H,V]` of a norm.
    """
    lead = work.batch, work.heads
    shapes = [network.shape(layer) for layer in network.layers]

    def arrays(*more):
        return [jax.ShapeDtypeStruct((*lead, *more, *shape), F32) for shape in shapes]

    outputs = {
        "y": jax.ShapeDtypeStruct((*lead, work.steps, BLOCK * network.tiles[-1], network.columns), dtype),
        "surprise": jax.ShapeDtypeStruct((*lead, work.steps, network.columns), F32),
        "final": {name: arrays() for name in network.states},
    } | ({"kept": arrays(work.steps, len(network.states))} if keep else {})
    desk = desk_room(network, slots(network), 4 * sum(network.tiles[1:]))
    chip = on_chip(network, (desk, work.sources({n: inputs[n] for n in STREAMS if n in inputs})))
    scratch = desk | {name: [room_for(shape) for shape in shapes] for name in chip}

    def kernel(ins, outs, scratch):
        _kernel(ins, outs, scratch, work, network, chip)

    return call(kernel, "memory_update_forward", work.grid, inputs, outputs, scratch)
