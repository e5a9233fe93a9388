"""Mamba: a diagonal state space whose step size, input and output maps depend on the token (S6).

With E = expand * width channels, N states per channel and a step size of rank R,

    [x | z] = W_in u,                 x = silu(conv(x) + b_conv)
    [r | B | C] = W_x x,              dt = softplus(W_dt r + b_dt),          A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,     y_t = h_t C_t + D x_t,   h in R^{E x N}
    out = W_out( y * silu(z) )

B and C are shared by all channels; r, B and C have R, N and N entries. There is no norm inside, unless
`inner_norm` puts an RMSNorm on each of r, B and C, with a learned scale or, as in Falcon Mamba, without
(`inner_scale`), and the layer replaces both the mixer and the MLP of a block.

Source: Gu & Dao 2023 (arXiv 2312.00752), algorithm 2 and figure 3; initial values of sec. 3.6:
A_log[c, n] = log(n + 1) for n = 0..N-1 (S4D-real), D = 1, W_dt uniform within 1/sqrt(R), softplus(b_dt)
log-uniform in [1e-3, 1e-1], the remaining matrices uniform within 1/sqrt(fan in). The inner norms are those
of Jamba (Lieber et al. 2024, arXiv 2403.19887), against spikes of the loss at 7B parameters.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_positive
from layers.common import Params, conv_init, conv_state, dense, rms_norm, wide
from layers.fields import later
from layers.state_spaces import dt_bias_init
from pallas_kernels.selective_scan import flops_per_token, selective_scan, selective_scan_step
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1."""

    sequence_way = "scan"

    width: int
    expand: int = 2
    state_dim: int = 16  # N per channel
    conv: int = 4  # taps of the short convolution
    dt_rank: int | None = None  # R; default ceil(width / 16)
    inner_norm: bool = False  # RMSNorm of r, B and C
    inner_scale: bool = later(True)  # whether those norms have learned scales
    inner_eps: float = later(1e-5)  # of those norms

    def __post_init__(self):
        require_positive(self, "width", "expand", "state_dim", "conv")
        if self.dt_rank is not None:
            require_positive(self, "dt_rank")

    @property
    def channels(self) -> int:
        return self.expand * self.width

    @property
    def rank(self) -> int:
        return self.dt_rank or -(-self.width // 16)

    def state_bytes(self) -> int:
        """`4 E (N + conv - 1)`."""
        return 4 * self.channels * (self.state_dim + self.conv - 1)

    def flops_per_token(self, length: int) -> int:
        """The same at every length."""
        columns = 3 * self.width + self.conv + 2 * self.rank + 2 * self.state_dim
        return 2 * self.channels * columns + flops_per_token(self.channels, self.state_dim)


@struct.dataclass
class State:
    memory: Array  # [B, E, N]
    conv: Array  # [B, conv - 1, E]


def _uniform(key: Array, fan_in: int, *shape: int) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * fan_in**-0.5


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module."""
    keys = iter(jax.random.split(key, 7))
    E, N, R = cfg.channels, cfg.state_dim, cfg.rank
    norms = {"dt_scale": jnp.ones(R), "b_scale": jnp.ones(N), "c_scale": jnp.ones(N)}
    return (norms if cfg.inner_norm and cfg.inner_scale else {}) | {
        "w_in": _uniform(next(keys), cfg.width, cfg.width, 2 * E),
        "conv": conv_init(next(keys), cfg.conv, E),
        "conv_bias": _uniform(next(keys), cfg.conv, E),
        "w_x": _uniform(next(keys), E, E, R + 2 * N),
        "w_dt": _uniform(next(keys), R, R, E),
        "dt_bias": dt_bias_init(next(keys), (E,)),
        "A_log": jnp.broadcast_to(jnp.log(jnp.arange(1.0, N + 1)), (E, N)),
        "D": jnp.ones(E),
        "w_out": _uniform(next(keys), E, E, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.channels, cfg.state_dim)),
        conv=conv_state(batch, cfg.conv, cfg.channels),
    )


def _dynamics(params: Params, cfg: Config, x: Array) -> tuple[Array, ...]:
    """The op's `(x, dt, a, b, c, d)` from the convolved stream `[..., E]`; dt and a at least float32."""
    x = jax.nn.silu(x + params["conv_bias"].astype(x.dtype))
    r, b, c = jnp.split(dense(x, params["w_x"]), [cfg.rank, cfg.rank + cfg.state_dim], -1)
    if cfg.inner_norm:
        scales = (params[f"{name}_scale"] if cfg.inner_scale else None for name in ("dt", "b", "c"))
        r, b, c = (rms_norm(y, scale, cfg.inner_eps) for y, scale in zip((r, b, c), scales, strict=True))
    dt = jax.nn.softplus(wide(dense(r, params["w_dt"])) + params["dt_bias"])
    return x, dt, -jnp.exp(wide(params["A_log"])), b, c, params["D"]


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    stream, gate = jnp.split(dense(x, params["w_in"]), 2, -1)
    stream, conv = short_conv(stream, params["conv"], state.conv, segment_ids=segment_ids)
    y, memory = selective_scan(
        *_dynamics(params, cfg, stream),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return dense(y * jax.nn.silu(gate), params["w_out"]), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    stream, gate = jnp.split(dense(x_t, params["w_in"]), 2, -1)
    stream, conv = short_conv_step(stream, params["conv"], state.conv)
    y, memory = selective_scan_step(*_dynamics(params, cfg, stream), state.memory)
    return dense(y * jax.nn.silu(gate), params["w_out"]), State(memory=memory, conv=conv)
