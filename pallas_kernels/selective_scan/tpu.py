"""Token by token as TPU kernels, states on the chip; the formulas are those of `xla.py`.

The forward kernel writes the states that enter the blocks of tokens when a gradient will need them; the
backward kernel takes the blocks in reverse, walks forward through each to fill VMEM with its states, and back
with the adjoint.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import segment_starts
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.tpu_kernels import backward_kernel, forward_kernel
from pallas_kernels.tpu_math import F32
from pallas_kernels.tpu_tokens import ROWS, Block, Specs, call, flags, vmem

# Compiled for v5e, N = 16, float32, instruction words per token and 512 channels: forward 23 (32 with 256
# lanes, 33 with 1,024), backward 15 to fill, 55 to walk back, 4 for the rest (16, 66, 4 with 256 lanes).
# Forward without the common sums of eight tokens: 30. Two groups of eight per turn of a loop save a tenth
# forward and nothing backward. On the chip: 3 MiB forward, 9 MiB backward. Compiled, not timed on hardware.
TOKENS = 128
LANES = 512
# Numbers per token in the states of a block, which the backward pass holds for all its tokens.
STATE = 1 << 13
MOST_STATES = 128


def _like(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _specs(x, b, *, reverse: bool) -> Specs:
    lanes = min(LANES, max(STATE // b.shape[1] // 128 * 128, 128))
    while x.shape[2] > lanes and x.shape[2] % lanes:
        lanes //= 2
    lanes, tokens = min(lanes, x.shape[2]), min(TOKENS, x.shape[1])
    return Specs(Block(tokens, lanes), x.shape[1] // tokens, reverse)


def _inputs(specs: Specs, x, dt, a, b, c, state, marks):
    """Blocks of the arguments, the states as one for all blocks of tokens or as one for each."""
    states = specs.state(state) if state.ndim == 3 else specs.states(state)
    marks = None if marks is None else specs.flags(marks)
    return *(specs.tokens(z) for z in (x, dt, a)), specs.columns(b), specs.columns(c), states, marks


def _forward(x, dt, a, b, c, state, starts, *, save: bool):
    specs = _specs(x, b, reverse=False)
    marks = flags(starts, specs.block.tokens)
    entering = None
    if save:
        entering = jax.ShapeDtypeStruct((x.shape[0], specs.steps, *state.shape[1:]), F32)
    run = call(
        forward_kernel,
        "selective_scan_forward",
        specs.grid(x),
        _inputs(specs, x, dt, a, b, c, state, marks),
        (specs.tokens(x), specs.state(state), entering and specs.states(entering)),
        (_like(x), _like(state), entering),
        [vmem(*specs.block)] * 3,
    )
    return run(x, dt, a, b, c, state, marks)


@jax.custom_vjp
def _scan(x, dt, a, b, c, state, starts):
    """`x, dt [B,T,D]`, `a [N,D]` in units of log 2, `b, c [B,N,T]`, `state [B,N,D]`, `starts [B,T]` or None.

    N is a multiple of 8, T one of 8 or, above TOKENS, of TOKENS; float32 but for x and dt.
    """
    return _forward(x, dt, a, b, c, state, starts, save=False)[:2]


@jax.custom_vjp
def _saving(x, dt, a, b, c, state, starts):
    """Also the states that enter the blocks, `[B,n,N,D]`."""
    return _forward(x, dt, a, b, c, state, starts, save=True)


def _scan_fwd(x, dt, a, b, c, state, starts):
    y, state, entering = _saving(x, dt, a, b, c, state, starts)
    return (y, state), (x, dt, a, b, c, entering, starts)


def _saving_fwd(*arguments):
    (y, state), saved = _scan_fwd(*arguments)
    return (y, state, saved[5]), saved


def _saving_bwd(saved, cotangents):
    dy, dfinal, dentering = cotangents
    *gradients, dstate = _adjoint(*saved, dy, dfinal)
    # Nothing but `_adjoint` looks at the states that enter, and its derivative only at the first of them.
    return *gradients, dstate + dentering[:, 0], None


@jax.custom_vjp
def _adjoint(x, dt, a, b, c, entering, starts, dy, dfinal):
    """Cotangents of x, dt, a, b, c and the state."""
    specs = _specs(x, b, reverse=True)
    marks = flags(starts, specs.block.tokens)
    da = jax.ShapeDtypeStruct(dfinal.shape, F32)
    column = jax.ShapeDtypeStruct((x.shape[0], specs.grid(x)[1], *b.shape[1:]), F32)
    in_specs = (*_inputs(specs, x, dt, a, b, c, entering, marks), specs.tokens(dy), specs.state(dfinal))
    out_specs = (specs.tokens(x), specs.tokens(dt), specs.state(da), *[specs.columns(column)] * 2)
    run = call(
        backward_kernel,
        "selective_scan_backward",
        specs.grid(x),
        in_specs,
        (*out_specs, specs.state(dfinal)),
        (_like(x), _like(dt), da, column, column, _like(dfinal)),
        [*[vmem(*specs.block)] * 5, vmem(specs.block.tokens + 1, b.shape[1], specs.block.lanes)],
    )
    dx, ddt, da, db, dc, dstate = run(x, dt, a, b, c, entering, marks, dy, dfinal)
    # What came in units of log 2 has so much smaller a gradient.
    return dx, ddt, math.log(2) * jnp.sum(da, 0), jnp.sum(db, 1), jnp.sum(dc, 1), dstate


def _adjoint_fwd(*arguments):
    return _adjoint(*arguments), arguments


def _adjoint_bwd(arguments, cotangents):
    """Second derivatives are left to XLA."""
    *primals, entering, starts, dy, dfinal = arguments
    ids = None if starts is None else jnp.cumsum(starts, 1, dtype=jnp.int32)
    swap = partial(jnp.swapaxes, axis1=1, axis2=2)

    def scan(x, dt, a, b, c, state):
        wide = x.astype(F32), dt.astype(F32), math.log(2) * a.T, swap(b), swap(c), swap(state)
        y, state = xla.selective_scan(*wide, ids)
        return y.astype(x.dtype), swap(state)

    def plain(primals, first, cotangents):
        return jax.vjp(scan, *primals, first)[1](cotangents)

    pull = jax.vjp(plain, tuple(primals), entering[:, 0], (dy, dfinal))[1]
    dprimals, dfirst, ddirections = pull(tuple(cotangents))
    return *dprimals, jnp.zeros_like(entering).at[:, 0].set(dfirst), None, *ddirections


_scan.defvjp(_scan_fwd, lambda saved, cotangents: (*_adjoint(*saved, *cotangents), None))
_saving.defvjp(_saving_fwd, _saving_bwd)
_adjoint.defvjp(_adjoint_fwd, _adjoint_bwd)


def _pad(x, axis: int, multiple: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def selective_scan(x, dt, a, b, c, state, segment_ids=None):
    """Without the skip connection `d`; shapes as in `api.py`, y in x's dtype, the state float32.

    Padding has dt = 0, b = c = 0 and a = 0: decays of 1, nothing written, nothing read.
    """
    length, channels, states = x.shape[1], x.shape[2], a.shape[1]
    time = ROWS if length < TOKENS else TOKENS
    width = 1 if channels <= 128 else 128

    def columns(z):
        return _pad(_pad(jnp.swapaxes(z.astype(F32), 1, 2), 1, ROWS), 2, time)

    def by_states(z):
        return _pad(_pad(jnp.swapaxes(z.astype(F32), -1, -2), -2, ROWS), -1, width)

    x, dt = (_pad(_pad(z if z.dtype == jnp.bfloat16 else z.astype(F32), 1, time), 2, width) for z in (x, dt))
    starts = None if segment_ids is None else segment_starts(segment_ids)
    rate = by_states(a) / math.log(2)
    y, state = _scan(x, dt, rate, columns(b), columns(c), by_states(state), starts)
    return y[:, :length, :channels], jnp.swapaxes(state[:, :states, :channels], 1, 2)


def refusal(x, dt, a, b, c, state, segment_ids=None) -> str | None:
    """Why the kernel cannot take these arguments."""
    return f"takes at most {MOST_STATES} states per channel" if a.shape[1] > MOST_STATES else None
