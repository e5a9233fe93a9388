"""What the element-wise scans share on a GPU: a warpgroup owns 128 channels, one a thread, through time.

States are lists of vectors of 128 numbers, so that a thread keeps its own in registers. Tokens come by TMA
into shared memory, the next chunk while one is worked on; results go straight to main memory. Where samples
times channels leave the GPU idle, time is cut into segments: a first pass finds what each makes of a zero
state, and a second runs all of them at once from their true states.

Automatic barriers are off: a thread reads only what it wrote itself or what TMA brought, except where a
kernel calls `commit_smem` between.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128
F32 = jnp.float32
LOG2_E = 1.4426950408889634


def constant(value: float) -> Array:
    """A vector of equal numbers, spread over the threads as loaded vectors are."""
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
    return plgpu.layout_cast(jnp.full((LANES,), value, F32), layout)


def zeros() -> Array:
    return constant(0.0)


def ones() -> Array:
    return constant(1.0)


def loop(count: int, step: Callable, carry: Any, unroll: int = 1) -> Any:
    """`carry = step(i, carry)` for i < count; i is int32 also where 64-bit types are on."""
    return lax.fori_loop(
        np.int32(0), np.int32(count), lambda i, carry: step(i.astype(jnp.int32), carry), carry, unroll=unroll
    )


class Walk(NamedTuple):
    """Inside a kernel: the sample, channels and segment of a block, and its way through the chunks."""

    sample: Array
    mine: Any  # slice of channels
    segment: Array
    chunks: int  # of a segment
    chunk: int  # tokens
    buffers: int  # chunks in shared memory
    reverse: bool

    def place(self, i: Array) -> Array:
        """Number in the whole sequence of the chunk that comes i-th."""
        return self.segment * self.chunks + (self.chunks - 1 - i if self.reverse else i)

    def tokens(self, ref) -> Callable[[Array], Any]:
        """This block's part of `[B,T,D]`, by chunk."""
        return lambda k: ref.at[self.sample, pl.ds(k * self.chunk, self.chunk), self.mine]

    def shared(self, ref) -> Callable[[Array], Any]:
        """`[B,T,W]` by chunk, for all channels."""
        return lambda k: ref.at[self.sample, pl.ds(k * self.chunk, self.chunk)]

    def states(self, ref) -> Callable[[Array], Any]:
        """This block's part of `[B,T/C,N,D]`, by chunk."""
        return lambda k: ref.at[self.sample, k, :, self.mine]

    def stream(
        self, sources: Sequence[tuple[Callable, Any]], arrived: Any, work: Callable, carry: Any
    ) -> Any:
        """`carry = work(chunk's place, slot, carry)` for each chunk, after it is copied from `sources`."""

        def load(i, slot):
            for view, buffer in sources:
                plgpu.copy_gmem_to_smem(view(self.place(i)), buffer.at[slot], arrived.at[slot])

        def step(i, carry):
            slot = lax.rem(i, jnp.int32(self.buffers))
            plgpu.barrier_wait(arrived.at[slot])
            carry = work(self.place(i), slot, carry)
            # All threads have read the slot.
            plgpu.commit_smem()

            @pl.when(i + self.buffers < self.chunks)
            def _():
                load(i + self.buffers, slot)

            return carry

        for i in range(min(self.buffers, self.chunks)):
            load(i, i)
        return loop(self.chunks, step, carry)


class Cut(NamedTuple):
    """Outside kernels: how `[B,T,D]` is cut."""

    batch: int
    length: int
    width: int
    segments: int
    chunk: int
    buffers: int

    @property
    def grid(self) -> dict[str, int]:
        return {"sample": self.batch, "lanes": self.width // LANES, "segment": self.segments}

    def walk(self, reverse: bool = False) -> Walk:
        """Inside the kernel on this grid."""
        sample, lanes, segment = (lax.axis_index(name) for name in self.grid)
        chunks = self.length // (self.segments * self.chunk)
        mine = pl.ds(lanes * LANES, LANES)
        return Walk(sample, mine, segment, chunks, self.chunk, self.buffers, reverse)

    def buffered(self, shape: Sequence[int], dtype) -> Any:
        """Shared memory for what comes with every chunk."""
        return plgpu.SMEM((self.buffers, *shape), dtype)

    def barrier(self, copies: int) -> Any:
        """On which a chunk's copies arrive."""
        return plgpu.Barrier(num_arrivals=copies, num_barriers=self.buffers)

    def tokens(self, dtype) -> jax.ShapeDtypeStruct:
        """`[B,T,D]`"""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.width), dtype)

    def states(self, count: int, *shape: int) -> jax.ShapeDtypeStruct:
        """`[B,count,*shape,D]` float32"""
        return jax.ShapeDtypeStruct((self.batch, count, *shape, self.width), F32)


class Filling(NamedTuple):
    """When and how finely time is cut: what keeps all multiprocessors busy against doing the work twice."""

    enough: int  # blocks for which one pass over whole sequences is better
    wanted: int  # blocks to come near to otherwise
    shortest: int  # tokens of a segment

    def segments(self, x: Array) -> int:
        """A power of two, for `x [B,T,D]`."""
        blocks = x.shape[0] * -(-x.shape[2] // LANES)
        if blocks >= self.enough:
            return 1
        most = max(min(self.wanted // blocks, x.shape[1] // self.shortest), 1)
        return 1 << (most.bit_length() - 1)

    def cut(self, x: Array, chunk: int, buffers: int = 2) -> Cut:
        """For `x` of whole chunks and groups of channels; fewer segments where these would not be equal."""
        batch, length, width = x.shape
        segments = self.segments(x)
        while length % (segments * chunk):
            segments //= 2
        return Cut(batch, length, width, segments, chunk, buffers)


def entering(decay: Array, ends: Array, state: Array, reverse: bool = False) -> Array:
    """States that enter the segments `[B,S,...]`: each decays what enters it and adds its own end."""
    states, count = [state], decay.shape[1]
    for i in range(count - 1):
        s = count - 1 - i if reverse else i
        states.append(decay[:, s] * states[-1] + ends[:, s])
    return jnp.stack(states[::-1] if reverse else states, 1)


def row_sums_layout(rows: int) -> Any:
    """For `[rows,128]` float32 (8 or 16 rows) to be summed along rows: a row in as few threads of one warp as
    read 128 bytes or more at once, without conflicts of shared memory's banks."""
    each = rows // 4
    columns = 4 * (32 // each)
    tiling = plgpu.Tiling(((rows, columns), (each, columns), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
