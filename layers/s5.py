"""S5: one state space with P states for all channels together, diagonal, in conjugate pairs.

    x_t = a x_{t-1} + b (B u_t),        s_t = 2 Re(C x_t),      x in C^{P/2}, entry by entry
    a = e^{lam dt},   b = (a - 1) / lam                         zero-order hold, a step dt for each state
    z = gelu(s + D u),     y = z * sigmoid(W_out z)             gate = "half"
                           y = GLU(W_out z)                     gate = "full"

lam = -exp(A_log) + i A_im starts at the eigenvalues of the normal part of HiPPO-LegS with P/J states, J times
over; dt is log-uniform. B and C have unit fan-in variance before they are taken to the basis of the modes.
That basis is unitary and leaves Gaussian matrices Gaussian, so they are drawn in it directly: B with half its
variance in each part, and C with all of it in each (as published: complex before the change of basis).

Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), sec. 3 (MIMO state space, diagonalised dynamics,
discretisation) and 4 (initial values, one step per state, conjugate pairs). The real part is kept
negative by its logarithm, as in S4D, where the published code learns it as it is or clips it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.checks import require, require_choice, require_positive
from layers.common import Params, dense, weight, wide
from layers.state_spaces import (
    GELU_FLOPS,
    dense_to_complex,
    dense_to_real,
    hippo_legs,
    log_uniform,
    state_space_output,
)
from pallas_kernels.diagonal_scan import diagonal_scan, diagonal_scan_step, flops_per_token

GATES = ("half", "full")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for states that are not J blocks of pairs, a bad dt range or an unknown gate."""

    sequence_way = "scan"

    width: int
    state_dim: int | None = None  # P, in conjugate pairs; default width, or one more
    blocks: int = 1  # J copies of the initial modes
    gate: str = "half"
    dt_min: float = 1e-3  # dt starts log-uniform in [dt_min, dt_max]: memory of about 1/dt tokens
    dt_max: float = 1e-1

    def __post_init__(self):
        require_positive(self, "width", "blocks")
        if self.state_dim is not None:
            require_positive(self, "state_dim")
        require(
            self.P % (2 * self.blocks) == 0,
            f"s5: state_dim={self.P} must be a multiple of twice blocks={self.blocks}",
        )
        require_choice(self, "gate", GATES)
        require(0 < self.dt_min <= self.dt_max, f"s5: dt_min={self.dt_min}, dt_max={self.dt_max}")

    @property
    def P(self) -> int:
        return self.state_dim or self.width + self.width % 2

    def state_bytes(self) -> int:
        """`4 P`: P/2 complex numbers."""
        return 4 * self.P

    def flops_per_token(self, length: int) -> int:
        """The same at every length: B and C, the discretised input and the scan, D, GELU, gate."""
        mix = 4 * self.width * self.P + 3 * self.P + flops_per_token(self.P // 2, complex_numbers=True)
        gate = (4 if self.gate == "full" else 2) * self.width**2
        return mix + gate + (2 + GELU_FLOPS) * self.width


@struct.dataclass
class State:
    memory: Array  # [B, P/2] complex


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; D ~ N(0, 1)."""
    keys = iter(jax.random.split(key, 7))
    half = cfg.P // 2
    lam = np.tile(hippo_legs(cfg.P // cfg.blocks)[0], cfg.blocks)
    return {
        "ssm_A_log": jnp.zeros(half) + np.log(-lam.real),
        "ssm_A_im": jnp.zeros(half) + lam.imag,
        "ssm_log_dt": log_uniform(next(keys), (half,), cfg.dt_min, cfg.dt_max),
        "ssm_B_re": weight(next(keys), cfg.width, half, gain=0.5**0.5),
        "ssm_B_im": weight(next(keys), cfg.width, half, gain=0.5**0.5),
        "C_re": jax.random.normal(next(keys), (half, cfg.width)) * cfg.P**-0.5,
        "C_im": jax.random.normal(next(keys), (half, cfg.width)) * cfg.P**-0.5,
        "D": jax.random.normal(next(keys), (cfg.width,)),
        "w_out": weight(next(keys), cfg.width, (2 if cfg.gate == "full" else 1) * cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.P // 2), complex))


def _recurrence(params: Params, x: Array) -> tuple[Array, Array]:
    """a `[P/2]` and the discretised input `[..., P/2]`."""
    lam = jax.lax.complex(-jnp.exp(params["ssm_A_log"]), params["ssm_A_im"])
    exponent = lam * jnp.exp(params["ssm_log_dt"])
    write = dense_to_complex(x, params["ssm_B_re"], params["ssm_B_im"])
    return jnp.exp(exponent), jnp.expm1(exponent) / lam * write


def _output(params: Params, cfg: Config, x: Array, h: Array) -> Array:
    s = 2 * dense_to_real(h, params["C_re"], params["C_im"])
    if cfg.gate == "full":
        return state_space_output(params, x, s)
    z = jax.nn.gelu((s + params["D"] * wide(x)).astype(x.dtype), approximate=False)
    return z * jax.nn.sigmoid(dense(z, params["w_out"]))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    h, memory = diagonal_scan(
        *_recurrence(params, x), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, cfg, x, h), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    memory = diagonal_scan_step(*_recurrence(params, x_t), state.memory)
    return _output(params, cfg, x_t, memory), State(memory=memory)
