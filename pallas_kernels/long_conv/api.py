"""Public entries of the op: checks, dtypes, choice of implementation.

M numbers are stored per channel: all N states of a real system, or N/2 complex ones, each standing for a
conjugate pair, whose products are then counted twice in their real part.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Complex, Float, Inexact, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.dispatch import choose
from pallas_kernels.long_conv import kernels, reference, xla
from pallas_kernels.partition import by_rows
from pallas_kernels.short_conv import reference as window

DIAGONAL = {"reference": reference.diagonal_ssm, "xla": xla.diagonal_ssm}
DPLR = {"reference": reference.dplr_ssm, "xla": xla.dplr_ssm}


def _direct(u, kernel):
    empty = jnp.zeros((u.shape[0], kernel.shape[1] - 1, u.shape[2]), u.dtype)
    return window.short_conv(u, kernel.T[::-1], empty)[0]


CONVOLUTION = {"reference": _direct, "xla": xla.long_conv}


def long_conv(
    u: Float[Array, "B T D"], kernel: Float[Array, "D L"], *, implementation: str | None = None
) -> Float[Array, "B T D"]:
    """`y_t = sum_{s<L} kernel_s u_{t-s}` per channel, u being 0 before t = 0; in u's dtype.

    Computed by FFT in float32 or wider, O(T log T): every output sees every input at rounding level, so
    where the future must not leak at all use a form with a state. Raises ValueError for an unknown
    implementation.
    """
    run = choose("long_conv", implementation, CONVOLUTION)
    length, dtype = u.shape[1], accumulation_dtype(u, kernel)
    kernel = jnp.pad(kernel[:, :length], ((0, 0), (0, max(length - kernel.shape[1], 0))))
    return run(u.astype(dtype), kernel.astype(dtype)).astype(u.dtype)


def vandermonde(a: Inexact[Array, "D M"], weight: Inexact[Array, "D M"], length: int) -> Float[Array, "D L"]:
    """`K_j = sum_n weight_n a_n^j`, j < length: the kernel of a diagonal system, weight = B * C.

    Gu et al. 2022 (arXiv 2206.11893) sec. 3.2. Complex arguments stand for conjugate pairs (twice the real
    part); `a` and `weight` have one dtype.
    """
    return kernels.vandermonde(a, weight, length)


def cauchy(
    lam: Complex[Array, "D M"],
    p: Complex[Array, "*R D M"],
    b: Complex[Array, "D M"],
    c_tilde: Complex[Array, "D M"],
    dt: Float[Array, "D"],
    length: int,
) -> Float[Array, "D L"]:
    """`K_j = C A^j B`, j < length, A and B the bilinear discretisation of `diag(lam) - p p*` and b.

    `p [R,D,M]` is a sum of R such terms; `c_tilde = C (I - A^length)`, over conjugate pairs. Truncated
    generating function at the roots of unity: Gu et al. 2021 (arXiv 2111.00396) theorem 3 and algorithm 1.
    """
    return kernels.cauchy(lam, p, b, c_tilde, dt, length)


def diagonal_ssm(
    u: Float[Array, "B T D"],
    a: Inexact[Array, "D M"],
    b: Inexact[Array, "D M"],
    c: Inexact[Array, "D M"],
    state: Inexact[Array, "B D M"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D M"]]:
    """`x_t = a x_{t-1} + b u_t`, `y_t = sum_n c_n x_tn` per channel, the discrete diagonal system.

    `a, b, c` and the state are all real or all complex (conjugate pairs, |a| <= 1). The output has u's
    dtype, the state a's. Raises ValueError for an unknown implementation.
    """
    run = choose("diagonal_ssm", implementation, DIAGONAL)
    if state is None:
        state = jnp.zeros((u.shape[0], *a.shape), a.dtype)
    wide, ids = u.astype(accumulation_dtype(u, a.real)), number_runs(segment_ids)

    def from_state(start):
        return by_rows(run, (wide, a, b, c, start, ids), (True, False, False, False, True, True))

    def summary(start):
        return jax.lax.integer_pow(a, u.shape[1]), from_state(start)[1]

    out, state = from_state(sequence.carried(state, segment_ids, summary))
    return out.astype(u.dtype), state


def diagonal_ssm_step(
    u: Float[Array, "B D"],
    a: Inexact[Array, "D M"],
    b: Inexact[Array, "D M"],
    c: Inexact[Array, "D M"],
    state: Inexact[Array, "B D M"],
) -> tuple[Float[Array, "B D"], Inexact[Array, "B D M"]]:
    """One token of `diagonal_ssm`."""
    state, out = reference.diagonal_step(state, u.astype(state.real.dtype), a, b, c)
    return out.astype(u.dtype), state


def dplr_ssm(
    u: Float[Array, "B T D"],
    lam: Complex[Array, "D M"],
    p: Complex[Array, "*R D M"],
    b: Complex[Array, "D M"],
    c: Complex[Array, "D M"],
    dt: Float[Array, "D"],
    state: Complex[Array, "B D M"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D M"]]:
    """`x' = A x + b u`, `y = C x` with `A = diag(lam) - p p*`, by the bilinear rule with step dt:

    `(I - dt/2 A) x_t = (I + dt/2 A) x_{t-1} + dt b u_t`. `p [R,D,M]` is a sum of R such terms. All vectors
    are over conjugate pairs, Re lam < 0. The output has u's dtype, the state lam's. Raises ValueError for an
    unknown implementation.

    Gu et al. 2021 (arXiv 2111.00396) eq. 3 (discretisation) and theorem 2 (the linear-time step).
    """
    run = choose("dplr_ssm", implementation, DPLR)
    if state is None:
        state = jnp.zeros((u.shape[0], *lam.shape), lam.dtype)
    wide = u.astype(accumulation_dtype(u, lam.real))
    ids = number_runs(segment_ids)

    def from_state(start):
        return by_rows(run, (wide, lam, p, b, c, dt, start, ids), (True, *[False] * 5, True, True))

    def summary(start):
        return xla.dplr_power(lam, p, dt, u.shape[1]), from_state(start)[1]

    out, state = from_state(sequence.carried(state, segment_ids, summary, xla.dplr_moved))
    return out.astype(u.dtype), state


def dplr_ssm_step(
    u: Float[Array, "B D"],
    lam: Complex[Array, "D M"],
    p: Complex[Array, "*R D M"],
    b: Complex[Array, "D M"],
    c: Complex[Array, "D M"],
    dt: Float[Array, "D"],
    state: Complex[Array, "B D M"],
) -> tuple[Float[Array, "B D"], Complex[Array, "B D M"]]:
    """One token of `dplr_ssm`, in O(M) per channel."""
    system = reference.bilinear(lam, p, b, dt)
    state, out = reference.dplr_step(state, u.astype(state.real.dtype), system, c)
    return out.astype(u.dtype), state


def flops_per_token(length: int, width: int, state_dim: int, *, dense: bool) -> int:
    """Forward FLOPs of one token: Toeplitz product, write, read and, per chunk, one transition of the state.

    `dense`: the transition is a matrix (`dplr_ssm`), else a diagonal. The tables are left out: they depend
    neither on length nor on batch.
    """
    chunk = min(length, xla.CHUNK)
    transition = 2 * state_dim**2 if dense else 4 * state_dim
    return width * (2 * chunk + 4 * state_dim + transition // chunk)
