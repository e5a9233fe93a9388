"""HGRN2: gated linear attention whose key is what the forget gate lets go, with gates bounded from below.

Per head of width K,

    f_t = l + (1 - l) sigmoid(W_f x_t)                  forget gate in (l, 1)^K
    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,          v_t = W_v x_t
    o_t = S_t^T silu(W_q x_t),      y_t = W_out RMSNorm(o_t)

with the norm over all heads together and no output gate. With K = 1 it is the elementwise HGRN:
h = f h + (1 - f) v.

Source: Qin et al. 2024 (arXiv 2404.07904; outer-product expansion of the state, key tied to the
forget gate). There the bounds of a model's L layers are one cumulative softmax over depth, per channel

    l_i = sum_{0<j<=i} exp(b_j) / sum_{j<L} exp(b_j),     i = 0 .. L-1

0 in the first layer and growing upwards (Qin et al. 2023, arXiv 2311.04823): with `cumulative`,
the model makes them of its layers' b. A layer that does not know the others has l = sigmoid(b), which starts
at `lower_bound`; 0 means no bound. A model that wants longer memories higher up may also give its layers
growing `lower_bound`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, dense, rms_norm, weight, wide
from layers.fields import later
from layers.heads import dense_heads, merge_heads
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a head width that does not divide the width, or a bound outside [0, 1)."""

    sequence_way = "scan"

    width: int
    head_dim: int | None = None  # K = V; default the largest power of two up to 128 that divides the width
    lower_bound: float = 0.0  # of the forget gate, at the start
    cumulative: bool = later(False)  # bounds by all layers of a model together

    def __post_init__(self):
        require_positive(self, "width")
        require(
            self.K >= 1 and self.width % self.K == 0,
            f"hgrn2: head_dim={self.head_dim} does not divide width={self.width}",
        )
        require(0 <= self.lower_bound < 1, f"hgrn2: lower_bound={self.lower_bound} must be in [0, 1)")
        ok = not (self.cumulative and self.lower_bound)
        require(ok, f"hgrn2: lower_bound={self.lower_bound} and cumulative bounds exclude each other")

    @property
    def bounded(self) -> bool:
        return self.cumulative or self.lower_bound > 0

    @property
    def over_depth(self) -> dict[str, Callable[[Array], Array]]:
        """See the package docstring."""
        return {"bound": _cumulative} if self.cumulative else {}

    @property
    def K(self) -> int:
        return math.gcd(128, self.width) if self.head_dim is None else self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.K

    def state_bytes(self) -> int:
        """`4 D K`."""
        return 4 * self.width * self.K

    def flops_per_token(self, length: int) -> int:
        return 8 * self.width**2 + flops_per_token(length, self.heads, self.K, self.K, channels=True)


@struct.dataclass
class State:
    memory: Array  # [B, H, K, K]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; every bound at `lower_bound`."""
    q_key, f_key, v_key, out_key = jax.random.split(key, 4)
    params = {
        "w_q": weight(q_key, cfg.width, cfg.width),
        "w_forget": weight(f_key, cfg.width, cfg.width),
        "w_v": weight(v_key, cfg.width, cfg.width),
        "norm_scale": jnp.ones(cfg.width),
        "w_out": weight(out_key, cfg.width, cfg.width),
    }
    if cfg.cumulative:
        params["bound"] = jnp.zeros(cfg.width)
    elif cfg.lower_bound:
        params["bound"] = jnp.full(cfg.width, math.log(cfg.lower_bound) - math.log1p(-cfg.lower_bound))
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.K)))


def _cumulative(rows: Array) -> Array:
    """From b `[L, D]` of all layers, bottom to top, the logits of their l; minus infinity in the first."""
    rows = wide(rows)
    nothing = jnp.full_like(rows[:1], -jnp.inf)
    below = jax.lax.cumlogsumexp(rows[1:], 0)
    above = jnp.concatenate([jax.lax.cumlogsumexp(rows[2:], 0, reverse=True), nothing])[: len(below)]
    return jnp.concatenate([nothing, below - jnp.logaddexp(rows[0], above)])


def _log_forget(params: Params, cfg: Config, x: Array) -> Array:
    """`log f [..., H, K]`: the logarithm of `l + (1 - l) sigmoid` without leaving log space."""
    log_forget = jax.nn.log_sigmoid(wide(dense(x, params["w_forget"])))
    if cfg.bounded:
        bound = params["bound"]
        log_forget = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + log_forget)
        # Rounding may lift the sum of two shares of 1 above it.
        log_forget = jnp.minimum(log_forget, 0.0)
    return log_forget.reshape(*x.shape[:-1], cfg.heads, cfg.K)


def _inputs(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, Array, Array]:
    """The op's q, k, v and log decay, each `[..., H, K]`."""
    q = jax.nn.silu(dense_heads(x, params["w_q"], cfg.heads)) * cfg.K**-0.5
    log_forget = _log_forget(params, cfg, x)
    # 1 - f by expm1: exact where the gate is nearly open, that is where the memory is longest.
    return q, -jnp.expm1(log_forget), dense_heads(x, params["w_v"], cfg.heads), log_forget


def _output(params: Params, o: Array) -> Array:
    return dense(rms_norm(merge_heads(o), params["norm_scale"]), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    o, memory = gated_linear_attention(
        *_inputs(params, cfg, x), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, o), State(memory=memory), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, memory = gated_linear_attention_step(*_inputs(params, cfg, x_t), state.memory)
    return _output(params, o), State(memory=memory)
