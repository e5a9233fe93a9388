"""LRU: a linear recurrence with N complex modes, placed on a ring in the unit disc and normalised there.

    h_t = lam h_{t-1} + gamma (B x_t),      s_t = Re(C h_t),      h in C^N, entry by entry
    lam = exp(-e^nu + i e^theta),           gamma = e^gamma_log
    y   = GLU( W_out gelu(s + D x) ).

|lam| < 1 whatever nu. At the start the squared radius |lam|^2 is uniform in [r_min^2, r_max^2], the phase in
[0, max_phase], and gamma = sqrt(1 - |lam|^2), so that white inputs give states of the size of B x; gamma is
a parameter of its own from then on. B x has unit variance, C twice that of its fan-in, as the real part takes
half of it, and D ~ N(0, 1). Modes are not in conjugate pairs.

Source: Orvieto et al. 2023 (arXiv 2303.06349), sec. 3 (exponential parametrisation, ring, normalisation).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, weight
from layers.state_spaces import GELU_FLOPS, dense_to_complex, dense_to_real, state_space_output
from pallas_kernels.diagonal_scan import diagonal_scan, diagonal_scan_step, flops_per_token


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1 or an empty ring."""

    sequence_way = "scan"

    width: int
    state_dim: int | None = None  # N complex modes; default width
    r_min: float = 0.0  # the ring of |lam| at the start; 0.9 to 0.999 for long memory
    r_max: float = 1.0
    max_phase: float = 2 * math.pi  # smaller for long memory, say pi / 10

    def __post_init__(self):
        require_positive(self, "width")
        if self.state_dim is not None:
            require_positive(self, "state_dim")
        require(0 <= self.r_min < self.r_max <= 1, f"lru: r_min={self.r_min}, r_max={self.r_max}")
        require(0 < self.max_phase <= 2 * math.pi, f"lru: max_phase={self.max_phase}")

    @property
    def N(self) -> int:
        return self.state_dim or self.width

    def state_bytes(self) -> int:
        """`8 N`."""
        return 8 * self.N

    def flops_per_token(self, length: int) -> int:
        """The same at every length: B and C, the scan and its normalised input, D, GELU, GLU."""
        mix = 8 * self.width * self.N + flops_per_token(self.N, complex_numbers=True) + 2 * self.N
        return mix + 4 * self.width**2 + (2 + GELU_FLOPS) * self.width


@struct.dataclass
class State:
    memory: Array  # [B, N] complex


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module."""
    keys = iter(jax.random.split(key, 8))
    # Bounded away from 0, where both logarithms end.
    ring, phase = (jax.random.uniform(next(keys), (cfg.N,), minval=1e-6) for _ in range(2))
    nu = jnp.log(-0.5 * jnp.log(cfg.r_min**2 + ring * (cfg.r_max**2 - cfg.r_min**2)))
    return {
        "ssm_nu": nu,
        "ssm_theta": jnp.log(phase * cfg.max_phase),
        # 1 - |lam|^2 without cancellation where |lam| is nearly 1.
        "ssm_gamma_log": 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu))),
        "ssm_B_re": weight(next(keys), cfg.width, cfg.N, gain=0.5**0.5),
        "ssm_B_im": weight(next(keys), cfg.width, cfg.N, gain=0.5**0.5),
        "C_re": weight(next(keys), cfg.N, cfg.width),
        "C_im": weight(next(keys), cfg.N, cfg.width),
        "D": jax.random.normal(next(keys), (cfg.width,)),
        "w_out": weight(next(keys), cfg.width, 2 * cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.N), complex))


def _recurrence(params: Params, x: Array) -> tuple[Array, Array]:
    """lam `[N]` and the normalised input `[..., N]`."""
    lam = jnp.exp(jax.lax.complex(-jnp.exp(params["ssm_nu"]), jnp.exp(params["ssm_theta"])))
    gamma = jnp.exp(params["ssm_gamma_log"])
    return lam, gamma * dense_to_complex(x, params["ssm_B_re"], params["ssm_B_im"])


def _output(params: Params, x: Array, h: Array) -> Array:
    return state_space_output(params, x, dense_to_real(h, params["C_re"], params["C_im"]))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    h, memory = diagonal_scan(
        *_recurrence(params, x), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, x, h), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    memory = diagonal_scan_step(*_recurrence(params, x_t), state.memory)
    return _output(params, x_t, memory), State(memory=memory)
