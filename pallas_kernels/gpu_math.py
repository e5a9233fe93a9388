"""What chunks are made of inside a Hopper kernel: tiles of 64 tokens by 64 channels and their products.

One warpgroup owns a tile of 64 rows in the layout that wgmma leaves its sums in; an operand of wgmma lies in
shared memory in 128-byte swizzled rows. wgmma multiplies bfloat16 and sums in float32; it has no float32
product (TF32 keeps 11 bits, and is not used). A float32 operand is therefore carried as three bfloat16
parts, 8 bits each, and of the nine products of two such operands the six that matter are summed ("bf16x6"):
as good as float32. Two parts and three products ("bf16x3") leave 5e-6 of each product, which is too much
where gradients cancel: that of the decay was wrong by 2e-5 to 4e-5.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.gpu_stream import nothing

F32, BF16 = jnp.float32, jnp.bfloat16
BLOCK = 64  # rows of wgmma, tokens of a chunk, channels of a tile
TILE = plgpu.Layout.WGMMA
ROWS, COLUMNS = TILE.reduce(1), TILE.reduce(0)  # one number per row, per column of a tile


def swizzled(dtype) -> tuple:
    """How operands of wgmma lie in shared memory: 8 rows of 128 bytes a piece."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(128)  # type: ignore[abstract]


def shared_tile(rows: int, columns: int, dtype=BF16, *, count: int = 1) -> Any:
    """To be used as `ref.at[n]`, the single one as `ref.at[nothing()]` (see there)."""
    return plgpu.SMEM((count, rows, columns), dtype, transforms=swizzled(dtype))


def part_count(dtype) -> int:
    """bfloat16 parts of an operand."""
    return 1 if jnp.dtype(dtype) == BF16 else 3


def parts_of(x: Array, count: int) -> tuple[Array, ...]:
    """Outside of kernels: bfloat16 arrays that sum to `x`, to 8 bits each."""
    if x.dtype == BF16:
        return (x,)
    rest, parts = x.astype(F32), []
    for _ in range(count):
        # Not a cast there and back, which XLA may leave out.
        parts.append(lax.reduce_precision(rest, 8, 7))
        rest = rest - parts[-1]
    return tuple(part.astype(BF16) for part in parts)


def split(value: Array, count: int) -> list[Array]:
    """The bfloat16 parts of a float32 tile in registers."""
    parts = []
    for n in range(count):
        # The barrier keeps a compiler from taking the rounding away again.
        parts.append(lax.optimization_barrier(value.astype(BF16)))
        if n + 1 < count:
            value = value - parts[-1].astype(F32)
    return parts


def put(refs: Sequence[Any], value: Array) -> None:
    """A float32 tile into its bfloat16 parts in shared memory."""
    for ref, part in zip(refs, split(value, len(refs)), strict=True):
        ref[...] = part


def left_scratch(count: int) -> list | None:
    """Room for `as_left`: none on the chip, where the left operand of wgmma may come from registers."""
    return [shared_tile(BLOCK, BLOCK)] * count if dispatch.interpretation("gpu") else None


def as_left(value: Array, count: int, scratch: Sequence[Any] | None) -> Sequence[Any]:
    """A float32 tile as parts of a left operand; the interpreter's wgmma reads only memory."""
    if scratch is None:
        return split(value, count)
    put(scratch, value)
    return scratch


def get(refs: Sequence[Any], layout=TILE) -> Array:
    """The float32 tile of such parts."""
    value = plgpu.load(refs[0], layout=layout).astype(F32)
    for ref in refs[1:]:
        value = value + plgpu.load(ref, layout=layout).astype(F32)
    return value


def store(ref: Any, value: Array) -> None:
    """From registers to main memory."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def turned(refs: Sequence[Any]) -> list:
    return [ref.transpose((1, 0)) for ref in refs]


def columns(refs: Sequence[Any], block: int) -> list:
    """The 64 columns number `block` of tiles in shared memory."""
    return [ref.at[:, pl.ds(BLOCK * block, BLOCK)] for ref in refs]


def rows(refs: Sequence[Any], block: int) -> list:
    return [ref.at[pl.ds(BLOCK * block, BLOCK)] for ref in refs]


def product(left: Sequence[Any], right: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The products of parts whose sum is `left @ right`: of n parts each, those of the first n orders."""
    orders = max(len(left), len(right))
    return [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < orders]


def multiply(*sums: list[tuple[Any, Any]]) -> list[Array]:
    """Sums of products of tiles, `[64,64]` float32 each; all are on their way before the first is awaited."""

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *[plgpu.ACC((BLOCK, BLOCK), F32) for _ in sums])


def accumulate(start: Array, pairs: list[tuple[Any, Any]]) -> Array:
    """`start` and products of tiles, in place; the interpreter's accumulators can only begin at zero."""
    if dispatch.interpretation("gpu"):
        return start + multiply(pairs)[0]

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(plgpu.ACC.init(start))


def down(vector: Array, width: int = BLOCK) -> Array:
    """A number per row, as a tile."""
    return lax.broadcast_in_dim(vector, (BLOCK, width), [0])


def across(vector: Array) -> Array:
    """A number per column, as a tile."""
    return lax.broadcast_in_dim(vector, (BLOCK, *vector.shape), [1])


def row_numbers() -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=ROWS) + nothing()


def column_numbers(numbered: Any) -> Array:
    """As a tile, from the scratch of `number`: computed, they would be held in registers through a loop."""
    return across(plgpu.load(numbered, layout=COLUMNS))


def number(numbered: Any) -> None:
    """0, 1, ... into scratch `[1,64]` int32."""
    numbered.at[0][...] = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=ROWS)
    plgpu.commit_smem()


def settled(value: Array) -> Array:
    """`value`, computed here: left to itself the compiler holds its operands instead, to where it is used."""
    return lax.optimization_barrier(value)


def zeros() -> Array:
    return plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), F32), TILE)


def quotient(a: Array, b: int) -> Array:
    return lax.div(a, jnp.int32(b))


def padded(x: Array, length: int, width: int | None = None) -> Array:
    """`[B,T,H,W]` with zeros up to `length` tokens and `width` channels."""
    pad = [(0, 0), (0, length - x.shape[1]), (0, 0), (0, (width or x.shape[3]) - x.shape[3])]
    return jnp.pad(x, pad) if any(after for _, after in pad) else x


def on_blocks(
    run: Callable, keyed: Sequence, v: Array, log_decay: Array, state: Array, ids: Array | None
) -> tuple[Array, Array]:
    """`run(*keyed, v, log_decay, state, ids)` on whole blocks of tokens and channels, its output and final
    state cut back; `keyed` are arrays `[B,T,G,K]`, some of them None."""
    length, keys, values = v.shape[1], state.shape[2], v.shape[3]
    tokens, wide, high = up_to(length, BLOCK), up_to(keys, BLOCK), up_to(values, BLOCK)
    keyed = [None if x is None else padded(x, tokens, wide) for x in keyed]
    log_decay = padded(log_decay, tokens, None if log_decay.shape[3] == 1 else wide)
    state = jnp.pad(state.astype(F32), ((0, 0), (0, 0), (0, wide - keys), (0, high - values)))
    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, tokens - length)), mode="edge")
    out, state = run(*keyed, padded(v, tokens, high), log_decay, state, ids)
    return out[:, :length, :, :values], state[:, :, :keys, :values]


def summed_heads(x: Array, like: Array) -> Array:
    """`[B,T,H,W]` to the heads of `like`, each of which serves several, and its dtype."""
    if x.shape[2] != like.shape[2]:
        x = jnp.sum(x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[3]), 3)
    return x.astype(like.dtype)


def shared_dtype(x: Array, heads: int) -> Any:
    """Of the gradient of x from each of `heads` heads."""
    return x.dtype if x.shape[2] == heads else F32


def up_to(size: int, multiple: int) -> int:
    return size + -size % multiple
