"""Shifted multiplies as a TPU kernel: every token is read once, taps are made of it by rotating registers.

Eight tokens at a time, beside the eight before them. The backward kernel walks from the last token to the
first, beside the eight after them. Where r_t tokens before t and r'_t after it are of t's document,

    y_t = sum_{s <= r_t} w_s x_{t-s},    dx_t = sum_{s <= r'_t} w_s dy_{t+s},
    dw_s = sum_{t: s <= r'_t} x_t dy_{t+s},

w_s being `weight[k-1-s]`; what the carried window adds to dw is a sum over k - 1 tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.short_conv import xla
from pallas_kernels.tpu_math import F32
from pallas_kernels.tpu_tokens import ROWS, Block, Specs, call, eight, on_first, vmem, widened

# Compiled for v5e, four taps, segments, float32, instruction words per token and 512 channels: 3.1 forward,
# 4.6 backward with a few spills (5.1 and none with 256 lanes); with four groups of eight per turn of the loop
# not less. On the chip: 2 MiB forward, 3 MiB backward. Compiled, not timed on hardware.
BLOCK = {"float32": Block(256, 512), "bfloat16": Block(256, 512)}
UNROLL = 2  # groups of eight tokens


def _shifted(here, beside, by: int, *, reverse: bool):
    """`[8, lanes]`: tokens that lie `by` before those of `here`, or after; the others are `beside`."""
    if by == 0:
        return here
    sublane = lax.broadcasted_iota(jnp.int32, here.shape, 0)
    if reverse:
        return pltpu.roll(jnp.where(sublane >= by, here, beside), ROWS - by, 0)
    return pltpu.roll(jnp.where(sublane < ROWS - by, here, beside), by, 0)


def _taps(here, beside, reach, t0, count: int, *, reverse: bool):
    """The shifted tokens of all taps, the nearest first; `reach [1, tokens]` of the block or None."""
    taps = [_shifted(here, beside, by, reverse=reverse) for by in range(count)]
    if reach is None:
        return taps
    place = (lax.broadcasted_iota(jnp.int32, (ROWS, reach.shape[1]), axis) for axis in (0, 1))
    mine = jnp.sum(jnp.where(t0 + next(place) == next(place), reach, 0.0), 1, keepdims=True)
    return [taps[0], *(jnp.where(mine >= by, taps[by], 0.0) for by in range(1, count))]


def _groups(tokens: int, group, carry):
    count = tokens // ROWS
    return lax.fori_loop(0, count, group, carry, unroll=UNROLL if count % UNROLL == 0 else 1)


def _stretched(weight):
    """`[k, lanes]`, the farthest token's first, as rows `[8, lanes]`, the nearest first."""
    return [
        jnp.broadcast_to(weight[pl.ds(n, 1), :], (ROWS, weight.shape[1]))
        for n in reversed(range(weight.shape[0]))
    ]


def _weighted(weight, taps):
    return sum(w * tap for w, tap in zip(weight, taps, strict=True))


def _forward_kernel(x, weight, window, reach, y, before, wide, wide_y):
    def begin():
        before[...] = window[...]

    on_first(begin)
    source, target = widened(x, wide), y if y.dtype == F32 else wide_y
    reach = None if reach is None else reach[...]
    weight = _stretched(weight)

    def group(i, beside):
        here = source[eight(ROWS * i)]
        taps = _taps(here, beside, reach, ROWS * i, len(weight), reverse=False)
        target[eight(ROWS * i)] = _weighted(weight, taps)
        return here

    before[...] = _groups(x.shape[0], group, before[...])
    if target is wide_y:
        y[...] = wide_y[...].astype(y.dtype)


def _backward_kernel(x, dy, weight, ahead, dx, dweight, after, wide_x, wide_dy, wide_dx):
    def begin():
        after[...] = jnp.zeros_like(after)
        dweight[...] = jnp.zeros_like(dweight)

    on_first(begin)
    x, source = widened(x, wide_x), widened(dy, wide_dy)
    target = dx if dx.dtype == F32 else wide_dx
    ahead = None if ahead is None else ahead[...]
    weight = _stretched(weight)
    tokens, taps = x.shape[0], len(weight)

    def group(i, carry):
        beside, sums = carry
        t0 = tokens - ROWS * (i + 1)
        here = source[eight(t0)]
        shifted = _taps(here, beside, ahead, t0, taps, reverse=True)
        target[eight(t0)] = _weighted(weight, shifted)
        old = x[eight(t0)]
        return here, tuple(s + old * tap for s, tap in zip(sums, shifted, strict=True))

    zeros = (jnp.zeros_like(after),) * taps
    after[...], sums = _groups(tokens, group, (after[...], zeros))
    if target is wide_dx:
        dx[...] = wide_dx[...].astype(dx.dtype)
    for by, total in enumerate(sums):
        row = pl.ds(taps - 1 - by, 1), slice(None)
        dweight[row] = dweight[row] + jnp.sum(total, 0, keepdims=True)


def _run_lengths(ids: Array, window: int) -> tuple[Array, Array]:
    """How many tokens before and after each are of its run, at most `window`; `[B,k-1+T] -> [B,T]`."""

    def count(neighbours, own):
        run, total = jnp.ones(own.shape, bool), jnp.zeros(own.shape, F32)
        for neighbour in neighbours:
            run &= neighbour == own
            total += run
        return total

    length = ids.shape[1] - window
    behind = count((ids[:, window - s :][:, :length] for s in range(1, window + 1)), ids[:, window:])
    padded = jnp.pad(ids, ((0, 0), (0, window)), constant_values=-1)
    after = (padded[:, window + s :][:, :length] for s in range(1, window + 1))
    return behind, count(after, ids[:, window:])


def _rows(marks: Array | None, length: int, tokens: int) -> Array | None:
    """`[B,T] -> [B,n,1,tokens]`."""
    if marks is None:
        return None
    marks = jnp.pad(marks, ((0, 0), (0, length - marks.shape[1])))
    return marks.reshape(marks.shape[0], -1, 1, tokens)


def _specs(x: Array, *, reverse: bool) -> Specs:
    tokens, lanes = BLOCK[str(x.dtype)]
    block = Block(min(tokens, x.shape[1]), min(lanes, x.shape[2]))
    return Specs(block, x.shape[1] // block.tokens, reverse)


def _wide(specs: Specs, x: Array, count: int) -> list:
    """Room for float32 copies of blocks, if they are needed."""
    return [vmem(*specs.block) if x.dtype != F32 else vmem(ROWS, 128)] * count


def _padded(x: Array) -> Array:
    """Whole blocks of tokens."""
    tokens = BLOCK[str(x.dtype)].tokens
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % (tokens if x.shape[1] > tokens else ROWS)), (0, 0)))


@jax.custom_vjp
def _convolve(x, weight, state, ids):
    """As `xla.convolve`; all but x and y float32."""
    length, stream = x.shape[1], _padded(x)
    specs = _specs(stream, reverse=False)
    window = jnp.pad(state, ((0, 0), (ROWS - state.shape[1], 0), (0, 0)))
    reach = None if ids is None else _run_lengths(ids, state.shape[1])[0]
    reach = _rows(reach, stream.shape[1], specs.block.tokens)
    mapped = jax.tree.map
    run = call(
        _forward_kernel,
        "short_conv_forward",
        specs.grid(stream),
        (specs.tokens(stream), specs.tokens(weight), specs.state(window), mapped(specs.rows, reach)),
        specs.tokens(stream),
        jax.ShapeDtypeStruct(stream.shape, stream.dtype),
        [vmem(ROWS, specs.block.lanes), *_wide(specs, x, 2)],
    )
    return run(stream, weight, window, reach)[:, :length]


def _convolve_fwd(x, weight, state, ids):
    return _convolve(x, weight, state, ids), (x, weight, state, ids)


@jax.custom_vjp
def _adjoint(x, weight, state, ids, dy):
    """Cotangents of x, the weight and the state."""
    length, stream, tangent = x.shape[1], _padded(x), _padded(dy)
    specs = _specs(stream, reverse=True)
    ahead = None if ids is None else _run_lengths(ids, state.shape[1])[1]
    ahead = _rows(ahead, stream.shape[1], specs.block.tokens)
    dweight = jax.ShapeDtypeStruct((x.shape[0], *weight.shape), F32)
    tokens = specs.tokens(stream)
    run = call(
        _backward_kernel,
        "short_conv_backward",
        specs.grid(stream),
        (tokens, tokens, specs.tokens(weight), jax.tree.map(specs.rows, ahead)),
        (tokens, specs.state(dweight)),
        (jax.ShapeDtypeStruct(stream.shape, stream.dtype), dweight),
        [vmem(ROWS, specs.block.lanes), *_wide(specs, x, 3)],
    )
    dx, dweight = run(stream, tangent, weight, ahead)
    by_window, dstate = _of_window(weight, state, ids, dy)
    return dx[:, :length], jnp.sum(dweight, 0) + by_window, dstate


def _of_window(weight, state, ids, dy):
    """Cotangents of the weight and the state from the tokens that see the window."""
    window = state.shape[1]
    head = dy[:, :window].astype(F32)
    ids = None if ids is None else ids[:, : window + head.shape[1]]
    nothing = jnp.zeros_like(head)
    return jax.vjp(lambda weight, state: xla.convolve(nothing, weight, state, ids), weight, state)[1](head)


def _adjoint_fwd(*arguments):
    return _adjoint(*arguments), arguments


def _adjoint_bwd(arguments, cotangents):
    """Second derivatives are left to XLA."""
    x, weight, state, ids, dy = arguments

    def plain(x, weight, state, dy):
        wide = x.astype(F32), weight, state
        dx, *rest = jax.vjp(lambda *z: xla.convolve(*z, ids), *wide)[1](dy.astype(F32))
        return dx.astype(x.dtype), *rest

    dx, dweight, dstate, ddy = jax.vjp(plain, x, weight, state, dy)[1](cotangents)
    return dx, dweight, dstate, None, ddy


_adjoint.defvjp(_adjoint_fwd, _adjoint_bwd)
_convolve.defvjp(_convolve_fwd, lambda saved, dy: (*_adjoint(*saved, dy), None))


def short_conv(x, weight, state, segment_ids=None, mask=None):
    """Arguments as in `api.py`; y in x's dtype, the state float32."""
    x = x if x.dtype == jnp.bfloat16 else x.astype(F32)
    wide = weight.astype(F32), state.astype(F32)
    return xla.short_conv(x, *wide, segment_ids, mask, _convolve)


def refusal(x, weight, state, segment_ids=None, mask=None) -> str | None:
    """Why the kernel cannot take these arguments."""
    return None if 2 <= weight.shape[0] <= ROWS + 1 else f"takes 2 to {ROWS + 1} taps"
