"""S4: one state space per channel whose matrix is HiPPO-LegS, kept as a diagonal minus a rank one.

Channel d is x'(t) = A x + B u, s = C x with N states and A = diag(lam) - P P*, in the basis where the
normal part of HiPPO-LegS is diagonal: N/2 complex numbers stand for N/2 conjugate pairs. With
lam = -exp(A_log) + i A_im the real part stays negative and A dissipative. The bilinear rule with step dt,

    (I - dt/2 A) x_t = (I + dt/2 A) x_{t-1} + dt B u_t,      s_t = 2 Re sum_{n < N/2} C_n x_tn,
    y = GLU( W_out gelu(s + D u) ),

is solved in O(N) by Woodbury's identity in `step`. `apply` convolves chunks of L tokens with the kernel
K_j = C A^j B, found at the roots of unity from four Cauchy sums over the modes and C~ = C (I - A^L), and
carries the state from chunk to chunk. C itself is the parameter: nothing depends on L.

Source: Gu, Goel, Ré 2021 (arXiv 2111.00396) eq. 3-5, theorems 1-3, algorithm 1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.common import (
    Params,
    hippo_legs,
    log_uniform,
    require,
    require_positive,
    state_space_output,
    weight,
)
from pallas_kernels.long_conv import dplr_ssm, dplr_ssm_step, flops_per_token


@dataclass(frozen=True)
class Config:
    """Raises ValueError for an odd number of states or a bad dt range."""

    width: int
    state_dim: int = 64  # N, in conjugate pairs
    dt_min: float = 1e-3  # dt starts log-uniform in [dt_min, dt_max]: memory of about 1/dt tokens
    dt_max: float = 1e-1

    def __post_init__(self):
        require_positive(self, "width", "state_dim")
        require(self.state_dim % 2 == 0, f"s4: state_dim={self.state_dim} must be even")
        require(0 < self.dt_min <= self.dt_max, f"s4: dt_min={self.dt_min}, dt_max={self.dt_max}")

    def state_bytes(self) -> int:
        """`4 D N`: D N/2 complex numbers."""
        return 4 * self.width * self.state_dim

    def flops_per_token(self, length: int) -> int:
        mix = flops_per_token(length, self.width, self.state_dim, dense=True)
        return mix + 4 * self.width**2 + 2 * self.width


@struct.dataclass
class State:
    memory: Array  # [B, D, N/2] complex


def init(key: Array, cfg: Config) -> Params:
    """All channels start from HiPPO-LegS; C has unit variance, D ~ N(0, 1)."""
    keys = iter(jax.random.split(key, 5))
    shape = (cfg.width, cfg.state_dim // 2)
    lam, p, b = (np.broadcast_to(v, shape) for v in hippo_legs(cfg.state_dim))
    parts = {
        "ssm_A_log": np.log(-lam.real),
        "ssm_A_im": lam.imag,
        "ssm_P_re": p.real,
        "ssm_P_im": p.imag,
        "ssm_B_re": b.real,
        "ssm_B_im": b.imag,
    }
    return {
        **{name: jnp.zeros(shape) + value for name, value in parts.items()},
        "ssm_log_dt": log_uniform(next(keys), (cfg.width,), cfg.dt_min, cfg.dt_max),
        "C_re": jax.random.normal(next(keys), shape) * 0.5**0.5,
        "C_im": jax.random.normal(next(keys), shape) * 0.5**0.5,
        "D": jax.random.normal(next(keys), (cfg.width,)),
        "w_out": weight(next(keys), cfg.width, 2 * cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.width, cfg.state_dim // 2), complex))


def _system(params: Params) -> tuple[Array, Array, Array, Array, Array]:
    """The continuous `lam, P, B, C [D, N/2]` and `dt [D]`."""
    lam = jax.lax.complex(-jnp.exp(params["ssm_A_log"]), params["ssm_A_im"])
    p = jax.lax.complex(params["ssm_P_re"], params["ssm_P_im"])
    b = jax.lax.complex(params["ssm_B_re"], params["ssm_B_im"])
    c = jax.lax.complex(params["C_re"], params["C_im"])
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
