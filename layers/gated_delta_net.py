"""Gated DeltaNet: a memory that forgets as a whole and corrects what it recalls at the key it writes to.

With q, k, v = silu(conv(W x)), q and k of length 1, and per head

    alpha_t = exp( -exp(A_log) softplus(w_a x_t + dt_bias) ),    beta_t = sigmoid(w_b x_t)

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(K)
    y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

Decay comes first: the value is compared with what the decayed memory recalls. `decay=False` (alpha = 1) and
`gate=False` (no silu factor) are DeltaNet. With `negative_eigenvalues` beta is twice the sigmoid: above 1 the
memory is reflected along k, which is what tracking of parities and permutations needs. With `key_heads` = G,
each head of queries and keys serves H / G memories one after the other (Qwen3-Next).

Sources: Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464) sec. 3; DeltaNet: Schlag et al. 2021 (arXiv
2102.11174) and, with convolution, SiLU and unit keys, Yang et al. 2024 (arXiv 2406.06484); negative
eigenvalues: Grazzi et al. 2024 (arXiv 2411.12537). exp(A_log) starts uniform in (0.01, 16), softplus(dt_bias)
log-uniform in (0.001, 0.1). The published sizes are K = V = width / heads for DeltaNet and K = 3/4 width /
heads, V = 2 K for the gated one; here the first is the default of both, so that they compare at equal state.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_head_dims, require_not_negative
from layers.common import (
    Params,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    rms_norm,
    weight,
    wide,
)
from layers.fields import later
from layers.heads import HeadDims, merge_heads, unit_heads
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
    decay: bool = True
    gate: bool = True  # multiply the normalised read by silu(W_gate x)
    negative_eigenvalues: bool = False  # beta in (0, 2) in place of (0, 1)
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none
    key_heads: int | None = later(None)  # G heads of queries and keys, each for H / G of values; default H
    eps: float = later(1e-5)  # of the norm of the read

    def __post_init__(self):
        require_head_dims(self)
        require_not_negative(self, "conv")
        ok = self.G >= 1 and self.heads % self.G == 0
        require(ok, f"gated_delta_net: key_heads={self.key_heads} does not divide heads={self.heads}")

    @property
    def G(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def stream(self) -> int:
        """Channels of q, k and v together."""
        return 2 * self.G * self.K + self.heads * self.V

    def state_bytes(self) -> int:
        """`4 (H K V + (conv - 1)(2 G K + H V))`."""
        return 4 * (self.heads * self.K * self.V + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        columns = self.stream + self.heads * (1 + self.decay + (1 + self.gate) * self.V)
        mix = flops_per_token(length, self.heads, self.K, self.V, channels=False)
        return 2 * (self.width * columns + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    conv: Array  # [B, conv - 1, 2 G K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decays as in the docstring of this module."""
    keys = iter(jax.random.split(key, 8))
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_beta": weight(next(keys), cfg.width, cfg.heads),
        "norm_scale": jnp.ones(cfg.V),
        "w_out": weight(next(keys), cfg.heads * cfg.V, cfg.width),
    }
    if cfg.gate:
        params["w_gate"] = weight(next(keys), cfg.width, cfg.heads * cfg.V)
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


def _rule_inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array | None, ...]:
    """The op's q, k, beta v, beta k `[..., H, K or V]` and log decay `[..., H]` or None."""
    q, k, v = unit_heads(qkv, cfg.G, cfg.K)
    if cfg.heads != cfg.G:
        q, k = (jnp.repeat(x, cfg.heads // cfg.G, -2) for x in (q, k))
        v = v.reshape(*v.shape[:-2], cfg.heads, cfg.V)
    beta = jax.nn.sigmoid(wide(dense(x, params["w_beta"])))[..., None] * (1 + cfg.negative_eigenvalues)
    log_decay = None
    if cfg.decay:
        log_decay = softplus_decay(dense(x, params["w_decay"]), params["A_log"], params["dt_bias"])
    return q * cfg.K**-0.5, k, beta * v, beta * k, log_decay


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    """Normalise the read `o [..., H, V]`, gate it by x and project."""
    y = merge_heads(rms_norm(o, params["norm_scale"], cfg.eps)).astype(x.dtype)
    if cfg.gate:
        y = y * jax.nn.silu(dense(x, params["w_gate"]))
    return dense(y, params["w_out"])


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
