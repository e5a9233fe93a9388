"""Titans with attention beside its memory (MAG) or above it (MAL).

With Memory the layer of Titans' long-term memory (`titans`), and Attention causal softmax attention over
a sliding window and N learned persistent tokens (keys and values that every query sees),

    combine = "gate"     y = W_out( RMSNorm(Attention(x)) * sigmoid(RMSNorm(Memory(x))) )      MAG
              "layer"    y = W_out Attention(Memory(x))                                        MAL

Positions are rotary, within the document; persistent tokens have none.

Source: Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) sec. 4.2 (gating), 4.3 (layer) and 3.3 (persistent
memory). There persistent tokens are put before the sequence; they are learned directly as keys and values
here, which is what attention makes of them, and the memory does not read them: what it would have learned
from them is in its learned initial weights. The paper leaves the nonlinearity of the gate open: we take a
sigmoid on the branch of the memory.

The name `titans_mal` sets `max_rate` to 0.1: attention sees the memory alone, and with the 0.3 of `titans`
200 steps of training on text at width 32 ended at a loss of 3.33, not 2.90, with gradients up to 5e4 long.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers import titans
from layers.checks import (
    require_choice,
    require_divides,
    require_not_negative,
    require_positive,
    require_rotary,
)
from layers.common import Params, dense, rms_norm, weight
from layers.heads import merge_heads, rotary_thirds
from pallas_kernels.attention import (
    Cache,
    attention,
    attention_step,
    empty_cache,
    flops_per_token,
    positions,
)

COMBINE = ("gate", "layer")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together; settings of the memory as `titans.Config`."""

    width: int
    heads: int = 4
    combine: str = "gate"
    window: int = 64  # tokens that attention sees, the own one included
    persistent: int = 4  # N
    rope_base: float | None = 10000.0  # None: no positions
    depth: int = 2
    expand: int = 2
    gradients: str = "chunk"
    chunk: int = 16
    max_rate: float = 0.3
    clip: float | None = 1.0
    conv: int = 4

    def __post_init__(self):
        require_positive(self, "width", "heads", "window")
        require_divides(self, "heads", "width")
        require_choice(self, "combine", COMBINE)
        require_not_negative(self, "persistent")
        require_rotary(self, self.K)
        hash(self.memory)  # it checks itself

    @property
    def K(self) -> int:
        return self.width // self.heads

    @property
    def memory(self) -> titans.Config:
        names = ("width", "heads", "depth", "expand", "gradients", "chunk", "max_rate", "clip", "conv")
        return titans.Config(**{name: getattr(self, name) for name in names})

    def state_bytes(self) -> int:
        """`4 (window (2 D + 1) + 1)`, D the width, and the memory's."""
        return 4 * (self.window * (2 * self.width + 1) + 1) + self.memory.state_bytes()

    def flops_per_token(self, length: int) -> int:
        mix = flops_per_token(length, self.window, self.heads, self.K, self.K)
        mix += 4 * self.persistent * self.width
        return 2 * 4 * self.width**2 + mix + self.memory.flops_per_token(length)


@struct.dataclass
class State:
    memory: titans.State
    cache: Cache  # the last `window` keys and values


def init(key: Array, cfg: Config) -> Params:
    """The memory's parameters, projections with unit gain, persistent keys of unit variance."""
    keys = jax.random.split(key, 5)
    memory = titans.init(keys[0], cfg.memory)
    params = {
        "memory": {name: value for name, value in memory.items() if name != "w_out"},
        "w_memory": memory["w_out"],
        "w_qkv": weight(keys[1], cfg.width, 3 * cfg.width),
        "w_out": weight(keys[2], cfg.width, cfg.width),
    }
    if cfg.persistent:
        shape = (cfg.persistent, cfg.heads, cfg.K)
        params["persistent_k"] = jax.random.normal(keys[3], shape)
        params["persistent_v"] = jax.random.normal(keys[4], shape)
    if cfg.combine == "gate":
        params["norm_scale"] = jnp.ones(cfg.width)
        params["gate_scale"] = jnp.ones(cfg.width)
    return params


def init_state(cfg: Config, batch: int) -> State:
    cache = empty_cache(batch, cfg.window, cfg.heads, cfg.K, cfg.K)
    return State(memory=titans.init_state(cfg.memory, batch), cache=cache)


def _memory_params(params: Params) -> Params:
    """What `titans` calls its own: its projection is not the last one here."""
    return {**params["memory"], "w_out": params["w_memory"]}


def _heads(params: Params, cfg: Config, x: Array, position: Array) -> tuple[Array, Array, Array]:
    """Rotated and scaled q, rotated k, and v, `[..., H, K]`."""
    return rotary_thirds(dense(x, params["w_qkv"]), cfg.heads, position, cfg.rope_base)


def _persistent(params: Params, cfg: Config) -> tuple[Array, Array] | None:
    return (params["persistent_k"], params["persistent_v"]) if cfg.persistent else None


def _output(params: Params, cfg: Config, o: Array, remembered: Array) -> Array:
    o = merge_heads(o)
    if cfg.combine == "gate":
        gate = jax.nn.sigmoid(rms_norm(remembered, params["gate_scale"]))
        o = rms_norm(o, params["norm_scale"]) * gate
    return dense(o, params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; `aux` is that of the memory."""
    how = {"segment_ids": segment_ids, "implementation": implementation}
    past = None if state is None else state.memory
    remembered, memory, aux = titans.apply(_memory_params(params), cfg.memory, x, past, **how)
    length = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.cache.length
    position = positions(length, segment_ids, x.shape[1])
    o, cache = attention(
        *_heads(params, cfg, x if cfg.combine == "gate" else remembered, position),
        cfg.window,
        None if state is None else state.cache,
        extra=_persistent(params, cfg),
        **how,
    )
    return _output(params, cfg, o, remembered), State(memory=memory, cache=cache), aux


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    remembered, memory = titans.step(_memory_params(params), cfg.memory, x_t, state.memory)
    heads = _heads(params, cfg, x_t if cfg.combine == "gate" else remembered, state.cache.length)
    o, cache = attention_step(*heads, state.cache, extra=_persistent(params, cfg))
    return _output(params, cfg, o, remembered), State(memory=memory, cache=cache)
