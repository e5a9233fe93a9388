"""B'MOJO: attention to a window, to what a state space makes of the past, and to tokens it did not foresee.

Three memories, and one softmax over all of them. With y the output of a selective state space (`mamba`) on x,

    fading      keys and values of RMSNorm(y_j), the F tokens before the window:   w <= i - j < w + F
    eidetic     keys and values of x_j as they are, for the M tokens with i - j >= w that were worst predicted
    window      keys and values of x_j, the last w tokens:                         0 <= i - j < w

    o_i = softmax( q_i . [k_fading, k_eidetic, k_window] / sqrt(K) ) [v_fading, v_eidetic, v_window]
    e_j = mean( (x_j - W_predict RMSNorm(y_{j-1}))^2 )                             innovation of token j,

and W_out o is the output. Queries come from x, positions are rotary and those of the document. A token's
innovation is known when it comes; when it leaves the window it enters the eidetic memory if that has room or
holds a lower innovation, whose place it takes: the M largest of all tokens that have left, of equal ones the
earlier.

Source: Zancato et al. 2024 (arXiv 2407.06324): fading memory by a state space, eidetic memory by innovation
selection, sliding-window attention over both. Readings, where it leaves a choice:
- The fading tokens are the state space's outputs at the w positions before the window (`fading` = F sets
  another number; 1 is one summary of all that the window does not see). Without eidetic memory, `memories=0`,
  this is the variant B'MOJO-F.
- The predictor is a linear map of the state space's previous output, 0 at the start. Selection is discrete,
  so its only teacher is a loss of its own, prediction_loss = predict * mean(e), whose gradient ends at
  W_predict. The kept keys and values carry gradients, the choice has none.
- The memory is bounded, M tokens for ever, and a token is in the window or in the memory, never in both.
- `tied`: x and y share W_qkv, as in the authors' later code; untied, the fading memory has one of its own.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers import mamba
from layers.checks import require_divides, require_not_negative, require_positive, require_rotary
from layers.common import Params, dense, rms_norm, token_shift, weight, wide
from layers.heads import merge_heads, rotary_thirds
from pallas_kernels.attention import (
    Cache,
    attention_part,
    attention_part_step,
    chosen_attention,
    empty_cache,
    flops_per_token,
    merge,
    positions,
)
from pallas_kernels.running_top import Top, running_top


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together; `expand` and `state_dim` as `mamba.Config`."""

    width: int
    heads: int = 4
    window: int = 64  # w tokens, the own one included
    fading: int | None = None  # F; default w
    memories: int = 16  # M
    tied: bool = True  # one W_qkv for tokens and for the state space's outputs
    rope_base: float | None = 10000.0  # None: no positions
    predict: float = 0.01  # coefficient of the predictor's loss
    expand: int = 2
    state_dim: int = 16

    def __post_init__(self):
        require_positive(self, "width", "heads", "window", "F")
        require_divides(self, "heads", "width")
        require_not_negative(self, "memories", "predict")
        require_rotary(self, self.K)
        hash(self.ssm)  # it checks itself

    @property
    def K(self) -> int:
        return self.width // self.heads

    @property
    def F(self) -> int:
        return self.window if self.fading is None else self.fading

    @property
    def ssm(self) -> mamba.Config:
        return mamba.Config(width=self.width, expand=self.expand, state_dim=self.state_dim)

    def state_bytes(self) -> int:
        """`4 ((2 w + F + M)(2 D + 1) + 2 + w + D)` and the state space's: two ring buffers of keys, values
        and positions with their lengths, the kept tokens, the window's innovations, the last output."""
        kept = 2 * self.window + self.F + self.memories
        own = kept * (2 * self.width + 1) + 2 + self.window + self.width
        return 4 * own + self.ssm.state_bytes()

    def flops_per_token(self, length: int) -> int:
        """As executed: the fading memory's keys inside the window are computed and masked, its queries are
        computed even where tied weights leave them unused."""
        spans = (self.window, self.window + self.F)
        mix = sum(flops_per_token(length, span, self.heads, self.K, self.K, part=True) for span in spans)
        maps = 2 * 8 * self.width**2
        return maps + mix + 4 * self.memories * self.width + self.ssm.flops_per_token(length)


@struct.dataclass
class State:
    ssm: mamba.State
    window: Cache  # the last w tokens' keys and values
    fading: Cache  # those of the last w + F outputs of the state space
    innovation: Array  # [B, w] of the last w tokens, oldest first
    output: Array  # [B, D] the state space's last output, normed
    kept_k: Array  # [B, M, H, K]: the eidetic memory, highest innovation first
    kept_v: Array  # [B, M, H, K]
    kept_innovation: Array  # [B, M], -1 where there is nothing


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; nothing is predicted at first."""
    ssm_key, in_key, fading_key, out_key = jax.random.split(key, 4)
    ssm = mamba.init(ssm_key, cfg.ssm)
    params = {
        "ssm": {name: value for name, value in ssm.items() if name != "w_out"},
        "w_ssm": ssm["w_out"],
        "w_qkv": weight(in_key, cfg.width, 3 * cfg.width),
        "w_predict": jnp.zeros((cfg.width, cfg.width)),
        "fading_scale": jnp.ones(cfg.width),
        "w_out": weight(out_key, cfg.width, cfg.width),
    }
    if not cfg.tied:
        params["w_fading"] = weight(fading_key, cfg.width, 3 * cfg.width)
    return params


def init_state(cfg: Config, batch: int) -> State:
    def cache(span):
        return empty_cache(batch, span, cfg.heads, cfg.K, cfg.K)

    return State(
        ssm=mamba.init_state(cfg.ssm, batch),
        window=cache(cfg.window),
        fading=cache(cfg.window + cfg.F),
        innovation=jnp.zeros((batch, cfg.window)),
        output=jnp.zeros((batch, cfg.width)),
        kept_k=jnp.zeros((batch, cfg.memories, cfg.heads, cfg.K)),
        kept_v=jnp.zeros((batch, cfg.memories, cfg.heads, cfg.K)),
        kept_innovation=jnp.full((batch, cfg.memories), -1.0),
    )


def _ssm_params(params: Params) -> Params:
    """What `mamba` calls its own: its projection is not the last one here."""
    return {**params["ssm"], "w_out": params["w_ssm"]}


def _heads(cfg: Config, qkv: Array, position: Array) -> tuple[Array, Array, Array]:
    """Rotated and scaled q, rotated k, and v, `[..., H, K]`."""
    return rotary_thirds(qkv, cfg.heads, position, cfg.rope_base)


def _fading_heads(params: Params, cfg: Config, q: Array, y: Array, position: Array):
    """q, k and v of the fading memory: with tied weights its queries are the window's."""
    own, k, v = _heads(cfg, dense(y, params["w_qkv" if cfg.tied else "w_fading"]), position)
    return q if cfg.tied else own, k, v


def _innovation(params: Params, x: Array, before: Array) -> Array:
    """`[...]` from x and the state space's output before it: a function of W_predict alone to gradients."""
    x, before = jax.lax.stop_gradient((wide(x), wide(before)))
    return jnp.mean(jnp.square(x - dense(before, params["w_predict"])), -1)


def _eidetic(cfg, state, q, k, v, innovation, position, segment_ids=None, implementation=None):
    """What q `[B, T, H, K]` reads from the tokens kept, as a list of parts, and the state fields after."""
    slots = (state.window.length[:, None] + jnp.arange(cfg.window)) % cfg.window
    scores = jnp.concatenate([state.innovation, jax.lax.stop_gradient(innovation)], 1)
    fields = {"innovation": scores[:, -cfg.window :]}
    if not cfg.memories:
        return [], fields
    # Places in order of time: kept tokens, the window, the call. At t the token at place M + t leaves.
    keys, values = (
        jnp.concatenate([kept, jnp.take_along_axis(old, slots[..., None, None], 1), wide(new)], 1)
        for kept, old, new in ((state.kept_k, state.window.k, k), (state.kept_v, state.window.v, v))
    )
    length = position.shape[1]
    leaving = jnp.broadcast_to(cfg.memories + jnp.arange(length, dtype=jnp.int32), position.shape)
    place = jnp.where(state.kept_innovation >= 0, jnp.arange(cfg.memories, dtype=jnp.int32), -1)
    top = running_top(
        scores[:, :length],
        leaving,
        position >= cfg.window,
        Top(state.kept_innovation, place),
        segment_ids=segment_ids,
        implementation=implementation,
    )
    part = chosen_attention(q, keys, values, top.place, implementation=implementation)
    last = top.place[:, -1, :, None, None]
    kept = (jnp.where(last >= 0, jnp.take_along_axis(x, last, 1), 0) for x in (keys, values))
    fields |= zip(("kept_k", "kept_v"), kept, strict=True)
    return [part], fields | {"kept_innovation": top.score[:, -1]}


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; aux has the predictor's loss and the mean innovation."""
    caches = (None, None) if state is None else (state.window, state.fading)
    state = init_state(cfg, x.shape[0]) if state is None else state
    how = {"segment_ids": segment_ids, "implementation": implementation}
    y, ssm, _ = mamba.apply(_ssm_params(params), cfg.ssm, x, state.ssm, **how)
    y = rms_norm(y, params["fading_scale"])
    before, output = token_shift(y, state.output, segment_ids)
    innovation = _innovation(params, x, before)
    position = positions(state.window.length, segment_ids, x.shape[1])
    q, k, v = _heads(cfg, dense(x, params["w_qkv"]), position)
    near, window = attention_part(q, k, v, cfg.window, caches[0], **how)
    faded = _fading_heads(params, cfg, q, y, position)
    far, fading = attention_part(*faded, cfg.window + cfg.F, caches[1], delay=cfg.window, **how)
    kept, fields = _eidetic(cfg, state, q, k, v, innovation, position, **how)
    o = merge([near, far, *kept]).astype(x.dtype)
    state = state.replace(ssm=ssm, window=window, fading=fading, output=output, **fields)
    mean = jnp.mean(innovation)
    aux = {"prediction_loss": cfg.predict * mean, "innovation": jax.lax.stop_gradient(mean)}
    return dense(merge_heads(o), params["w_out"]), state, aux


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    y, ssm = mamba.step(_ssm_params(params), cfg.ssm, x_t, state.ssm)
    y = rms_norm(y, params["fading_scale"])
    innovation = _innovation(params, x_t, state.output.astype(y.dtype))
    position = state.window.length
    q, k, v = _heads(cfg, dense(x_t, params["w_qkv"]), position)
    near, window = attention_part_step(q, k, v, state.window)
    faded = _fading_heads(params, cfg, q, y, position)
    far, fading = attention_part_step(*faded, state.fading, delay=cfg.window)
    kept, fields = _eidetic(cfg, state, *(a[:, None] for a in (q, k, v, innovation, position)))
    parts = [near, far, *jax.tree.map(lambda a: a[:, 0], kept)]
    output = y.astype(state.output.dtype)
    state = state.replace(ssm=ssm, window=window, fading=fading, output=output, **fields)
    return dense(merge_heads(merge(parts).astype(x_t.dtype)), params["w_out"]), state
