"""Lightning attention: linear attention with a fixed decay per head, one norm over all heads and a gate.

    q_t, k_t, v_t = silu(W_q x_t), silu(W_k x_t), silu(W_v x_t)
    S_t = e^(-s_h) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    s_h = slope 2^(-8 (h+1) / H)
    y_t = W_out( sigmoid(W_gate x_t) * RMSNorm(o_t) )

Head 0 forgets fastest. Models lower `slope` from 1 in the first layer towards 0 in the last, so that memories
grow with depth; 0 is no decay.

Sources: Qin et al. 2023 (arXiv 2307.14995, TransNormerLLM: decays by head and layer, norm in place of the
denominator, gate); Qin et al. 2024 (arXiv 2401.04658, the tiled algorithm: intra-block products, inter-block
state); MiniMax 2025 (arXiv 2501.08313, the layer with SiLU on q, k, v and a sigmoid gate, which this is).
TransNormerLLM's gate is linear and it has no activation on v.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_divides, require_not_negative, require_positive
from layers.common import Params, dense, rms_norm, weight
from layers.heads import merge_heads
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together or a negative slope."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    head_dim: int | None = None  # K = V; default width / heads
    slope: float = 1.0  # scales all decays: 1 - l / L in layer l of L

    def __post_init__(self):
        require_positive(self, "width", "heads")
        if self.head_dim is None:
            require_divides(self, "heads", "width")
        require(self.K >= 1, f"lightning_attention: head_dim={self.head_dim} must be >= 1")
        require_not_negative(self, "slope")

    @property
    def K(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def state_bytes(self) -> int:
        """`4 H K^2`."""
        return 4 * self.heads * self.K**2

    def flops_per_token(self, length: int) -> int:
        projections = 5 * self.width * self.heads * self.K
        return 2 * projections + flops_per_token(length, self.heads, self.K, self.K, channels=False)


@struct.dataclass
class State:
    memory: Array  # [B, H, K, K]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    qkv_key, gate_key, out_key = jax.random.split(key, 3)
    channels = cfg.heads * cfg.K
    return {
        "w_qkv": weight(qkv_key, cfg.width, 3 * channels),
        "w_gate": weight(gate_key, cfg.width, channels),
        "norm_scale": jnp.ones(channels),
        "w_out": weight(out_key, channels, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.K)))


def _inputs(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, Array, Array]:
    """q, k, v `[..., H, K]` and the log decay `[H]`."""
    qkv = jax.nn.silu(dense(x, params["w_qkv"]))
    q, k, v = (p.reshape(*p.shape[:-1], cfg.heads, cfg.K) for p in jnp.split(qkv, 3, -1))
    # The norm that follows makes the scale of q immaterial; this one keeps reads of the order of v.
    return q * cfg.K**-0.5, k, v, -cfg.slope * 2.0 ** (-8.0 * jnp.arange(1, cfg.heads + 1) / cfg.heads)


def _output(params: Params, x: Array, o: Array) -> Array:
    o = rms_norm(merge_heads(o), params["norm_scale"], 1e-6)
    return dense(jax.nn.sigmoid(dense(x, params["w_gate"])) * o, params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    o, memory = gated_linear_attention(
        *_inputs(params, cfg, x), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, x, o), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, memory = gated_linear_attention_step(*_inputs(params, cfg, x_t), state.memory)
    return _output(params, x_t, o), State(memory=memory)
