"""The convolution as GPU kernels: a thread owns a channel and keeps the last tokens in registers.

    y_t = sum_s w[k-1-s] x_{t-s},     dx_t = sum_s w[k-1-s] dy_{t+s},     dw[k-1-s] = sum_t x_t dy_{t+s},

the latter two while walking through time in reverse, with the next tokens' dy in registers. What enters at
the front is the state, as if it were earlier tokens. A segment start empties the window. Time is cut into as
many pieces as keep the GPU busy: each begins by reading the few tokens before it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.chunks import segment_starts
from pallas_kernels.gpu_lanes import F32, LANES, Cut, Filling, Walk, loop, zeros
from pallas_kernels.gpu_stream import launch

# Only compiled so far, for sm_90a, not timed on hardware. No spills, at most 56 registers; shared memory of
# a block in bfloat16 (float32): forward 17 (33) KiB, backward 33 (65) KiB. Memory binds: 4 (8) bytes a token
# and channel forward, 6 (12) backward.
CHUNK = 32
UNROLL = 8
FILLING = Filling(enough=1056, wanted=1056, shortest=64)
LEAST_TAPS, MOST_TAPS = 2, 8

Vectors = list[Array]


def _kept(window: Vectors, same: Array | None) -> Vectors:
    """The window, empty where not `same`."""
    return window if same is None else [jnp.where(same, x, zeros()) for x in window]


def _same(on, *index) -> Array | None:
    return None if on is None else on[index] != 0


def _dot(weight: Vectors, window: Vectors) -> Array:
    terms = [w * x for w, x in zip(weight, window, strict=True)]
    return sum(terms[1:], terms[0])


def _scratch(cut: Cut, dtypes, on: tuple) -> dict:
    buffers = [cut.buffered((cut.chunk, LANES), dtype) for dtype in dtypes]
    buffers += [cut.buffered((cut.chunk,), jnp.int32) for _ in on]
    return {"buffers": buffers, "arrived": cut.barrier(len(buffers))}


def _sources(walk: Walk, arrays, on_refs, buffers) -> list:
    views = [*map(walk.tokens, arrays), *map(walk.shared, on_refs)]
    return list(zip(views, buffers, strict=True))


def _before(walk: Walk, x_ref, state_ref, on_ref) -> Vectors:
    """The k-1 tokens before a piece, oldest first."""
    window = [state_ref[walk.sample, i, walk.mine].astype(F32) for i in range(state_ref.shape[1])]
    begin, taps = walk.segment * walk.chunks * walk.chunk, len(window) + 1
    earlier = [zeros()] * (taps - 1)
    for back in range(taps - 1, 0, -1):
        t = jnp.maximum(begin - back, 0)
        x = x_ref[walk.sample, t, walk.mine].astype(F32)
        earlier = [*_kept(earlier, _same(on_ref, walk.sample, t))[1:], x]
    return [jnp.where(begin == 0, s, x) for s, x in zip(window, earlier, strict=True)]


def _forward(cut: Cut, x: Array, weight: Array, state: Array, on: tuple) -> Array:
    """`[B,T,D]`; `weight [k,D]`, `state [B,k-1,D]`; `on`: nothing, or one `[B,T]`, 0 at segment starts."""

    def body(x_ref, weight_ref, state_ref, on_refs, y_ref, *, buffers, arrived):
        walk = cut.walk()
        w = [weight_ref[i, walk.mine].astype(F32) for i in range(weight.shape[0])]
        x_s, on_s = buffers[0], (*buffers[1:], None)[0]

        def work(place, slot, window):
            def token(t, window):
                window = [*_kept(window, _same(on_s, slot, t)), x_s[slot, t].astype(F32)]
                y_ref[walk.sample, place * cut.chunk + t, walk.mine] = _dot(w, window).astype(y_ref.dtype)
                return window[1:]

            return loop(cut.chunk, token, window, UNROLL)

        window = _before(walk, x_ref, state_ref, (*on_refs, None)[0])
        walk.stream(_sources(walk, [x_ref], on_refs, buffers), arrived, work, window)

    scratch = _scratch(cut, [x.dtype], on)
    return launch("short_conv_forward", body, cut.grid, cut.tokens(x.dtype), scratch)(x, weight, state, on)


def _after(walk: Walk, dy_ref, taps: int, on_ref) -> Vectors:
    """dy of the k-1 tokens after a piece, the next one first, as its last token sees them."""
    length, end = dy_ref.shape[1], (walk.segment + 1) * walk.chunks * walk.chunk
    later, same = [], None
    for ahead in range(taps - 1):
        t = jnp.minimum(end + ahead, length - 1)
        inside = end + ahead < length
        here = _same(on_ref, walk.sample, t)
        inside = inside if here is None else inside & here
        same = inside if same is None else same & inside
        later += _kept([dy_ref[walk.sample, t, walk.mine].astype(F32)], same)
    return later


def _backward(cut: Cut, x: Array, weight: Array, state: Array, on: tuple, dy: Array):
    """dx `[B,T,D]`, dw of every piece `[B,S,k,D]`, dstate `[B,k-1,D]`."""
    taps = weight.shape[0]

    def body(x_ref, weight_ref, state_ref, on_refs, dy_ref, dx_ref, dw_ref, dstate_ref, *, buffers, arrived):
        walk = cut.walk(reverse=True)
        w = [weight_ref[taps - 1 - s, walk.mine].astype(F32) for s in range(taps)]
        (x_s, dy_s), on_s = buffers[:2], (*buffers[2:], None)[0]

        def earlier(x, window, dw):
            return _dot(w, window), [dw + x * dy for dw, dy in zip(dw, window, strict=True)]

        def work(place, slot, carry):
            def token(i, carry):
                window, dw = carry
                t = cut.chunk - 1 - i
                window = [dy_s[slot, t].astype(F32), *window]
                dx, dw = earlier(x_s[slot, t].astype(F32), window, dw)
                dx_ref[walk.sample, place * cut.chunk + t, walk.mine] = dx.astype(dx_ref.dtype)
                return _kept(window[:-1], _same(on_s, slot, t)), dw

            return loop(cut.chunk, token, carry, UNROLL)

        carry = _after(walk, dy_ref, taps, (*on_refs, None)[0]), [zeros()] * taps
        window, dw = walk.stream(_sources(walk, [x_ref, dy_ref], on_refs, buffers), arrived, work, carry)
        first = walk.segment == 0
        for i in reversed(range(taps - 1)):
            window = [zeros(), *window]
            dx, more = earlier(state_ref[walk.sample, i, walk.mine].astype(F32), window, dw)
            window, dw = window[:-1], [jnp.where(first, x, y) for x, y in zip(more, dw, strict=True)]

            @pl.when(first)
            def _(i=i, dx=dx):
                dstate_ref[walk.sample, i, walk.mine] = dx

        for s in range(taps):
            dw_ref[walk.sample, walk.segment, taps - 1 - s, walk.mine] = dw[s]

    out = cut.tokens(x.dtype), cut.states(cut.segments, taps), cut.states(taps - 1)
    scratch = _scratch(cut, [x.dtype, dy.dtype], on)
    return launch("short_conv_backward", body, cut.grid, out, scratch)(x, weight, state, on, dy)


@jax.custom_vjp
def _convolve(x, weight, state, on):
    """`_forward` for whole chunks of tokens and whole groups of channels."""
    return _forward(FILLING.cut(x, CHUNK), x, weight, state, on)


def _convolve_fwd(x, weight, state, on):
    return _convolve(x, weight, state, on), (x, weight, state, on)


def _convolve_bwd(saved, dy):
    x, weight, _, on = saved
    dx, dw, dstate = _backward(FILLING.cut(x, CHUNK), *saved, dy)
    return dx, jnp.sum(dw, (0, 1)).astype(weight.dtype), dstate, jax.tree.map(lambda _: None, on)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _last(x: Array, state: Array, segment_ids: Array | None) -> Array:
    """The last k-1 tokens of the last segment, float32."""
    window, length = state.shape[1], x.shape[1]
    stream = jnp.concatenate(
        [state[:, min(length, window) :], x[:, max(length - window, 0) :].astype(F32)], 1
    )
    if segment_ids is None:
        return stream
    ids = jnp.pad(segment_ids, ((0, 0), (window, 0)), mode="edge")[:, length:]
    return jnp.where((ids == segment_ids[:, -1:])[..., None], stream, 0)


def short_conv(x, weight, state, segment_ids=None, mask=None):
    """Arguments as in `api.py`, without a mask; y has x's dtype, the state is float32."""
    assert mask is None
    length, width = x.shape[1:]
    state = state.astype(F32)
    late, lanes = (0, -length % (CHUNK * FILLING.segments(x))), (0, -width % LANES)
    on = () if segment_ids is None else (1 - segment_starts(segment_ids).astype(jnp.int32),)
    on = tuple(jnp.pad(z, ((0, 0), late)) for z in on)
    whole, front = jnp.pad(x, ((0, 0), late, lanes)), jnp.pad(state, ((0, 0), (0, 0), lanes))
    y = _convolve(whole, jnp.pad(weight, ((0, 0), lanes)), front, on)
    return y[:, :length, :width], _last(x, state, segment_ids)


def refusal(x, weight, state, segment_ids=None, mask=None) -> str | None:
    """Why the kernel cannot take these arguments."""
    if mask is not None:
        return "takes no mask"
    if not LEAST_TAPS <= weight.shape[0] <= MOST_TAPS:
        return f"takes {LEAST_TAPS} to {MOST_TAPS} taps"
    return None
