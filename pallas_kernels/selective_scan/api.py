"""Public entry of the op: dtypes, skip connection, choice of implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.dispatch import Kernel, choose, widened
from pallas_kernels.selective_scan import gpu, reference, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": widened(reference.selective_scan),
    "xla": widened(xla.selective_scan),
    "tpu": Kernel(tpu.selective_scan, tpu.refusal),
    "gpu": Kernel(gpu.selective_scan, gpu.refusal),
}


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    d: Float[Array, " D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """`h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T`, `y_t = h_t c_t + d x_t`, per channel of D.

    `a <= 0` and `dt >= 0`, so that every decay is at most 1. The states of all tokens, `[B,T,D,N]`, are
    never written out, forward or backward. The output has x's dtype, the state is at least float32.
    Raises ValueError for an unknown implementation.

    Gu & Dao 2023 (arXiv 2312.00752) eq. 2a-2b and algorithm 2; a is discretised by the zero-order hold of
    their eq. 4, b by its first order dt b, as in the authors' code. Recomputing states for the adjoint is
    their sec. 3.3.2.
    """
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), accumulation_dtype(x, dt, a, b, c))
    tokens, ids = (x, dt, a, b, c), number_runs(segment_ids)
    run = choose("selective_scan", implementation, IMPLEMENTATIONS, (*tokens, state, ids))

    def summary(start):
        return jnp.exp(jnp.sum(dt, 1)[..., None] * a), run(*tokens, start, ids)[1]

    out, state = run(*tokens, sequence.carried(state, segment_ids, summary), ids)
    if d is not None:
        dtype = accumulation_dtype(x, d)
        out = out.astype(dtype) + d.astype(dtype) * x.astype(dtype)
    return out.astype(x.dtype), state


def selective_scan_step(
    x: Float[Array, "B D"],
    dt: Float[Array, "B D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B N"],
    c: Float[Array, "B N"],
    d: Float[Array, " D"] | None,
    state: Float[Array, "B D N"],
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
    """One token of `selective_scan`."""
    wide = [z.astype(state.dtype) for z in (x, dt, a, b, c)]
    state, out = reference.step(state, *wide)
    if d is not None:
        out = out + d.astype(out.dtype) * wide[0]
    return out.astype(x.dtype), state


def flops_per_token(channels: int, state_dim: int) -> int:
    """Forward FLOPs of one token, at any length, an exponential counted as one.

    Per state entry dt a, exp, decay, write (2) and read (2); per channel dt x and the skip d x (2).
    """
    return channels * (7 * state_dim + 3)
