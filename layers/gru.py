"""GRU: the gated recurrence without a cell, sequential in time.

    [r | z] = sigmoid(W x_t + U h_{t-1} + b)                               h in R^E
    n_t = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))
    h_t = (1 - z) n_t + z h_{t-1},                                         y_t = W_out h_t

Source: Cho et al. 2014 (arXiv 1406.1078) sec. 2.3; the reset gate acts after the matrix U_n, with a bias of
its own, as cuDNN has it, and not on h before it. U starts with an orthogonal matrix per gate, all biases
at 0. W x is computed for all tokens at once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_positive
from layers.common import Params, dense, orthogonal_gates, weight, wide
from pallas_kernels.nonlinear_scan import nonlinear_scan


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1."""

    width: int
    hidden: int | None = None  # E; default width

    def __post_init__(self):
        require_positive(self, "width")
        if self.hidden is not None:
            require_positive(self, "hidden")

    @property
    def E(self) -> int:
        return self.hidden or self.width

    def state_bytes(self) -> int:
        """`4 E`."""
        return 4 * self.E

    def flops_per_token(self, length: int) -> int:
        """The same at every length; 14 per channel for biases, gates and the mixture."""
        return 2 * self.E * (4 * self.width + 3 * self.E) + 14 * self.E


@struct.dataclass
class State:
    memory: Array  # [B, E]


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; W and W_out have unit-variance outputs."""
    keys = jax.random.split(key, 3)
    return {
        "w_in": weight(keys[0], cfg.width, 3 * cfg.E),
        "w_hidden": orthogonal_gates(keys[1], cfg.E, 3),
        "bias": jnp.zeros(3 * cfg.E),
        "hidden_bias": jnp.zeros(cfg.E),
        "w_out": weight(keys[2], cfg.E, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.E)))


def _input(params: Params, x: Array) -> Array:
    """What the gates get from x, `[..., 3 E]`."""
    return wide(dense(x, params["w_in"])) + params["bias"]


def _cell(params: Params, state: State, gates: Array) -> tuple[State, Array]:
    """One token: the new state, and h."""
    r, z, n = jnp.split(gates, 3, -1)
    hidden_r, hidden_z, hidden_n = jnp.split(dense(state.memory, params["w_hidden"]), 3, -1)
    reset = jax.nn.sigmoid(r + hidden_r)
    candidate = jnp.tanh(n + reset * (hidden_n + params["hidden_bias"]))
    keep = jax.nn.sigmoid(z + hidden_z)
    memory = (1 - keep) * candidate + keep * state.memory
    return State(memory=memory), memory


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    h, state = nonlinear_scan(
        lambda s, gates: _cell(params, s, gates),
        _input(params, x),
        state,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return dense(h.astype(x.dtype), params["w_out"]), state, {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    state, h = _cell(params, state, _input(params, x_t))
    return dense(h.astype(x_t.dtype), params["w_out"]), state
