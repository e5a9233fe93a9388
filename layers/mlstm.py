"""mLSTM: an LSTM with a matrix memory, exponential input gates and no recurrence through its output (xLSTM).

With E = expand * width channels in H heads of width K = E / H,

    [x | z] = W_up u,      c = silu(conv(x) + b_conv),      q, k, v = Q c, K c, V x        block-diagonal
    i_t = exp(w_i [q; k; v] + b_i),    f_t = sigmoid(w_f [q; k; v] + b_f)                  per head
    C_t = f_t C_{t-1} + i_t k_t v_t^T / sqrt(K),    n_t = f_t n_{t-1} + i_t k_t / sqrt(K)
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)
    y_t = W_out( (LayerNorm_head(h_t) + skip * c_t) * silu(z_t) )

exp(w_i ...) overflows, so C and n are kept divided by e^m, and 1 in the maximum becomes e^-m, with

    m_t = max(log f_t + m_{t-1}, log i_t, 0),      m_0 = 0,

which leaves every h as it is. In these terms the layer is gated linear attention with log decay
log f_t + m_{t-1} - m_t <= 0 and keys scaled by e^(log i_t - m_t) <= 1; m itself needs no memory of C and is
found first, by an associative scan.

Source: Beck et al. 2024 (arXiv 2405.04517), sec. 2.3 (mLSTM), the appendix's stabilised form and the block
with up-projection before the cell. Readings: the paper's m has no floor; ours at 0 gives the same h (any m
does) and keeps e^-m finite. The bound e^-m is kept above 1e-6, so that a query that is orthogonal to n never
divides by 0. W_i and w_f start at 0, b_f in [3, 6] over the heads, b_i ~ N(0, 0.01), skip = 1.

xLSTM 7B (Beck et al. 2025, arXiv 2503.13427, sec. 3) leaves projecting up to the block's MLP
(`up_projection="after"`): the cell works on u itself, without convolution and skip, with queries and keys
narrower than values, gates of u that are capped, and a gate on its output,

    q, k, v = W_qkv u,      i_t = exp(cap(w_i u + b_i)),      f_t = sigmoid(cap(w_f u + b_f))
    y_t = W_out( LayerNorm_head(h_t) * sigmoid(W_gate u) ),      cap(a) = c tanh(a / c)

With `divisor_eps`, where C and n are divided by e^m_t, the divisor is max(|n_t . q_t|, e^-m_t) + eps, and m_t
has no floor but the empty memory's m_0 = 0. What h then owes to m, a part in eps, has no gradient.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_choice, require_divides, require_positive
from layers.common import Params, conv_init, conv_state, dense, layer_norm, token_shift, weight, wide
from layers.fields import later
from layers.heads import block_dense, block_weight, merge_heads, split_heads
from pallas_kernels import sequence
from pallas_kernels.chunks import segment_starts
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)
from pallas_kernels.short_conv import short_conv, short_conv_step

UP_PROJECTIONS = ("before", "after")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1, heads or blocks that do not divide the channels, an eps of the
    divisor without capped gates, which keep e^-m finite, or `key_dim` and `value_dim` where E decides."""

    width: int
    heads: int = 4
    expand: int = 2
    conv: int = 4  # taps of the short convolution
    block: int = 4  # channels of a block of the block-diagonal Q, K, V
    # Where channels are multiplied; with "after", by the block's MLP, the three fields above have no part.
    up_projection: str = later("before")
    key_dim: int | None = later(None)  # of a head, with "after"; default half of V
    value_dim: int | None = later(None)  # the same; default width / H
    gate_cap: float | None = later(None)  # c of both gates' logits
    eps: float = later(1e-5)  # of the norm
    divisor_eps: float | None = later(None)

    def __post_init__(self):
        require_positive(self, "width", "heads", "expand", "conv", "block")
        require_choice(self, "up_projection", UP_PROJECTIONS)
        channels, given = self.expand * self.width, [self.key_dim, self.value_dim]
        for name in ("heads", "block") if self.before else ():
            size = getattr(self, name)
            require(channels % size == 0, f"mlstm: {name}={size} does not divide expand * width = {channels}")
        ok = not self.before or given == [None, None]
        require(ok, "mlstm: key_dim and value_dim are of up_projection='after'")
        if not self.before and self.value_dim is None:
            require_divides(self, "heads", "width")
        require_positive(self, "K", "V")
        cap, eps = self.gate_cap, self.divisor_eps
        require(cap is None or cap > 0, f"mlstm: gate_cap={cap} must be > 0")
        ok = eps is None or (eps >= 0 and cap is not None)
        require(ok, f"mlstm: divisor_eps={eps} must be >= 0 and needs gate_cap")

    @property
    def sequence_way(self) -> str:
        """Shards' summaries take m for at least 0, which it is not with an eps in the divisor."""
        return "scan" if self.divisor_eps is None else "relay"

    @property
    def before(self) -> bool:
        return self.up_projection == "before"

    @property
    def channels(self) -> int:
        """E, the values of all heads."""
        return self.heads * self.V

    @property
    def K(self) -> int:
        if self.before:
            return self.V
        return max(self.V // 2, 1) if self.key_dim is None else self.key_dim

    @property
    def V(self) -> int:
        if self.before:
            return self.expand * self.width // self.heads
        return self.width // self.heads if self.value_dim is None else self.value_dim

    @property
    def taps(self) -> int:
        """Of the convolution, 0 where there is none."""
        return self.conv if self.before else 0

    def state_bytes(self) -> int:
        """`4 (E (K + 1) + H + (conv - 1) E)` and, with "after", `4 (H K (V + 1) + H)`: C and n, m, the window
        of the convolution."""
        window = max(self.taps - 1, 0) * self.channels
        return 4 * (self.heads * self.K * (self.V + 1) + self.heads + window)

    def flops_per_token(self, length: int) -> int:
        mix = flops_per_token(length, self.heads, self.K, self.V + 1, channels=False)
        if not self.before:
            return 2 * self.width * (2 * self.heads * (self.K + 1) + 3 * self.channels) + mix
        columns = 3 * self.width + 3 * self.block + 6 * self.heads + self.conv
        return 2 * self.channels * columns + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, V + 1]: C, and n in the last column, both times e^-m
    stabiliser: Array  # [B, H]: m
    conv: Array  # [B, conv - 1, E]; of no tokens without a convolution


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; gates as in the docstring of this module."""
    keys = iter(jax.random.split(key, 8))
    E, blocks = cfg.channels, cfg.channels // cfg.block
    if not cfg.before:
        projections = {
            "w_qkv": weight(next(keys), cfg.width, 2 * cfg.heads * cfg.K + E),
            "w_gate": weight(next(keys), cfg.width, E),
        }
    else:
        projections = {
            "w_up": weight(next(keys), cfg.width, 2 * E),
            "conv": conv_init(next(keys), cfg.conv, E),
            "conv_bias": jnp.zeros(E),
            **{f"w_{name}": block_weight(next(keys), blocks, cfg.block, cfg.block) for name in "qkv"},
        }
    return projections | {
        "w_gates": jnp.zeros((3 * E if cfg.before else cfg.width, 2 * cfg.heads)),
        "input_bias": 0.1 * jax.random.normal(next(keys), (cfg.heads,)),
        "forget_bias": jnp.linspace(3.0, 6.0, cfg.heads),
        "norm_scale": jnp.ones((cfg.heads, cfg.V)),
        **({"skip": jnp.ones(E)} if cfg.before else {}),
        "w_out": weight(next(keys), E, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.V + 1)),
        stabiliser=jnp.zeros((batch, cfg.heads)),
        conv=conv_state(batch, cfg.taps, cfg.channels),
    )


def _gates(params: Params, cfg: Config, x: Array) -> tuple[Array, Array]:
    """`(log i, log f) [..., H]` from what the gates look at, at least float32."""
    log_i, log_f = jnp.split(wide(dense(x, params["w_gates"])), 2, -1)
    log_i, log_f = log_i + params["input_bias"], log_f + params["forget_bias"]
    if cfg.gate_cap is not None:
        log_i, log_f = (cfg.gate_cap * jnp.tanh(logit / cfg.gate_cap) for logit in (log_i, log_f))
    return log_i, jax.nn.log_sigmoid(log_f)


def _heads(cfg: Config, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """`(q, k / sqrt(K), [v | 1]) [..., H, K or V + 1]`, at least float32."""
    q, k, v = (split_heads(wide(part), cfg.heads) for part in (q, k, v))
    return q, k * cfg.K**-0.5, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _inputs(params: Params, cfg: Config, x: Array, c: Array) -> tuple[tuple[Array, ...], ...]:
    """`_heads` and `_gates` of the projected stream x and the convolved one, c."""
    q, k, v = block_dense(c, params["w_q"]), block_dense(c, params["w_k"]), block_dense(x, params["w_v"])
    return _heads(cfg, q, k, v), _gates(params, cfg, jnp.concatenate([q, k, v], -1))


def _inputs_after(params: Params, cfg: Config, u: Array) -> tuple[tuple[Array, ...], ...]:
    """`_heads` and `_gates` of the layer's input itself."""
    keys = cfg.heads * cfg.K
    q, k, v = jnp.split(dense(u, params["w_qkv"]), [keys, 2 * keys], -1)
    return _heads(cfg, q, k, v), _gates(params, cfg, u)


def _least(cfg: Config, log_i: Array) -> Array:
    """What m_t is at least, whatever came before."""
    return jnp.maximum(log_i, 0.0) if cfg.divisor_eps is None else log_i


def _stabilisers(cfg: Config, log_i: Array, log_f: Array, first: Array, segment_ids: Array | None) -> Array:
    """All m_t `[B,T,H]`, constants of the backward pass: h does not depend on them."""
    log_i, log_f, first = jax.lax.stop_gradient((log_i, log_f, first))
    floor = _least(cfg, log_i)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[..., None]
        floor = jnp.where(starts, jnp.maximum(floor, log_f), floor)  # m_0 = 0
        # max(-inf + m, .) forgets m. There is nothing to differentiate and no difference of two of these.
        log_f = jnp.where(starts, -jnp.inf, log_f)

    def combine(early, late):
        """The map m -> max(m + a, b) of two stretches of time, one after the other."""
        return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])

    def maps(first):
        entered = floor.at[:, 0].max((log_f[:, 0] + first).astype(floor.dtype))
        return jax.lax.associative_scan(combine, (log_f, entered), axis=1)

    def summary(first):
        slope, least = (part[:, -1] for part in maps(first))
        return (slope, least), least

    def above(line, m):
        return jnp.maximum(m + line[0] - line[1], 0.0)

    return maps(sequence.carried(first, segment_ids, summary, above))[1]


def _divided(cfg: Config, o: Array, m: Array) -> Array:
    """h `[..., H, V]` from the read `o [..., H, V + 1]`, whose last column is n . q."""
    bound, n = jnp.exp(-m)[..., None], jnp.abs(o[..., -1:])
    if cfg.divisor_eps is None:
        return o[..., :-1] / jnp.maximum(n, jnp.maximum(bound, 1e-6))
    return o[..., :-1] / (jnp.maximum(n, bound) + cfg.divisor_eps)


def _cell(cfg: Config, qkv, gates, state: State, segment_ids, implementation):
    """The memory over T tokens: `(h [B,T,H,V], memory, m)`."""
    (q, k, v), (log_i, log_f) = qkv, gates
    m = _stabilisers(cfg, log_i, log_f, state.stabiliser, segment_ids)
    before, last = token_shift(m, state.stabiliser, segment_ids)
    o, memory = gated_linear_attention(
        q,
        k * jnp.exp(log_i - m)[..., None],
        v,
        log_f + before - m,
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _divided(cfg, o, m), memory, last


def _cell_step(cfg: Config, qkv, gates, state: State):
    """One token of `_cell`."""
    (q, k, v), (log_i, log_f) = qkv, gates
    m = jax.lax.stop_gradient(jnp.maximum(_least(cfg, log_i), log_f + state.stabiliser))
    o, memory = gated_linear_attention_step(
        q, k * jnp.exp(log_i - m)[..., None], v, log_f + state.stabiliser - m, state.memory
    )
    return _divided(cfg, o, m), memory, m


def _normed(params: Params, cfg: Config, h: Array, dtype) -> Array:
    return merge_heads(layer_norm(h, params["norm_scale"], eps=cfg.eps)).astype(dtype)


def _output(params: Params, cfg: Config, h: Array, c: Array, z: Array) -> Array:
    """Norm, skip, gate and projection."""
    h = _normed(params, cfg, h, c.dtype)
    return dense((h + params["skip"].astype(c.dtype) * c) * jax.nn.silu(z), params["w_out"])


def _output_after(params: Params, cfg: Config, h: Array, u: Array) -> Array:
    gate = jax.nn.sigmoid(dense(u, params["w_gate"]))
    return dense(_normed(params, cfg, h, u.dtype) * gate, params["w_out"])


def _activate(params: Params, stream: Array) -> Array:
    return jax.nn.silu(stream + params["conv_bias"].astype(stream.dtype))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state, how = init_state(cfg, x.shape[0]) if state is None else state, (segment_ids, implementation)
    if not cfg.before:
        h, memory, m = _cell(cfg, *_inputs_after(params, cfg, x), state, *how)
        return _output_after(params, cfg, h, x), State(memory=memory, stabiliser=m, conv=state.conv), {}
    x, z = jnp.split(dense(x, params["w_up"]), 2, -1)
    stream, conv = short_conv(x, params["conv"], state.conv, segment_ids=segment_ids)
    c = _activate(params, stream)
    h, memory, m = _cell(cfg, *_inputs(params, cfg, x, c), state, *how)
    return _output(params, cfg, h, c, z), State(memory=memory, stabiliser=m, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    if not cfg.before:
        h, memory, m = _cell_step(cfg, *_inputs_after(params, cfg, x_t), state)
        return _output_after(params, cfg, h, x_t), State(memory=memory, stabiliser=m, conv=state.conv)
    x, z = jnp.split(dense(x_t, params["w_up"]), 2, -1)
    stream, conv = short_conv_step(x, params["conv"], state.conv)
    c = _activate(params, stream)
    h, memory, m = _cell_step(cfg, *_inputs(params, cfg, x, c), state)
    return _output(params, cfg, h, c, z), State(memory=memory, stabiliser=m, conv=conv)
