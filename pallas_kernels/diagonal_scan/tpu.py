"""The recurrence token by token as a TPU kernel: channels side by side, the state stays on the chip.

One kernel walks in both directions, which are each other's adjoint (stars are conjugates):

    forward   h_t = a_t h_{t-1} + b_t,            h_{-1} enters and h_{T-1} leaves;
    reverse   l_t = b_t + (a*_{t+1} l_{t+1}),     the bracket at T enters and the one at 0, a*_0 l_0, leaves.

The product with a_t is left out where a segment starts at t. For the adjoint of one direction the other is
run on the cotangents, entered by the cotangent of what left: out comes the cotangent of b, and that of what
entered. With h the one that walks forward and l the other, da_t = l_t h*_{t-1} either way. So the adjoint has
an adjoint, and so on. Complex numbers are pairs of real arrays.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.chunks import segment_starts
from pallas_kernels.diagonal_scan.parts import Parts, plus, times
from pallas_kernels.tpu_math import F32
from pallas_kernels.tpu_tokens import Block, Specs, call, flags, on_first, vmem, widened

# A row of 1,024 channels is read from `[tokens, lanes]` as one whole register. Compiled for v5e, no spills: 6
# instruction words a token and 1,024 channels real, 10 complex; in reverse with segments 8 and 11. Narrower
# blocks take as many. On the chip: 3 MiB real, 6 MiB complex. Only compiled so far, not timed on hardware.
BLOCK = {"float32": Block(128, 1024), "bfloat16": Block(128, 1024)}
UNROLL = 8


def _where(mask, a: Parts, b: Parts) -> Parts:
    return tuple(jnp.where(mask, x, y) for x, y in zip(a, b, strict=True))


def _without(mask, x: Parts) -> Parts:
    return tuple(jnp.where(mask, 0.0, y) for y in x)


def _rows(refs, wide):
    """t -> row t of every `ref [tokens, lanes]`, or always that of a `ref [1, lanes]`; float32."""

    def one(ref):
        if ref.shape[0] == 1:
            value = ref[...].astype(F32)
            return lambda t: value
        ref = widened(ref, None if ref.dtype == F32 else next(wide))
        return lambda t: ref[pl.ds(t, 1), :]

    rows = [one(ref) for ref in refs]
    return lambda t: tuple(row(t) for row in rows)


def _write(refs, values: Parts) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value


def _kernel(a, b, enters, starts, h, leaves, wide, *, reverse: bool, ragged: int | None):
    """`ragged`: the number of tokens, if it is no multiple of the block's."""
    tokens, wide = b[0].shape[0], iter(wide)
    on_first(lambda: _write(leaves, tuple(x[...] for x in enters)))
    a_of, b_of = _rows(a, wide), _rows(b, wide)
    place = pl.num_programs(2) - 1 - pl.program_id(2) if reverse else pl.program_id(2)

    def token(i, carry):
        t = tokens - 1 - i if reverse else i
        starting = None if starts is None else starts[0, t] != 0
        if reverse:
            now = plus(b_of(t), carry)
            after = times(a_of(t), now, conjugate=True)
            after = after if starts is None else _without(starting, after)
        else:
            before = carry if starts is None else _without(starting, carry)
            now = after = plus(times(a_of(t), before, conjugate=False), b_of(t))
        for ref, x in zip(h, now, strict=True):
            ref[pl.ds(t, 1), :] = x
        return after if ragged is None else _where(place * tokens + t < ragged, after, carry)

    unroll = UNROLL if tokens % UNROLL == 0 else 1
    carry = lax.fori_loop(0, tokens, token, tuple(x[...] for x in leaves), unroll=unroll)
    _write(leaves, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(reverse: bool, a: Parts, b: Parts, enters: Parts, starts: Array | None) -> tuple[Parts, Parts]:
    """All states `[B,T,D]` and what leaves `[B,1,D]`, float32; `a` like b or `[1,D]`, `starts [B,T]` bool."""
    length, channels = b[0].shape[1:]
    tokens, lanes = BLOCK[str(b[0].dtype)]
    block = Block(min(tokens, length), min(lanes, channels))
    specs = Specs(block, pl.cdiv(length, block.tokens), reverse)
    mapped = jax.tree.map
    marks = flags(starts, block.tokens)
    in_specs = (mapped(specs.tokens, a), mapped(specs.tokens, b), mapped(specs.state, enters))
    run = call(
        partial(_kernel, reverse=reverse, ragged=length if length % block.tokens else None),
        "diagonal_scan_reverse" if reverse else "diagonal_scan_forward",
        specs.grid(b[0]),
        (*in_specs, mapped(specs.flags, marks)),
        in_specs[1:],
        mapped(lambda x: jax.ShapeDtypeStruct(x.shape, F32), (b, enters)),
        ([vmem(*block) for x in (*a, *b) if x.ndim == 3 and x.dtype != F32],),
    )
    return run(a, b, enters, marks)


def _scan_fwd(reverse, a, b, enters, starts):
    h, leaves = _scan(reverse, a, b, enters, starts)
    return (h, leaves), (a, h, enters, starts, jnp.empty(0, b[0].dtype))


def _scan_bwd(reverse, saved, cotangents):
    a, h, enters, starts, like_b = saved
    dh, dleaves = cotangents
    db, denters = _scan(not reverse, a, dh, dleaves, starts)
    early, first, late = (db, dleaves, h) if reverse else (h, enters, db)
    before = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, :-1]], 1), first, early)
    if starts is not None:
        before = _without(starts[..., None], before)
    # conj(h) l is l conj(h)
    da = times(before, late, conjugate=True)
    axes = () if a[0].ndim == 3 else (0, 1)
    da = tuple(jnp.sum(x, axes).reshape(y.shape).astype(y.dtype) for x, y in zip(da, a, strict=True))
    return da, tuple(x.astype(like_b.dtype) for x in db), denters, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _parts(x: Array, pair: bool) -> Parts:
    """Real arrays that the kernel reads."""
    if pair:
        x = x.astype(jnp.complex64)
        return x.real, x.imag
    return (x if x.dtype == jnp.bfloat16 else x.astype(F32),)


def diagonal_scan(a, b, state, segment_ids=None):
    """`b [B,T,...]`, `a` of b's shape or without B and T, `state [B,...]`; float32 or complex64 states."""
    pair = any(jnp.iscomplexobj(x) for x in (a, b, state))
    a = a.reshape(*b.shape[:2], -1) if a.ndim == b.ndim else a.reshape(1, -1)
    flat = a, b.reshape(*b.shape[:2], -1), state.reshape(state.shape[0], 1, -1)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    a, b_parts, enters = (_parts(x, pair) for x in flat)
    found = _scan(False, a, b_parts, tuple(x.astype(F32) for x in enters), starts)
    h, last = (lax.complex(*x) if pair else x[0] for x in found)
    return h.reshape(b.shape), last.reshape(state.shape)
