"""Running a Hopper kernel: how it is launched, and how tiles of its operands stream through shared memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

# What a block may have of a multiprocessor's shared memory, less what the compiler takes for itself; and how
# many multiprocessors an H200 has.
SHARED_BYTES, MULTIPROCESSORS = 227 * 1024 - 1024, 132


def launch(name: str, body: Callable, grid: dict[str, int], out: Any, scratch: dict[str, Any]) -> Callable:
    """`body(*inputs, *outputs, **scratch)` as a kernel of one warpgroup per block.

    Automatic barriers are off: a kernel calls `commit_smem` between writing shared memory and its next use.
    """

    def kernel(*refs, **scratch_refs):
        body(*refs, **scratch_refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=dispatch.interpretation("gpu"),
        kernel_name=name,
    )


def call(kernel: Callable, name: str, grid: dict[str, int], inputs: dict, outputs: Any, scratch: dict) -> Any:
    """`kernel(inputs, outputs, scratch)` on trees of references; arrays like `outputs` come back.

    What is None or empty in `inputs` does not reach the kernel.
    """
    inputs = {name: x for name, x in inputs.items() if jax.tree.leaves(x)}
    flat, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(outputs)

    def body(*refs, **scratch_refs):
        ins, outs = refs[: len(flat)], refs[len(flat) :]
        kernel(jax.tree.unflatten(tree, ins), jax.tree.unflatten(out_tree, outs), scratch_refs)

    return jax.tree.unflatten(out_tree, launch(name, body, grid, shapes, scratch)(*flat))


def nothing() -> Array:
    """Zero, but not to LLVM: what depends on it is computed anew in every step of a loop.

    Else addresses, descriptors and masks are held through the loop, and the registers do not suffice.
    """
    return lax.optimization_barrier(jnp.int32(0))


class Zero:
    """`nothing` to ptxas too, which sees through the one above: read from shared memory.

    A long step calls `renew` where its parts begin: what depends on it is not held from one part to the next.
    Measured on the backward kernel of the test-time memory: 1,256 bytes of spilled registers became none.
    """

    room = plgpu.SMEM((1, 64), jnp.int32)

    def __init__(self, ref: Any):
        self._ref, self._now = ref, ref[0, 0]

    @staticmethod
    def begin(ref: Any) -> None:
        """At a kernel's beginning."""
        layout = plgpu.Layout.WGMMA.reduce(1)
        ref.at[0][...] = plgpu.layout_cast(jnp.zeros(64, jnp.int32), layout)
        plgpu.commit_smem()

    def renew(self) -> None:
        self._now = self._ref[0, 0]

    def __call__(self) -> Array:
        return lax.optimization_barrier(self._now)


class Source(NamedTuple):
    """Tiles of an operand: those of step i are `view(i)` in main memory."""

    view: Callable[[Any], Any]
    shape: tuple[int, ...]
    dtype: Any
    transforms: tuple = ()

    def room(self, stages: int) -> Any:
        return plgpu.SMEM((stages, *self.shape), self.dtype, transforms=self.transforms)


def loop(count: int, step: Callable, carry: Any) -> Any:
    """`carry = step(i, carry)` for i < count; i is int32 also where 64-bit types are on."""
    return lax.fori_loop(np.int32(0), np.int32(count), lambda i, x: step(i.astype(jnp.int32), x), carry)


def stream(
    count: int, stages: int, sources: Any, step: Callable, carry: Any, zero: Callable[[], Array] = nothing
) -> Any:
    """`carry = step(i, tiles, carry)`: `tiles()` are those of all `sources`, a tree; `stages` are in flight.

    A step calls `tiles` again in loops of its own and between its parts (see `nothing`). It ends with
    `commit_smem`: then all threads have read the tiles.
    """
    flat, tree = jax.tree.flatten(sources, is_leaf=lambda x: isinstance(x, Source))
    stages = min(stages, count)

    def load(i, slot, rooms, arrived):
        for source, room in zip(flat, rooms, strict=True):
            plgpu.copy_gmem_to_smem(source.view(i), room.at[slot], arrived.at[slot])

    def run(*rooms, arrived):
        def body(i, carry):
            slot = lax.rem(i, np.int32(stages))
            plgpu.barrier_wait(arrived.at[slot])

            def tiles():
                now = slot + zero()
                return jax.tree.unflatten(tree, [room.at[now] for room in rooms])

            carry = step(i, tiles, carry)

            @pl.when(i + stages < count)
            def _():
                load(i + stages, slot + zero(), rooms, arrived)

            return carry

        for i in range(stages):
            load(jnp.int32(i), i, rooms, arrived)
        return loop(count, body, carry)

    arrived = plgpu.Barrier(num_arrivals=len(flat), num_barriers=stages)
    return pl.run_scoped(run, *[source.room(stages) for source in flat], arrived=arrived)


def bytes_of(tree: Any) -> int:
    """Of shared memory; what a piece lacks to 1,024 bytes is lost."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    sizes = [jnp.dtype(x.dtype).itemsize * math.prod(x.shape) for x in leaves]
    return sum(size + -size % 1024 for size in sizes)


def stages_for(scratch: Any, sources: Any, blocks: int) -> int:
    """Steps in flight, in a grid of so many blocks: two, if that leaves as many blocks on a multiprocessor as
    there would be with one, or two of them; else one."""
    fixed, tiles = bytes_of(scratch), bytes_of(sources)
    if fixed + 2 * tiles <= SHARED_BYTES // 2:
        return 2
    if fixed + 2 * tiles > SHARED_BYTES:
        return 1
    return 1 if fixed + tiles <= SHARED_BYTES // 2 and blocks > MULTIPROCESSORS else 2
