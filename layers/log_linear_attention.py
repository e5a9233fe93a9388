"""Log-linear attention: gated linear attention with a state for every scale of the past, weighed per token.

Positions count from 0 at the start of the document. Tokens i > j are of level l >= 1 when l - 1 is the
highest bit in which i and j differ, and of level 0 when i = j: seen from i, the past is cut into blocks of
2^(l-1) tokens, the shorter the closer, at most one of each size (a Fenwick tree). With
q, k, v = silu(conv(W x)),

    o_i = sum_{j <= i} lambda_i^(level(i, j)) e^{G_i - G_j} (k_j . q_i / sqrt(K)) dt_j v_j
    dt = softplus(w_dt x + b_dt),   G_i - G_j = -exp(A_log) sum_{j < s <= i} dt_s       per head
    lambda^(l) = softplus(L_l * (W_lambda x)_l)                                        per head and level
    y = W_out( RMSNorm_head(o) * silu(W_gate x) )

With every lambda = 1 this is Mamba-2's recurrence. Level l is itself gated linear attention: split time into
blocks of 2^l positions; tokens in the first half of a block write, tokens in the second half read, and a
block starts from an empty state. So there is one state per level, log2(max_length) of them, and a sequence
costs O(T log T).

Source: Guo et al. 2025 (arXiv 2506.04761; Fenwick partition, weights per level, log-linear Mamba-2).
Reading: their recurrence merges the states of small blocks into one larger when a block is complete; here
the larger block takes in its tokens from the beginning, which gives the same reads from as many states.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_head_dims, require_positive
from layers.common import Params, conv_init, conv_state, dense, weight, wide
from layers.heads import HeadDims, gated_output, split_heads
from layers.state_spaces import dt_bias_init
from pallas_kernels import sequence
from pallas_kernels.attention import positions
from pallas_kernels.chunks import segment_starts
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    max_length: int = 2048  # longest document; a longer one forgets everything at its multiples
    conv: int = 4  # taps of the short convolution on q, k, v

    def __post_init__(self):
        require_head_dims(self)
        require_positive(self, "conv", "max_length")
        require(
            self.max_length >= 2, f"log_linear_attention: max_length={self.max_length} must be at least 2"
        )

    @property
    def levels(self) -> int:
        """Levels with a state: 1 .. levels. Level 0 is the token itself."""
        return (self.max_length - 1).bit_length()

    def state_bytes(self) -> int:
        """`4 (ceil(log2(max_length)) H K V + (conv - 1)(2 H K + H V) + 1)`: the last is the position."""
        memory = self.levels * self.heads * self.K * self.V
        return 4 * (memory + (self.conv - 1) * self.stream + 1)

    def flops_per_token(self, length: int) -> int:
        gates = self.heads * (2 + self.levels)
        projections = self.width * (self.stream + 2 * self.heads * self.V + gates) + self.conv * self.stream
        # Entry by entry: decays and masks of a level's reads and writes, and what it adds to the output.
        level = flops_per_token(length, self.heads, self.K, self.V, channels=False)
        level += self.heads * (5 * self.K + 3 * self.V)
        return 2 * projections + self.levels * level + 2 * self.heads * (self.K + self.V)


@struct.dataclass
class State:
    memory: Array  # [B, levels, H, K, V]
    conv: Array  # [B, conv - 1, 2 H K + H V]
    position: Array  # [B] int32: tokens of the document so far


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decays as in Mamba-2, L = 1."""
    keys = iter(jax.random.split(key, 8))
    H = cfg.heads
    return {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "conv": conv_init(next(keys), cfg.conv, cfg.stream),
        "w_dt": weight(next(keys), cfg.width, H),
        "dt_bias": dt_bias_init(next(keys), (H,)),
        "A_log": jnp.log(jax.random.uniform(next(keys), (H,), minval=1.0, maxval=16.0)),
        "w_level": weight(next(keys), cfg.width, H, cfg.levels + 1),
        "level_scale": jnp.ones((H, cfg.levels + 1)),
        "w_gate": weight(next(keys), cfg.width, H * cfg.V),
        "norm_scale": jnp.ones(cfg.V),
        "w_out": weight(next(keys), H * cfg.V, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.levels, cfg.heads, cfg.K, cfg.V)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
        position=jnp.zeros(batch, jnp.int32),
    )


def _inputs(params: Params, cfg: Config, x: Array, qkv: Array) -> tuple[Array, Array, Array, Array]:
    """The op's q, k, dt v and log decay, at least float32, from the convolved `qkv [..., 2HK + HV]`."""
    keys = cfg.heads * cfg.K
    q, k, v = (split_heads(wide(p), cfg.heads) for p in jnp.split(jax.nn.silu(qkv), [keys, 2 * keys], -1))
    dt = jax.nn.softplus(wide(dense(x, params["w_dt"])) + params["dt_bias"])
    return q * cfg.K**-0.5, k, dt[..., None] * v, -jnp.exp(params["A_log"]) * dt


def _level_weights(params: Params, x: Array) -> Array:
    """lambda `[..., H, levels + 1]`."""
    return jax.nn.softplus(params["level_scale"] * wide(dense(x, params["w_level"])))


def _reads(position: Array, level: Array) -> Array:
    """Whether a token reads its level's state (second half of the block) rather than writing to it."""
    return (position >> (level - 1)) & 1 == 1


def _within(position: Array, level: Array) -> Array:
    """Whether a token continues a block, rather than starting one."""
    return position & ((1 << level) - 1) != 0


def _own(q: Array, k: Array, v: Array, weights: Array) -> Array:
    """Level 0: the token itself."""
    return (weights[..., 0] * jnp.sum(q * k, -1))[..., None] * v


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.silu(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract.

    Raises ValueError for more than `max_length` tokens at once.
    """
    length = sequence.whole_length(x.shape[1])
    require(
        length <= cfg.max_length,
        f"log_linear_attention: {length} tokens are more than max_length={cfg.max_length}; raise it",
    )
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = short_conv(dense(x, params["w_qkv"]), params["conv"], state.conv, segment_ids=segment_ids)
    q, k, v, log_decay = _inputs(params, cfg, x, qkv)
    weights = _level_weights(params, x)
    position = positions(state.position, segment_ids, x.shape[1]).astype(jnp.int32)
    document = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)

    @jax.checkpoint
    def add_level(o, inputs):
        level, memory, weight = inputs
        within, reads = _within(position, level), _reads(position, level)[..., None]
        read, memory = gated_linear_attention(
            q,
            jnp.where(reads[..., None], 0, k),
            v,
            log_decay,
            jnp.where(within[:, 0, None, None, None], memory, 0),
            segment_ids=sequence.numbered(document | ~within),
            implementation=implementation,
        )
        return o + jnp.where(reads, weight, 0)[..., None] * read, memory

    levels = jnp.arange(1, cfg.levels + 1), jnp.moveaxis(state.memory, 1, 0), jnp.moveaxis(weights, -1, 0)[1:]
    o, memory = jax.lax.scan(add_level, _own(q, k, v, weights), levels)
    memory = jnp.moveaxis(memory, 0, 1)
    return _output(params, x, o), State(memory=memory, conv=conv, position=position[:, -1] + 1), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = short_conv_step(dense(x_t, params["w_qkv"]), params["conv"], state.conv)
    q, k, v, log_decay = _inputs(params, cfg, x_t, qkv)
    weights = _level_weights(params, x_t)
    level, position = jnp.arange(1, cfg.levels + 1)[:, None], state.position
    within, reads = _within(position, level), _reads(position, level)
    read, memory = jax.vmap(gated_linear_attention_step, (None, 0, None, None, 0), (0, 1))(
        q,
        jnp.where(reads[..., None, None], 0, k),
        v,
        log_decay,
        jnp.where(within[..., None, None, None], jnp.moveaxis(state.memory, 1, 0), 0),
    )
    seen = jnp.where(reads[..., None], jnp.moveaxis(weights, -1, 0)[1:], 0)
    o = _own(q, k, v, weights) + jnp.einsum("lbh,lbhv->bhv", seen, read)
    return _output(params, x_t, o), State(memory=memory, conv=conv, position=position + 1)
