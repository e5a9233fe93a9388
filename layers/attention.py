"""Softmax attention with rotary positions, grouped queries and an optional sliding window.

    o_i = sum_j softmax_j( R_i q_i . R_j k_j / sqrt(K) ) v_j      over 0 <= i - j < span

R_p rotates by the position p in the document, so that only i - j matters. The span is `window`, or
`max_length` for full attention: the state is a ring buffer of `span` keys and values, and a sequence that
grows past `max_length` step by step attends to its last `max_length` tokens.

Sources: Vaswani et al. 2017 (arXiv 1706.03762) eq. 1; Su et al. 2021 (arXiv 2104.09864) eq. 34 (rotary);
Ainslie et al. 2023 (arXiv 2305.13245) (grouped queries); Beltagy et al. 2020 (arXiv 2004.05150) (window).
The window counts the query's own token, so `window=1` sees only itself. `conv` adds a short causal
convolution (linear, no activation) on q, k and v before the rotation, which lets one layer bind a token to
the one before it (Arora et al. 2023, arXiv 2312.04927). `sinusoidal` adds absolute positions to the layer's
input, which do not carry beyond the lengths that were trained; with `rope_base=None` they are the only ones.

With `sinks` = S > 0 the first S tokens of the document stay visible beside a window of w tokens. As in
StreamingLLM (Xiao et al. 2023, arXiv 2309.17453 sec. 3.2), whose cache numbers what it holds from 0, no
distance grows beyond S + w - 1: for j < S that the window has left behind, the logit is
R_p q_i . R_j k_j with p = S + w - 1. With `sink_logit` the softmax has one more term, exp(b_h), in its
denominator, b_h a number learned per head that starts at 0: the + 1 with which a head may attend to nothing
(gpt-oss, arXiv 2508.10925). Published models differ in the rest: positions may turn only a part of each head
(`rotary_channels`), q and k may be normalised (`qk_norm`; Henry et al. 2020, arXiv 2010.04245), and what the
heads read may pass a gate (`gate`; Qiu et al. 2025, arXiv 2505.06708). A layer that shares its weights with
others may add matrices of rank r of its own, zero at first, to those of q, k and v (`adapter`; Hu et al.
2021, arXiv 2106.09685; Glorioso et al. 2024, arXiv 2411.15242), and it may read more channels than it writes
(`out_width`).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import (
    require,
    require_divides,
    require_not_negative,
    require_positive,
    require_rotary,
)
from layers.common import (
    Params,
    adapted,
    adapter_init,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    rms_norm,
    rotary,
    sinusoids,
    weight,
)
from layers.fields import later
from layers.heads import merge_heads
from pallas_kernels import sequence
from pallas_kernels.attention import (
    Cache,
    attention,
    attention_part,
    attention_part_step,
    attention_step,
    chosen_attention,
    empty_cache,
    flops_per_token,
    merge,
    positions,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for head counts that do not divide, an odd head width with rotary positions, or sinks
    without a window."""

    width: int
    heads: int = 4  # query heads H
    kv_heads: int | None = None  # key and value heads G; default H
    head_dim: int | None = None  # default width / H
    window: int | None = None  # None: full attention
    max_length: int = 2048  # longest sequence of full attention: the slots of its state
    rope_base: float | None = 10000.0  # None: no positions
    conv: int = 0  # taps of the short convolution on q, k, v; 0 for none
    sinusoidal: bool = False  # absolute positions: sines and cosines added to the input
    sinks: int = 0  # S first tokens of the document that are seen beside the window
    sink_logit: bool = False  # a learned logit per head in the denominator alone
    rotary_channels: int | None = later(None)  # the first so many of a head's channels turn; default all
    qk_norm: bool = later(False)  # RMSNorm with learned scales of every head's q and k
    unit_offset: bool = later(False)  # those scales are 1 + the parameter
    eps: float = later(1e-5)  # of those norms
    gate: bool = later(False)  # multiply what the heads read by sigmoid(W_gate x)
    out_bias: bool = later(False)
    out_width: int | None = later(None)  # channels of y; default D
    scale: float | None = later(None)  # of q; default 1 / sqrt(K)
    adapter: int = later(0)  # r; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "heads", "max_length", "G", "span")
        if self.head_dim is None:
            require_divides(self, "heads", "width")
        require(
            self.heads % self.G == 0,
            f"attention: kv_heads={self.kv_heads} does not divide heads={self.heads}",
        )
        require_not_negative(self, "conv", "adapter")
        require(self.out_width is None or self.out_width >= 1, f"attention: out_width={self.out_width} < 1")
        require(
            self.sinks >= 0 and (self.sinks == 0 or self.window is not None),
            f"attention: sinks={self.sinks} must be >= 0, and 0 where window={self.window}",
        )
        r = self.rotary_channels
        require(r is None or 0 < r <= self.K, f"attention: rotary_channels={r} must be in [1, {self.K}]")
        require_rotary(self, r or self.K)

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
    def sequence_way(self) -> str:
        return "ring" if self.window is None else "halo"

    @property
    def plain(self) -> bool:
        """Without sinks of either kind."""
        return not self.sinks and not self.sink_logit

    @property
    def channels(self) -> int:
        """Of q, k and v together."""
        return (self.heads + 2 * self.G) * self.K

    def state_bytes(self) -> int:
        """`4 (span (2 G K + 1) + 1 + S 2 G K + (conv - 1)(H + 2 G) K)`: keys, values and positions, length,
        keys and values of the sinks, window of the convolution."""
        window = max(self.conv - 1, 0) * self.channels
        return 4 * (self.span * (2 * self.G * self.K + 1) + 1 + self.sinks * 2 * self.G * self.K + window)

    def flops_per_token(self, length: int) -> int:
        outputs = (self.gate * self.width + (self.out_width or self.width)) * self.heads * self.K
        projections = self.width * self.channels + outputs + self.conv * self.channels
        projections += self.adapter * (3 * self.width + self.channels)
        mix = flops_per_token(length, self.span, self.heads, self.K, self.K, part=not self.plain)
        return 2 * projections + mix + 4 * self.sinks * self.heads * self.K


@struct.dataclass
class State:
    cache: Cache  # the last `span` keys and values
    conv: Array  # [B, conv - 1, (H + 2 G) K]
    sink_k: Array  # [B, S, G, K]: of the document's first S tokens, zeros where they have not come yet
    sink_v: Array  # [B, S, G, K]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs."""
    in_key, out_key, conv_key = jax.random.split(key, 3)
    params: Params = {
        "w_qkv": weight(in_key, cfg.width, cfg.channels),
        "w_out": weight(out_key, cfg.heads * cfg.K, cfg.out_width or cfg.width),
    }
    if cfg.adapter:
        widths = {"q": cfg.heads * cfg.K, "k": cfg.G * cfg.K, "v": cfg.G * cfg.K}
        params["adapter"] = adapter_init(jax.random.fold_in(key, 4), cfg.adapter, cfg.width, widths)
    if cfg.conv:
        params["conv"] = conv_init(conv_key, cfg.conv, cfg.channels)
    if cfg.sink_logit:
        params["sink_logit"] = jnp.zeros(cfg.heads)
    if cfg.gate:
        params["w_gate"] = weight(jax.random.fold_in(key, 3), cfg.width, cfg.heads * cfg.K)
    if cfg.qk_norm:
        scale = jnp.full(cfg.K, 0.0 if cfg.unit_offset else 1.0)
        params |= {"q_scale": scale, "k_scale": jnp.copy(scale)}
    return params | ({"out_bias": jnp.zeros(cfg.out_width or cfg.width)} if cfg.out_bias else {})


def init_state(cfg: Config, batch: int) -> State:
    sinks = jnp.zeros((batch, cfg.sinks, cfg.G, cfg.K))
    return State(
        cache=empty_cache(batch, cfg.span, cfg.G, cfg.K, cfg.K),
        conv=conv_state(batch, cfg.conv, cfg.channels),
        sink_k=sinks,
        sink_v=jnp.copy(sinks),
    )


def _projected(params: Params, cfg: Config, x: Array, position: Array) -> Array:
    """q, k and v side by side, before convolution and rotation."""
    if cfg.sinusoidal:
        x = x + sinusoids(position, cfg.width).astype(x.dtype)
    qkv = dense(x, params["w_qkv"])
    return qkv + adapted(params["adapter"], "qkv", x) if cfg.adapter else qkv


def _normed(params: Params, cfg: Config, name: str, x: Array) -> Array:
    scale = params[f"{name}_scale"]
    return rms_norm(x, 1 + scale if cfg.unit_offset else scale, cfg.eps)


def _turned(cfg: Config, x: Array, position: Array) -> Array:
    turning, rest = jnp.split(x, [cfg.rotary_channels or cfg.K], -1)
    turned = rotary(turning, position, cfg.rope_base)
    return turned if cfg.rotary_channels is None else jnp.concatenate([turned, rest], -1)


def _heads(params: Params, cfg: Config, qkv: Array, position: Array) -> tuple[Array, Array, Array, Array]:
    """Rotated, scaled q, and the same as the sinks see it, `[..., H, K]`; rotated k and v `[..., G, K]`."""
    qkv = qkv.reshape(*qkv.shape[:-1], -1, cfg.K)
    q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.G], -2)
    if cfg.qk_norm:
        q, k = _normed(params, cfg, "q", q), _normed(params, cfg, "k", k)
    q = q * (cfg.K**-0.5 if cfg.scale is None else cfg.scale)
    farthest = jnp.minimum(position, cfg.sinks + cfg.span - 1)
    far = _turned(cfg, q, farthest) if cfg.sinks else q
    return _turned(cfg, q, position), far, _turned(cfg, k, position), v


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    """Gate and projection of what the heads read, `o [..., H, K]`."""
    y = merge_heads(o.astype(x.dtype))
    if cfg.gate:
        y = y * jax.nn.sigmoid(dense(x, params["w_gate"]))
    y = dense(y, params["w_out"])
    return y + params["out_bias"].astype(y.dtype) if cfg.out_bias else y


def _kept(cfg: Config, state: State, k: Array, v: Array, position: Array):
    """Keys and values, the old sinks' and the new tokens', `[B, S + T, G, K]`; which of them each token sees
    as sinks, `[B, T, S]`, -1 for those that the window still holds; the sinks after the last token.
    """
    time, sink = jnp.arange(k.shape[1])[:, None], jnp.arange(cfg.sinks)
    place = time - position[..., None] + sink  # in this call, or negative: it came before
    index = jnp.where(place < 0, sink, cfg.sinks + place)
    seen = jnp.where(position[..., None] - sink >= cfg.span, index, -1)
    old = state.sink_k, state.sink_v
    both = [jnp.concatenate([o, x.astype(o.dtype)], 1) for o, x in zip(old, (k, v), strict=True)]
    there = (place[:, -1] < k.shape[1])[..., None, None]
    last = jnp.minimum(index[:, -1], cfg.sinks + k.shape[1] - 1)[..., None, None]
    return *both, seen, *(jnp.where(there, jnp.take_along_axis(x, last, 1), 0) for x in both)


def _entered(cfg: Config, state: State, k: Array, v: Array, position: Array, segment_ids) -> State:
    """`state` with the sinks that enter this shard, where the sequence is cut over devices."""

    def summary(start):
        return None, tuple(
            _kept(cfg, dataclasses.replace(state, sink_k=start[0], sink_v=start[1]), k, v, position)[3:]
        )

    sinks = state.sink_k, state.sink_v
    if cfg.sinks:
        sinks = sequence.carried(sinks, segment_ids, summary, lambda _, sinks: sinks)
    return dataclasses.replace(state, sink_k=sinks[0], sink_v=sinks[1])


def _with_sinks(params, cfg, state, part, far, k, v, position, implementation=None):
    """`(o [B, T, H, K], sink_k, sink_v)`: one softmax over the window's `part`, sinks and the extra logit."""
    null = params["sink_logit"] if cfg.sink_logit else None
    if not cfg.sinks:
        return merge([part], null), state.sink_k, state.sink_v
    keys, values, seen, *sinks = _kept(cfg, state, k, v, position)
    beyond = chosen_attention(far, keys, values, seen, implementation=implementation)
    return merge([part, beyond], null), *sinks


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; y has `out_width` channels where that is given.

    Raises ValueError when full attention is asked for more than `max_length` tokens at once.
    """
    length = sequence.whole_length(x.shape[1])
    require(
        cfg.window is not None or length <= cfg.max_length,
        f"attention: {length} tokens are more than max_length={cfg.max_length}; raise it or set window",
    )
    cache = None if state is None else state.cache
    state = init_state(cfg, x.shape[0]) if state is None else state
    position = positions(state.cache.length, segment_ids, x.shape[1])
    qkv, conv = convolved(params, cfg, _projected(params, cfg, x, position), state.conv, segment_ids)
    q, far, k, v = _heads(params, cfg, qkv, position)
    sinks = state.sink_k, state.sink_v
    how = {"segment_ids": segment_ids, "implementation": implementation}
    if cfg.plain:
        o, cache = attention(q, k, v, cfg.span, cache, **how)
    else:
        part, cache = attention_part(q, k, v, cfg.span, cache, **how)
        state = _entered(cfg, state, k, v, position, segment_ids)
        o, *sinks = _with_sinks(params, cfg, state, part, far, k, v, position, implementation)
    return _output(params, cfg, x, o), State(cache, conv, *sinks), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    position, sinks = state.cache.length, (state.sink_k, state.sink_v)
    qkv, conv = convolved_step(params, cfg, _projected(params, cfg, x_t, position), state.conv)
    q, far, k, v = _heads(params, cfg, qkv, position)
    if cfg.plain:
        o, cache = attention_step(q, k, v, state.cache)
    else:
        part, cache = attention_part_step(q, k, v, state.cache)
        here = jax.tree.map(lambda a: a[:, None], (part, far, k, v, position))
        o, *sinks = _with_sinks(params, cfg, state, *here)
        o = o[:, 0]
    return _output(params, cfg, x_t, o), State(cache, conv, *sinks)
