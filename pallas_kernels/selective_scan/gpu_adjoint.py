"""The backward kernel of the selective scan on a GPU; notation as in `xla.py`, the way as `gpu.py` tells."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_lanes import F32, LANES, LOG2_E, Cut, loop, row_sums_layout, zeros
from pallas_kernels.gpu_stream import launch
from pallas_kernels.selective_scan.gpu_parts import (
    UNROLL,
    Chunk,
    Vectors,
    each,
    put_rows,
    rates_of,
    rows,
    scratch,
    total,
)


class _Carry(NamedTuple):
    adjoint: Vectors  # of the state that leaves to the left
    da: Vectors


class _Slot(NamedTuple):
    """A chunk in shared memory, with what is read beside dt, b and c and where its states go."""

    chunk: Chunk
    x: Any  # [C,128]
    dy: Any
    kept: Any  # [N,128]
    h: Any  # [N,C+1,128]: the state that enters, then those of the tokens


def _recompute(slot: _Slot) -> None:
    """Fills `slot.h`."""

    def token(t, h):
        now = slot.chunk.token(t)
        u = now.dt * slot.x[t].astype(F32)
        h = each(lambda e, h, b: e * h + u * b, now.e, h, now.b)
        put_rows(slot.h.at[:, t + 1], h)
        return h

    h = rows(slot.kept)
    put_rows(slot.h.at[:, 0], h)
    loop(slot.x.shape[0], token, h, UNROLL)


def _token(slot: _Slot, t: Array, carry: _Carry) -> tuple[_Carry, Array, Array]:
    """The carry, dx and ddt; l u takes the place of h."""
    now, rates = slot.chunk.token(t), slot.chunk.rates
    x, dy = slot.x[t].astype(F32), slot.dy[t].astype(F32)
    l = each(lambda l, c: l + dy * c, carry.adjoint, now.c)
    through = each(lambda l, e, h: l * (e * h), l, now.e, rows(slot.h.at[:, t]))
    u = now.dt * x
    put_rows(slot.h.at[:, t + 1], [l * u for l in l])
    du = total(each(jnp.multiply, l, now.b))
    ddt = x * du + total(each(jnp.multiply, rates, through)) * (1 / LOG2_E)
    da = each(lambda da, p: da + now.dt * p, carry.da, through)
    return _Carry(each(jnp.multiply, now.e, l), da), now.dt * du, ddt


def _sum_rows(h, sums, weight: Array | None = None) -> None:
    """`sums [N,C]` over channels of what `h [N,C+1,128]` holds for the tokens, with a weight `[C,128]`."""
    for n in range(h.shape[0]):
        row = plgpu.load(h.at[n, 1:], layout=row_sums_layout(sums.shape[1]))
        sums[n] = jnp.sum(row if weight is None else row * weight, 1)


def _sums(slot: _Slot, dbc_s, adjoint, carry: _Carry) -> _Carry:
    """`carry = adjoint(carry)` and the chunk's db, dc summed over the channels into `dbc_s [2N,C]`."""
    N, C = slot.kept.shape[0], slot.x.shape[0]
    _recompute(slot)
    # `dbc_s` is free again, and all threads have written their states.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()
    dy = plgpu.load(slot.dy, layout=row_sums_layout(C)).astype(F32)
    _sum_rows(slot.h, dbc_s.at[N:], dy)
    plgpu.commit_smem()
    carry = loop(C, adjoint, carry, UNROLL)
    plgpu.commit_smem()
    _sum_rows(slot.h, dbc_s.at[:N])
    plgpu.commit_smem()
    return carry


def backward(cut: Cut, x, dt, a, bc, kept, dy, adjoints):
    """dx, ddt, sums over 128 channels each of (db, dc) `[B,D/128,T/C,2N,C]`, da `[B,S,N,D]` of every segment,
    and the adjoints `[B,S,N,D]` that leave the segments on the left, given those that enter on the right."""
    N, C = a.shape[0], cut.chunk

    def body(
        x_ref, dt_ref, a_ref, bc_ref, kept_ref, dy_ref, adjoints_ref, *out_refs, arrived, h_s, dbc_s, **s
    ):
        dx_ref, ddt_ref, dbc_ref, da_ref, left_ref = out_refs
        walk = cut.walk(reverse=True)
        rates = rates_of(a_ref, walk)

        def work(place, slot, carry):
            chunk = Chunk(s["dt_s"].at[slot], s["bc_s"].at[slot], rates)
            here = _Slot(chunk, s["x_s"].at[slot], s["dy_s"].at[slot], s["kept_s"].at[slot], h_s)

            def adjoint(i, carry):
                t = C - 1 - i
                carry, dx, ddt = _token(here, t, carry)
                token = walk.sample, place * C + t, walk.mine
                dx_ref[token] = dx.astype(dx_ref.dtype)
                ddt_ref[token] = ddt.astype(ddt_ref.dtype)
                return carry

            carry = _sums(here, dbc_s, adjoint, carry)
            plgpu.copy_smem_to_gmem(dbc_s, dbc_ref.at[walk.sample, lax.axis_index("lanes"), place])
            return carry

        streams = {"x_s": x_ref, "dt_s": dt_ref, "dy_s": dy_ref}
        sources = [(walk.tokens(ref), s[name]) for name, ref in streams.items()]
        sources += [(walk.shared(bc_ref), s["bc_s"]), (walk.states(kept_ref), s["kept_s"])]
        here = walk.sample, walk.segment, slice(None), walk.mine
        carry = _Carry(rows(adjoints_ref.at[here]), [zeros()] * N)
        carry = walk.stream(sources, arrived, work, carry)
        put_rows(left_ref.at[here], carry.adjoint)
        put_rows(da_ref.at[here], carry.da)
        plgpu.wait_smem_to_gmem(0)

    sums = jax.ShapeDtypeStruct((cut.batch, cut.width // LANES, cut.length // C, 2 * N, C), F32)
    out = [cut.tokens(x.dtype), cut.tokens(dt.dtype), sums, *[cut.states(cut.segments, N)] * 2]
    buffers = scratch(cut, bc.shape[2], N, x_s=x.dtype, dt_s=dt.dtype, dy_s=dy.dtype)
    buffers |= {"h_s": plgpu.SMEM((N, C + 1, LANES), F32), "dbc_s": plgpu.SMEM((2 * N, C), F32)}
    return launch("selective_scan_backward", body, cut.grid, out, buffers)(x, dt, a, bc, kept, dy, adjoints)
