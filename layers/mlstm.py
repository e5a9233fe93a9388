"""mLSTM: an LSTM with a matrix memory, exponential input gates and no recurrence through its output (xLSTM).

With E = expand * width channels in H heads of width K = E / H,

    [x | z] = W_up u,      c = silu(conv(x) + b_conv),      q, k, v = Q c, K c, V x        block-diagonal
    i_t = exp(w_i [q; k; v] + b_i),    f_t = sigmoid(w_f [q; k; v] + b_f)                  per head
    C_t = f_t C_{t-1} + i_t k_t v_t^T / sqrt(K),    n_t = f_t n_{t-1} + i_t k_t / sqrt(K)
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)
    y_t = W_out( (LayerNorm_head(h_t) + skip * c_t) * silu(z_t) )

exp(w_i ...) overflows, so C and n are kept divided by e^m, and 1 in the maximum becomes e^-m, with

    m_t = max(log f_t + m_{t-1}, log i_t, 0),      m_0 = 0,

which leaves every h as it is. In these terms the layer is gated linear attention with log decay
log f_t + m_{t-1} - m_t <= 0 and keys scaled by e^(log i_t - m_t) <= 1; m itself needs no memory of C and is
found first, by an associative scan.

Source: Beck et al. 2024 (arXiv 2405.04517), sec. 2.3 (mLSTM), the appendix's stabilised form and the block
with up-projection before the cell. Readings: the paper's m has no floor; ours at 0 gives the same h (any m
does) and keeps e^-m finite. The bound e^-m is kept above 1e-6, so that a query that is orthogonal to n never
divides by 0. W_i and w_f start at 0, b_f in [3, 6] over the heads, b_i ~ N(0, 0.01), skip = 1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, conv_init, conv_state, dense, layer_norm, token_shift, weight, wide
from layers.heads import block_dense, block_weight, merge_heads, split_heads
from pallas_kernels.chunks import segment_starts
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1, or heads or blocks that do not divide the channels."""

    width: int
    heads: int = 4
    expand: int = 2
    conv: int = 4  # taps of the short convolution
    block: int = 4  # channels of a block of the block-diagonal Q, K, V

    def __post_init__(self):
        require_positive(self, "width", "heads", "expand", "conv", "block")
        for name in ("heads", "block"):
            require(
                self.channels % getattr(self, name) == 0,
                f"mlstm: {name}={getattr(self, name)} does not divide expand * width = {self.channels}",
            )

    @property
    def channels(self) -> int:
        """E."""
        return self.expand * self.width

    @property
    def K(self) -> int:
        return self.channels // self.heads

    def state_bytes(self) -> int:
        """`4 (E (K + 1) + H + (conv - 1) E)`: C and n, m, the window of the convolution."""
        return 4 * (self.channels * (self.K + 1) + self.heads + (self.conv - 1) * self.channels)

    def flops_per_token(self, length: int) -> int:
        columns = 3 * self.width + 3 * self.block + 6 * self.heads + self.conv
        mix = flops_per_token(length, self.heads, self.K, self.K + 1, channels=False)
        return 2 * self.channels * columns + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, K + 1]: C, and n in the last column, both times e^-m
    stabiliser: Array  # [B, H]: m
    conv: Array  # [B, conv - 1, E]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; gates as in the docstring of this module."""
    keys = iter(jax.random.split(key, 8))
    E, blocks = cfg.channels, cfg.channels // cfg.block
    return {
        "w_up": weight(next(keys), cfg.width, 2 * E),
        "conv": conv_init(next(keys), cfg.conv, E),
        "conv_bias": jnp.zeros(E),
        **{f"w_{name}": block_weight(next(keys), blocks, cfg.block, cfg.block) for name in "qkv"},
        "w_gates": jnp.zeros((3 * E, 2 * cfg.heads)),
        "input_bias": 0.1 * jax.random.normal(next(keys), (cfg.heads,)),
        "forget_bias": jnp.linspace(3.0, 6.0, cfg.heads),
        "norm_scale": jnp.ones((cfg.heads, cfg.K)),
        "skip": jnp.ones(E),
        "w_out": weight(next(keys), E, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.K + 1)),
        stabiliser=jnp.zeros((batch, cfg.heads)),
        conv=conv_state(batch, cfg.conv, cfg.channels),
    )


def _inputs(params: Params, cfg: Config, x: Array, c: Array) -> tuple[tuple[Array, ...], ...]:
    """`(q, k / sqrt(K), [v | 1]) [..., H, K or K + 1]` and `(log i, log f) [..., H]`, at least float32."""
    q, k, v = block_dense(c, params["w_q"]), block_dense(c, params["w_k"]), block_dense(x, params["w_v"])
    logits = wide(dense(jnp.concatenate([q, k, v], -1), params["w_gates"]))
    log_i, log_f = jnp.split(logits, 2, -1)
    gates = log_i + params["input_bias"], jax.nn.log_sigmoid(log_f + params["forget_bias"])
    q, k, v = (split_heads(wide(part), cfg.heads) for part in (q, k, v))
    return (q, k * cfg.K**-0.5, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)), gates


def _stabilisers(log_i: Array, log_f: Array, first: Array, segment_ids: Array | None) -> Array:
    """All m_t `[B,T,H]`, constants of the backward pass: h does not depend on them."""
    log_i, log_f, first = jax.lax.stop_gradient((log_i, log_f, first))
    floor = jnp.maximum(log_i, 0.0)
    floor = floor.at[:, 0].max(log_f[:, 0] + first)
    if segment_ids is not None:
        # max(-inf + m, .) forgets m. There is nothing to differentiate and no difference of two of these.
        log_f = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_f)

    def combine(early, late):
        """The map m -> max(m + a, b) of two stretches of time, one after the other."""
        return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])

    return jax.lax.associative_scan(combine, (log_f, floor), axis=1)[1]


def _output(params: Params, o: Array, m: Array, c: Array, z: Array) -> Array:
    """The cell's output from the read `o [..., H, K + 1]`, then norm, skip, gate and projection."""
    bound = jnp.maximum(jnp.exp(-m), 1e-6)[..., None]
    h = o[..., :-1] / jnp.maximum(jnp.abs(o[..., -1:]), bound)
    h = merge_heads(layer_norm(h, params["norm_scale"])).astype(c.dtype)
    return dense((h + params["skip"].astype(c.dtype) * c) * jax.nn.silu(z), params["w_out"])


def _activate(params: Params, stream: Array) -> Array:
    return jax.nn.silu(stream + params["conv_bias"].astype(stream.dtype))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    x, z = jnp.split(dense(x, params["w_up"]), 2, -1)
    stream, conv = short_conv(x, params["conv"], state.conv, segment_ids=segment_ids)
    c = _activate(params, stream)
    (q, k, v), (log_i, log_f) = _inputs(params, cfg, x, c)
    m = _stabilisers(log_i, log_f, state.stabiliser, segment_ids)
    before, last = token_shift(m, state.stabiliser, segment_ids)
    o, memory = gated_linear_attention(
        q,
        k * jnp.exp(log_i - m)[..., None],
        v,
        log_f + before - m,
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, o, m, c, z), State(memory=memory, stabiliser=last, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    x, z = jnp.split(dense(x_t, params["w_up"]), 2, -1)
    stream, conv = short_conv_step(x, params["conv"], state.conv)
    c = _activate(params, stream)
    (q, k, v), (log_i, log_f) = _inputs(params, cfg, x, c)
    floor = jnp.maximum(log_i, 0.0)
    m = jax.lax.stop_gradient(jnp.maximum(floor, log_f + state.stabiliser))
    o, memory = gated_linear_attention_step(
        q, k * jnp.exp(log_i - m)[..., None], v, log_f + state.stabiliser - m, state.memory
    )
    return _output(params, o, m, c, z), State(memory=memory, stabiliser=m, conv=conv)
