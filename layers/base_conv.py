"""BaseConv: a gated short convolution, the cheapest mixer that can compare a token with the ones before it.

With E = expand * width channels,

    [u | g] = W_in x + b_in,        y = W_out( silu(conv(u)) * g )

conv being causal and per channel, with a few taps. It sees nothing beyond them; a model alternates it with
layers that do.

Sources: Arora et al. 2023 (arXiv 2312.04927, where the filter is long and acts on x itself); Arora et al.
2024 (arXiv 2402.18668), whose short filter after an expanding projection this is.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_positive
from layers.common import Params, conv_init, conv_state, dense, weight
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1."""

    sequence_way = "halo"

    width: int
    expand: int = 2
    conv: int = 3  # taps

    def __post_init__(self):
        require_positive(self, "width", "expand", "conv")

    @property
    def channels(self) -> int:
        return self.expand * self.width

    def state_bytes(self) -> int:
        """`4 E (conv - 1)`."""
        return 4 * self.channels * (self.conv - 1)

    def flops_per_token(self, length: int) -> int:
        """The same at every length."""
        return 2 * self.channels * (3 * self.width + self.conv)


@struct.dataclass
class State:
    conv: Array  # [B, conv - 1, E]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    in_key, conv_key, out_key = jax.random.split(key, 3)
    return {
        "w_in": weight(in_key, cfg.width, 2 * cfg.channels),
        "in_bias": jnp.zeros(2 * cfg.channels),
        "conv": conv_init(conv_key, cfg.conv, cfg.channels),
        "w_out": weight(out_key, cfg.channels, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(conv=conv_state(batch, cfg.conv, cfg.channels))


def _project(params: Params, x: Array) -> tuple[Array, Array]:
    """The stream u and its gate, `[..., E]` each."""
    stream, gate = jnp.split(dense(x, params["w_in"]) + params["in_bias"].astype(x.dtype), 2, -1)
    return stream, gate


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    stream, gate = _project(params, x)
    stream, conv = short_conv(
        stream, params["conv"], state.conv, segment_ids=segment_ids, implementation=implementation
    )
    return dense(jax.nn.silu(stream) * gate, params["w_out"]), State(conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    stream, gate = _project(params, x_t)
    stream, conv = short_conv_step(stream, params["conv"], state.conv)
    return dense(jax.nn.silu(stream) * gate, params["w_out"]), State(conv=conv)
