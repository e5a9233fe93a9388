"""Recurrences over tokens as TPU kernels: blocks of arrays on the grid (samples, channels, time).

Channels lie side by side and do not see each other; time comes last, in order or in reverse, so that what
one block leaves in VMEM the next one finds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.tpu_math import F32

ROWS = 8  # of a register


class Block(NamedTuple):
    tokens: int
    lanes: int


class Specs(NamedTuple):
    """Where the blocks of arrays lie; `reverse` walks from the last block of tokens to the first."""

    block: Block
    steps: int  # blocks of tokens
    reverse: bool = False

    def place(self, i):
        return self.steps - 1 - i if self.reverse else i

    def tokens(self, x) -> pl.BlockSpec:
        """`[B,T,D]`, of which a kernel sees `[tokens, lanes]`; or `[R,D]`, the same for all tokens."""
        if x.ndim == 2:
            return pl.BlockSpec((x.shape[0], self.block.lanes), lambda s, d, i: (0, d))
        return pl.BlockSpec((None, *self.block), lambda s, d, i: (s, self.place(i), d))

    def state(self, x) -> pl.BlockSpec:
        """`[B,R,D]`: the same block at all times, as `[R, lanes]`."""
        return pl.BlockSpec((None, x.shape[1], self.block.lanes), lambda s, d, i: (s, 0, d))

    def states(self, x) -> pl.BlockSpec:
        """`[B,n,R,D]`: one per block of tokens, as `[R, lanes]`."""
        shape = None, None, x.shape[2], self.block.lanes
        return pl.BlockSpec(shape, lambda s, d, i: (s, self.place(i), 0, d))

    def columns(self, x) -> pl.BlockSpec:
        """`[B,N,T]`, or `[B,m,N,T]` with one for each of m blocks of channels, as `[N, tokens]`."""
        if x.ndim == 3:
            return pl.BlockSpec((None, x.shape[1], self.block.tokens), lambda s, d, i: (s, 0, self.place(i)))
        shape = None, None, x.shape[2], self.block.tokens
        return pl.BlockSpec(shape, lambda s, d, i: (s, d, 0, self.place(i)))

    def grid(self, x) -> tuple[int, int, int]:
        return x.shape[0], pl.cdiv(x.shape[2], self.block.lanes), self.steps

    def rows(self, x) -> pl.BlockSpec:
        """`[B,n,1,tokens]`."""
        shape = None, None, 1, self.block.tokens
        return pl.BlockSpec(shape, lambda s, d, i: (s, self.place(i), 0, 0))

    def flags(self, x) -> pl.BlockSpec:
        """The same, scalar by scalar."""
        shape = None, None, 1, self.block.tokens
        return pl.BlockSpec(shape, lambda s, d, i: (s, self.place(i), 0, 0), memory_space=pltpu.SMEM)


def flags(marks: Array | None, tokens: int) -> Array | None:
    """`[B,T] -> [B,n,1,tokens]`; 0 where time is padded."""
    if marks is None:
        return None
    marks = jnp.pad(marks.astype(jnp.int32), ((0, 0), (0, -marks.shape[1] % tokens)))
    return marks.reshape(marks.shape[0], -1, 1, tokens)


def call(kernel: Callable, name: str, grid, in_specs, out_specs, out_shape, scratch=()) -> Any:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=dispatch.interpretation("tpu"),
        name=name,
    )


def on_first(run: Callable[[], None]) -> None:
    """Inside a kernel: `run` before the first block in time."""
    pl.when(pl.program_id(2) == 0)(run)


def vmem(*shape: int) -> Any:
    return pltpu.VMEM(shape, F32)


def eight(t) -> tuple:
    """Inside a kernel: the index of rows t to t + 8, t being a multiple of 8."""
    return pl.ds(pl.multiple_of(t, ROWS), ROWS), slice(None)


def widened(ref, scratch) -> Any:
    """Inside a kernel: a reference to the numbers as float32, of which single rows can be taken."""
    if ref.dtype == F32:
        return ref
    scratch[...] = ref[...].astype(F32)
    return scratch
