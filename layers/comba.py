"""Comba: the delta rule as a controller, with feedback from the state and a correction of its output.

With q, k, v = silu(conv(W x)), q and k of length 1, and per head

    alpha_t = exp( -exp(A_log) softplus(w_a x_t + dt_bias) ),    beta_t = sigmoid(w_b x_t)
    p_t = sigmoid(lambda) k_t

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,    o_t = S_t^T (q_t - d p_t) / sqrt(K)
    y_t = W_out( RMSNorm_head(o_t) * sigmoid(W_gate x_t) )

with numbers lambda and d per head. The memory is compared with the value before it decays, where the gated
delta rule compares it after: the transition is a scalar plus a low rank, alpha I - beta k p^T.

Source: Hu et al. 2025 (arXiv 2506.02475). Readings: k has length 1 before p is formed (published code makes p
a unit vector afterwards, which cancels lambda); the recall is from the memory before its decay, as in the
chunkwise form and the trained models (one published recurrence decays it first); lambda and d start at 1,
`correction` being d's start (0.02 is advised for small models); decays start as in Gated DeltaNet.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require_head_dims, require_not_negative
from layers.common import Params, conv_init, conv_state, convolved, convolved_step, dense, weight, wide
from layers.heads import HeadDims, gated_output, unit_heads
from layers.state_spaces import dt_bias_init, softplus_decay
from pallas_kernels.dplr import dplr, dplr_step, flops_per_token


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    correction: float = 1.0  # d before training
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_head_dims(self)
        require_not_negative(self, "conv")

    def state_bytes(self) -> int:
        """`4 (H K V + (conv - 1)(2 H K + H V))`."""
        return 4 * (self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + 2 * self.heads * (1 + self.V)
        mix = flops_per_token(length, self.heads, self.K, self.V, channels=False, separate_key=False)
        return 2 * (self.width * columns + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    conv: Array  # [B, conv - 1, 2 H K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decays as in the docstring of this module."""
    keys = iter(jax.random.split(key, 8))
    H = cfg.heads
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_beta": weight(next(keys), cfg.width, H),
        "w_decay": weight(next(keys), cfg.width, H),
        "A_log": jnp.log(jax.random.uniform(next(keys), (H,), minval=0.01, maxval=16.0)),
        "dt_bias": dt_bias_init(next(keys), (H,)),
        "feedback": jnp.ones((H, 1)),
        "D": jnp.full((H, 1), cfg.correction),
        "w_gate": weight(next(keys), cfg.width, H * cfg.V),
        "norm_scale": jnp.ones(cfg.V),
        "w_out": weight(next(keys), H * cfg.V, cfg.width),
    }
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, cfg.stream)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.V)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array | None, ...]:
    """The op's q, no key of its own, v, a = -p, b = beta k `[..., H, K or V]` and log decay `[..., H]`."""
    q, k, v = unit_heads(qkv, cfg.heads, cfg.K)
    p = jax.nn.sigmoid(wide(params["feedback"])) * k
    beta = jax.nn.sigmoid(wide(dense(x, params["w_beta"])))[..., None]
    log_decay = softplus_decay(dense(x, params["w_decay"]), params["A_log"], params["dt_bias"])
    q = (q - params["D"] * p) * cfg.K**-0.5
    return q, None, wide(v), -p, beta * k, log_decay


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.sigmoid(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), state.conv, segment_ids)
    o, memory = dplr(
        *_rule_inputs(params, cfg, x, qkv),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, x, o), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    o, memory = dplr_step(*_rule_inputs(params, cfg, x_t, qkv), state.memory)
    return _output(params, x_t, o), State(memory=memory, conv=conv)
