"""The backward kernel of the test-time memory on a GPU: passes in reverse, from the states they entered with.

With W' = e W + i S - d (x b)^T and S' = s S - d (x m)^T for what a pass makes of a layer's weights and
momentum (e, i, s, b, m: coefficients at the end), dW' and dS' their cotangents and g that of the layer's
output for queries h,

    dW = e dW' + (g keep) h^T,    dS = i dW' + s dS' + (g in_weights) h^T,
    dh = keep (W^T g) + in_weights (S^T g) + x dA,              A the scores, dA = -(d^T g) pairs
    dd = -b (dW' x) - m (dS' x) - g A^T,    dx = -b (dW'^T d) - m (dS'^T d) + h dA^T,

and dx, dd go on through the keys' gradients, at the start weights, whose cotangents are gathered until the
chunk began: there the start weights were the weights.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_math import BLOCK, F32, store
from pallas_kernels.gpu_stream import Zero, call, nothing, stages_for, stream
from pallas_kernels.memory_update.gpu_adjoints import Coefficients, Passage, pull_keys, pull_layer, queries
from pallas_kernels.memory_update.gpu_blocks import (
    BEGINS,
    FULL,
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
from pallas_kernels.memory_update.gpu_network import (
    Norm,
    Pulled,
    clipped,
    each,
    pull_clipped,
    pull_head,
    slopes,
)
from pallas_kernels.memory_update.gpu_tiles import (
    PARTS,
    Desk,
    Network,
    Slots,
    Stack,
    desk_room,
    on_chip,
    room_for,
)


def slots(network: Network) -> Slots:
    """Stacks on the desk."""
    own: Slots = {}
    for layer in network.layers:
        own |= {f"{name}{layer}": (network.tiles[layer], parts_at(layer, network)) for name in "xh"}
        own[f"d{layer}"] = network.tiles[layer + 1], PARTS
    return own | {"back": (max(network.tiles[1:]), PARTS), "pairs": (1, PARTS), "dpairs": (1, PARTS)}


def put_by(network: Network) -> int:
    """Tiles: `z`, `back` and `delta` of every layer, `dx`, `y` but for the last, `scores`, `dh`, 5 more."""
    inner, layers = sum(network.tiles[1:-1]), len(network.layers)
    return 3 * sum(network.tiles[1:]) + sum(network.tiles[:-1]) + inner + layers + max(network.tiles[:-1]) + 5


def _pass(outputs: dict, place: Place, passage: Passage, norm: Norm | None) -> None:
    desk, state, _, block, network, _ = passage
    keys(desk, state["start"], block, norm, network)
    for layer in network.layers:
        delta = clipped(inputs(desk, "x", layer, network), raw_gradient(desk, layer, network), network)
        desk.write(**{f"d{layer}": delta})
    top = pull_head(queries(desk, state, block, network), block.tokens("dy"), norm, network)
    g = top.z
    for layer in reversed(network.layers):
        emit = partial(_write_coefficients, outputs, place, desk.zero, layer)
        g = pull_layer(passage._replace(layer=layer), g, emit)
        if layer:
            g = each(jnp.multiply, g, slopes(desk.by(f"y{layer - 1}"), network))
        if network.clip is not None:
            x, raw = inputs(desk, "x", layer, network), raw_gradient(desk, layer, network)
            own, more = pull_clipped(x, raw, desk.by(f"delta{layer}"), network)
            dx = each(jnp.add, desk.by(f"dx{layer}"), more)
            desk.put_by(**{f"delta{layer}": own, f"dx{layer}": dx})
    tokens, width = outputs["dtokens"], network.tiles[0]
    _write_tokens(tokens, 0, each(jnp.add, g, block.tokens("dy")) if network.residual else g, place)
    dk, loss = pull_keys(passage, norm)
    _write_tokens(tokens, width, each(jnp.add, dk, loss.out) if network.residual else dk, place)
    _write_tokens(tokens, 2 * width, [-x for x in loss.out], place)
    if norm is not None:
        _write_norm(outputs["dnorm"], (top, loss), place)


def _write_tokens(ref: Any, first: int, stack: Stack, place: Place) -> None:
    for n, tile in enumerate(stack, first):
        target = ref.at[(*place(), pl.ds(BLOCK * n, BLOCK))]
        store(target, tile.astype(target.dtype))


def _write_coefficients(outputs: dict, place: Place, zero: Zero, layer: int, pulled: Coefficients) -> None:
    def at(name, *numbers):
        return outputs[name].at[(*place(), *(number + zero() for number in numbers))]

    zero.renew()
    store(at("dpairs", layer), pulled.pairs)
    for row, vector in pulled.rows.items():
        store(at("dvectors", layer, row), vector)
    for number, vector in pulled.ends.items():
        store(at("dends", layer, number), vector)


def _write_norm(ref: Any, parts: tuple[Pulled, Pulled], place: Place) -> None:
    for row, name in enumerate(("scale", "bias")):
        for n, tile in enumerate(each(jnp.add, *(getattr(part, name) for part in parts))):
            store(ref.at[(*place(), row, pl.ds(BLOCK * n, BLOCK))], jnp.sum(tile, 1))


def _add(source: list, target: list, network: Network) -> None:
    for layer in network.layers:
        for o, i in network.blocks(layer):
            target[layer].store(o, i, target[layer].load(o, i) + source[layer].load(o, i))
            plgpu.commit_smem()  # one tile after the other: registers would not suffice


def _began(adjoint: dict, fresh: list, network: Network) -> None:
    """The pass entered with a new document's memory."""
    for name in ("weights", "start"):
        _add(adjoint[name], fresh, network)
    for matrices_ in adjoint.values():
        clear(matrices_, network)


def _kernel(refs: dict, outputs: dict, scratch: dict, work: Work, network: Network, chip: tuple) -> None:
    places = slots(network)
    Zero.begin(scratch["zero"])

    def carried(zero):
        main = stacked(outputs["dinitial"], work.place, zero, network)
        return main | {name: matrices(scratch[name], None, zero) for name in chip}

    adjoint = carried(nothing)
    for name in network.states:
        copy(matrices(refs["final"][name], work.place), adjoint[name], network)
    fresh = matrices(outputs["dfresh"], work.place) if "dfresh" in outputs else []
    if fresh:
        clear(fresh, network)
    sources = work.sources({name: refs[name] for name in STREAMS if name in refs})

    def closed(adjoint):
        _add(adjoint["start"], adjoint["weights"], network)
        clear(adjoint["start"], network)

    def retreat(block, step):
        zero = Zero(scratch["zero"])
        here, adjoint = partial(work.at, step, zero), carried(zero)
        pl.when(block.flag(FULL))(lambda: closed(adjoint))
        state = stacked(refs["kept"], partial(work.at, step), zero, network)
        passage = Passage(Desk(scratch, network, places, zero), state, adjoint, block, network, 0)
        _pass(outputs, here, passage, norm_of(refs, work, network))
        if fresh:
            pl.when(block.flag(BEGINS))(lambda: _began(adjoint, fresh, network))

    def visit(i, tiles, carry):
        block = Block(tiles, network)
        if work.passes == 1:
            retreat(block, work.step(i))
        else:
            pl.when(block.flag(PRESENT))(lambda: retreat(block, work.step(i)))
        plgpu.commit_smem()
        return carry

    stream(work.steps, stages_for(scratch, sources, work.batch * work.heads), sources, visit, ())
    for name in chip:
        copy(adjoint[name], stacked(outputs["dinitial"], work.place, nothing, network)[name], network)


def _outputs(inputs: dict, work: Work, network: Network) -> dict:
    lead, C, layers = (work.batch, work.heads), network.columns, len(network.layers)
    dtype = inputs["v"].dtype if work.passes == 1 else F32
    each_pass: dict[str, tuple[int, ...]] = {"dpairs": (layers, BLOCK, C), "dvectors": (layers, 4, C)}
    each_pass |= {"dends": (layers, 3 if network.momentum else 1, BLOCK)}
    if network.norm_eps is not None:
        each_pass["dnorm"] = (2, BLOCK * network.tiles[-1])
    outputs: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((*lead, work.steps, *shape), F32) for name, shape in each_pass.items()
    }
    channels = BLOCK * (2 * network.tiles[0] + network.tiles[-1])
    outputs["dtokens"] = jax.ShapeDtypeStruct((*lead, work.steps, channels, C), dtype)
    states = [jax.ShapeDtypeStruct((*lead, *network.shape(layer)), F32) for layer in network.layers]
    count = len(network.states)
    outputs["dinitial"] = [jax.ShapeDtypeStruct((*lead, count, *x.shape[2:]), F32) for x in states]
    return outputs | ({"dfresh": states} if inputs.get("fresh") is not None else {})


def run(inputs: dict, work: Work, network: Network) -> dict:
    """Gradients by the names of what they are of with a `d`: of q, k and v `dtokens [B,H,steps,2K+V,C]` (to
    be summed over the passes of a block), `dpairs [B,H,steps,L,64,C]`, `dvectors [B,H,steps,L,4,C]`, `dends
    [B,H,steps,L,3 or 1,64]` and `dnorm [B,H,steps,2,V]` (each to be summed), of every layer `dinitial
    [B,H,states,out,in]`, and `dfresh`.

    `inputs`: those of the forward kernel with `dy`, the cotangent of the loss in `vectors`, the states `kept`
    and the cotangents of those that were `final`.
    """
    work = work._replace(reverse=True)
    outputs, desk = _outputs(inputs, work, network), desk_room(network, slots(network), put_by(network))
    chip = on_chip(network, (desk, work.sources({n: inputs[n] for n in STREAMS})))
    scratch = desk | {name: [room_for(network.shape(layer)) for layer in network.layers] for name in chip}
    given = {name: x for name, x in inputs.items() if name not in ("initial", "fresh")}

    def kernel(ins, outs, scratch):
        _kernel(ins, outs, scratch, work, network, chip)

    return call(kernel, "memory_update_backward", work.grid, given, outputs, scratch)
