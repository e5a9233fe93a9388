"""Titans, memory as context (MAC): attention over a segment, what memory says of it, and persistent tokens.

A document is cut into segments of C tokens. With M the long-term memory of each head (`titans`), W_c its
weights where the segment of token i began and N learned persistent keys and values,

    h_j = RMSNorm(M(q(x_j); W_c))                               recalled from before the segment
    y_i = W_y Attention(x_i; persistent, h_j and x_j of the segment, j <= i)
    W_i : one step of the memory's rule on k(y_i) -> v(y_i), gradients at W_c, gates functions of y_i
    z_i = W_out( RMSNorm(y_i) * sigmoid(RMSNorm(M(q(y_i); W_i))) )

Everything is causal token by token: token i attends to what was recalled for tokens j <= i only, and its gate
is read at its own weights W_i, not at those of the segment's end. x and h share their projections to keys and
values, and are rotated by the place j in the segment; persistent tokens are not rotated. q(.) and k(.) of the
memory are SiLU of a projection, scaled to unit length, v(.) SiLU of one.

Source: Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) sec. 4.1 (context), 3.1 (the rule), 3.3 (persistent
memory, here learned directly as keys and values). The paper lets every token of a segment see all that was
recalled for it, which tells of tokens to come: hence j <= i here. It writes `y * M(y)` for the output; norms
and the sigmoid are its gating of sec. 4.2 with a nonlinearity of our choice. There is no short convolution.

The memory learns from outputs that contain what it recalled, and for some parameters that loop is chaotic: of
nine draws at width 8, gradients of one grew by e^0.004 a token (1e9 after 4,096 tokens of a document), those
of the others stayed near 1. Hence a smaller `max_rate` than that of `titans`: 200 steps of training on text
at width 32 ended at a loss of 2.76 with 0.1, of 3.34 with 0.3; gradients were at most 124 and 2e4 long.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers import titans
from layers.checks import require_divides, require_not_negative, require_positive, require_rotary
from layers.common import Params, dense, l2_norm, rms_norm, weight, wide
from layers.heads import merge_heads, rotary_thirds, split_heads, unit_thirds
from layers.memories import initial_memory, initial_memory_init, memory_gates, memory_gates_init
from pallas_kernels.attention import positions
from pallas_kernels.chunks import number_runs, scan_tokens
from pallas_kernels.dispatch import choose
from pallas_kernels.memory_update import (
    Memory,
    empty_memory,
    memory_read,
    memory_update_group,
    memory_update_step,
)
from pallas_kernels.phases import Group, scan_blocks


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together; settings of the memory as `titans.Config`."""

    width: int
    heads: int = 4
    segment: int = 32  # C, of attention and of the memory's gradients
    persistent: int = 4  # N
    rope_base: float | None = 10000.0  # None: no positions
    depth: int = 2
    expand: int = 2
    max_rate: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self):
        require_positive(self, "width", "heads", "segment")
        require_divides(self, "heads", "width")
        require_not_negative(self, "persistent")
        require_rotary(self, self.K)
        hash(self.memory)  # it checks itself

    @property
    def K(self) -> int:
        return self.width // self.heads

    @property
    def memory(self) -> titans.Config:
        """The memory alone, with a chunk per segment."""
        names = ("width", "heads", "depth", "expand", "max_rate", "clip")
        settings = {name: getattr(self, name) for name in names}
        return titans.Config(**settings, chunk=self.segment, conv=0)

    def state_bytes(self) -> int:
        """`16 C D` for the segment's keys and values, of tokens and of recollections, and the memory's."""
        return 16 * self.segment * self.width + self.memory.state_bytes()

    def flops_per_token(self, length: int) -> int:
        inner = sum(h * i * o for h, i, o in self.memory.shapes)
        attention = 4 * (self.persistent + 4 * self.segment) * self.width
        return 2 * 7 * self.width**2 + 2 * inner + attention + self.memory.flops_per_token(length)


@struct.dataclass
class State:
    memory: Memory
    k: Array  # [B, C, 2, H, K] of what was recalled and of the segment's tokens, 0 where there is none yet
    v: Array

    @property
    def phase(self) -> Array:
        return self.memory.phase


class _Tokens(NamedTuple):
    """What is known of tokens without the memory, `[B, (T,) H, K]`."""

    query: Array  # of the memory
    q: Array
    k: Array
    v: Array
    place: Array  # [B, (T)] in the segment


def init(key: Array, cfg: Config) -> Params:
    """Projections and initial memory with unit gain, persistent keys of unit variance."""
    keys = iter(jax.random.split(key, 8 + cfg.depth))
    params = {
        "w_qkv": weight(next(keys), cfg.width, 3 * cfg.width),
        "w_attention": weight(next(keys), cfg.width, cfg.width),
        "w_memory_q": weight(next(keys), cfg.width, cfg.width),
        "w_memory_kv": weight(next(keys), cfg.width, 2 * cfg.width),
        "w_out": weight(next(keys), cfg.width, cfg.width),
        "recall_scale": jnp.ones(cfg.width),
        "norm_scale": jnp.ones(cfg.width),
        "gate_scale": jnp.ones(cfg.width),
        **memory_gates_init(next(keys), cfg.width, cfg.heads),
    }
    if cfg.persistent:
        shape = (cfg.persistent, cfg.heads, cfg.K)
        params["persistent_k"] = jax.random.normal(next(keys), shape)
        params["persistent_v"] = jax.random.normal(next(keys), shape)
    return params | initial_memory_init(keys, cfg.memory.shapes)


def init_state(cfg: Config, batch: int) -> State:
    none = jnp.zeros((batch, cfg.segment, 2, cfg.heads, cfg.K))
    return State(memory=empty_memory(cfg.memory.shapes, batch), k=none, v=none)


def _tokens(params: Params, cfg: Config, x: Array, place: Array) -> _Tokens:
    query = l2_norm(split_heads(jax.nn.silu(dense(x, params["w_memory_q"])), cfg.heads))
    heads = rotary_thirds(dense(x, params["w_qkv"]), cfg.heads, place, cfg.rope_base)
    return _Tokens(query, *heads, place)


def _pairs_of_keys(params: Params, cfg: Config, recalled: Array, tokens: _Tokens) -> tuple[Array, Array]:
    """Keys and values of what was recalled and of the tokens, `[..., 2, H, K]`, at least float32."""
    h = rms_norm(merge_heads(recalled), params["recall_scale"])
    _, k, v = rotary_thirds(dense(h, params["w_qkv"]), cfg.heads, tokens.place, cfg.rope_base)
    return wide(jnp.stack([k, tokens.k], -3)), wide(jnp.stack([v, tokens.v], -3))


def _attention(params: Params, cfg: Config, q: Array, k: Array, v: Array, visible: Array) -> Array:
    """`q [B,I,H,K]` over `k, v [B,J,2,H,K]` where `visible [B,I,J]`, and persistent tokens: `y [B,I,D]`."""
    batch, queries = q.shape[:2]
    k, v = (x.reshape(batch, -1, *x.shape[3:]) for x in (k, v))
    visible = jnp.repeat(visible, 2, -1)
    if cfg.persistent:
        names, own = ("persistent_k", "persistent_v"), (k, v)
        learned = (jnp.broadcast_to(params[n], (batch, *params[n].shape)) for n in names)
        k, v = (jnp.concatenate([e.astype(x.dtype), x], 1) for e, x in zip(learned, own, strict=True))
        visible = jnp.pad(visible, ((0, 0), (0, 0), (cfg.persistent, 0)), constant_values=True)
    logits = jnp.einsum("bihk,bjhk->bhij", wide(q), k)
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), -1)
    o = jnp.einsum("bhij,bjhk->bihk", weights, v).astype(q.dtype)
    return dense(o.reshape(batch, queries, -1), params["w_attention"])


def _lesson(
    params: Params, cfg: Config, y: Array
) -> tuple[tuple[Array, ...], Array, Array, Array, Array, Array, Array | None]:
    """Initial weights of the memory, and its query, key, value and gates for `y [..., D]`."""
    qkv = jnp.concatenate([dense(y, params["w_memory_q"]), dense(y, params["w_memory_kv"])], -1)
    gates = memory_gates(params, y, cfg.max_rate)
    return initial_memory(params, cfg.depth), *unit_thirds(qkv, cfg.heads), *gates


def _close(state: State) -> State:
    """Where the segment is full, the next one begins without a key."""
    rows = (state.phase == 0)[:, None, None, None, None]
    return State(memory=state.memory, k=jnp.where(rows, 0, state.k), v=jnp.where(rows, 0, state.v))


def _one(state: State, tokens: _Tokens, *, params: Params, cfg: Config):
    """One token: `(state, (y [B,D], read [B,H,K], surprise [B,H]))`."""
    initial, rule = initial_memory(params, cfg.depth), cfg.memory.rule
    recalled = memory_read(initial, tokens.query[:, None], state.memory, **rule)[:, 0]
    new = _pairs_of_keys(params, cfg, recalled, tokens)
    slots = jnp.arange(cfg.segment)
    here = (slots == state.phase[:, None])[..., None, None, None]
    k, v = (jnp.where(here, n[:, None], old) for n, old in zip(new, (state.k, state.v), strict=True))
    visible = (slots <= state.phase[:, None])[:, None]
    y = _attention(params, cfg, tokens.q[:, None], k, v, visible)[:, 0]
    (read, surprise), memory = memory_update_step(*_lesson(params, cfg, y), state=state.memory, **rule)
    return _close(State(memory=memory, k=k, v=v)), (y, read, surprise)


def _many(state: State, tokens: _Tokens, group: Group, *, params: Params, cfg: Config):
    """The tokens of one group of a block."""
    initial, rule = initial_memory(params, cfg.depth), cfg.memory.rule
    recalled = memory_read(initial, tokens.query, state.memory, **rule)
    new = _pairs_of_keys(params, cfg, recalled, tokens)
    slots, length = jnp.arange(cfg.segment), tokens.place.shape[1]
    # Tokens of other groups see themselves, so that no row of the softmax is empty.
    near = group.pairs[:, :-1] | jnp.eye(length, dtype=bool)
    before = (slots < state.phase[:, None])[:, None] & group.members[..., None]
    old = state.k, state.v
    k, v = (jnp.concatenate(both, 1) for both in zip(old, new, strict=True))
    y = _attention(params, cfg, tokens.q, k, v, jnp.concatenate([before, near], -1))
    out, memory = memory_update_group(*_lesson(params, cfg, y), state=state.memory, group=group, **rule)
    put = group.reaches[:, None] & (tokens.place[:, None] == slots[:, None])  # [B, slots, tokens]
    source, some = (x[..., None, None, None] for x in (jnp.argmax(put, -1), jnp.any(put, -1)))
    k, v = (jnp.where(some, jnp.take_along_axis(n, source, 1), o) for n, o in zip(new, old, strict=True))
    return _close(State(memory=memory, k=k, v=v)), (y, *out)


def _output(params: Params, y: Array, read: Array) -> Array:
    gate = jax.nn.sigmoid(rms_norm(merge_heads(read), params["gate_scale"]))
    return dense(rms_norm(y, params["norm_scale"]) * gate, params["w_out"])


def _by_tokens(params, cfg, tokens, state, fresh, runs):
    state = fresh if state is None else state
    return scan_tokens(partial(_one, params=params, cfg=cfg), state, tokens, runs, fresh)


def _by_blocks(params, cfg, tokens, state, fresh, runs):
    return scan_blocks(partial(_many, params=params, cfg=cfg), fresh, state, tokens, runs, cfg.segment)


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; see the package docstring for the contract.

    `aux["surprise"]` is the mean inner loss per channel of v.
    """
    run = choose("titans_mac", implementation, {"reference": _by_tokens, "xla": _by_blocks})
    fresh = init_state(cfg, x.shape[0])
    phase = (fresh if state is None else state).phase
    tokens = _tokens(params, cfg, x, positions(phase, segment_ids, x.shape[1]) % cfg.segment)
    (y, read, surprise), state = run(params, cfg, tokens, state, fresh, number_runs(segment_ids))
    return _output(params, y, read), state, {"surprise": jnp.mean(surprise) / cfg.K}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    state, (y, read, _) = _one(state, _tokens(params, cfg, x_t, state.phase), params=params, cfg=cfg)
    return _output(params, y, read), state
