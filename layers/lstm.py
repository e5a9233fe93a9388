"""LSTM: the gated recurrence with a cell, sequential in time.

    [i | f | g | o] = W x_t + U h_{t-1} + b                                h, c in R^E
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),      h_t = sigmoid(o) tanh(c_t),      y_t = W_out h_t

Sources: Hochreiter & Schmidhuber 1997 (Neural Computation 9(8)); forget gate: Gers, Schmidhuber, Cummins
2000 (Neural Computation 12(10)). No peepholes. U starts with an orthogonal matrix per gate, the bias of the
forget gate at `forget_bias`, the others at 0. W x is computed for all tokens at once.
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
    forget_bias: float = 1.0

    def __post_init__(self):
        require_positive(self, "width")
        if self.hidden is not None:
            require_positive(self, "hidden")

    @property
    def E(self) -> int:
        return self.hidden or self.width

    def state_bytes(self) -> int:
        """`8 E`."""
        return 8 * self.E

    def flops_per_token(self, length: int) -> int:
        """The same at every length; 13 per channel for biases, gates and cell."""
        return 2 * self.E * (5 * self.width + 4 * self.E) + 13 * self.E


@struct.dataclass
class State:
    memory: Array  # [B, E] h
    cell: Array  # [B, E] c


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; W and W_out have unit-variance outputs."""
    keys = jax.random.split(key, 3)
    return {
        "w_in": weight(keys[0], cfg.width, 4 * cfg.E),
        "w_hidden": orthogonal_gates(keys[1], cfg.E, 4),
        "bias": jnp.zeros(4 * cfg.E).at[cfg.E : 2 * cfg.E].set(cfg.forget_bias),
        "w_out": weight(keys[2], cfg.E, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.E)), cell=jnp.zeros((batch, cfg.E)))


def _input(params: Params, x: Array) -> Array:
    """What the gates get from x, `[..., 4 E]`."""
    return wide(dense(x, params["w_in"])) + params["bias"]


def _cell(params: Params, state: State, gates: Array) -> tuple[State, Array]:
    """One token: the new state, and h."""
    i, f, g, o = jnp.split(gates + dense(state.memory, params["w_hidden"]), 4, -1)
    cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    memory = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return State(memory=memory, cell=cell), memory


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
