"""Softmax attention with rotary positions, grouped queries and an optional sliding window.

    o_i = sum_j softmax_j( R_i q_i . R_j k_j / sqrt(K) ) v_j      over 0 <= i - j < span

R_p rotates by the position p in the document, so that only i - j matters. The span is `window`, or
`max_length` for full attention: the state is a ring buffer of `span` keys and values, and a sequence that
grows past `max_length` step by step attends to its last `max_length` tokens.

Sources: Vaswani et al. 2017 (arXiv 1706.03762) eq. 1; Su et al. 2021 (arXiv 2104.09864) eq. 34 (rotary);
Ainslie et al. 2023 (arXiv 2305.13245) (grouped queries); Beltagy et al. 2020 (arXiv 2004.05150) (window).
The window counts the query's own token, so `window=1` sees only itself.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.common import (
    Params,
    dense,
    dense_heads,
    merge_heads,
    require,
    require_divides,
    require_positive,
    rotary,
    weight,
)
from pallas_kernels.attention import (
    Cache,
    attention,
    attention_step,
    empty_cache,
    flops_per_token,
    positions,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for head counts that do not divide, or an odd head width with rotary positions."""

    width: int
    heads: int = 4  # query heads H
    kv_heads: int | None = None  # key and value heads G; default H
    head_dim: int | None = None  # default width / H
    window: int | None = None  # None: full attention
    max_length: int = 2048  # longest sequence of full attention: the slots of its state
    rope_base: float | None = 10000.0  # None: no positions

    def __post_init__(self):
        require_positive(self, "width", "heads", "max_length", "G", "span")
        if self.head_dim is None:
            require_divides(self, "heads", "width")
        require(
            self.heads % self.G == 0,
            f"attention: kv_heads={self.kv_heads} does not divide heads={self.heads}",
        )
        require(
            self.rope_base is None or self.K % 2 == 0,
            f"attention: rotary positions need an even head width, not {self.K}",
        )

    @property
    def G(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def K(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def span(self) -> int:
        return self.max_length if self.window is None else self.window

    def state_bytes(self) -> int:
        """`4 span (2 G K + 1) + 4`: keys, values, slot positions, and the length."""
        return 4 * self.span * (2 * self.G * self.K + 1) + 4

    def flops_per_token(self, length: int) -> int:
        projections = 2 * self.width * self.K * (self.heads + self.G)
        return 2 * projections + flops_per_token(length, self.span, self.heads, self.K, self.K)


@struct.dataclass
class State:
    cache: Cache  # the last `span` keys and values


def init(key: Array, cfg: Config) -> Params:
    q_key, k_key, v_key, out_key = jax.random.split(key, 4)
    return {
        "w_q": weight(q_key, cfg.width, cfg.heads * cfg.K),
        "w_k": weight(k_key, cfg.width, cfg.G * cfg.K),
        "w_v": weight(v_key, cfg.width, cfg.G * cfg.K),
        "w_out": weight(out_key, cfg.heads * cfg.K, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(cache=empty_cache(batch, cfg.span, cfg.G, cfg.K, cfg.K))


def _project(params: Params, cfg: Config, x: Array, position: Array) -> tuple[Array, Array, Array]:
    """Rotated, scaled q `[..., H, K]`, rotated k and v `[..., G, K]`."""
    q = dense_heads(x, params["w_q"], cfg.heads) * cfg.K**-0.5
    k = dense_heads(x, params["w_k"], cfg.G)
    v = dense_heads(x, params["w_v"], cfg.G)
    if cfg.rope_base is not None:
        q, k = rotary(q, position, cfg.rope_base), rotary(k, position, cfg.rope_base)
    return q, k, v


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`.

    Raises ValueError when full attention is asked for more than `max_length` tokens at once.
    """
    require(
        cfg.window is not None or x.shape[1] <= cfg.max_length,
        f"attention: {x.shape[1]} tokens are more than max_length={cfg.max_length}; raise it or set window",
    )
    past = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.cache.length
    o, cache = attention(
        *_project(params, cfg, x, positions(past, segment_ids, x.shape[1])),
        cfg.span,
        None if state is None else state.cache,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return dense(merge_heads(o), params["w_out"]), State(cache=cache), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, cache = attention_step(*_project(params, cfg, x_t, state.cache.length), state.cache)
    return dense(merge_heads(o), params["w_out"]), State(cache=cache)
