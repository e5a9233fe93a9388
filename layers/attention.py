"""Softmax attention with rotary positions, grouped queries and an optional sliding window.

    o_i = sum_j softmax_j( R_i q_i . R_j k_j / sqrt(K) ) v_j      over 0 <= i - j < span

R_p rotates by the position p in the document, so that only i - j matters. The span is `window`, or
`max_length` for full attention: the state is a ring buffer of `span` keys and values, and a sequence that
grows past `max_length` step by step attends to its last `max_length` tokens.

Sources: Vaswani et al. 2017 (arXiv 1706.03762) eq. 1; Su et al. 2021 (arXiv 2104.09864) eq. 34 (rotary);
Ainslie et al. 2023 (arXiv 2305.13245) (grouped queries); Beltagy et al. 2020 (arXiv 2004.05150) (window).
The window counts the query's own token, so `window=1` sees only itself. `conv` adds a short causal
convolution (linear, no activation) on q, k and v before the rotation, which lets one layer bind a token to
the one before it (Arora et al. 2023, arXiv 2312.04927).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.common import (
    Params,
    conv_init,
    conv_state,
    dense,
    merge_heads,
    require,
    require_divides,
    require_positive,
    rotary,
    short_conv,
    short_conv_step,
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
    conv: int = 0  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "heads", "max_length", "G", "span")
        if self.head_dim is None:
            require_divides(self, "heads", "width")
        require(
            self.heads % self.G == 0,
            f"attention: kv_heads={self.kv_heads} does not divide heads={self.heads}",
        )
        require(self.conv >= 0, f"attention: conv={self.conv} must be >= 0")
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

    @property
    def channels(self) -> int:
        """Of q, k and v together."""
        return (self.heads + 2 * self.G) * self.K

    def state_bytes(self) -> int:
        """`4 (span (2 G K + 1) + 1 + (conv - 1)(H + 2 G) K)`: keys, values, positions, length, window."""
        window = max(self.conv - 1, 0) * self.channels
        return 4 * (self.span * (2 * self.G * self.K + 1) + 1 + window)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * (self.channels + self.heads * self.K) + self.conv * self.channels
        return 2 * projections + flops_per_token(length, self.span, self.heads, self.K, self.K)


@struct.dataclass
class State:
    cache: Cache  # the last `span` keys and values
    conv: Array  # [B, conv - 1, (H + 2 G) K]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    in_key, out_key, conv_key = jax.random.split(key, 3)
    params = {
        "w_qkv": weight(in_key, cfg.width, cfg.channels),
        "w_out": weight(out_key, cfg.heads * cfg.K, cfg.width),
    }
    if cfg.conv:
        params["conv"] = conv_init(conv_key, cfg.conv, cfg.channels)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        cache=empty_cache(batch, cfg.span, cfg.G, cfg.K, cfg.K),
        conv=conv_state(batch, max(cfg.conv, 1), cfg.channels),
    )


def _heads(cfg: Config, qkv: Array, position: Array) -> tuple[Array, Array, Array]:
    """Rotated, scaled q `[..., H, K]`, rotated k and v `[..., G, K]`."""
    qkv = qkv.reshape(*qkv.shape[:-1], -1, cfg.K)
    q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.G], -2)
    q = q * cfg.K**-0.5
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
    qkv = dense(x, params["w_qkv"])
    conv = init_state(cfg, x.shape[0]).conv if state is None else state.conv
    if cfg.conv:
        qkv, conv = short_conv(qkv, params["conv"], conv, segment_ids=segment_ids)
    o, cache = attention(
        *_heads(cfg, qkv, positions(past, segment_ids, x.shape[1])),
        cfg.span,
        None if state is None else state.cache,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return dense(merge_heads(o), params["w_out"]), State(cache=cache, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = dense(x_t, params["w_qkv"]), state.conv
    if cfg.conv:
        qkv, conv = short_conv_step(qkv, params["conv"], conv)
    o, cache = attention_step(*_heads(cfg, qkv, state.cache.length), state.cache)
    return dense(merge_heads(o), params["w_out"]), State(cache=cache, conv=conv)
