"""Kernels that work on every chunk by itself: which chunk is whose, and triangles of pairs of its tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_decay import FIRST, LAST
from pallas_kernels.gpu_math import (
    BF16,
    BLOCK,
    ROWS,
    column_numbers,
    down,
    put,
    quotient,
    row_numbers,
    swizzled,
)
from pallas_kernels.gpu_stream import MULTIPROCESSORS, Source, nothing

LEVELS = 6  # a triangle of 64 tokens is halved into blocks of two halves of 1, 2, 4, ... 32 tokens
# A block makes its masks once for several chunks, where that leaves it two of its like on a multiprocessor.
MOST_CHUNKS = 8


def chunks_a_block(rows: int, chunks: int) -> int:
    count = 1
    while (
        count < MOST_CHUNKS
        and chunks % (2 * count) == 0
        and rows * chunks // (2 * count) >= 2 * MULTIPROCESSORS
    ):
        count *= 2
    return count


class Run(NamedTuple):
    """Sizes; a block takes `each` chunks of one sample and head."""

    heads: int
    chunks: int
    width: int  # channels that a block goes through
    each: int  # chunks of a block
    rows: int  # samples times heads

    @staticmethod
    def of(batch: int, heads: int, length: int, width: int = BLOCK, times: int = 1) -> "Run":
        """For a grid of `times` as many blocks as samples, heads and groups of chunks make."""
        chunks = length // BLOCK
        return Run(heads, chunks, width, chunks_a_block(batch * heads * times, chunks), batch * heads)

    @property
    def grid(self) -> dict[str, int]:
        return {"group": self.chunks // self.each, "row": self.rows}  # the last axis has no limit

    @property
    def blocks(self) -> int:
        return self.rows * self.chunks // self.each

    @property
    def steps(self) -> int:
        return self.each * self.width // BLOCK

    def place(self) -> tuple[Array, Array]:
        row = lax.axis_index("row") + nothing()
        batch = quotient(row, self.heads)
        return batch, row - batch * self.heads

    def step(self, i: Array) -> tuple[Array, Array]:
        """Chunk and 64 channels of step i."""
        blocks = self.width // BLOCK
        own = quotient(i, blocks)
        return lax.axis_index("group") * self.each + own, i - own * blocks

    def tokens(self, ref: Any, chunk: Array, at: Any, width: int = BLOCK) -> Any:
        """Tokens of a chunk and some channels of `[B,T,G,W]`, G of which serve `heads`."""
        batch, head = self.place()
        own = quotient(head, self.heads // ref.shape[2])
        return ref.at[batch, pl.ds(chunk * BLOCK, BLOCK), own, pl.ds(at * BLOCK, width)]

    def source(self, ref: Any, channels: Any = None, width: int = BLOCK) -> Source:
        """Tiles of `[B,T,G,W]`; `channels` are those of the step unless given."""

        def view(i):
            chunk, block = self.step(i)
            return self.tokens(ref, chunk, block if channels is None else channels, width)

        return Source(view, (BLOCK, width), ref.dtype, swizzled(ref.dtype))

    def marks(self, ref: Any) -> Source:
        return Source(lambda i: ref.at[self.place()[0], self.step(i)[0]], (4, BLOCK), jnp.int32)

    def pairs(self, ref: Any) -> Source:
        """Tiles of `[B,H,T,64]`."""
        return Source(
            lambda i: self.per_head(ref, self.step(i)[0]), (BLOCK, BLOCK), ref.dtype, swizzled(ref.dtype)
        )

    def per_head(self, ref: Any, chunk: Array) -> Any:
        """Tokens of a chunk of `[B,H,T,W]`."""
        batch, head = self.place()
        return ref.at[batch, head, pl.ds(chunk * BLOCK, BLOCK)]


def now(scratch: dict, several: Sequence[str] = ()) -> dict:
    """The scratch at this point (see `gpu_stream.nothing`), but for what is there `several` times."""
    zero = nothing()
    rest = {name: x for name, x in scratch.items() if name not in several}
    return jax.tree.map(lambda ref: ref.at[zero], rest) | {name: scratch[name] for name in several}


def send(buffers: Sequence[Any], targets: Sequence[Any], value: Array) -> None:
    """Through `buffers` in shared memory, parts of a tile or one tile, to main memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if buffers[0].dtype == BF16:
        put(buffers, value)
    else:
        buffers[0][...] = value
    plgpu.commit_smem()
    for buffer, target in zip(buffers, targets, strict=True):
        plgpu.copy_smem_to_gmem(buffer, target)


def square(numbered: Any, level: Array, *, turn: bool = False) -> Array:
    """Pairs of a late (row) and an early token (column) of one block, or the other way round."""
    i, j = down(row_numbers()), column_numbers(numbered)
    apart = lax.shift_right_logical(lax.bitwise_xor(i, j), level)
    return (apart == 1) & (i < j if turn else i > j)


def of_document(tiles: dict, numbered: Any, pairs: Array, *, turn: bool) -> Array:
    """`pairs` of one document, the later token in the rows or, with `turn`, in the columns."""
    if "marks" not in tiles:
        return pairs
    j = column_numbers(numbered)
    edge = down(plgpu.load(tiles["marks"].at[LAST if turn else FIRST], layout=ROWS))
    return jnp.where(j <= edge if turn else j >= edge, pairs, 0)
