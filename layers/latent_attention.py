"""Multi-head latent attention (MLA): all heads attend to one small latent per token, which is all they keep.

With R channels of a latent, r channels that the heads' keys share as they are, and per head h of H

    [c | s] = W_latent x,      c = RMSNorm(c),      [q_h | p_h] = W_q,h x,      [K_h | V_h] = W_up,h
    a_ij = softmax_j( ( q_i . K_h^T c_j + p_i . s_j ) / sqrt(N + r) )      over 0 <= i - j < max_length
    o_h,i = V_h^T sum_j a_ij c_j,      y = W_out [o_1 .. o_H]

that is keys K_h^T c and values V_h^T c of N and V channels that are never made: K_h goes to the query and V_h
behind the softmax, so that the state holds R + r numbers a token whatever H is. There are no positions.

Source: DeepSeek-AI 2024 (arXiv 2405.04434) sec. 2.1; without positions as in Kimi Linear (Kimi Team 2025,
arXiv 2510.26692), where layers between know the order. The latent is in the state twice, as key and as value.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, dense, rms_norm, weight
from layers.heads import dense_heads, merge_heads
from pallas_kernels import sequence
from pallas_kernels.attention import Cache, attention, attention_step, empty_cache, flops_per_token


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1."""

    sequence_way = "ring"

    width: int
    heads: int = 4  # H
    latent: int = 64  # R
    shared: int = 16  # r: channels of the keys that the heads have in common
    key_dim: int = 16  # N per head
    value_dim: int = 16  # V per head
    max_length: int = 2048  # the slots of the state
    eps: float = 1e-6  # of the latent's norm

    def __post_init__(self):
        names = ("width", "heads", "latent", "shared", "key_dim", "value_dim", "max_length")
        require_positive(self, *names)

    def state_bytes(self) -> int:
        """`4 (max_length (2 R + r + 1) + 1)`: latents as keys and as values, positions, length."""
        return 4 * (self.max_length * (2 * self.latent + self.shared + 1) + 1)

    def flops_per_token(self, length: int) -> int:
        H, N, V, R = self.heads, self.key_dim, self.value_dim, self.latent
        projections = self.width * (H * (N + self.shared) + R + self.shared + H * V) + H * R * (N + V)
        return 2 * projections + flops_per_token(length, self.max_length, H, R + self.shared, R)


@struct.dataclass
class State:
    cache: Cache  # the last `max_length` latents, one head


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    keys = iter(jax.random.split(key, 4))
    H, N, V = cfg.heads, cfg.key_dim, cfg.value_dim
    return {
        "w_q": weight(next(keys), cfg.width, H * (N + cfg.shared)),
        "w_latent": weight(next(keys), cfg.width, cfg.latent + cfg.shared),
        "latent_scale": jnp.ones(cfg.latent),
        "w_up": weight(next(keys), cfg.latent, H * (N + V)),
        "w_out": weight(next(keys), H * V, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(cache=empty_cache(batch, cfg.max_length, 1, cfg.latent + cfg.shared, cfg.latent))


def _up(params: Params, cfg: Config) -> tuple[Array, Array]:
    """K_h and V_h, `[R, H, N]` and `[R, H, V]`."""
    up = params["w_up"].reshape(cfg.latent, cfg.heads, -1)
    return up[..., : cfg.key_dim], up[..., cfg.key_dim :]


def _inputs(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, Array]:
    """Scaled queries `[..., H, R + r]`, keys `[..., 1, R + r]` and values `[..., 1, R]`."""
    latent, shared = jnp.split(dense(x, params["w_latent"]), [cfg.latent], -1)
    latent = rms_norm(latent, params["latent_scale"], cfg.eps)
    q = dense_heads(x, params["w_q"], cfg.heads)
    own, common = jnp.split(q * (cfg.key_dim + cfg.shared) ** -0.5, [cfg.key_dim], -1)
    own = jnp.einsum("...hn,rhn->...hr", own, _up(params, cfg)[0].astype(x.dtype))
    keys = jnp.concatenate([latent, shared], -1)[..., None, :]
    return jnp.concatenate([own, common], -1), keys, latent[..., None, :]


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    """Values and projection of the latents that the heads read, `o [..., H, R]`."""
    o = jnp.einsum("...hr,rhv->...hv", o.astype(x.dtype), _up(params, cfg)[1].astype(x.dtype))
    return dense(merge_heads(o), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`.

    Raises ValueError when it is asked for more than `max_length` tokens at once.
    """
    length = sequence.whole_length(x.shape[1])
    message = f"latent_attention: {length} tokens are more than max_length={cfg.max_length}; raise it"
    require(length <= cfg.max_length, message)
    cache = None if state is None else state.cache
    how = {"segment_ids": segment_ids, "implementation": implementation}
    o, cache = attention(*_inputs(params, cfg, x), cfg.max_length, cache, **how)
    return _output(params, cfg, x, o), State(cache=cache), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, cache = attention_step(*_inputs(params, cfg, x_t), state.cache)
    return _output(params, cfg, x_t, o), State(cache=cache)
