"""RWKV's channel mixing: an MLP of squared ReLUs on a mean of each token and the one before it.

With x'_t the token before x_t in the document (0 for the first) and mu per channel,

    y_t = W_out max( W_in (x_t + (x'_t - x_t) * mu), 0 )^2

It sees nothing beyond the token before. A model has it in a block of its own, without an MLP, above each
block of time mixing.

Source: Peng et al. 2025 (arXiv 2503.14456; the channel mixing of RWKV-7, without the gate of earlier ones).
mu starts as published for the middle layer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_positive
from layers.common import Params, conv_state, dense, weight
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1."""

    width: int
    expand: int = 4
    hidden: int | None = None  # default expand * width

    def __post_init__(self):
        require_positive(self, "width", "expand")
        if self.hidden is not None:
            require_positive(self, "hidden")

    @property
    def channels(self) -> int:
        return self.hidden or self.expand * self.width

    def state_bytes(self) -> int:
        """`4 D`: the last token."""
        return 4 * self.width

    def flops_per_token(self, length: int) -> int:
        """The same at every length."""
        return 4 * self.width * (self.channels + 1)


@struct.dataclass
class State:
    last: Array  # [B, 1, D] the token before


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    in_key, out_key = jax.random.split(key)
    return {
        "mix": 1 - (jnp.arange(cfg.width) / cfg.width) ** (0.5**4),
        "w_in": weight(in_key, cfg.width, cfg.channels),
        "w_out": weight(out_key, cfg.channels, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(last=conv_state(batch, 2, cfg.width))


def _taps(params: Params) -> Array:
    """The mean as a convolution's filter `[2, D]`."""
    return jnp.stack([params["mix"], 1 - params["mix"]])


def _output(params: Params, mixed: Array) -> Array:
    return dense(jnp.square(jax.nn.relu(dense(mixed, params["w_in"]))), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    mixed, last = short_conv(
        x, _taps(params), state.last, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, mixed), State(last=last), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    mixed, last = short_conv_step(x_t, _taps(params), state.last)
    return _output(params, mixed), State(last=last)
