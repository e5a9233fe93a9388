"""The selective scan as GPU kernels: a thread owns a channel and keeps its N states in registers.

Notation as in `xla.py`. If there will be a gradient, the forward kernel keeps the states that enter the
chunks. The backward kernel goes through them from the last to the first, recomputes the states inside a chunk
into shared memory, then runs the adjoint. db and dc are sums over channels, which is over threads: the
products l u take the place of the states in shared memory, where a few threads sum a row of 128. What
different groups of 128 channels make is added outside.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import segment_starts
from pallas_kernels.gpu_lanes import F32, LANES, Cut, Filling, entering, loop, zeros
from pallas_kernels.gpu_stream import launch
from pallas_kernels.selective_scan.gpu_adjoint import backward
from pallas_kernels.selective_scan.gpu_parts import (
    UNROLL,
    Chunk,
    each,
    put_rows,
    rates_of,
    rows,
    scratch,
    total,
)

# Only compiled so far, for sm_90a with N = 16, not timed on hardware. No spills; registers of a thread and
# shared memory of a block in bfloat16 (float32): forward 116 (111) and 20 (36) KiB, backward 124 (124) and
# 105 (117) KiB, so that two blocks (one) fit on a multiprocessor. Main memory per token and channel in
# bfloat16: forward 7 bytes and 8 for kept states, backward 20; an extra pass 5. Chunks of 16 would keep half
# as many states, but leave room for one block.
CHUNK = 8
# Forward a chunk takes about 1,000 cycles, less than main memory to answer: several are on their way.
BUFFERS = 4
# From the count of instructions: an exponential takes a quarter of a multiprocessor 8 cycles a warp, which
# binds forward: 128 cycles a token of 128 channels. Issue binds backward: 370. An extra pass costs 128.
FORWARD = Filling(enough=64, wanted=264, shortest=64)
BACKWARD = Filling(enough=100, wanted=264, shortest=64)
# Registers and shared memory of the backward kernel.
MOST_STATES = 32


def _ends(cut: Cut, v, dt, a, bc, reverse: bool):
    """What segments make of a zero state `[B,S,N,D]`, and their sums of dt `[B,S,D]`.

    Forwards `v` is x; in reverse it is dy, and the state is the adjoint that leaves a segment on its left.
    """
    N = a.shape[0]

    def body(v_ref, dt_ref, a_ref, bc_ref, ends_ref, sums_ref, *, v_s, dt_s, bc_s, arrived):
        walk = cut.walk(reverse)
        rates = rates_of(a_ref, walk)

        def work(place, slot, carry):
            chunk = Chunk(dt_s.at[slot], bc_s.at[slot], rates)

            def token(i, carry):
                t = cut.chunk - 1 - i if reverse else i
                (h, passed), now, v = carry, chunk.token(t), v_s[slot, t].astype(F32)
                if reverse:
                    h = each(lambda e, h, c: e * (h + v * c), now.e, h, now.c)
                else:
                    u = now.dt * v
                    h = each(lambda e, h, b: e * h + u * b, now.e, h, now.b)
                return h, passed + now.dt

            return loop(cut.chunk, token, carry, UNROLL)

        sources = (walk.tokens(v_ref), v_s), (walk.tokens(dt_ref), dt_s), (walk.shared(bc_ref), bc_s)
        h, passed = walk.stream(sources, arrived, work, ([zeros()] * N, zeros()))
        put_rows(ends_ref.at[walk.sample, walk.segment, :, walk.mine], h)
        sums_ref[walk.sample, walk.segment, walk.mine] = passed

    out = [cut.states(cut.segments, N), cut.states(cut.segments)]
    buffers = scratch(cut, bc.shape[2], v_s=v.dtype, dt_s=dt.dtype)
    name = "selective_scan_reverse_ends" if reverse else "selective_scan_forward_ends"
    return launch(name, body, cut.grid, out, buffers)(v, dt, a, bc)


def _forward(cut: Cut, x, dt, a, bc, states, keep: bool):
    """y, the states `[B,S,N,D]` at segment ends and, to keep, `[B,T/C,N,D]` at chunk starts."""
    N = a.shape[0]

    def body(x_ref, dt_ref, a_ref, bc_ref, states_ref, y_ref, ends_ref, *kept, x_s, dt_s, bc_s, arrived):
        walk = cut.walk()
        rates = rates_of(a_ref, walk)

        def work(place, slot, h):
            chunk = Chunk(dt_s.at[slot], bc_s.at[slot], rates)
            for ref in kept:
                put_rows(ref.at[walk.sample, place, :, walk.mine], h)

            def token(t, h):
                now = chunk.token(t)
                u = now.dt * x_s[slot, t].astype(F32)
                h = each(lambda e, h, b: e * h + u * b, now.e, h, now.b)
                y = total(each(jnp.multiply, h, now.c))
                y_ref[walk.sample, place * cut.chunk + t, walk.mine] = y.astype(y_ref.dtype)
                return h

            return loop(cut.chunk, token, h, UNROLL)

        sources = (walk.tokens(x_ref), x_s), (walk.tokens(dt_ref), dt_s), (walk.shared(bc_ref), bc_s)
        h = rows(states_ref.at[walk.sample, walk.segment, :, walk.mine])
        h = walk.stream(sources, arrived, work, h)
        put_rows(ends_ref.at[walk.sample, walk.segment, :, walk.mine], h)

    out = [cut.tokens(x.dtype), cut.states(cut.segments, N)]
    out += [cut.states(cut.length // cut.chunk, N)] if keep else []
    buffers = scratch(cut, bc.shape[2], x_s=x.dtype, dt_s=dt.dtype)
    return launch("selective_scan_forward", body, cut.grid, out, buffers)(x, dt, a, bc, states)


def _entering(cut: Cut, v, dt, a, bc, state, reverse: bool = False):
    """States `[B,S,N,D]` that enter the segments; `state [B,N,D]` enters the first, in reverse the last."""
    if cut.segments == 1:
        return state[:, None]
    ends, sums = _ends(cut, v, dt, a, bc, reverse)
    decay = jnp.exp(sums[:, :, None] * a)
    if bc.shape[2] > 2 * a.shape[0]:
        starts = bc[..., 2 * a.shape[0]].reshape(cut.batch, cut.segments, -1) < 0
        decay = jnp.where(starts.any(2)[..., None, None], 0, decay)
    return entering(decay, ends, state, reverse)


def _run(x, dt, a, bc, state, keep: bool):
    cut = FORWARD.cut(x, CHUNK, BUFFERS)
    y, ends, *kept = _forward(cut, x, dt, a, bc, _entering(cut, x, dt, a, bc, state), keep)
    return (y, ends[:, -1]), kept


@jax.custom_vjp
def _scan(x, dt, a, bc, state):
    """`x, dt [B,T,D]`, `a [N,D]`, `bc [B,T,W]`, `state [B,N,D]`: whole chunks, whole groups of channels."""
    return _run(x, dt, a, bc, state, keep=False)[0]


def _scan_fwd(x, dt, a, bc, state):
    out, (kept,) = _run(x, dt, a, bc, state, keep=True)
    return out, (x, dt, a, bc, kept)


def _scan_bwd(saved, cotangents):
    x, dt, a, bc, kept = saved
    dy, adjoint = cotangents
    cut = BACKWARD.cut(x, CHUNK)
    adjoints = _entering(cut, dy, dt, a, bc, adjoint, reverse=True)
    dx, ddt, dbc, da, left = backward(cut, x, dt, a, bc, kept, dy, adjoints)
    dbc = jnp.swapaxes(jnp.sum(dbc, 1), 2, 3).reshape(cut.batch, cut.length, -1)
    dbc = jnp.pad(dbc, ((0, 0), (0, 0), (0, bc.shape[2] - dbc.shape[2])))
    return dx, ddt, jnp.sum(da, (0, 1)), dbc, left[:, 0]


_scan.defvjp(_scan_fwd, _scan_bwd)


def _packed(b: Array, c: Array, segment_ids: Array | None) -> Array:
    """`[B,T,2N]`, or `[B,T,2N+4]` with 0 or, where a segment starts, -inf: added to exponents of decays."""
    columns = [b.astype(F32), c.astype(F32)]
    if segment_ids is not None:
        start = jnp.where(segment_starts(segment_ids), -jnp.inf, 0).astype(F32)[..., None]
        columns += [start, jnp.zeros((*start.shape[:2], 3), F32)]
    return jnp.concatenate(columns, 2)


def selective_scan(x, dt, a, b, c, state, segment_ids=None):
    """Shapes as in `api.py`, without the skip connection `d`; y has x's dtype, the state is float32."""
    (_, length, width), N = x.shape, a.shape[1]
    lanes, states = -width % LANES, -N % 4
    # Padding has dt = 0: its decay is 1 and it writes nothing.
    late = -length % (CHUNK * max(way.segments(x) for way in (FORWARD, BACKWARD)))
    x, dt = (jnp.pad(z, ((0, 0), (0, late), (0, lanes))) for z in (x, dt))
    b, c = (jnp.pad(z, ((0, 0), (0, 0), (0, states))) for z in (b, c))
    bc = jnp.pad(_packed(b, c, segment_ids), ((0, 0), (0, late), (0, 0)))
    a = jnp.pad(a.astype(F32).T, ((0, states), (0, lanes)))
    state = jnp.pad(jnp.swapaxes(state.astype(F32), 1, 2), ((0, 0), (0, states), (0, lanes)))
    y, state = _scan(x, dt, a, bc, state)
    return y[:, :length, :width], jnp.swapaxes(state[:, :N, :width], 1, 2)


def refusal(x, dt, a, b, c, state, segment_ids=None) -> str | None:
    """Why the kernel cannot take these arguments."""
    return f"takes at most {MOST_STATES} states per channel" if a.shape[1] > MOST_STATES else None
