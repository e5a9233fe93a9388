"""The delta rule with momentum: the linear memory of Titans, trained on every token as it comes.

With q, k, v = silu(conv(W x)), q and k of length 1, and per head

    alpha_t = sigmoid(w_alpha x_t + b_alpha)                           forgetting
    eta_t   = sigmoid(w_eta x_t + b_eta)                               momentum of the surprise
    theta_t = theta_max (1 - eta_t) sigmoid(w_theta x_t + b_theta)     step size

    M_t = eta_t M_{t-1} - theta_t grad |W_{t-1}^T k_t - v_t|^2
        = eta_t M_{t-1} + 2 theta_t k_t (v_t - W_{t-1}^T k_t)^T,       M_0 = 0
    W_t = (1 - alpha_t) W_{t-1} + M_t,                                 W_0 = 0
    o_t = W_t^T q_t,      y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

The gradient is taken at the weights of the token before, as the paper writes it, where the layer `titans`
takes it at the start of a chunk: for a linear memory the two coincide at its chunk = 1, and this form is as
parallel as the delta rule, which it is without momentum and forgetting.

Source: Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) eq. 8-14 with a memory of one matrix. Readings as in
`titans`: theta has the factor 1 - eta_t, so that a token moves W by 2 theta_max in all, however long it stays
in M (theta_max = 1/2: by the whole error at most); slow forgetting at the start. W starts at 0, not learned.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_above_zero, require_head_dims, require_not_negative
from layers.common import Params, conv_init, conv_state, convolved, convolved_step, dense, weight, wide
from layers.heads import HeadDims, gated_output, unit_heads
from pallas_kernels.momentum_delta_rule import (
    flops_per_token,
    momentum_delta_rule,
    momentum_delta_rule_step,
)

# Before training: theta = theta_max (1 - eta) / 2, alpha = 0.0025, eta = 0.88.
BIASES = {"rate": 0.0, "forget": -6.0, "momentum": 2.0}


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together or a rate that is not positive."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    max_rate: float = 0.5  # theta_max
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_head_dims(self)
        require_above_zero(self, "max_rate")
        require_not_negative(self, "conv")

    def state_bytes(self) -> int:
        """`4 (2 H K V + (conv - 1)(2 H K + H V))`."""
        return 4 * (2 * self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + self.heads * (len(BIASES) + 2 * self.V)
        mix = flops_per_token(length, self.heads, self.K, self.V)
        return 2 * (self.width * columns + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, 2, K, V]: weights and momentum
    conv: Array  # [B, conv - 1, 2 H K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; gates as the biases above say."""
    keys = iter(jax.random.split(key, 4 + len(BIASES)))
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_gate": weight(next(keys), cfg.width, cfg.heads * cfg.V),
        "w_out": weight(next(keys), cfg.heads * cfg.V, cfg.width),
        "norm_scale": jnp.ones(cfg.V),
    }
    for name, bias in BIASES.items():
        params[f"w_{name}"] = weight(next(keys), cfg.width, cfg.heads)
        params[f"{name}_bias"] = jnp.full(cfg.heads, bias)
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, cfg.stream)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, 2, cfg.K, cfg.V)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array, ...]:
    """The op's q, k, 2 theta v, 2 theta k `[..., H, K or V]`, log(1 - alpha) and log eta `[..., H]`."""
    rate, forget, momentum = (wide(dense(x, params[f"w_{n}"])) + params[f"{n}_bias"] for n in BIASES)
    q, k, v = unit_heads(qkv, cfg.heads, cfg.K)
    strength = 2 * cfg.max_rate * jax.nn.sigmoid(-momentum) * jax.nn.sigmoid(rate)
    written, recalled = (strength[..., None] * y for y in (v, k))
    return q, k, written, recalled, jax.nn.log_sigmoid(-forget), jax.nn.log_sigmoid(momentum)


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.silu(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), state.conv, segment_ids)
    o, memory = momentum_delta_rule(
        *_rule_inputs(params, cfg, x, qkv),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, x, o), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    o, memory = momentum_delta_rule_step(*_rule_inputs(params, cfg, x_t, qkv), state.memory)
    return _output(params, x_t, o), State(memory=memory, conv=conv)
