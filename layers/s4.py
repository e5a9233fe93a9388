"""S4: one state space per channel whose matrix is HiPPO-LegS, kept as a diagonal minus a rank one.

Channel d is x'(t) = A x + B u, s = C x with N states and A = diag(lam) - P P*, in the basis where the
normal part of the HiPPO matrix is diagonal: N/2 complex numbers stand for N/2 conjugate pairs. With
lam = -exp(A_log) + i A_im the real part stays negative and A dissipative. The bilinear rule with step dt,

    (I - dt/2 A) x_t = (I + dt/2 A) x_{t-1} + dt B u_t,      s_t = 2 Re sum_{n < N/2} C_n x_tn,
    y = GLU( W_out gelu(s + D u) ),

is solved in O(N) by Woodbury's identity in `step`. `apply` convolves chunks of L tokens with the kernel
K_j = C A^j B, found at the roots of unity from four Cauchy sums over the modes and C~ = C (I - A^L), and
carries the state from chunk to chunk. C itself is the parameter: nothing depends on L.

A starts as the matrix of one of HiPPO's measures, which says what of the past the N states hold at first;
n, k = 0 .. N-1, r_n = sqrt(2n + 1), time in tokens times dt:

    measure = "legs"    all of it, exponentially warped:  A_nk = -r_n r_k (n > k), -(n + 1) (n = k), 0,  B = r
              "legt"    the last unit of time, in Legendre polynomials:
                        A_nk = -r_n r_k (n >= k), -r_n r_k (-1)^(n-k) (n < k),  B = r
              "lagt"    e^{-s} at age s, in Laguerre polynomials:  A_nk = -1 (n >= k), 0,  B = 1
              "fout"    the last unit of time, in a Fourier series, states in turn cos and sin of 2 pi m s:
                        A = (rotations by 2 pi m) - 2 f f^T,  B = 2 f,  f = 1, 0, sqrt(2), 0, sqrt(2), 0, ...

"legt" has two ranks, P [2, N/2]. The normal parts of "legt" and "fout" are skew, with Re lam = 0; the
parametrisation needs less, and takes -1e-4. With `sets` = S the S parameter sets (A_log, A_im, P, B) are
shared, channel d using number d mod S; dt, C and D stay its own.

Sources: Gu, Goel, Ré 2021 (arXiv 2111.00396) eq. 3-5, theorems 1-3, algorithm 1; the measures of Gu et al.
2020 (arXiv 2008.07669) theorem 1 and, FouT, Gu et al. 2022 (arXiv 2206.12037). Shared sets are an
option of the authors' code.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.checks import require, require_choice, require_positive, require_sets
from layers.common import Params, weight
from layers.state_spaces import GELU_FLOPS, hippo_legs, log_uniform, per_channel, state_space_output
from pallas_kernels.long_conv import dplr_ssm, dplr_ssm_step, flops_per_token

MEASURES = ("legs", "legt", "lagt", "fout")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for an odd number of states, a bad dt range, an unknown measure or `sets` that do not
    divide the width."""

    sequence_way = "scan"

    width: int
    state_dim: int = 64  # N, in conjugate pairs
    measure: str = "legs"  # of HiPPO, where A starts
    sets: int | None = None  # S copies of A and B that the channels share; default one each
    dt_min: float = 1e-3  # dt starts log-uniform in [dt_min, dt_max]: memory of about 1/dt tokens
    dt_max: float = 1e-1

    def __post_init__(self):
        require_positive(self, "width", "state_dim")
        require(self.state_dim % 2 == 0, f"s4: state_dim={self.state_dim} must be even")
        require(0 < self.dt_min <= self.dt_max, f"s4: dt_min={self.dt_min}, dt_max={self.dt_max}")
        require_choice(self, "measure", MEASURES)
        require_sets(self)

    def state_bytes(self) -> int:
        """`4 D N`: D N/2 complex numbers."""
        return 4 * self.width * self.state_dim

    def flops_per_token(self, length: int) -> int:
        mix = flops_per_token(length, self.width, self.state_dim, dense=True)
        return mix + 4 * self.width**2 + (2 + GELU_FLOPS) * self.width


@struct.dataclass
class State:
    memory: Array  # [B, D, N/2] complex


def _hippo(measure: str, states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`lam, P, B` over conjugate pairs: `[states/2]`, P `[R, states/2]` where it has more than one rank."""
    if measure == "legs":
        return hippo_legs(states)
    n = np.arange(states)
    if measure == "fout":
        f = np.where(n[: states // 2] == 0, 1.0, 2**0.5)
        return 2j * np.pi * n[: states // 2], f + 0j, 2**0.5 * f + 0j
    if measure == "legt":
        b = np.sqrt(2 * n + 1.0)
        p = np.stack([b * (n % 2 == parity) for parity in (0, 1)])
        a = -np.outer(b, b) * np.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] + n))
    else:
        b, p = np.ones(states), np.full(states, 2**-0.5)
        a = -np.tri(states)
    normal = a + (p.T @ p if p.ndim == 2 else np.outer(p, p))
    # i times a skew-symmetric matrix is Hermitian: real frequencies, orthonormal modes, in pairs +-w.
    frequency, modes = np.linalg.eigh(-1j * (normal - normal.T) / 2)
    upper = modes[:, frequency > 0].conj().T
    return normal[0, 0] + 1j * frequency[frequency > 0], p @ upper.T, upper @ b


def init(key: Array, cfg: Config) -> Params:
    """All channels start from the HiPPO matrix; C has unit variance, D ~ N(0, 1)."""
    keys = iter(jax.random.split(key, 5))
    shape, sets = (cfg.width, cfg.state_dim // 2), (cfg.sets or cfg.width, cfg.state_dim // 2)
    lam, p, b = _hippo(cfg.measure, cfg.state_dim)
    lam, p, b = (np.broadcast_to(v[..., None, :], (*v.shape[:-1], *sets)) for v in (lam, p, b))
    parts = {
        "ssm_A_log": np.log(-np.minimum(lam.real, -1e-4)),
        "ssm_A_im": lam.imag,
        "ssm_P_re": p.real,
        "ssm_P_im": p.imag,
        "ssm_B_re": b.real,
        "ssm_B_im": b.imag,
    }
    return {
        **{name: jnp.zeros(value.shape) + value for name, value in parts.items()},
        "ssm_log_dt": log_uniform(next(keys), (cfg.width,), cfg.dt_min, cfg.dt_max),
        "C_re": jax.random.normal(next(keys), shape) * 0.5**0.5,
        "C_im": jax.random.normal(next(keys), shape) * 0.5**0.5,
        "D": jax.random.normal(next(keys), (cfg.width,)),
        "w_out": weight(next(keys), cfg.width, 2 * cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.width, cfg.state_dim // 2), complex))


def _system(params: Params) -> tuple[Array, Array, Array, Array, Array]:
    """The continuous `lam, P, B, C [D, N/2]` (P also `[R, D, N/2]`) and `dt [D]`."""
    lam = jax.lax.complex(-jnp.exp(params["ssm_A_log"]), params["ssm_A_im"])
    p = jax.lax.complex(params["ssm_P_re"], params["ssm_P_im"])
    b = jax.lax.complex(params["ssm_B_re"], params["ssm_B_im"])
    c = jax.lax.complex(params["C_re"], params["C_im"])
    lam, p, b = (per_channel(v, len(c)) for v in (lam, p, b))
    return lam, p, b, c, jnp.exp(params["ssm_log_dt"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    y, memory = dplr_ssm(
        x, *_system(params), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return state_space_output(params, x, y), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    y, memory = dplr_ssm_step(x_t, *_system(params), state.memory)
    return state_space_output(params, x_t, y), State(memory=memory)
