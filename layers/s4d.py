"""S4D: a bank of diagonal state spaces, one per channel, with complex modes in conjugate pairs.

Channel d has step dt_d and modes lam_dn = -exp(A_log_dn) + i A_im_dn, n < N/2. Discretised,

    zero-order hold    a = e^{lam dt},                        b = (a - 1) / lam
    bilinear           a = (1 + lam dt/2) / (1 - lam dt/2),   b = dt / (1 - lam dt/2)

    x_tn = a_n x_{t-1,n} + b_n u_t,      s_t = 2 Re sum_n C_n x_tn,
    y = GLU( W_out gelu(s + D u) ).

The input vector B is 1: another one could be moved into C. The modes start as (n = 0 .. N/2 - 1)

    init = "lin"     -1/2 + i pi n
           "inv"     -1/2 + i (N/pi) (N / (2n + 1) - 1)
           "legs"    the eigenvalues of the normal part of HiPPO-LegS
           "real"    -(n + 1), n < N: N real modes, s_t = sum_n C_n x_tn

("lin" is the normal part of HiPPO-FouT at half its frequencies, moved left by 1/2). With `sets` = S the
channels share S sets of modes, channel d using number d mod S with its own dt. With `separate_dt` the real
and the imaginary part of lam dt have a step each, equal at the start: lam dt is then
-exp(A_log) dt + i A_im dt_im in a and b above. Both together, with S = 1, are DSS-exp, whose weights W over
the modes with positive frequency are 2C.

DSS-softmax normalises every mode over the L positions of the sequence,

    K_j = Re sum_n W_n / lam_n * e^{j lam_n dt} / sum_{l<L} e^{l lam_n dt},

which is b divided by e^{L lam dt} - 1. With L the length of the input, as there, the first output changes
with the number of tokens that follow: not causal between inputs of different length, and no step form can
agree with it. So L = `softmax_length` is part of the model here, and the kernel goes on beyond L. There the
sign of Re lam is free, as the kernel ends at L; a state that goes on would grow without bound, so Re lam < 0
stays.
1/x is conj(x) / (|x|^2 + 1e-7), since a sum of complex exponentials may vanish.

Sources: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893) sec. 3 (discretisation, kernel, parameters), 4 (inits);
Gupta, Gu, Berant 2022 (arXiv 2203.14343), DSS-exp and DSS-softmax; shared modes, separate steps and the
guarded reciprocal are those of its code.
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
from pallas_kernels.long_conv import diagonal_ssm, diagonal_ssm_step, flops_per_token

INITS = ("lin", "inv", "legs", "real")
DISCRETIZATIONS = ("zoh", "bilinear")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for an odd number of states, a bad dt range, an unknown init or discretization,
    `sets` that do not divide the width, or separate steps or a softmax of anything but complex modes under
    the zero-order hold."""

    sequence_way = "scan"

    width: int
    state_dim: int = 64  # N real numbers per channel
    init: str = "legs"
    discretization: str = "zoh"
    sets: int | None = None  # S sets of modes that the channels share; default one each
    separate_dt: bool = False  # a step of its own for the imaginary part
    softmax_length: int | None = None  # L of DSS-softmax; default no normalisation
    dt_min: float = 1e-3  # dt starts log-uniform in [dt_min, dt_max]: memory of about 1/dt tokens
    dt_max: float = 1e-1

    def __post_init__(self):
        require_positive(self, "width", "state_dim")
        require(self.state_dim % 2 == 0, f"s4d: state_dim={self.state_dim} must be even")
        require(0 < self.dt_min <= self.dt_max, f"s4d: dt_min={self.dt_min}, dt_max={self.dt_max}")
        require_choice(self, "init", INITS)
        require_choice(self, "discretization", DISCRETIZATIONS)
        require_sets(self)
        zoh = self.discretization == "zoh" and not self.real
        choice = f"init={self.init!r}, discretization={self.discretization!r}"
        require(not self.separate_dt or zoh, f"s4d: separate_dt with {choice}")
        if self.softmax_length is not None:
            require_positive(self, "softmax_length")
            require(zoh, f"s4d: softmax_length={self.softmax_length} with {choice}")

    @property
    def real(self) -> bool:
        return self.init == "real"

    @property
    def modes(self) -> int:
        """Stored numbers per channel."""
        return self.state_dim if self.real else self.state_dim // 2

    def state_bytes(self) -> int:
        """`4 D N`: D N real numbers, or D N/2 complex ones."""
        return 4 * self.width * self.state_dim

    def flops_per_token(self, length: int) -> int:
        mix = flops_per_token(length, self.width, self.state_dim, dense=False)
        return mix + 4 * self.width**2 + (2 + GELU_FLOPS) * self.width


@struct.dataclass
class State:
    memory: Array  # [B, D, N/2] complex, or [B, D, N] for real modes


def _initial_modes(cfg: Config) -> np.ndarray:
    """lam at the start, `[N/2]` complex or `[N]` real."""
    n, size = np.arange(cfg.modes), cfg.state_dim
    if cfg.init == "lin":
        return -0.5 + 1j * np.pi * n
    if cfg.init == "inv":
        return -0.5 + 1j * (size / np.pi) * (size / (2 * n + 1) - 1)
    if cfg.init == "legs":
        return hippo_legs(size)[0]
    return -(n + 1.0)


def init(key: Array, cfg: Config) -> Params:
    """All channels start with the same modes; C has unit variance, D ~ N(0, 1)."""
    keys = iter(jax.random.split(key, 5))
    shape = (cfg.width, cfg.modes)
    modes = np.broadcast_to(_initial_modes(cfg), (cfg.sets or cfg.width, cfg.modes))
    log_dt = log_uniform(next(keys), (cfg.width,), cfg.dt_min, cfg.dt_max)
    params = {
        "ssm_log_dt": log_dt,
        "ssm_A_log": jnp.zeros(modes.shape) + np.log(-modes.real),
        "C_re": jax.random.normal(next(keys), shape) * (1 if cfg.real else 0.5**0.5),
        "D": jax.random.normal(next(keys), (cfg.width,)),
        "w_out": weight(next(keys), cfg.width, 2 * cfg.width),
    }
    if not cfg.real:
        params["ssm_A_im"] = jnp.zeros(modes.shape) + modes.imag
        params["C_im"] = jax.random.normal(next(keys), shape) * 0.5**0.5
    if cfg.separate_dt:
        # A copy: a donated buffer has one owner.
        params["ssm_log_dt_im"] = jnp.copy(log_dt)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.width, cfg.modes), float if cfg.real else complex))


def _system(params: Params, cfg: Config) -> tuple[Array, Array, Array]:
    """The discrete `a, b, C [D, modes]`."""
    lam, c = -jnp.exp(params["ssm_A_log"]), params["C_re"]
    if not cfg.real:
        lam, c = jax.lax.complex(lam, params["ssm_A_im"]), jax.lax.complex(c, params["C_im"])
    lam, dt = per_channel(lam, cfg.width), jnp.exp(params["ssm_log_dt"])[:, None]
    exponent = lam * dt
    if cfg.separate_dt:
        exponent = jax.lax.complex(lam.real * dt, lam.imag * jnp.exp(params["ssm_log_dt_im"])[:, None])
    if cfg.discretization == "zoh":
        b = jnp.expm1(exponent) / lam
        if cfg.softmax_length is not None:
            total = jnp.expm1(cfg.softmax_length * exponent)
            b = b * jnp.conj(total) / (total.real**2 + total.imag**2 + 1e-7)
        return jnp.exp(exponent), b, c
    inverse = 1 / (1 - exponent / 2)
    return (1 + exponent / 2) * inverse, dt * inverse, c


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    y, memory = diagonal_ssm(
        x, *_system(params, cfg), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return state_space_output(params, x, y), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    y, memory = diagonal_ssm_step(x_t, *_system(params, cfg), state.memory)
    return state_space_output(params, x_t, y), State(memory=memory)
