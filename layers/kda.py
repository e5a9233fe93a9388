"""Kimi delta attention (KDA): the gated delta rule with a decay for every key channel.

With q, k, v = silu(conv(W x)), q and k of length 1, and per head

    alpha_t = exp( -exp(A_log) softplus(W_up W_down x_t + dt_bias) )  in (0,1)^K,    beta_t = sigmoid(w_b x_t)

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(K)
    y_t = W_out( RMSNorm_head(o_t) * sigmoid(G_up G_down x_t + b) )

Decay and gate have rank `rank`. With `bound` it is

    alpha_t = exp( -bound sigmoid(exp(A_log) (W_up W_down x_t + dt_bias)) ),

which forgets by no more than e^-bound a token.

Source: Kimi Team 2025 (arXiv 2510.26692) sec. 3 and 4. Rank, the bias of the gate and the initial values are
those of published code: the rank is one head's width, exp(A_log) uniform in (1, 16) (1 with a bound),
softplus(dt_bias) log-uniform in (0.001, 0.1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_head_dims, require_not_negative, require_positive
from layers.common import (
    Params,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    low_rank,
    weight,
    wide,
)
from layers.fields import later
from layers.heads import HeadDims, gated_output, split_heads, unit_heads
from layers.state_spaces import dt_bias_init, softplus_decay
from pallas_kernels.gated_delta_rule import flops_per_token, gated_delta_rule, gated_delta_rule_step


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together or a bound that is not positive."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    rank: int | None = None  # of the decay's and the gate's projections; default V
    bound: float | None = None  # the largest decay in one token, None for any
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none
    gate_bias: bool = later(True)  # b
    eps: float = later(1e-5)  # of the norm of the read

    def __post_init__(self):
        require_head_dims(self)
        if self.rank is not None:
            require_positive(self, "rank")
        require(self.bound is None or self.bound > 0, f"kda: bound={self.bound} must be > 0 or None")
        require_not_negative(self, "conv")

    @property
    def R(self) -> int:
        return self.rank or self.V

    def state_bytes(self) -> int:
        """`4 (H K V + (conv - 1)(2 H K + H V))`."""
        return 4 * (self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + self.heads * (1 + self.V) + 2 * self.R
        up = self.R * self.heads * (self.K + self.V)
        mix = flops_per_token(length, self.heads, self.K, self.V, channels=True)
        return 2 * (self.width * columns + up + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    conv: Array  # [B, conv - 1, 2 H K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decays as in the docstring of this module."""
    keys = iter(jax.random.split(key, 10))
    H, K, V, R = cfg.heads, cfg.K, cfg.V, cfg.R
    fastest = 16.0 if cfg.bound is None else 1.0
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_beta": weight(next(keys), cfg.width, H),
        "w_decay_down": weight(next(keys), cfg.width, R),
        "w_decay_up": weight(next(keys), R, H * K),
        "A_log": jnp.log(jax.random.uniform(next(keys), (H, 1), minval=1.0, maxval=fastest)),
        "dt_bias": dt_bias_init(next(keys), (H, K)),
        "w_gate_down": weight(next(keys), cfg.width, R),
        "w_gate_up": weight(next(keys), R, H * V),
        "norm_scale": jnp.ones(V),
        "w_out": weight(next(keys), H * V, cfg.width),
    }
    if cfg.gate_bias:
        params["gate_bias"] = jnp.zeros(H * V)
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, cfg.stream)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.V)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _log_decay(params: Params, cfg: Config, x: Array) -> Array:
    """`[..., H, K]`, <= 0."""
    logits = split_heads(low_rank(params, "decay", x), cfg.heads)
    if cfg.bound is None:
        return softplus_decay(logits, params["A_log"], params["dt_bias"])
    return -cfg.bound * jax.nn.sigmoid(jnp.exp(wide(params["A_log"])) * (wide(logits) + params["dt_bias"]))


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array, ...]:
    """The op's q, k, beta v, beta k and log decay, `[..., H, K or V]`."""
    q, k, v = unit_heads(qkv, cfg.heads, cfg.K)
    beta = jax.nn.sigmoid(wide(dense(x, params["w_beta"])))[..., None]
    return q * cfg.K**-0.5, k, beta * v, beta * k, _log_decay(params, cfg, x)


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    logits = low_rank(params, "gate", x)
    if cfg.gate_bias:
        logits = logits + params["gate_bias"].astype(x.dtype)
    return gated_output(params, o, jax.nn.sigmoid(logits), cfg.eps)


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), state.conv, segment_ids)
    o, memory = gated_delta_rule(
        *_rule_inputs(params, cfg, x, qkv),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, cfg, x, o), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    o, memory = gated_delta_rule_step(*_rule_inputs(params, cfg, x_t, qkv), state.memory)
    return _output(params, cfg, x_t, o), State(memory=memory, conv=conv)
