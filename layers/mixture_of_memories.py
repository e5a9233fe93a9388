"""Mixture of memories (MoM): a router sends every token to a few of M recurrent memories.

    pi_t = softmax(W_r x_t),    the k largest selected,    w_tm = pi_tm / sum of the selected, else 0

Memory m sees only the tokens that were routed to it, in their order, as if they were its whole sequence.
There, with keys and values of its own and every quantity per head,

    k, v = silu(conv(W_k^m x)), silu(conv(W_v^m x)),    k and q scaled to length 1
    dt = softplus(W_a^m x + dt_bias),    g = -exp(A_log) dt,    beta = sigmoid(W_b^m x)

    rule = "gated_delta"    S = e^g S + beta k (v - (e^g S)^T k)^T
           "mamba2"         S = e^g S + k (dt v)^T
           "gla"            S = e^g S + k v^T
           "linear"         S = S + k v^T

and a token routed elsewhere leaves S_m and the convolution's window of m as they are. The query
q = silu(conv(W_q x)) runs over all tokens. One more memory, `shared`, receives every token:

    o_t = sum_m w_tm S_tm^T q_t / sqrt(K) + S_shared^T q_t / sqrt(K),
    y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) ).

The query, A_log, dt_bias and the filters of the convolutions serve all memories. In published models the
query's convolution, too, sees a memory's own tokens alone (`routed_queries`), and some have one projection
to keys, values, dt and beta for all memories (`own_projections` false).

Sources: Du et al. 2025 (arXiv 2502.13685); the inner rule is the gated delta rule of Yang et al. 2024 (arXiv
2412.06464), or that of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060) or of linear attention, on the same keys.
All memories are executed on all tokens with the foreign ones masked: exact, and nothing depends on other
samples of the batch except the loss

    balance_loss = balance * M * sum_m f_m P_m,    f_m the fraction of tokens routed to m (sum_m f_m = k),
                                                   P_m the mean of pi_tm; at even load it is balance * k.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import (
    require,
    require_above_zero,
    require_choice,
    require_head_dims,
    require_not_negative,
    require_positive,
)
from layers.common import Params, conv_init, conv_state, dense, l2_norm, rms_norm, weight, wide
from layers.fields import later
from layers.heads import HeadDims, dense_heads, merge_heads, split_heads
from layers.routing import balance, route
from layers.state_spaces import dt_bias_init
from pallas_kernels import gated_delta_rule as delta
from pallas_kernels import gated_linear_attention as gla
from pallas_kernels.short_conv import short_conv, short_conv_step

RULES = ("gated_delta", "mamba2", "gla", "linear")


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together, top_k > memories or an unknown rule."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / heads
    value_dim: int | None = None  # V per head; default width / heads
    memories: int = 4  # M, those that are routed to
    top_k: int = 2  # how many of them a token reads and writes
    shared: bool = True  # one more memory, which every token reads and writes
    rule: str = "gated_delta"
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none
    balance: float = 0.01  # coefficient of the load-balancing loss
    routed_queries: bool = later(False)
    own_projections: bool = later(True)  # of each memory
    gate: bool = later(True)
    eps: float = later(1e-5)  # of the norm

    def __post_init__(self):
        require_head_dims(self)
        require_positive(self, "memories", "top_k")
        require(
            self.top_k <= self.memories,
            f"mixture_of_memories: top_k={self.top_k} exceeds memories={self.memories}",
        )
        require_choice(self, "rule", RULES)
        require_not_negative(self, "conv", "balance")
        require_above_zero(self, "eps")

    @property
    def streams(self) -> tuple[int, int]:
        """Channels that are convolved once, and in each memory: q among the first or the second, k and v."""
        keys, values = self.heads * self.K, self.heads * self.V
        return (0, 2 * keys + values) if self.routed_queries else (keys, keys + values)

    @property
    def all_memories(self) -> int:
        """The routed ones and, last, the shared one."""
        return self.memories + self.shared

    def state_bytes(self) -> int:
        """`4 (M' H K V + (conv - 1)(H K + M' H (K + V)))`, M' counting the shared memory; of H K, M' times as
        many with routed queries."""
        queries, writes = self.streams
        window = max(self.conv - 1, 0) * (queries + self.all_memories * writes)
        return 4 * (self.all_memories * self.heads * self.K * self.V + window)

    def flops_per_token(self, length: int) -> int:
        """All memories run on all tokens."""
        queries, writes = self.streams
        keys, values, M = self.heads * self.K, self.heads * self.V, self.all_memories
        gates = self.heads * {"gated_delta": 2, "linear": 0}.get(self.rule, 1)
        once = self.width * (keys + (1 + self.gate) * values + self.memories) + self.conv * queries
        once += (M if self.own_projections else 1) * self.width * (keys + values + gates)
        op = delta if self.rule == "gated_delta" else gla
        mix = op.flops_per_token(length, self.heads, self.K, self.V, channels=False)
        return 2 * once + M * (2 * self.conv * writes + mix)


@struct.dataclass
class State:
    memory: Array  # [B, M', H, K, V]
    conv_query: Array  # [B, conv - 1, H K]; of no channels with routed queries
    conv_write: Array  # [B, M', conv - 1, H (K + V)]: of each memory's own tokens; their queries first


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; A uniform in (0.01, 16), dt log-uniform in (0.001, 0.1)."""
    keys = iter(jax.random.split(key, 10))
    K, V, sets = cfg.heads * cfg.K, cfg.heads * cfg.V, cfg.all_memories if cfg.own_projections else 1
    params = {
        "w_router": weight(next(keys), cfg.width, cfg.memories),
        "w_q": weight(next(keys), cfg.width, K),
        "w_kv": weight(next(keys), cfg.width, sets, K + V),
    }
    if cfg.rule != "linear":
        params |= {
            "w_decay": weight(next(keys), cfg.width, sets, cfg.heads),
            "A_log": jnp.log(jax.random.uniform(next(keys), (cfg.heads,), minval=0.01, maxval=16.0)),
            "dt_bias": dt_bias_init(next(keys), (cfg.heads,)),
        }
    params |= {
        "w_gate": weight(next(keys), cfg.width, cfg.heads * cfg.V),
        "norm_scale": jnp.ones(cfg.V),
        "w_out": weight(next(keys), cfg.heads * cfg.V, cfg.width),
    }
    if cfg.rule == "gated_delta":
        params["w_beta"] = weight(next(keys), cfg.width, sets, cfg.heads)
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, 2 * K + V)
    if not cfg.gate:
        del params["w_gate"]
    return params


def init_state(cfg: Config, batch: int) -> State:
    queries, writes = cfg.streams
    windows = conv_state(batch * cfg.all_memories, cfg.conv, writes)
    return State(
        memory=jnp.zeros((batch, cfg.all_memories, cfg.heads, cfg.K, cfg.V)),
        conv_query=conv_state(batch, cfg.conv, queries),
        conv_write=windows.reshape(batch, cfg.all_memories, *windows.shape[1:]),
    )


def _fold(x: Array) -> Array:
    """`[B, M', ...] -> [B M', ...]`: to ops, every memory is a sequence of its own."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unfold(x: Array, cfg: Config) -> Array:
    return x.reshape(x.shape[0] // cfg.all_memories, cfg.all_memories, *x.shape[1:])


def _route(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Weights and choices `[B, M', ...]` (1 and true for the shared memory), and the statistics of the batch,
    which no output depends on."""
    weights, chosen, probabilities = route(dense(wide(x), params["w_router"]), cfg.top_k)
    loss, load, share = balance(chosen, probabilities)
    aux = {"balance_loss": cfg.balance * loss, "router_load": load, "router_probability": share}
    if cfg.shared:
        weights, chosen = (jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1) for a in (weights, chosen))
    return jnp.moveaxis(weights, -1, 1), jnp.moveaxis(chosen, -1, 1), aux


def _per_memory(cfg: Config, x: Array, w: Array) -> Array:
    """`x [B, ..., D]` through `w [D, M' or 1, E]`: `[B M', ..., E]`, in x's dtype."""
    y = jnp.einsum("b...d,dme->bm...e", x, w.astype(x.dtype))
    return _fold(y if cfg.own_projections else jnp.repeat(y, cfg.all_memories, 1))


def _streams(params: Params, cfg: Config, x: Array) -> tuple[Array, Array]:
    """What is convolved over all tokens, `[B, ..., E]`, and over those of each memory, `[B M', ..., E']`."""
    q, kv = dense(x, params["w_q"]), _per_memory(cfg, x, params["w_kv"])
    if cfg.routed_queries:
        return q[..., :0], jnp.concatenate([jnp.repeat(q, cfg.all_memories, 0), kv], -1)
    return q, kv


def _rule_inputs(params: Params, cfg: Config, x: Array, q: Array, kv: Array, chosen: Array) -> list:
    """Arguments of the inner rule, `[B M', ..., H, K or V or none]`: (q, k, v, p, g), p for gated_delta only.

    `q` and `kv` as of `_streams`, after their convolutions, `chosen [B M', ...]`.
    """
    if cfg.conv:
        q, kv = jax.nn.silu(q), jax.nn.silu(kv)
    keys = cfg.heads * cfg.K
    if cfg.routed_queries:
        q, kv = kv[..., :keys], kv[..., keys:]
    q, k, v = (split_heads(y, cfg.heads) for y in (q, kv[..., :keys], kv[..., keys:]))
    q = l2_norm(q) * cfg.K**-0.5
    q = q if cfg.routed_queries else jnp.repeat(q, cfg.all_memories, 0)
    # A key of zero writes and, with no decay, keeps: the state passes a foreign token unharmed.
    k = jnp.where(chosen[..., None, None], l2_norm(k), 0)
    if cfg.rule == "linear":
        return [q, k, v, None]
    rate = jax.nn.softplus(wide(_per_memory(cfg, x, params["w_decay"])) + params["dt_bias"])
    log_decay = jnp.where(chosen[..., None], -jnp.exp(params["A_log"]) * rate, 0)
    if cfg.rule == "gla":
        return [q, k, v, log_decay]
    if cfg.rule == "mamba2":
        return [q, k, (rate[..., None] * v).astype(v.dtype), log_decay]
    beta = jax.nn.sigmoid(_per_memory(cfg, x, params["w_beta"]))[..., None]
    return [q, k, beta * v, beta * k, log_decay]


def _output(params: Params, cfg: Config, x: Array, o: Array, weights: Array) -> Array:
    """Mix what the memories said, `o [B M', ..., H, V]`; normalise, gate by x and project."""
    o = jnp.einsum("bm...,bm...hv->b...hv", weights.astype(o.dtype), _unfold(o, cfg))
    o = rms_norm(o, params["norm_scale"], cfg.eps)
    if cfg.gate:
        o = o * jax.nn.silu(dense_heads(x, params["w_gate"], cfg.heads))
    return dense(merge_heads(o), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; see the package docstring for the contract.

    `aux` holds `balance_loss`, and per memory `router_load [M]` (fraction of tokens routed there) and
    `router_probability [M]`.
    """
    state = init_state(cfg, x.shape[0]) if state is None else state
    weights, chosen, aux = _route(params, cfg, x)
    folded_ids = None if segment_ids is None else jnp.repeat(segment_ids, cfg.all_memories, 0)
    mask = _fold(chosen)
    q, kv = _streams(params, cfg, x)
    conv_query, conv_write = state.conv_query, _fold(state.conv_write)
    if cfg.conv:
        filters = jnp.split(params["conv"], [cfg.streams[0]], -1)
        if not cfg.routed_queries:
            q, conv_query = short_conv(q, filters[0], conv_query, segment_ids=segment_ids)
        kv, conv_write = short_conv(kv, filters[1], conv_write, segment_ids=folded_ids, mask=mask)
    run = delta.gated_delta_rule if cfg.rule == "gated_delta" else gla.gated_linear_attention
    o, memory = run(
        *_rule_inputs(params, cfg, x, q, kv, mask),
        _fold(state.memory),
        segment_ids=folded_ids,
        implementation=implementation,
    )
    new = State(_unfold(memory, cfg), conv_query, _unfold(conv_write, cfg))
    return _output(params, cfg, x, o, weights), new, aux


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    weights, chosen, _ = _route(params, cfg, x_t)
    mask = _fold(chosen)
    q, kv = _streams(params, cfg, x_t)
    conv_query, conv_write = state.conv_query, _fold(state.conv_write)
    if cfg.conv:
        filters = jnp.split(params["conv"], [cfg.streams[0]], -1)
        if not cfg.routed_queries:
            q, conv_query = short_conv_step(q, filters[0], conv_query)
        kv, moved = short_conv_step(kv, filters[1], conv_write)
        conv_write = jnp.where(mask[:, None, None], moved, conv_write)
    run = delta.gated_delta_rule_step if cfg.rule == "gated_delta" else gla.gated_linear_attention_step
    o, memory = run(*_rule_inputs(params, cfg, x_t, q, kv, mask), _fold(state.memory))
    new = State(_unfold(memory, cfg), conv_query, _unfold(conv_write, cfg))
    return _output(params, cfg, x_t, o, weights), new
