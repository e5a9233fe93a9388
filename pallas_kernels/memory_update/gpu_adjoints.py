"""Cotangents through one layer's reads and writes and through the keys' gradients; see `gpu_backward`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_math import get, product, settled, turned
from pallas_kernels.memory_update.gpu_blocks import (
    END_GRADIENT,
    END_IN_WEIGHTS,
    END_KEEP,
    END_MOVE,
    END_STAY,
    IN_WEIGHTS,
    KEEP,
    LOSS,
    Block,
    inputs,
    parts_at,
    raw_gradient,
)
from pallas_kernels.memory_update.gpu_network import (
    Norm,
    Pulled,
    activated,
    curvatures,
    each,
    pull_loss_gradient,
    slopes,
)
from pallas_kernels.memory_update.gpu_tiles import (
    PARTS,
    Desk,
    Matrix,
    Network,
    Stack,
    first_rows,
    multiplied,
    sums,
)

Matrices = dict[str, list[Matrix]]


def queries(desk: Desk, state: Matrices, block: Block, network: Network) -> Stack:
    """What the network makes of queries; the gradients lie on the desk as d0, d1, ...

    Its layers' inputs lie on the desk as h0, h1, ... then, and there are put by what they are made of, `y`,
    and the `scores` with the inputs for keys.
    """
    y: Stack = []
    for layer in network.layers:
        count = parts_at(layer, network)
        hidden = activated(y, network) if layer else block.tokens("q")
        desk.write(**{f"h{layer}": (hidden, count)})
        scores = desk.scores(f"x{layer}", f"h{layer}", network.tiles[layer], (count, count))
        desk.put_by(**{f"scores{layer}": [scores]})
        desk.write(pairs=[scores * block.pairs()])
        y = desk.through(state["weights"][layer], f"h{layer}", network, layer, count)
        y = [block.vector(KEEP) * x for x in y]
        if network.momentum:
            moved = desk.through(state["momentum"][layer], f"h{layer}", network, layer, count)
            y = each(lambda y, x: y + block.vector(IN_WEIGHTS) * x, y, moved)
        for n, delta in enumerate(desk.read(f"d{layer}", network.tiles[layer + 1])):
            y[n] = y[n] - desk.times(delta, first_rows(desk.parts("pairs"), network.columns))
        if layer != network.layers[-1]:
            desk.put_by(**{f"y{layer}": y})
    return y


class Coefficients(NamedTuple):
    """Cotangents of what a layer had of them: of scores `[64,C]`, of rows `[C]` and of numbers `[64]`, these
    to be summed."""

    pairs: Array
    rows: dict[int, Array]
    ends: dict[int, Array]


def _gather(ends: dict[int, Array], number: int, value: Array) -> None:
    own = jnp.sum(value, 1)
    plgpu.commit_smem()  # see `multiplied`
    ends[number] = settled(ends[number] + own if number in ends else own)


class Passage(NamedTuple):
    """What goes with a layer's tiles."""

    desk: Desk
    state: Matrices
    adjoint: Matrices
    block: Block
    network: Network
    layer: int

    def written(self, matrix: Matrix, row: int, at: tuple[int, int]) -> None:
        """A tile of the cotangent of what is written to: with the keys' inputs and, transposed, with their
        gradients."""
        (o, i), desk, count = at, self.desk, parts_at(self.layer, self.network)
        tile, weight = desk.turn(matrix.load(o, i)), self.block.vector(row)
        own = multiplied(product(tile, desk.parts(f"x{self.layer}", i, count)))
        desk.add(f"delta{self.layer}", o, weight * own)
        desk.add(f"row{row}", 0, -own * get(desk.parts(f"d{self.layer}", o)))
        own = multiplied(product(turned(tile), desk.parts(f"d{self.layer}", o)))
        desk.add(f"dx{self.layer}", i, weight * own)

    def read(self, matrix: Matrix, row: int, at: tuple[int, int]) -> None:
        """A tile of what was read, transposed, with the cotangent of the reads."""
        (o, i), desk, count = at, self.desk, parts_at(self.layer, self.network)
        own = multiplied(product(turned(desk.turn(matrix.load(o, i))), desk.parts("back", o)))
        desk.add("dh", i, self.block.vector(row) * own)
        desk.add(f"row{row}", 0, own * get(desk.parts(f"h{self.layer}", i, count)))

    def tile(self, at: tuple[int, int], ends: dict[int, Array]) -> None:
        """What one tile of the matrices does to tokens; its own cotangents before the pass."""
        o, i = at
        w, dw = (states["weights"][self.layer] for states in (self.state, self.adjoint))
        self.read(w, KEEP, at)
        self.written(dw, END_GRADIENT, at)
        _gather(ends, END_KEEP, w.load(o, i) * dw.load(o, i))
        if self.network.momentum:
            s, ds = (states["momentum"][self.layer] for states in (self.state, self.adjoint))
            self.read(s, IN_WEIGHTS, at)
            self.written(ds, END_MOVE, at)
            _gather(ends, END_IN_WEIGHTS, s.load(o, i) * dw.load(o, i))
            _gather(ends, END_STAY, s.load(o, i) * ds.load(o, i))
            before = settled(self.block.end(END_IN_WEIGHTS) * dw.load(o, i))
            before = settled(before + self.block.end(END_STAY) * ds.load(o, i))
            ds.store(o, i, before + self._outer(at, IN_WEIGHTS))
        before = settled(self.block.end(END_KEEP) * dw.load(o, i))
        dw.store(o, i, before + self._outer(at, KEEP))

    def _outer(self, at: tuple[int, int], row: int) -> Array:
        """Cotangents of reads times inputs."""
        plgpu.commit_smem()  # see `multiplied`
        (o, i), desk = at, self.desk
        h = desk.tokens(f"h{self.layer}", i, parts_at(self.layer, self.network))
        return desk.times(get(desk.parts("back", o)) * self.block.vector(row), h)


def pull_layer(passage: Passage, g: Stack, emit: Callable[[Coefficients], None]) -> Stack:
    """The cotangent of the layer's inputs for queries, from `g`, that of what it makes of them, and those of
    the states that leave, in whose place come those of the states that enter. Those of the gradients and of
    the inputs for keys are put by as `delta` and `dx`."""
    desk, block, network, layer = passage.desk, passage.block, passage.network, passage.layer
    desk.write(back=g)
    toward = -desk.scores(f"d{layer}", "back", len(g), (PARTS, PARTS))
    (scores,) = desk.by(f"scores{layer}")
    desk.write(pairs=[scores * block.pairs()], dpairs=[toward * block.pairs()])
    desk.put_by(toward=[toward * scores])
    rows = [KEEP, END_GRADIENT] + ([IN_WEIGHTS, END_MOVE] if network.momentum else [])
    sizes = {f"delta{layer}": len(g), f"dx{layer}": network.tiles[layer]} | {f"row{row}": 1 for row in rows}
    for name, count in sizes.items():
        desk.begin(name, count)
    desk.begin("dh", max(network.tiles[:-1]))
    ends: dict[int, Array] = {}
    for at in network.blocks(layer):
        passage.tile(at, ends)
    emit(Coefficients(desk.by("toward")[0], {row: sums(desk.by(f"row{row}")) for row in rows}, ends))
    pairs, dpairs = (first_rows(desk.parts(name), network.columns) for name in ("pairs", "dpairs"))
    for n, tile in enumerate(desk.read("back", len(g))):
        desk.add(f"delta{layer}", n, desk.times(tile, turned(pairs)))
    desk.put_by(**{f"delta{layer}": [-d for d in desk.by(f"delta{layer}")]})
    for n, tile in enumerate(inputs(desk, "h", layer, network)):
        desk.add(f"dx{layer}", n, -desk.times(tile, turned(dpairs)))
    desk.put_by(**{f"dx{layer}": [-d for d in desk.by(f"dx{layer}")]})
    for n, tile in enumerate(inputs(desk, "x", layer, network)):
        desk.add("dh", n, desk.times(tile, dpairs))
    return desk.by("dh")[: network.tiles[layer]]


def _add_outer(
    desk: Desk, matrix: Matrix, left: Stack, right: str, layer: int, network: Network, count: int = 3
) -> None:
    for o, i in network.blocks(layer):
        more = desk.times(left[o], desk.tokens(right, i, count))
        matrix.store(o, i, matrix.load(o, i) + more)


def pull_keys(passage: Passage, norm: Norm | None) -> tuple[Stack, Pulled]:
    """The cotangent of k but for that of the loss, which comes beside it; from those of the gradients (not
    clipped) and of the layers' inputs, put by as `delta` and `dx`. Cotangents of the start weights join
    `adjoint`."""
    desk, block, network = passage.desk, passage.block, passage.network
    start, adjoint = passage.state["start"], passage.adjoint["start"]
    for layer in network.layers[1:]:
        z, draw = f"z{layer - 1}", f"delta{layer - 1}"
        desk.write(back=each(jnp.multiply, desk.by(draw), slopes(desk.by(z), network)))
        bent = each(jnp.multiply, desk.by(f"back{layer - 1}"), curvatures(desk.by(z), network))
        desk.put_by(**{draw: each(jnp.multiply, desk.by(draw), bent)})  # of z, from here on
        for n, more in enumerate(desk.through(start[layer], "back", network, layer)):
            desk.add(f"delta{layer}", n, more)
        _add_outer(desk, adjoint[layer], raw_gradient(desk, layer, network), "back", layer, network)
    k, v, last = block.tokens("k"), block.tokens("v"), network.layers[-1]
    at_last = desk.by(f"z{last}"), k, v, norm, network
    top = pull_loss_gradient(*at_last, desk.by(f"delta{last}"), block.vector(LOSS))
    dz, dx = top.z, []
    for layer in reversed(network.layers):
        desk.write(back=dz)
        _add_outer(desk, adjoint[layer], dz, f"x{layer}", layer, network, parts_at(layer, network))
        dx = each(jnp.add, desk.by(f"dx{layer}"), desk.back(start[layer], "back", network, layer))
        if layer:
            below = each(jnp.multiply, dx, slopes(desk.by(f"z{layer - 1}"), network))
            dz = each(jnp.add, desk.by(f"delta{layer - 1}"), below)
    return dx, top
