"""Based: linear attention whose kernel is the second-order Taylor polynomial of exp, over few features.

With q, k of width f per head and s = q . k / sqrt(f), softmax's e^s is replaced by

    phi(q) . phi(k) = 1 + s + s^2 / 2,        phi(x) = [1, x / f^(1/4), (x x^T) / (sqrt(2) f^(1/2))]
    S_t = S_{t-1} + phi(k_t) v_t^T,    n_t = n_{t-1} + phi(k_t),    o_t = S_t^T phi(q_t) / (phi(q_t) . n_t)
    y_t = W_out o_t

The kernel is at least 1/2, so the denominator is at least t/2 and needs no guard. x x^T is symmetric: each
product of two different channels is kept once, times sqrt(2), which leaves 1 + f + f (f + 1) / 2 features
(153 for f = 16) of the 1 + f + f^2 (273) that `packed=False` keeps; the inner product is the same.

Source: Arora et al. 2024 (arXiv 2402.18668; Taylor linear attention; there it alternates with
sliding windows, here layer `attention` with `window`, and with gated short convolutions, `base_conv`).
No positions, no gate. Features are formed in float32: in bfloat16 the 1 drowns beside s^2 / 2.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.checks import require, require_divides, require_positive
from layers.common import Params, dense, weight, wide
from layers.heads import dense_heads, merge_heads
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes below 1, or heads that do not divide the width."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    feature_dim: int = 16  # f: width of q and k per head
    value_dim: int | None = None  # V per head; default width / heads
    packed: bool = True  # keep each product of two channels once

    def __post_init__(self):
        require_positive(self, "width", "heads", "feature_dim")
        if self.value_dim is None:
            require_divides(self, "heads", "width")
        require(self.V >= 1, f"based: value_dim={self.V} must be >= 1")

    @property
    def V(self) -> int:
        return self.width // self.heads if self.value_dim is None else self.value_dim

    @property
    def features(self) -> int:
        """Entries of phi."""
        f = self.feature_dim
        return 1 + f + (f * (f + 1) // 2 if self.packed else f * f)

    def state_bytes(self) -> int:
        """`4 H F (V + 1)`, F = 1 + f + f (f + 1) / 2 features (1 + f + f^2 unpacked)."""
        return 4 * self.heads * self.features * (self.V + 1)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * self.heads * 2 * (self.feature_dim + self.V)
        return 2 * projections + flops_per_token(
            length, self.heads, self.features, self.V + 1, channels=False
        )


@struct.dataclass
class State:
    memory: Array  # [B, H, F, V + 1]: S, and n in the last column


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    q_key, k_key, v_key, out_key = jax.random.split(key, 4)
    return {
        "w_q": weight(q_key, cfg.width, cfg.heads * cfg.feature_dim),
        "w_k": weight(k_key, cfg.width, cfg.heads * cfg.feature_dim),
        "w_v": weight(v_key, cfg.width, cfg.heads * cfg.V),
        "w_out": weight(out_key, cfg.heads * cfg.V, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.heads, cfg.features, cfg.V + 1)))


def _taylor(cfg: Config, x: Array) -> Array:
    """phi: `[..., f] -> [..., F]`."""
    x = wide(x) * cfg.feature_dim**-0.25
    if cfg.packed:
        i, j = np.triu_indices(cfg.feature_dim)
        square = x[..., i] * x[..., j] * np.where(i == j, 0.5**0.5, 1.0).astype(x.dtype)
    else:
        square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) * 0.5**0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square], -1)


def _inputs(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, Array]:
    """phi(q) and phi(k) `[..., H, F]`, v with a column of ones `[..., H, V + 1]`."""
    q, k = (_taylor(cfg, dense_heads(x, params[name], cfg.heads)) for name in ("w_q", "w_k"))
    v = wide(dense_heads(x, params["w_v"], cfg.heads))
    return q, k, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _output(params: Params, x: Array, o: Array) -> Array:
    """The weighted mean, projected."""
    return dense(merge_heads(o[..., :-1] / o[..., -1:]).astype(x.dtype), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    o, memory = gated_linear_attention(
        *_inputs(params, cfg, x),
        state=state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, x, o), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, memory = gated_linear_attention_step(*_inputs(params, cfg, x_t), None, state.memory)
    return _output(params, x_t, o), State(memory=memory)
