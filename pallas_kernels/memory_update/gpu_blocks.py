"""A block of tokens in the Hopper kernels of the test-time memory: what reaches it, and its keys."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_math import BLOCK, COLUMNS, F32, ROWS, TILE, across, down, quotient
from pallas_kernels.gpu_stream import Source, nothing
from pallas_kernels.memory_update.gpu_network import (
    Norm,
    activated,
    each,
    loss_gradient,
    slopes,
)
from pallas_kernels.memory_update.gpu_tiles import PARTS, Desk, Matrix, Network, Stack

# Rows of `vectors [8,C]`: of the weights that enter, of the momentum that enters in the weights; of each
# gradient at the end, in the weights and in the momentum; single numbers; flags; the cotangent of the loss.
KEEP, IN_WEIGHTS, END_GRADIENT, END_MOVE, ENDS, FLAGS, LOSS = range(7)
# The first numbers of row ENDS: at the end, of the weights, of the momentum in the weights, of the momentum.
END_KEEP, END_IN_WEIGHTS, END_STAY = range(3)
# The first numbers of row FLAGS: whether the pass has tokens, starts a document, fills the chunk; 0 or 1.
PRESENT, BEGINS, FULL = range(3)


class Work(NamedTuple):
    """Sizes of a run; a block of the GPU takes a sample and head through all passes over blocks of tokens."""

    batch: int
    heads: int
    blocks: int
    passes: int
    reverse: bool = False

    @property
    def steps(self) -> int:
        return self.blocks * self.passes

    @property
    def grid(self) -> dict[str, int]:
        return {"row": self.batch * self.heads}

    def place(self, zero: Callable[[], Array] = nothing, *numbers: int) -> tuple[Array, ...]:
        row = lax.axis_index("row") + zero()
        batch = quotient(row, self.heads)
        return batch, row - batch * self.heads, *(number + zero() for number in numbers)

    def at(self, step: Any, zero: Callable[[], Array], *numbers: int) -> tuple[Array, ...]:
        return *self.place(zero), *(number + zero() for number in (step, *numbers))

    def step(self, i: Any) -> Any:
        return self.steps - 1 - i if self.reverse else i

    def sources(self, refs: dict) -> dict:
        """Of every step: tokens `[B,H,blocks,W,C]`, else `[B,H,steps,...]`."""

        def view(name, ref):
            def at(i):
                batch, head = self.place()
                step = self.step(i)
                return ref.at[batch, head, quotient(step, self.passes) if name in ("q", "k", "v") else step]

            return at

        return {name: Source(view(name, ref), tuple(ref.shape[3:]), ref.dtype) for name, ref in refs.items()}


STREAMS = ("q", "k", "v", "pairs", "vectors", "dy")


class Block:
    """One pass over one block: its streams, at the moment."""

    def __init__(self, tiles: Any, network: Network):
        self._tiles, self._network = tiles, network

    def tokens(self, name: str) -> Stack:
        """`q`, `k`, `v` or `dy` in float32."""
        ref = self._tiles()[name]
        return [
            plgpu.load(ref.at[pl.ds(BLOCK * n, BLOCK)], layout=TILE, optimized=False).astype(F32)
            for n in range(ref.shape[0] // BLOCK)
        ]

    def vector(self, row: int) -> Array:
        """As a tile: the same in every row."""
        return across(plgpu.load(self._tiles()["vectors"].at[row], layout=COLUMNS))

    def end(self, number: int) -> Array:
        return self._tiles()["vectors"][ENDS, number]

    def pairs(self) -> Array:
        """Of each gradient (row) for each token (column)."""
        return plgpu.load(self._tiles()["pairs"], layout=TILE, optimized=False)

    def flag(self, number: int) -> Array:
        return self._tiles()["vectors"][FLAGS, number] != 0


def norm_of(refs: dict, work: Work, network: Network) -> Norm | None:
    """From `scale`, `bias [H,V]`."""
    if network.norm_eps is None:
        return None

    def tiles(ref):
        at = [ref.at[work.place()[1], pl.ds(BLOCK * n, BLOCK)] for n in range(network.tiles[-1])]
        return [down(plgpu.load(x, layout=ROWS, optimized=False), network.columns) for x in at]

    return Norm(tiles(refs["scale"]), tiles(refs["bias"]))


def parts_at(layer: int, network: Network) -> int:
    """bfloat16 parts of the inputs of a layer."""
    return PARTS if layer else network.parts


def keys(desk: Desk, start: list[Matrix], block: Block, norm: Norm | None, network: Network) -> Array:
    """The network at the start weights, and its gradients: returns the loss `[C]`.

    Per layer there are then put by: `z`, what it makes of its inputs, which lie on the desk as x; and `back`,
    the gradient in z, but for the last layer before it is multiplied with the slope of the activation.
    """
    z: Stack = []
    for layer in network.layers:
        count = parts_at(layer, network)
        x = activated(z, network) if layer else block.tokens("k")
        desk.write(**{f"x{layer}": (x, count)})
        z = desk.through(start[layer], f"x{layer}", network, layer, count)
        desk.put_by(**{f"z{layer}": z})
    back, loss = loss_gradient(z, block.tokens("k"), block.tokens("v"), norm, network)
    desk.put_by(**{f"back{network.layers[-1]}": back})
    for layer in reversed(network.layers[1:]):
        desk.write(back=raw_gradient(desk, layer, network))
        desk.put_by(**{f"back{layer - 1}": desk.back(start[layer], "back", network, layer)})
    return loss


def raw_gradient(desk: Desk, layer: int, network: Network) -> Stack:
    """That of a layer's output, not clipped."""
    back = desk.by(f"back{layer}")
    if layer == network.layers[-1]:
        return back
    return each(jnp.multiply, back, slopes(desk.by(f"z{layer}"), network))


def inputs(desk: Desk, letter: str, layer: int, network: Network) -> Stack:
    """Those of a layer, of keys (x) or queries (h)."""
    return desk.read(f"{letter}{layer}", network.tiles[layer], parts_at(layer, network))


Place = Callable[[], tuple]


def matrices(refs: list, place: Place | None, zero: Callable[[], Array] = nothing) -> list[Matrix]:
    """Of refs `[B,H,...,out,in]`, or (None) in shared memory."""
    return [Matrix(ref, place, zero) for ref in refs]


def stacked(refs: list, place: Callable[..., tuple], zero: Callable[[], Array], network: Network) -> dict:
    """States from `[B,H,...,states,out,in]` of every layer: there is one address for all of a layer.

    `place(zero, number)`
    """
    return {
        name: matrices(refs, partial(place, zero, number), zero) for number, name in enumerate(network.states)
    }


def copy(source: list[Matrix], target: list[Matrix], network: Network) -> None:
    for layer in network.layers:
        for o, i in network.blocks(layer):
            target[layer].store(o, i, source[layer].load(o, i))
            plgpu.commit_smem()  # one tile after the other: registers would not suffice


def clear(target: list[Matrix], network: Network) -> None:
    for layer in network.layers:
        for o, i in network.blocks(layer):
            target[layer].store(o, i, plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), F32), TILE))
