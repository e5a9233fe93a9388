"""Gated DeltaNet-2: the delta rule with one gate for what is erased and another for what is written.

With q, k, v = silu(conv(W x)), q and k of length 1, and per head

    alpha_t = exp( -exp(A_log) softplus(W_up W_down x_t + dt_bias) )  in (0,1)^K,
    b_t = sigmoid(W_erase x_t)  in (0,1)^K,          w_t = sigmoid(W_write x_t)  in (0,1)^V

    S_t = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = S_t^T q_t / sqrt(K)
    y_t = W_out( RMSNorm_head(o_t) * sigmoid(G_up G_down x_t + b) )

The decay comes first, and the erase gate chooses which channels of the decayed memory are compared with the
key. With every b_t and w_t one number beta_t per head this is Kimi delta attention.

Source: Hatamizadeh, Choi, Kautz 2026 (arXiv 2605.22791), the gated delta rule-2. Ranks, the output gate and
the initial values are those of Kimi delta attention, from which the layer differs by the two gates only.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_head_dims, require_not_negative, require_positive
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
from layers.heads import HeadDims, gated_output, split_heads, unit_heads
from layers.state_spaces import dt_bias_init, softplus_decay
from pallas_kernels.gated_delta_rule import flops_per_token, gated_delta_rule, gated_delta_rule_step


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    rank: int | None = None  # of the decay's and the gate's projections; default V
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_head_dims(self)
        if self.rank is not None:
            require_positive(self, "rank")
        require_not_negative(self, "conv")

    @property
    def R(self) -> int:
        return self.rank or self.V

    def state_bytes(self) -> int:
        """`4 (H K V + (conv - 1)(2 H K + H V))`."""
        return 4 * (self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + self.heads * (self.K + 2 * self.V) + 2 * self.R
        up = self.R * self.heads * (self.K + self.V)
        mix = flops_per_token(length, self.heads, self.K, self.V, channels=True)
        return 2 * (self.width * columns + up + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    conv: Array  # [B, conv - 1, 2 H K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decays as in the docstring of this module."""
    keys = iter(jax.random.split(key, 11))
    H, K, V, R = cfg.heads, cfg.K, cfg.V, cfg.R
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_erase": weight(next(keys), cfg.width, H * K),
        "w_write": weight(next(keys), cfg.width, H * V),
        "w_decay_down": weight(next(keys), cfg.width, R),
        "w_decay_up": weight(next(keys), R, H * K),
        "A_log": jnp.log(jax.random.uniform(next(keys), (H, 1), minval=1.0, maxval=16.0)),
        "dt_bias": dt_bias_init(next(keys), (H, K)),
        "w_gate_down": weight(next(keys), cfg.width, R),
        "w_gate_up": weight(next(keys), R, H * V),
        "gate_bias": jnp.zeros(H * V),
        "norm_scale": jnp.ones(V),
        "w_out": weight(next(keys), H * V, cfg.width),
    }
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
    return softplus_decay(logits, params["A_log"], params["dt_bias"])


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array, ...]:
    """The op's q, k, w v, b k and log decay, `[..., H, K or V]`."""
    q, k, v = unit_heads(qkv, cfg.heads, cfg.K)
    erase, write = (
        split_heads(jax.nn.sigmoid(wide(dense(x, params[name]))), cfg.heads)
        for name in ("w_erase", "w_write")
    )
    return q * cfg.K**-0.5, k, write * v, erase * k, _log_decay(params, cfg, x)


def _output(params: Params, x: Array, o: Array) -> Array:
    logits = low_rank(params, "gate", x) + params["gate_bias"].astype(x.dtype)
    return gated_output(params, o, jax.nn.sigmoid(logits))


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
    return _output(params, x, o), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    o, memory = gated_delta_rule_step(*_rule_inputs(params, cfg, x_t, qkv), state.memory)
    return _output(params, x_t, o), State(memory=memory, conv=conv)
