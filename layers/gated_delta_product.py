"""Gated DeltaProduct: several steps of the delta rule for every token, one after the other.

With q, k_j, v_j = silu(conv(W x)) for j = 1..n, q and all keys of length 1, and per head

    alpha_t = exp( -exp(A_log) softplus(w_a x_t + dt_bias) ),    beta_tj = 2 sigmoid(w_bj x_t)

    S_t0 = alpha_t S_{t-1},    S_tj = (I - beta_tj k_tj k_tj^T) S_t,j-1 + beta_tj k_tj v_tj^T,    S_t = S_tn
    o_t  = S_t^T q_t / sqrt(K),    y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

The transition of one token is a product of n generalised Householder matrices: two of them make any rotation
of a plane, where one (n = 1, the gated delta rule) only reflects. `decay=False` (alpha = 1) is DeltaProduct;
`negative_eigenvalues=False` leaves out the factor 2 of beta, and with it the reflections.

The op runs over the n T small steps, with the decay at the first and the read at the last of each token.

Source: Siems et al. 2025 (arXiv 2502.10297), DeltaProduct and Gated DeltaProduct; decay, norm, gate and
initial values are those of Gated DeltaNet (arXiv 2412.06464).
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
    l2_norm,
    weight,
    wide,
)
from layers.heads import HeadDims, gated_output
from layers.state_spaces import dt_bias_init, softplus_decay
from pallas_kernels.gated_delta_rule import flops_per_token, gated_delta_rule, gated_delta_rule_step


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together or fewer than one step."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    steps: int = 2  # n, of the delta rule for each token
    decay: bool = True
    negative_eigenvalues: bool = True  # beta in (0, 2) in place of (0, 1)
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_head_dims(self)
        require_positive(self, "steps")
        require_not_negative(self, "conv")

    @property
    def streams(self) -> tuple[int, int, int]:
        """Channels of q, and of all keys and all values of a token."""
        return self.heads * self.K, self.steps * self.heads * self.K, self.steps * self.heads * self.V

    @property
    def stream(self) -> int:
        return sum(self.streams)

    def state_bytes(self) -> int:
        """`4 (H K V + (conv - 1) H (K + n (K + V)))`."""
        return 4 * (self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + self.heads * (self.steps + self.decay + 2 * self.V)
        step = flops_per_token(self.steps * length, self.heads, self.K, self.V, channels=False)
        return 2 * (self.width * columns + self.conv * self.stream) + self.steps * step


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    conv: Array  # [B, conv - 1, H (K + n (K + V))]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; exp(A_log) in (0.01, 16), softplus(dt_bias) in (0.001, 0.1)."""
    keys = iter(jax.random.split(key, 8))
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_beta": weight(next(keys), cfg.width, cfg.steps * cfg.heads),
        "w_gate": weight(next(keys), cfg.width, cfg.heads * cfg.V),
        "norm_scale": jnp.ones(cfg.V),
        "w_out": weight(next(keys), cfg.heads * cfg.V, cfg.width),
    }
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, cfg.stream)
    if cfg.decay:
        params["w_decay"] = weight(next(keys), cfg.width, cfg.heads)
        params["A_log"] = jnp.log(jax.random.uniform(next(keys), (cfg.heads,), minval=0.01, maxval=16.0))
        params["dt_bias"] = dt_bias_init(next(keys), (cfg.heads,))
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.V)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array, ...]:
    """The op's q, k, beta v, beta k `[..., n, H, K or V]` and log decay `[..., n, H]`, n steps a token."""
    steps = (*x.shape[:-1], cfg.steps, cfg.heads)
    first, second, _ = cfg.streams
    q, k, v = jnp.split(jax.nn.silu(qkv), [first, first + second], -1)
    q = l2_norm(wide(q.reshape(*x.shape[:-1], cfg.heads, cfg.K))) * cfg.K**-0.5
    k = l2_norm(wide(k.reshape(*steps, cfg.K)))
    beta = jax.nn.sigmoid(wide(dense(x, params["w_beta"]))) * (1 + cfg.negative_eigenvalues)
    beta = beta.reshape(*steps, 1)
    decay = jnp.zeros((*x.shape[:-1], cfg.heads), q.dtype)
    if cfg.decay:
        decay = softplus_decay(dense(x, params["w_decay"]), params["A_log"], params["dt_bias"])
    q = jnp.broadcast_to(q[..., None, :, :], k.shape)
    decay = jnp.stack([decay] + [jnp.zeros_like(decay)] * (cfg.steps - 1), -2)
    return q, k, beta * v.reshape(*steps, cfg.V), beta * k, decay


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.silu(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), state.conv, segment_ids)
    inputs = [a.reshape(a.shape[0], -1, *a.shape[3:]) for a in _rule_inputs(params, cfg, x, qkv)]
    o, memory = gated_delta_rule(
        *inputs,
        state.memory,
        segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, cfg.steps, 1),
        implementation=implementation,
    )
    return _output(params, x, o[:, cfg.steps - 1 :: cfg.steps]), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    inputs, memory = _rule_inputs(params, cfg, x_t, qkv), state.memory
    for j in range(cfg.steps):
        o, memory = gated_delta_rule_step(*(a[:, j] for a in inputs), memory)
    return _output(params, x_t, o), State(memory=memory, conv=conv)
