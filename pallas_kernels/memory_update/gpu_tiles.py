"""Matrices and columns of tokens inside the Hopper kernels of the test-time memory.

Tokens are columns here and channels rows, so that the 64 rows that wgmma wants are channels however few
tokens a block has: a stack is a list of tiles `[64,C]`, one for every 64 channels. A matrix of the inner
network is kept transposed, `[out,in]`, in tiles of 64 x 64. Products are those of `gpu_math`: three bfloat16
parts of each operand and the six products that matter, for bfloat16 streams too (whose own tokens are one
part): a network is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.gpu_math import BF16, BLOCK, F32, TILE, get, product, put, settled, split, store, swizzled
from pallas_kernels.gpu_stream import SHARED_BYTES, Zero, bytes_of

PARTS = 3  # bfloat16 parts of a float32 operand

# Of shared memory, for barriers and for sums over channels, which four warps share.
RESERVED = 2048

Stack = list[Array]
Slots = dict[str, tuple[int, int]]  # of a stack: tiles and bfloat16 parts


class Network(NamedTuple):
    """What the kernels know of the inner network and of a block."""

    tiles: tuple[int, ...]  # channels over 64 of the input, of every hidden layer and of the output
    columns: int  # tokens of a block, C
    parts: int  # bfloat16 parts of a token of the streams
    momentum: bool
    activation: str
    residual: bool
    clip: float | None
    norm_eps: float | None  # None: no norm

    @property
    def layers(self) -> range:
        return range(len(self.tiles) - 1)

    def shape(self, layer: int) -> tuple[int, int]:
        return BLOCK * self.tiles[layer + 1], BLOCK * self.tiles[layer]

    def blocks(self, layer: int) -> list[tuple[int, int]]:
        """Row and column of every tile of a matrix."""
        return [(o, i) for o in range(self.tiles[layer + 1]) for i in range(self.tiles[layer])]

    @property
    def states(self) -> tuple[str, ...]:
        """By how much is gained by having them on the chip."""
        return ("weights", "momentum", "start") if self.momentum else ("weights", "start")


class Matrix(NamedTuple):
    """`[out,in]` float32, in shared memory or at a place in main memory, found again every time: addresses
    would be held in registers. A thread reads only what it has written itself there."""

    ref: Any
    place: Callable[[], tuple] | None  # None: in shared memory
    zero: Callable[[], Array]

    @property
    def on_chip(self) -> bool:
        return self.place is None

    def _at(self, o: int, i: int) -> Any:
        if self.place is None:
            return self.ref.at[self.zero(), pl.ds(BLOCK * o, BLOCK), pl.ds(BLOCK * i, BLOCK)]
        at = [pl.ds(BLOCK * n + self.zero(), BLOCK) for n in (o, i)]
        return self.ref.at[(*self.place(), *at)]

    def load(self, o: int, i: int) -> Array:
        return plgpu.load(self._at(o, i), layout=TILE, optimized=self.on_chip)

    def store(self, o: int, i: int, value: Array) -> None:
        if self.on_chip:
            self._at(o, i)[...] = value
        else:
            store(self._at(o, i), value)


def room_for(shape: tuple[int, int]) -> Any:
    """Shared memory for a matrix."""
    return plgpu.SMEM((1, *shape), F32, transforms=swizzled(F32))


def on_chip(network: Network, other: Any) -> tuple[str, ...]:
    """The states for which shared memory has room beside `other`."""
    free, chosen = SHARED_BYTES - RESERVED - bytes_of(other), []
    for name in network.states:
        size = bytes_of([room_for(network.shape(layer)) for layer in network.layers])
        if size <= free:
            free -= size
            chosen.append(name)
    return tuple(chosen)


def _narrow(rows: int, columns: int, count: int, width: int) -> Any:
    """An operand of wgmma in rows of C tokens: 32, 64 or 128 bytes, of which the swizzle is."""
    tiling = plgpu.TilingTransform((8, width))  # type: ignore[abstract]
    transforms = tiling, plgpu.SwizzleTransform(2 * width)  # type: ignore[abstract]
    return plgpu.SMEM((count, rows, columns), BF16, transforms=transforms)


def desk_room(network: Network, slots: Slots, put_by: int) -> dict[str, Any]:
    """Shared memory of a `Desk` with these stacks, and so many tiles put by."""
    C = network.columns
    # The window of 64 tokens reaches beyond the last slot.
    pool = _narrow(BLOCK, sum(tiles * parts for tiles, parts in slots.values()) * C + BLOCK - C, 1, C)
    by = plgpu.SMEM((put_by, BLOCK, C), F32)
    room = {"zero": Zero.room, "pool": pool, "turned": _narrow(BLOCK, BLOCK, PARTS, C), "by": by}
    if dispatch.interpretation("gpu"):
        room |= {"left": _narrow(BLOCK, BLOCK, PARTS, C), "left_tokens": _narrow(BLOCK, C, PARTS, C)}
    return room


class Desk:
    """Operands of wgmma in shared memory, by name, and products with them."""

    def __init__(self, scratch: dict[str, Any], network: Network, slots: Slots, zero: Zero):
        self._scratch, self._columns, self.zero = scratch, network.columns, zero
        self._first, count = {}, 0
        self._by: dict[str, tuple[int, int]] = {}
        self._begun: set[tuple[str, int]] = set()
        for name, (tiles, parts) in slots.items():
            self._first[name] = count, parts
            count += tiles * parts

    def _view(self, name: str, tile: int, part: int, width: int) -> Any:
        first, parts = self._first[name]
        at = (first + tile * parts + part) * self._columns
        return self._scratch["pool"].at[self.zero()].at[:, pl.ds(at, width)]

    def parts(self, name: str, tile: int = 0, count: int = PARTS) -> list:  # [64,C] each
        return [self._view(name, tile, part, self._columns) for part in range(count)]

    def tokens(self, name: str, tile: int = 0, count: int = PARTS) -> list:  # [C,64] each
        return [ref.transpose((1, 0)) for ref in self.parts(name, tile, count)]

    def _windows(self, name: str, tile: int, count: int) -> list:
        """`[64,64]`, the first C rows of which are tokens; of products the other rows are of no use."""
        return [self._view(name, tile, part, BLOCK).transpose((1, 0)) for part in range(count)]

    def write(self, **stacks: tuple[Stack, int] | Stack) -> None:
        """Stacks to be found under their names, in so many parts."""
        self.zero.renew()
        for name, stack in stacks.items():
            tiles, parts = stack if isinstance(stack, tuple) else (stack, PARTS)
            for n, value in enumerate(tiles):
                put(self.parts(name, n, parts), value)
        plgpu.commit_smem()

    def read(self, name: str, tiles: int, count: int = PARTS) -> Stack:
        return [get(self.parts(name, n, count)) for n in range(tiles)]

    def begin(self, name: str, count: int) -> None:
        """Room for a stack in float32, out of the registers until `by`; of a name all are of one size."""
        self.zero.renew()
        self._by.setdefault(name, (sum(n for _, n in self._by.values()), count))
        self._begun = {at for at in self._begun if at[0] != name}

    def _by_tile(self, name: str, tile: int) -> Any:
        return self._scratch["by"].at[self._by[name][0] + tile + self.zero()]

    def add(self, name: str, tile: int, value: Array) -> None:
        """To a tile of a stack that was begun."""
        if (name, tile) in self._begun:
            value = value + plgpu.load(self._by_tile(name, tile), layout=TILE, optimized=False)
        self._begun.add((name, tile))
        self._by_tile(name, tile)[...] = value

    def put_by(self, **stacks: Stack) -> None:
        for name, stack in stacks.items():
            self.begin(name, len(stack))
            for n, value in enumerate(stack):
                self.add(name, n, value)

    def by(self, name: str) -> Stack:
        self.zero.renew()
        refs = [self._by_tile(name, n) for n in range(self._by[name][1])]
        return [plgpu.load(ref, layout=TILE, optimized=False) for ref in refs]

    def _left(self, value: Array) -> Sequence[Any]:
        """A tile as left operand; the interpreter's wgmma reads only memory."""
        if not dispatch.interpretation("gpu"):
            return split(value, PARTS)
        room = self._scratch["left" if value.shape[1] == BLOCK else "left_tokens"]
        refs = [room.at[n] for n in range(PARTS)]
        put(refs, value)
        plgpu.commit_smem()
        return refs

    def turn(self, value: Array) -> list:
        """A tile of a matrix as left operand, to be used as it is or transposed, until the next."""
        self.zero.renew()
        refs = [self._scratch["turned"].at[n + self.zero()] for n in range(PARTS)]
        put(refs, value)
        plgpu.commit_smem()
        return refs

    def times(self, value: Array, right: list) -> Array:
        """A tile in registers, `[64,64]` or `[64,C]`, times an operand."""
        self.zero.renew()
        return multiplied(product(self._left(value), right))

    def scores(self, name: str, other: str, tiles: int, counts: tuple[int, int]) -> Array:
        """Products of the tokens of two stacks over all channels, `[64,C]`; rows from C on are of no use."""
        pairs = []
        for n in range(tiles):
            self.zero.renew()
            pairs += product(self._windows(name, n, counts[0]), self.parts(other, n, counts[1]))
        return multiplied(pairs)

    def through(self, matrix: Matrix, name: str, network: Network, layer: int, count: int = PARTS) -> Stack:
        """`W x` of a stack x."""
        stack: dict[int, Array] = {}
        for o, i in network.blocks(layer):
            own = self.times(matrix.load(o, i), self.parts(name, i, count))
            stack[o] = stack[o] + own if o in stack else own
        return list(stack.values())

    def back(self, matrix: Matrix, name: str, network: Network, layer: int) -> Stack:
        """`W^T d` of a stack d."""
        stack: dict[int, Array] = {}
        for o, i in network.blocks(layer):
            turned = [ref.transpose((1, 0)) for ref in self.turn(matrix.load(o, i))]
            term = multiplied(product(turned, self.parts(name, o)))
            stack[i] = stack[i] + term if i in stack else term
        return list(stack.values())


def first_rows(refs: list, count: int) -> list:
    return [ref.at[pl.ds(0, count)] for ref in refs]


def multiplied(pairs: list) -> Array:
    """Their sum, when all threads have it: operands may be written to again, and nothing is loaded early, for
    which registers would not suffice."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    value = settled(pl.run_scoped(run, plgpu.ACC((BLOCK, pairs[0][1].shape[1]), F32)))
    plgpu.commit_smem()
    return value


def sums(stack: Stack) -> Array:
    """Of every token over its channels, `[C]`."""
    return jnp.sum(sum(stack[1:], stack[0]), 0)
