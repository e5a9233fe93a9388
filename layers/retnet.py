"""Retention (RetNet): linear attention with rotated queries and keys and a fixed decay per head.

    q_t = R_t W_q x_t,    k_t = R_t W_k x_t / sqrt(K),    v_t = W_v x_t
    S_t = gamma_h S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    gamma_h = 1 - 2^(-5-h)
    y_t = W_out( silu(W_gate x_t) * RMSNorm_head(o_t) )

R_t rotates pairs of channels by the position t in the document, so that a read sees only differences of
positions: o_t = sum_j gamma^(t-j) (R_{t-j} W_q x_t) . k_j v_j. Values are twice as wide as keys.

Source: Sun et al. 2023 (arXiv 2307.08621), sec. 2.1 (retention: parallel, recurrent and chunkwise forms) and
2.2 (decays, gate, norm). Readings: the paper's GroupNorm is an RMSNorm per head, as published code has it;
it has no scale and an eps of 1e-8 unless told otherwise, because reads are small at the start and an eps of
the usual size would shrink them, which the paper's three rescalings (all undone by the norm) are there to
avoid. Pairs are (i, i + K/2) with frequencies 10000^(-2i/K).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_divides, require_positive
from layers.common import Params, dense, rms_norm, rotary, weight
from layers.fields import later
from layers.heads import dense_heads, merge_heads
from pallas_kernels.attention import positions
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head, even; default width / heads
    value_dim: int | None = None  # V per head; default 2 width / heads
    rope_base: float = 10000.0
    scale: bool = later(False)  # the norm of the read has a learned scale
    eps: float = later(1e-8)  # of that norm

    def __post_init__(self):
        require_positive(self, "width", "heads")
        if self.key_dim is None or self.value_dim is None:
            require_divides(self, "heads", "width")
        require(self.K >= 2 and self.K % 2 == 0, f"retnet: rotation needs an even key_dim, not {self.K}")
        require(self.V >= 1, f"retnet: value_dim={self.V} must be >= 1")
        require(self.rope_base > 1, f"retnet: rope_base={self.rope_base} must be > 1")

    @property
    def K(self) -> int:
        return self.width // self.heads if self.key_dim is None else self.key_dim

    @property
    def V(self) -> int:
        return 2 * self.width // self.heads if self.value_dim is None else self.value_dim

    def state_bytes(self) -> int:
        """`4 (H K V + 1)`: the memory and the position."""
        return 4 * (self.heads * self.K * self.V + 1)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * self.heads * (2 * self.K + 3 * self.V)
        return 2 * projections + flops_per_token(length, self.heads, self.K, self.V, channels=False)


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V]
    position: Array  # [B] int32: tokens of the document so far


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    q_key, k_key, v_key, gate_key, out_key = jax.random.split(key, 5)
    keys, values = cfg.heads * cfg.K, cfg.heads * cfg.V
    norm = {"norm_scale": jnp.ones(cfg.V)} if cfg.scale else {}
    return norm | {
        "w_q": weight(q_key, cfg.width, keys),
        "w_k": weight(k_key, cfg.width, keys),
        "w_v": weight(v_key, cfg.width, values),
        "w_gate": weight(gate_key, cfg.width, values),
        "w_out": weight(out_key, values, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.V)),
        position=jnp.zeros(batch, jnp.int32),
    )


def _inputs(params: Params, cfg: Config, x: Array, position: Array) -> tuple[Array, Array, Array, Array]:
    """Rotated q and k `[..., H, K]`, v `[..., H, V]` and the log decay `[H]`."""
    q = rotary(dense_heads(x, params["w_q"], cfg.heads), position, cfg.rope_base)
    k = rotary(dense_heads(x, params["w_k"], cfg.heads), position, cfg.rope_base)
    log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(cfg.heads))))
    return q, k * cfg.K**-0.5, dense_heads(x, params["w_v"], cfg.heads), log_decay


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    o = merge_heads(rms_norm(o, params["norm_scale"] if cfg.scale else None, cfg.eps))
    return dense(jax.nn.silu(dense(x, params["w_gate"])) * o, params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    position = positions(state.position, segment_ids, x.shape[1]).astype(jnp.int32)
    o, memory = gated_linear_attention(
        *_inputs(params, cfg, x, position),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, cfg, x, o), State(memory=memory, position=position[:, -1] + 1), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, memory = gated_linear_attention_step(*_inputs(params, cfg, x_t, state.position), state.memory)
    return _output(params, cfg, x_t, o), State(memory=memory, position=state.position + 1)
