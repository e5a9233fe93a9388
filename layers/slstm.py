"""sLSTM: an LSTM with exponential input gates, a normaliser and heads that keep to themselves (xLSTM).

With c the short convolution of the input and R block-diagonal, one block per head,

    i, f = W_i c, W_f c      z, o = W_z x, W_o x       block-diagonal, plus R h_{t-1} and a bias each
    c_t = f_t c_{t-1} + i_t tanh(z_t),     n_t = f_t n_{t-1} + i_t,     i_t = exp(i),  f_t = sigmoid(f)
    h_t = sigmoid(o_t) c_t / n_t,          y_t = W_out LayerNorm_head(h_t)

for every channel by itself. c and n are kept divided by e^m, m_t = max(log f_t + m_{t-1}, log i_t) and
m_1 = log i_1, so that no exponential overflows and n >= 1; c / n and with it h does not depend on m. The
gates see h_{t-1}, so tokens go one by one; everything that does not depend on h is computed before.

Source: Beck et al. 2024 (arXiv 2405.04517), sec. 2.2 (sLSTM, stabiliser, heads) and the block with the
convolution before and the norm after the cell. Readings: the paper's gated MLP after the cell is the
block's MLP, and a plain projection W_out leads back to the residual stream, as in all layers here. R starts
at 0 and the forget biases run from 5 to -7 over the channels of a head, b_j = 5 - 12 (j / (K-1))^0.3, as
published for one block; the exponent there grows with depth, which a layer does not know.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_divides, require_positive
from layers.common import Params, conv_init, conv_state, dense, layer_norm, weight, wide
from layers.heads import block_dense, block_weight, merge_heads, split_heads
from pallas_kernels.nonlinear_scan import nonlinear_scan
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1 or heads that do not divide the width."""

    width: int
    heads: int = 4
    conv: int = 4  # taps of the short convolution

    def __post_init__(self):
        require_positive(self, "width", "heads", "conv")
        require_divides(self, "heads", "width")

    @property
    def K(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def state_bytes(self) -> int:
        """`4 D (4 + conv - 1)`: c, n, m, h and the window of the convolution."""
        return 4 * self.width * (3 + self.conv)

    def flops_per_token(self, length: int) -> int:
        """The same at every length; the cell itself counts 15 per channel."""
        return 2 * self.width * (8 * self.K + self.width + self.conv) + 15 * self.width


@struct.dataclass
class State:
    cell: Array  # [B, H, K]: c e^-m
    normaliser: Array  # [B, H, K]: n e^-m, 0 before the first token
    stabiliser: Array  # [B, H, K]: m
    hidden: Array  # [B, H, K]: h
    conv: Array  # [B, conv - 1, D]


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; input projections with unit-variance outputs."""
    in_key, conv_key, out_key = jax.random.split(key, 3)
    i_key, f_key, z_key, o_key = jax.random.split(in_key, 4)
    H, K = cfg.heads, cfg.K
    forget = 5.0 - 12.0 * (jnp.arange(K) / max(K - 1, 1)) ** 0.3
    return {
        "conv": conv_init(conv_key, cfg.conv, cfg.width),
        "conv_bias": jnp.zeros(cfg.width),
        "w_input": block_weight(i_key, H, K, K),
        "w_forget": block_weight(f_key, H, K, K),
        "w_value": block_weight(z_key, H, K, K),
        "w_output": block_weight(o_key, H, K, K),
        "w_recurrent": jnp.zeros((H, K, 4 * K)),
        "gate_bias": jnp.zeros((H, 4, K)).at[:, 1].set(forget),
        "norm_scale": jnp.ones((H, K)),
        "w_out": weight(out_key, cfg.width, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    def zeros():
        return jnp.zeros((batch, cfg.heads, cfg.K))

    return State(zeros(), zeros(), zeros(), zeros(), conv_state(batch, cfg.conv, cfg.width))


def _preactivations(params: Params, cfg: Config, x: Array, stream: Array) -> Array:
    """What i, f, z and o get from the input: `[..., H, 4, K]`, at least float32."""
    c = jax.nn.silu(stream + params["conv_bias"].astype(stream.dtype))
    parts = [
        split_heads(block_dense(source, params[name]), cfg.heads)
        for source, name in ((c, "w_input"), (c, "w_forget"), (x, "w_value"), (x, "w_output"))
    ]
    return wide(jnp.stack(parts, -2)) + params["gate_bias"]


def _cell(params: Params, memory: tuple[Array, ...], inputs: Array) -> tuple[tuple[Array, ...], Array]:
    """One token: `memory` is (c, n, m, h) `[B,H,K]`, `inputs [B,H,4,K]`; returns the new one and h."""
    c, n, m, h = memory
    recurrent = jnp.einsum("bhk,hkg->bhg", h, params["w_recurrent"].astype(h.dtype))
    log_i, log_f, z, o = jnp.unstack(inputs + recurrent.reshape(inputs.shape), axis=-2)
    empty = n == 0
    kept = jax.nn.log_sigmoid(log_f) + m
    # A constant of the backward pass: h does not depend on it.
    new = jax.lax.stop_gradient(jnp.where(empty, log_i, jnp.maximum(kept, log_i)))
    forget, write = jnp.exp(jnp.where(empty, 0.0, kept - new)), jnp.exp(log_i - new)
    c, n = forget * c + write * jnp.tanh(z), forget * n + write
    h = jax.nn.sigmoid(o) * c / n
    return (c, n, new, h), h


def _output(params: Params, x: Array, h: Array) -> Array:
    return dense(merge_heads(layer_norm(h, params["norm_scale"])).astype(x.dtype), params["w_out"])


def _memory(state: State) -> tuple[Array, ...]:
    return state.cell, state.normaliser, state.stabiliser, state.hidden


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    stream, conv = short_conv(x, params["conv"], state.conv, segment_ids=segment_ids)
    h, memory = nonlinear_scan(
        lambda memory, inputs: _cell(params, memory, inputs),
        _preactivations(params, cfg, x, stream),
        _memory(state),
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, x, h), State(*memory, conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    stream, conv = short_conv_step(x_t, params["conv"], state.conv)
    memory, h = _cell(params, _memory(state), _preactivations(params, cfg, x_t, stream))
    return _output(params, x_t, h), State(*memory, conv)
