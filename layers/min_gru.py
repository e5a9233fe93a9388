"""minGRU: a GRU whose gate does not look at the state, which makes the recurrence linear and diagonal.

    z_t = sigmoid(W_z u_t + b_z),      c_t = g(W_c u_t + b_c),      u = x, or a short convolution of it
    h_t = (1 - z_t) h_{t-1} + z_t c_t,                              h in R^E, E = expand * width
    y_t = W_out h_t,                   g(v) = v + 1/2 where v >= 0, else sigmoid(v)

z and 1 - z are two sigmoids and g > 0, so every term is positive and the plain recurrence is as safe as its
form in logarithms.

Source: Feng et al. 2024 (arXiv 2410.01201), sec. 3.1 (minGRU) and the appendix on its log-space form (g). The
convolution before the gates has no activation; biases start at 0.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_not_negative, require_positive
from layers.common import (
    Params,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    positive,
    weight,
    wide,
)
from pallas_kernels.diagonal_scan import diagonal_scan, diagonal_scan_step, flops_per_token


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1 or a negative convolution."""

    sequence_way = "scan"

    width: int
    expand: int = 2
    conv: int = 0  # taps of the short convolution on the input; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "expand")
        require_not_negative(self, "conv")

    @property
    def E(self) -> int:
        return self.expand * self.width

    def state_bytes(self) -> int:
        """`4 (E + (conv - 1) D)`."""
        return 4 * (self.E + max(self.conv - 1, 0) * self.width)

    def flops_per_token(self, length: int) -> int:
        """The same at every length; 4 per channel for the two gates, g and the gated input."""
        return 2 * self.width * (3 * self.E + self.conv) + 4 * self.E + flops_per_token(self.E)


@struct.dataclass
class State:
    memory: Array  # [B, E]
    conv: Array  # [B, conv - 1, D]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    keys = iter(jax.random.split(key, 3))
    params = {
        "w_in": weight(next(keys), cfg.width, 2 * cfg.E),
        "bias": jnp.zeros(2 * cfg.E),
        "w_out": weight(next(keys), cfg.E, cfg.width),
    }
    return {**params, "conv": conv_init(next(keys), cfg.conv, cfg.width)} if cfg.conv else params


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.E)), conv=conv_state(batch, cfg.conv, cfg.width))


def _recurrence(params: Params, u: Array) -> tuple[Array, Array]:
    """Decay and gated candidate, `[..., E]`."""
    z, c = jnp.split(wide(dense(u, params["w_in"])) + params["bias"], 2, -1)
    return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * positive(c)


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    u, conv = convolved(params, cfg, x, state.conv, segment_ids)
    h, memory = diagonal_scan(
        *_recurrence(params, u), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return dense(h.astype(x.dtype), params["w_out"]), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    u, conv = convolved_step(params, cfg, x_t, state.conv)
    memory = diagonal_scan_step(*_recurrence(params, u), state.memory)
    return dense(memory.astype(x_t.dtype), params["w_out"]), State(memory=memory, conv=conv)
