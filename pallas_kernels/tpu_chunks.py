"""A recurrence over chunks of tokens as a TPU kernel: chunks stream through, the state stays on the chip.

An op says what one chunk does, on values, and `scan_chunks` makes the two kernels of it. The grid is
(batch, heads, chunks), the last axis in order; the state waits in its output block, which stays in VMEM until
its row of the grid is done. The forward kernel also writes the states that enter the chunks, when a gradient
will need them. The backward kernel takes the chunks in reverse order and differentiates each in place.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.chunks import chunk_length
from pallas_kernels.tpu_math import F32, column, sums

# The compiler's own limit is 16 MiB of the 128 (v5e, v6e) or 64 (v7x) that a core has.
VMEM = 48 << 20

# Tokens of a chunk: by dtype, for heads of at most so many channels.
Chunks = Mapping[str, Mapping[int, int]]


def chunk_of(table: Chunks, q: Array, v: Array) -> int:
    """For `q [B,T,G,K]`, `v [B,T,H,V]`: that of the table, or less where the sequence is short."""
    width = max(q.shape[-1], v.shape[-1])
    sizes = table[v.dtype.name]
    return chunk_length(v.shape[1], sizes[min(size for size in sizes if size >= width)], 8)


def refusal(table: Chunks, q: Array, v: Array) -> str | None:
    """Why a kernel with this table cannot take these arrays, or None."""
    if v.dtype.name not in table:
        return f"takes {' and '.join(table)}, not {v.dtype}"
    widest = max(table[v.dtype.name])
    if max(q.shape[-1], v.shape[-1]) > widest:
        return f"takes heads of at most {widest} channels, not {max(q.shape[-1], v.shape[-1])}"
    return None


class Segments(NamedTuple):
    """Documents in chunks, on the way into a kernel: runs of tokens numbered as by `chunks.number_runs`."""

    ids: Array  # [B,1,n,1,C] int32
    before: Array  # [B,1,n,1,1] of the token before the chunk, whose state enters
    last: Array  # [B,1,n,1,1] of the chunk's last token

    def masks(self) -> tuple[Array, Array, Array, Array]:
        """Inside the kernel, as 0 or 1: pairs of one document `[C,C]`, tokens of the state that enters
        `[C,1]`, tokens of the state that leaves `[C,1]`, whether they are one document `[1,1]`."""
        ids, before, last = (x.astype(F32) for x in self)
        mine = column(ids)
        same, seen, into, one = mine == ids, mine == before, mine == last, before == last
        return same.astype(F32), seen.astype(F32), into.astype(F32), one.astype(F32)


def cut(x: Array, chunk: int) -> Array:
    """`[B,T,G,W] -> [B,G,n,C,W]`, the tail padded with zeros."""
    x = jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0))), 1, 2)
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[3])


def cut_decay(x: Array, chunk: int) -> Array:
    """Float32; one number per token becomes rows: `[B,T,H,1] -> [B,H,n,1,C]`."""
    x = cut(x.astype(F32), chunk)
    return jnp.swapaxes(x, 3, 4) if x.shape[4] == 1 else x


def join(x: Array, length: int) -> Array:
    """Inverse of `cut`: `[B,H,n,C,W] -> [B,length,H,W]`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[4]), 1, 2)[:, :length]


def cut_segments(ids: Array | None, chunk: int) -> Segments | None:
    """From `[B,T]`; padding belongs to the last document."""
    if ids is None:
        return None
    before = ids[:, :1]
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % chunk)), mode="edge")
    ids = ids.reshape(ids.shape[0], 1, -1, 1, chunk).astype(jnp.int32)
    last = ids[..., -1:]
    first = before.reshape(-1, 1, 1, 1, 1).astype(jnp.int32)
    return Segments(ids, jnp.concatenate([first, last[:, :, :-1]], 2), last)


def decays(log_decay: Array, *, own: bool = True) -> tuple[Array, Array, Array]:
    """Of a chunk: what of the entering state token t reads (`own`: its decay included), what of its write
    stays to the end, what of the entering state does: `[C,1]`, `[C,1]`, `[1,1]` from a row `[1,C]`, or
    `[C,K]`, `[C,K]`, `[K,1]` from `[C,K]`."""
    read = jnp.exp(sums(log_decay, lambda i, t: t <= i if own else t < i))
    write = jnp.exp(sums(log_decay, lambda i, t: t > i))
    if log_decay.shape[0] == 1:
        return read, write, jnp.exp(jnp.sum(log_decay, 1, keepdims=True))
    return read, write, jnp.exp(column(jnp.sum(log_decay, 0, keepdims=True)))


class _Specs(NamedTuple):
    """Blocks of arrays of `heads` heads and `chunks` chunks."""

    heads: int
    chunks: int
    reverse: bool

    def tokens(self, x) -> pl.BlockSpec:
        """`[B,G,n,R,W]`; G heads serve H = `heads`."""
        share, last = self.heads // x.shape[1], self.chunks - 1
        order = (lambda i: last - i) if self.reverse else (lambda i: i)
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, i: (b, h // share, order(i), 0, 0))

    def rows(self, x) -> pl.BlockSpec:
        """`[B,H,X,Y]`: the same block for all chunks."""
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h, 0, 0))

    def shared(self, x) -> pl.BlockSpec:
        """`[H,X,Y]`."""
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, h, i: (h, 0, 0))


def _read(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs, values) -> None:
    def store(ref, value):
        ref[...] = value.astype(ref.dtype)

    jax.tree.map(store, refs, values)


def _forward_kernel(initial, tokens, shared, marks, out, state, entering, *, chunk: Callable):
    @pl.when(pl.program_id(2) == 0)
    def _():
        _write(state, _read(initial))

    before = _read(state)
    if entering is not None:
        _write(entering, before)
    after, values = chunk(before, _read(tokens), _read(shared), _read(marks))
    _write(out, values)
    _write(state, after)


def _backward_kernel(
    entering, tokens, shared, marks, dout, dfinal, dtokens, dstate, dshared, *, chunk: Callable
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        _write(dstate, _read(dfinal))
        jax.tree.map(lambda ref: _write(ref, jnp.zeros(ref.shape, ref.dtype)), dshared)

    marks = _read(marks)
    primals = _read(entering), _read(tokens), _read(shared)
    _, pull = jax.vjp(lambda state, tokens, shared: chunk(state, tokens, shared, marks), *primals)
    before, each, total = pull((_read(dstate), _read(dout)))
    _write(dtokens, each)
    _write(dstate, before)
    jax.tree.map(lambda ref, x: _write(ref, ref[...] + x.astype(ref.dtype)), dshared, total)


def _grid(state, tokens) -> tuple[int, int, int]:
    batch, heads = jax.tree.leaves(state)[0].shape[:2]
    return batch, heads, jax.tree.leaves(tokens)[0].shape[2]


def _call(kernel, grid, in_specs, out_specs, out_shape, name: str):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=dispatch.interpretation("tpu"),
        name=name,
    )


def _like(x, lead: tuple[int, ...] = (), dtype=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*lead, *x.shape), dtype or x.dtype)


def _block(x, axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)


def _forward(chunk: Callable, name: str, state, tokens, shared, marks, *, save: bool):
    grid = _grid(state, tokens)
    specs = _Specs(grid[1], grid[2], False)
    drops = (state, 2), (tokens, 3), (shared, 1), (marks, 3)
    blocks = [jax.tree.map(partial(_block, axes=n), x) for x, n in drops]
    values = jax.eval_shape(chunk, *blocks)[1]
    out = jax.tree.map(lambda x: _like(x, grid), values)
    entering = jax.tree.map(lambda x: _like(_block(x, 2), grid), state) if save else None
    mapped = jax.tree.map
    in_specs = (mapped(specs.rows, state), mapped(specs.tokens, tokens), mapped(specs.shared, shared))
    run = _call(
        partial(_forward_kernel, chunk=chunk),
        grid,
        (*in_specs, mapped(specs.tokens, marks)),
        (mapped(specs.tokens, out), mapped(specs.rows, state), mapped(specs.tokens, entering)),
        (out, mapped(_like, state), entering),
        f"{name}_forward",
    )
    return run(state, tokens, shared, marks)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_chunks(
    chunk: Callable, name: str, state: Any, tokens: Any, shared: Any, marks: Any
) -> tuple[Any, Any]:
    """`(outputs, final state)` of `chunk(state, tokens, shared, marks) -> (state, outputs)`, chunk by chunk.

    Pytrees of arrays: `state` of `[B,H,X,Y]` float32; `tokens` of `[B,G,n,R,W]`, of which the function gets
    `[R,W]`, G dividing H; `shared`, the same for all chunks and samples, of `[H,X,Y]`; `marks` like tokens,
    integers, not differentiated. Outputs are like tokens, with H heads. Kernels are called after `name`.
    """
    return _forward(chunk, name, state, tokens, shared, marks, save=False)[:2]


def _scan_fwd(chunk, name, state, tokens, shared, marks):
    out, final, entering = _forward(chunk, name, state, tokens, shared, marks, save=True)
    return (out, final), (entering, tokens, shared, marks)


def _scan_bwd(chunk, name, saved, cotangents):
    entering, tokens, shared, marks = saved
    dout, dfinal = cotangents
    grid = _grid(dfinal, tokens)
    specs = _Specs(grid[1], grid[2], True)
    mapped = jax.tree.map

    def gradient(x):  # of every head, summed over the heads that share x afterwards
        return _like(_block(x, 3), grid, F32 if x.shape[1] < grid[1] else None)

    dtokens, dshared = mapped(gradient, tokens), mapped(lambda x: _like(x, grid[:1], F32), shared)
    run = _call(
        partial(_backward_kernel, chunk=chunk),
        grid,
        (
            mapped(specs.tokens, entering),
            mapped(specs.tokens, tokens),
            mapped(specs.shared, shared),
            mapped(specs.tokens, marks),
            mapped(specs.tokens, dout),
            mapped(specs.rows, dfinal),
        ),
        (mapped(specs.tokens, dtokens), mapped(specs.rows, dfinal), mapped(specs.rows, dshared)),
        (dtokens, mapped(_like, dfinal), dshared),
        f"{name}_backward",
    )
    dtokens, dstate, dshared = run(entering, tokens, shared, marks, dout, dfinal)
    dtokens = mapped(lambda d, x: _sum_heads(d, x.shape[1]).astype(x.dtype), dtokens, tokens)
    return dstate, dtokens, mapped(lambda d, x: jnp.sum(d, 0).astype(x.dtype), dshared, shared), None


def _sum_heads(x: Array, groups: int) -> Array:
    """`[B,H,...] -> [B,groups,...]`."""
    if x.shape[1] == groups:
        return x
    return jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 2)


scan_chunks.defvjp(_scan_fwd, _scan_bwd)
