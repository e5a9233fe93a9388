"""Public entry of the op: shapes, dtypes, choice of implementation."""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Inexact, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.diagonal_scan import gpu, reference, tpu, xla
from pallas_kernels.dispatch import Kernel, choose


def _one_dtype(run):
    """`run` with all arguments in the dtype that holds each of them, complex if one is."""

    @wraps(run)
    def wide(a, b, state, segment_ids):
        dtype = accumulation_dtype(a, b, state)
        return run(*(x.astype(dtype) for x in (a, b, state)), segment_ids)

    return wide


IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": _one_dtype(reference.diagonal_scan),
    "xla": _one_dtype(xla.diagonal_scan),
    "tpu": Kernel(tpu.diagonal_scan),
    "gpu": Kernel(gpu.diagonal_scan),
}


def diagonal_scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B T *S"],
    state: Inexact[Array, "B *S"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B T *S"], Inexact[Array, "B *S"]]:
    """`h_t = a_t h_{t-1} + b_t`, entry by entry; returns all `h [B,T,...]` and the last one `[B,...]`.

    `a` has b's axes, or lacks the first two (the same for all tokens); axes of size 1 are broadcast.
    Meant for |a| <= 1; a = 0 forgets. All states are at least float32, and complex where an argument is.
    Raises ValueError when the axes of `a` do not fit or for an unknown implementation.
    """
    if state is None:
        state = jnp.zeros((b.shape[0], *b.shape[2:]), accumulation_dtype(a, b))
    a, ids = _full(a, b), number_runs(segment_ids)
    run = choose("diagonal_scan", implementation, IMPLEMENTATIONS, (a, b, state, ids))

    def summary(start):
        decay = jnp.prod(a, 1) if a.ndim == b.ndim else jax.lax.integer_pow(a, b.shape[1])
        return decay, run(a, b, start, ids)[1]

    return run(a, b, sequence.carried(state, segment_ids, summary), ids)


def _full(a: Array, b: Array) -> Array:
    """`a` with b's shape, or with b's shape without its first two axes."""
    shape = b.shape if a.ndim == b.ndim else b.shape[2:]
    if a.ndim != len(shape) or any(n not in (1, m) for n, m in zip(a.shape, shape, strict=True)):
        raise ValueError(f"diagonal_scan: a of shape {a.shape} does not fit b of shape {b.shape}")
    return jnp.broadcast_to(a, shape)


def diagonal_scan_step(
    a: Inexact[Array, "..."], b: Inexact[Array, "B *S"], state: Inexact[Array, "B *S"]
) -> Inexact[Array, "B *S"]:
    """One token of `diagonal_scan`: the new state, which is also the output. `a` has b's axes or lacks B."""
    a, b = (x.astype(state.dtype) for x in (a, b))
    return reference.step(state, a if a.ndim == b.ndim else a[None], b)


def flops_per_token(size: int, *, complex_numbers: bool = False) -> int:
    """Forward FLOPs of one token with `size` entries: a product and a sum each."""
    return size * (8 if complex_numbers else 2)
