"""The recurrence token by token as a GPU kernel: a thread owns a channel.

One kernel walks in both directions, which are each other's adjoint (stars are conjugates):

    forward   h_t = a_t h_{t-1} + b_t,            h_{-1} enters and h_{T-1} leaves;
    reverse   l_t = b_t + (a*_{t+1} l_{t+1}),     the bracket at T enters and the one at 0, a*_0 l_0, leaves.

The product with a_t is left out where a segment starts at t. With h the one that walks forward and l the
other, da_t = l_t h*_{t-1} either way; the cotangents of b are the states of the other direction, run on the
cotangents of the states. Complex numbers are pairs of real arrays.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.chunks import segment_starts
from pallas_kernels.diagonal_scan.parts import Parts, plus, times
from pallas_kernels.gpu_lanes import F32, LANES, Cut, Filling, Walk, entering, loop, ones, zeros
from pallas_kernels.gpu_stream import launch

# Only compiled so far, for sm_90a, not timed on hardware. No spills, at most 64 registers; shared memory of a
# block: real 65 KiB, half of that in bfloat16, complex 130 KiB. Memory binds: real float32 moves 12 bytes a
# token and channel, and 8 more where time is cut.
CHUNK = 32
UNROLL = 8
FILLING = Filling(enough=66, wanted=264, shortest=128)


class _Way(NamedTuple):
    length: int  # tokens without padding
    reverse: bool


def _where(mask: Array | None, x: Parts, y: Parts) -> Parts:
    """x where `mask` (None: everywhere), else y."""
    return x if mask is None else tuple(jnp.where(mask, x, y) for x, y in zip(x, y, strict=True))


def _nothing(like: Parts) -> Parts:
    return tuple(zeros() for _ in like)


def _advance(a: Parts, b: Parts, carry: Parts, on: Array | None, reverse: bool) -> tuple[Parts, Parts]:
    """The state of a token and the new carry; where not `on`, what comes before the token is another's."""
    if reverse:
        now = plus(b, carry)
        return now, _where(on, times(a, now, conjugate=True), _nothing(now))
    now = plus(times(a, _where(on, carry, _nothing(carry)), conjugate=False), b)
    return now, now


def _read(refs, *index) -> Parts:
    return tuple(ref[index].astype(F32) for ref in refs)


def _write(refs, parts: Parts, *index) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[index] = part


class _Streams(NamedTuple):
    """What comes chunk by chunk, in main memory or on the chip."""

    a: tuple[Any, ...]  # [B,T,D] each; () where a is the same for all tokens
    b: tuple[Any, ...]
    on: tuple[Any, ...]  # [B,T] int32, 0 where a segment starts; or ()

    def buffers(self, cut: Cut) -> "_Streams":
        def several(arrays, *shape):
            return tuple(cut.buffered((cut.chunk, *shape), x.dtype) for x in arrays)

        return _Streams(several(self.a, LANES), several(self.b, LANES), several(self.on))

    def sources(self, walk: Walk, buffers: "_Streams") -> list:
        views = [*map(walk.tokens, (*self.a, *self.b)), *map(walk.shared, self.on)]
        return list(zip(views, (*buffers.a, *buffers.b, *buffers.on), strict=True))

    def at(self, fixed: Parts, slot: Array, t: Array) -> tuple[Parts, Parts, Array | None]:
        """a, b and whether what comes before is of the same segment, on the chip."""
        a = _read(self.a, slot, t) if self.a else fixed
        return a, _read(self.b, slot, t), self.on[0][slot, t] != 0 if self.on else None


def _walk(cut: Cut, way: _Way, ends: bool, a: Parts, b: Parts, enters: Parts, on: tuple[Array, ...]):
    """All states, each `[B,T,D]`, and what leaves the segments, `[B,S,D]`.

    With `ends` instead of the states the products of all a of a segment, `[B,S,D]`. `a [B,T,D]` or `[1,D]`,
    `enters [B,S,D]`, `on [B,T]` int32 is 0 where a segment starts.
    """
    fixed = a if a[0].ndim == 2 else ()
    streams = _Streams(() if fixed else a, b, on)

    def body(stream_refs, fixed_refs, enters_refs, first_refs, leaves_refs, *, buffers, arrived):
        walk = cut.walk(way.reverse)
        here = walk.sample, walk.segment, walk.mine
        same_a = _read(fixed_refs, 0, walk.mine)

        def work(place, slot, carry):
            def token(i, carry):
                state, product = carry
                t = cut.chunk - 1 - i if way.reverse else i
                a, b, same = buffers.at(same_a, slot, t)
                now, after = _advance(a, b, state, same, way.reverse)
                moment = place * cut.chunk + t
                real = moment < way.length if way.length < cut.length else None
                if ends:
                    passed = _where(same, times(a, product, conjugate=way.reverse), _nothing(product))
                    product = _where(real, passed, product)
                else:
                    # What leaves towards the padding is no state of it.
                    now = _where(real, now, _nothing(now))
                    _write(first_refs, now, walk.sample, moment, walk.mine)
                return _where(real, after, state), product

            return loop(cut.chunk, token, carry, UNROLL)

        one = (ones(), *_nothing(b[1:])) if ends else ()
        carry = _read(enters_refs, *here), one
        state, product = walk.stream(stream_refs.sources(walk, buffers), arrived, work, carry)
        _write(leaves_refs, state, *here)
        if ends:
            _write(first_refs, product, *here)

    scratch = {"buffers": streams.buffers(cut), "arrived": cut.barrier(len(jax.tree.leaves(streams)))}
    leaves = tuple(cut.states(cut.segments) for _ in b)
    first = leaves if ends else tuple(cut.tokens(F32) for _ in b)
    name = f"diagonal_scan_{'reverse' if way.reverse else 'forward'}{'_ends' if ends else ''}"
    return launch(name, body, cut.grid, (first, leaves), scratch)(streams, fixed, enters)


def _entering(cut: Cut, way: _Way, a: Parts, b: Parts, enters: Parts, on: tuple[Array, ...]) -> Parts:
    """What enters each segment, `[B,S,D]`."""
    if cut.segments == 1:
        return tuple(x[:, None] for x in enters)
    empty = tuple(jnp.zeros(cut.states(cut.segments).shape, F32) for _ in b)
    decay, ends = map(_joined, _walk(cut, way, True, a, b, empty, on))
    return _parts(entering(decay, ends, _joined(enters), way.reverse))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(way: _Way, a: Parts, b: Parts, enters: Parts, on: tuple[Array, ...]) -> tuple[Parts, Parts]:
    """All states `[B,T,D]` and what leaves `[B,D]`, float32: whole chunks, whole groups of channels.

    `a` like b or `[1,D]`, `enters [B,D]`, `on`: nothing, or one `[B,T]` int32.
    """
    cut = FILLING.cut(b[0], CHUNK)
    entered = _entering(cut, way, a, b, enters, on)
    h, leaves = _walk(cut, way, False, a, b, entered, on)
    return h, tuple(x[:, 0 if way.reverse else -1] for x in leaves)


def _scan_fwd(way, a, b, enters, on):
    h, leaves = _scan(way, a, b, enters, on)
    return (h, leaves), (a, h, enters, on, jnp.empty(0, b[0].dtype))


def _scan_bwd(way, saved, cotangents):
    a, h, enters, on, like_b = saved
    dh, dleaves = cotangents
    db, denters = _scan(way._replace(reverse=not way.reverse), a, dh, dleaves, on)
    early, first, late = (db, dleaves, h) if way.reverse else (h, enters, db)
    before = tuple(jnp.concatenate([x[:, None], y[:, :-1]], 1) for x, y in zip(first, early, strict=True))
    if on:
        before = tuple(jnp.where(on[0][..., None] != 0, x, 0) for x in before)
    # conj(h) l is l conj(h)
    da = times(before, late, conjugate=True)
    axes = () if a[0].ndim == 3 else (0, 1)
    da = tuple(jnp.sum(x, axes).reshape(y.shape).astype(y.dtype) for x, y in zip(da, a, strict=True))
    return da, tuple(x.astype(like_b.dtype) for x in db), denters, (None,) * len(on)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _parts(x: Array) -> Parts:
    """Real arrays that the kernel reads."""
    if jnp.iscomplexobj(x):
        return x.real.astype(F32), x.imag.astype(F32)
    return (x if x.dtype == jnp.bfloat16 else x.astype(F32),)


def _joined(parts: Parts) -> Array:
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _padded(x: Array, late: int) -> Parts:
    """`[B,T,D]`, `[1,D]` or `[B,D]` in parts: `late` more tokens, a whole group of channels."""
    lanes = 0, -x.shape[-1] % LANES
    return _parts(jnp.pad(x, ((0, 0), (0, late), lanes) if x.ndim == 3 else ((0, 0), lanes)))


def diagonal_scan(a, b, state, segment_ids=None):
    """`b [B,T,...]`, `a` of b's shape or without B and T, `state [B,...]`; float32 or complex64 states."""
    batch, length = b.shape[:2]
    pair = any(jnp.iscomplexobj(x) for x in (a, b, state))
    a, tokens, enters = (x.astype(jnp.complex64) if pair else x for x in (a, b, state))
    a = a.reshape(batch, length, -1) if a.ndim == b.ndim else a.reshape(1, -1)
    tokens, enters = tokens.reshape(batch, length, -1), enters.reshape(batch, -1)
    if not pair:
        enters = enters.astype(F32)
    late, width = -length % (CHUNK * FILLING.segments(tokens)), enters.shape[1]
    on = () if segment_ids is None else (1 - segment_starts(segment_ids).astype(jnp.int32),)
    on = tuple(jnp.pad(x, ((0, 0), (0, late))) for x in on)
    way = _Way(length, reverse=False)
    found = _scan(way, _padded(a, late), _padded(tokens, late), _padded(enters, 0), on)
    h, last = map(_joined, found)
    return h[:, :length, :width].reshape(b.shape), last[:, :width].reshape(state.shape)
