"""RWKV-6 (Finch): gated linear attention that reads before it writes, on inputs mixed with the token before.

With x'_t the token before x_t in the document (0 for the first) and for each m of r, k, v, g and w

    x^m_t = x_t + (x'_t - x_t) * (mu_m + tanh( z_t A_m ) B_m),        z_t = x_t + (x'_t - x_t) * mu
    r, k, v, g = W_r x^r, W_k x^k, W_v x^v, W_g x^g
    w_t = exp(-exp( d + tanh(x^w_t A) B ))                            decay per channel, in (0, 1)
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,      S_t = diag(w_t) S_{t-1} + k_t v_t^T      per head
    y_t = W_out( LayerNorm_head(o_t) * silu(g_t) )

The bonus u weighs the token itself, which the read of S_{t-1} does not contain.

Source: Peng et al. 2024 (arXiv 2404.05892; Finch: data-dependent token shift, decay, time mixing).
Readings: published models start mu, d and u by formulas in the channel and the depth. A layer does not know
its depth: mu falls from 1 to 0 over the channels, d rises from -6 to -1, u is 1/2. The norm's eps is 64e-5,
as published, for heads of 64 channels: 1e-5 per channel. This is the time mixing; their channel mixing is
the block's MLP.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, dense, layer_norm, low_rank, token_shift, weight, wide
from layers.heads import merge_heads, split_heads
from pallas_kernels import sequence
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)

STREAMS = ("r", "k", "v", "gate", "decay")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1 or heads that do not divide the width."""

    sequence_way = "scan"

    width: int
    head_dim: int | None = None  # K = V; default the largest power of two up to 64 that divides the width
    mix_rank: int = 32  # rank of the data-dependent token shift, per stream
    decay_rank: int = 64

    def __post_init__(self):
        require_positive(self, "width", "mix_rank", "decay_rank")
        require(
            self.K >= 1 and self.width % self.K == 0,
            f"rwkv6: head_dim={self.head_dim} does not divide width={self.width}",
        )

    @property
    def K(self) -> int:
        return math.gcd(64, self.width) if self.head_dim is None else self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.K

    def state_bytes(self) -> int:
        """`4 D (K + 1)`: the memory and the last token."""
        return 4 * self.width * (self.K + 1)

    def flops_per_token(self, length: int) -> int:
        columns = 5 * self.width + 2 * len(STREAMS) * self.mix_rank + 2 * self.decay_rank
        mix = flops_per_token(length, self.heads, self.K, self.K, channels=True)
        return 2 * self.width * columns + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, K]
    last: Array  # [B, D] the token before


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; the low-rank parts start small, projections with unit variance."""
    keys = iter(jax.random.split(key, 9))
    D, R, M = cfg.width, cfg.mix_rank, len(STREAMS)
    share = jnp.arange(D) / max(D - 1, 1)
    return {
        "mix": 1 - share,
        "mix_streams": jnp.broadcast_to(1 - share, (M, D)),
        "w_mix_down": weight(next(keys), D, M, R, gain=0.1),
        "w_mix_up": weight(next(keys), R, M, D, gain=0.1),
        "decay_bias": -6.0 + 5.0 * share,
        "w_decay_down": weight(next(keys), D, cfg.decay_rank, gain=0.1),
        "w_decay_up": weight(next(keys), cfg.decay_rank, D, gain=0.1),
        **{f"w_{name}": weight(next(keys), D, D) for name in STREAMS[:4]},
        "bonus": jnp.full((cfg.heads, cfg.K), 0.5),
        "norm_scale": jnp.ones((cfg.heads, cfg.K)),
        "norm_bias": jnp.zeros((cfg.heads, cfg.K)),
        "w_out": weight(next(keys), D, D),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.K)),
        last=jnp.zeros((batch, cfg.width)),
    )


def _mix(params: Params, x: Array, before: Array) -> list[Array]:
    """x^r, x^k, x^v, x^g and x^w, `[..., D]` each, from tokens and the ones before them."""
    change = before - x
    z = x + change * params["mix"].astype(x.dtype)
    low = jnp.tanh(dense(z, params["w_mix_down"]))
    share = jnp.einsum("...mr,rmd->...md", low, params["w_mix_up"].astype(x.dtype))
    share = share + params["mix_streams"].astype(x.dtype)
    mixed = x[..., None, :] + change[..., None, :] * share
    return [mixed[..., i, :] for i in range(len(STREAMS))]


def _inputs(params: Params, cfg: Config, x: Array, before: Array) -> tuple[tuple[Array, ...], Array]:
    """`((r, k, v, log w) [..., H, K] at least float32, gate [..., D])`."""
    *streams, gate, decay = _mix(params, x, before)
    r, k, v = (
        split_heads(wide(dense(s, params[name])), cfg.heads)
        for s, name in zip(streams, ("w_r", "w_k", "w_v"), strict=True)
    )
    log_decay = -jnp.exp(wide(low_rank(params, "decay", decay, jnp.tanh)) + params["decay_bias"])
    return (r, k, v, split_heads(log_decay, cfg.heads)), dense(gate, params["w_gate"])


def _output(params: Params, cfg: Config, inputs: tuple[Array, ...], o: Array, gate: Array) -> Array:
    """Add the token's own bonus to the read, normalise, gate and project."""
    r, k, v, _ = inputs
    o = o + jnp.sum(r * params["bonus"] * k, -1, keepdims=True) * v
    o = layer_norm(o, params["norm_scale"], params["norm_bias"], 1e-5 * cfg.K)
    return dense(merge_heads(o).astype(gate.dtype) * jax.nn.silu(gate), params["w_out"])


def _read(state: Array, r: Array) -> Array:
    return jnp.einsum("bhkv,bhk->bhv", state, r)


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    before, last = token_shift(x, state.last, segment_ids)
    inputs, gate = _inputs(params, cfg, x, before)
    r, *writes = inputs
    # A read of S_{t-1} is asked one token early, after that token's write; the first, of the state itself.
    early = sequence.following(r)
    o, memory = gated_linear_attention(
        early, *writes, state.memory, segment_ids=segment_ids, implementation=implementation
    )
    o, _ = token_shift(o, _read(state.memory, r[:, 0]), segment_ids)
    return _output(params, cfg, inputs, o, gate), State(memory=memory, last=last), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    inputs, gate = _inputs(params, cfg, x_t, state.last.astype(x_t.dtype))
    o = _read(state.memory, inputs[0])
    _, memory = gated_linear_attention_step(*inputs, state.memory)
    last = x_t.astype(state.last.dtype)
    return _output(params, cfg, inputs, o, gate), State(memory=memory, last=last)
