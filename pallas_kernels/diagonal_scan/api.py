"""Public entry of the op: shapes, dtypes, choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Inexact, Int

from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.diagonal_scan import reference, xla
from pallas_kernels.dispatch import choose

IMPLEMENTATIONS = {"reference": reference.diagonal_scan, "xla": xla.diagonal_scan}


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
    run = choose("diagonal_scan", implementation, IMPLEMENTATIONS)
    dtype = accumulation_dtype(a, b) if state is None else accumulation_dtype(a, b, state)
    a = _full(a, b).astype(dtype)
    if state is None:
        state = jnp.zeros((b.shape[0], *b.shape[2:]), dtype)
    return run(a, b.astype(dtype), state.astype(dtype), number_runs(segment_ids))


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
