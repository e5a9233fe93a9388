"""RWKV-7 (Goose): every token takes some of what the memory holds along one direction out, and writes.

With x'_t the token before x_t in the document (0 for the first), x^m = x + (x' - x) * mu_m for m of r, w, k,
v, a and g, and * by channel,

    r, k, v = W_r x^r, W_k x^k, W_v x^v
    log w_t = -e^{-1/2} sigmoid( w_0 + tanh(x^w W_1) W_2 )            decay per channel, in (-0.61, 0)
    a_t = sigmoid( a_0 + x^a A_1 A_2 ),      g_t = sigmoid( x^g G_1 ) G_2
    kappa_t = (k_t * k_k) / |k_t * k_k| per head,      k_t <- k_t * (1 + (a_t - 1) * k_a)

    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T,      o_t = S_t^T r_t      per head
    y_t = W_out( ( LayerNorm_head(o_t) + (sum_i r_ti k_ti r_k,i) v_t ) * g_t )

What is taken out is read before the decay, and a_t, the rate of learning in context, is a number per channel:
the transition is a diagonal plus a rank one, not symmetric.

In published models the first layer hands its v upwards, and the others mix theirs with it,

    v_t <- v_t + (v^first_t - v_t) * sigmoid( v_0 + x^v V_1 V_2 )

which `values`, "first" or "mixed", asks for: the layer's `side` (package docstring) is v^first.

Source: Peng et al. 2025 (arXiv 2503.14456), the time mixing; their channel mixing is rwkv_channel_mix.py, or
the block's MLP. Readings: published models start mu
and w_0 by formulas in the channel and the depth, which a layer does not know: those of the middle layer are
taken. Projections start with unit variance, as in the other layers here, and low-rank parts small. The norm's
eps is 64e-5, as published, for heads of 64 channels: 1e-5 per channel.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_above_zero, require_choice, require_positive
from layers.common import Params, dense, l2_norm, layer_norm, low_rank, token_shift, weight, wide
from layers.fields import later
from layers.heads import merge_heads, split_heads
from pallas_kernels.dplr import dplr, dplr_step, flops_per_token

# Each stream and the power of channel / width that its mu falls with.
STREAMS = {"r": 0.1, "w": 0.45, "k": 0.35, "v": 0.35, "a": 0.45, "gate": 0.1}
VALUES = ("own", "first", "mixed")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1 or heads that do not divide the width."""

    sequence_way = "scan"

    width: int
    head_dim: int | None = None  # K = V; default the largest power of two up to 64 that divides the width
    decay_rank: int | None = None  # of W_1 W_2; default 2.5 sqrt(width) in multiples of 32
    rate_rank: int | None = None  # of A_1 A_2; the same default
    gate_rank: int | None = None  # of G_1 G_2; default 5 sqrt(width) in multiples of 32
    values: str = later("own")
    value_rank: int | None = later(None)  # of V_1 V_2; default 1.7 sqrt(width) in multiples of 32
    eps: float = later(1e-5)  # of the norm, for each channel of a head
    unit_eps: float = later(1e-6)  # kappa is v / sqrt(|v|^2 + unit_eps)

    def __post_init__(self):
        require_positive(self, "width")
        require_choice(self, "values", VALUES)
        require_above_zero(self, "eps", "unit_eps")
        for name in ("head_dim", "decay_rank", "rate_rank", "gate_rank", "value_rank"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(self.width % self.K == 0, f"rwkv7: head_dim={self.K} does not divide width={self.width}")

    @property
    def K(self) -> int:
        return self.head_dim or math.gcd(64, self.width)

    @property
    def heads(self) -> int:
        return self.width // self.K

    @property
    def side(self) -> int:
        return 0 if self.values == "own" else self.width

    @property
    def ranks(self) -> tuple[int, int, int, int]:
        """Of decay, rate, gate and, 0 where there is none, the share of the first values."""
        least, small, large = (max(32, 32 * round(f * self.width**0.5 / 32)) for f in (1.7, 2.5, 5))
        value = (self.value_rank or least) if self.values == "mixed" else 0
        return self.decay_rank or small, self.rate_rank or small, self.gate_rank or large, value

    def state_bytes(self) -> int:
        """`4 D (K + 1)`: the memory and the last token."""
        return 4 * self.width * (self.K + 1)

    def flops_per_token(self, length: int) -> int:
        columns = 4 * self.width + 2 * sum(self.ranks)
        mix = flops_per_token(length, self.heads, self.K, self.K, channels=True)
        return 2 * self.width * columns + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, K, K]
    last: Array  # [B, D] the token before


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module."""
    keys = iter(jax.random.split(key, 10))
    D, K, channel = cfg.width, cfg.K, jnp.arange(cfg.width)
    share = channel / max(D - 1, 1)
    # -1 to 1 within each head, flat in the middle.
    across = (channel % K - (K - 1) / 2) / max((K - 1) / 2, 1)
    zigzag = across * jnp.abs(across)
    decay, rate, gate, value = cfg.ranks
    params = {
        "mix": jnp.stack([1 - (channel / D) ** power for power in STREAMS.values()]),
        **{f"w_{name}": weight(next(keys), D, D) for name in ("r", "k", "v")},
        "decay_bias": -5.5 + 6 * share ** (1 + 0.5**0.3) + 2.5 * zigzag,
        "w_decay_down": weight(next(keys), D, decay, gain=0.1),
        "w_decay_up": weight(next(keys), decay, D, gain=0.1),
        "rate_bias": -0.19 + 0.3 * zigzag + 0.4 * (share - 0.5),
        "w_rate_down": weight(next(keys), D, rate, gain=0.1),
        "w_rate_up": weight(next(keys), rate, D, gain=0.1),
        "w_gate_down": weight(next(keys), D, gate),
        "w_gate_up": weight(next(keys), gate, D),
        "removal_scale": 0.71 - 0.1 * (share - 0.5),
        "rate_scale": jnp.full(D, 1.02),
        "bonus": jnp.full((cfg.heads, K), -0.04),
        "norm_scale": jnp.ones((cfg.heads, K)),
        "norm_bias": jnp.zeros((cfg.heads, K)),
        "w_out": weight(next(keys), D, D),
    }
    if cfg.values == "mixed":
        down, up = jax.random.split(jax.random.fold_in(key, 1))
        params["value_bias"] = 0.73 - 0.4 * (share - 0.5)
        params["w_value_down"] = weight(down, D, value, gain=0.1)
        params["w_value_up"] = weight(up, value, D, gain=0.1)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.K, cfg.K)),
        last=jnp.zeros((batch, cfg.width)),
    )


def _mixed_values(params: Params, x: Array, v: Array, first: Array | None) -> Array:
    """v of the stream `x`, drawn towards the first layer's, which is 0 where there is none."""
    share = jax.nn.sigmoid(wide(low_rank(params, "value", x)) + params["value_bias"])
    return v * (1 - share) if first is None else v + (wide(first) - v) * share


def _inputs(
    params: Params, cfg: Config, x: Array, before: Array, side: Array | None
) -> tuple[tuple[Array, ...], Array]:
    """The op's `(r, k, v, -kappa, a kappa, log w) [..., H, K]` at least float32, and the gate `[..., D]`."""
    change, mix = before - x, params["mix"].astype(x.dtype)
    streams = {name: x + change * mix[i] for i, name in enumerate(STREAMS)}
    r, k, v = (wide(dense(streams[name], params[f"w_{name}"])) for name in ("r", "k", "v"))
    if cfg.values == "mixed":
        v = _mixed_values(params, streams["v"], v, side)
    decay = wide(low_rank(params, "decay", streams["w"], jnp.tanh)) + params["decay_bias"]
    log_decay = -math.exp(-0.5) * jax.nn.sigmoid(decay)
    a = jax.nn.sigmoid(wide(low_rank(params, "rate", streams["a"])) + params["rate_bias"])
    gate = low_rank(params, "gate", streams["gate"], jax.nn.sigmoid)
    removed = k * params["removal_scale"]
    k = k * (1 + (a - 1) * params["rate_scale"])
    r, k, v, a, removed, log_decay = (split_heads(y, cfg.heads) for y in (r, k, v, a, removed, log_decay))
    removed = l2_norm(removed, cfg.unit_eps)
    return (r, k, v, -removed, a * removed, log_decay), gate


def _output(params: Params, cfg: Config, inputs: tuple[Array, ...], o: Array, gate: Array) -> Array:
    """Normalise the read, add the token's own bonus, gate and project."""
    r, k, v = inputs[:3]
    o = layer_norm(o, params["norm_scale"], params["norm_bias"], cfg.eps * cfg.K)
    o = o + jnp.sum(r * k * params["bonus"], -1, keepdims=True) * v
    return dense(merge_heads(o).astype(gate.dtype) * gate, params["w_out"])


def _with_side(cfg: Config, results: tuple, inputs: tuple[Array, ...], side: Array | None) -> tuple:
    """`results`, and what goes on upwards where something may."""
    if side is None:
        return results
    return *results, merge_heads(inputs[2]).astype(side.dtype) if cfg.values == "first" else side


def apply(params, cfg, x, state=None, *, side=None, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    before, last = token_shift(x, state.last, segment_ids)
    inputs, gate = _inputs(params, cfg, x, before, side)
    o, memory = dplr(*inputs, state.memory, segment_ids=segment_ids, implementation=implementation)
    results = _output(params, cfg, inputs, o, gate), State(memory=memory, last=last), {}
    return _with_side(cfg, results, inputs, side)


def step(params, cfg, x_t, state, *, side=None):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    inputs, gate = _inputs(params, cfg, x_t, state.last.astype(x_t.dtype), side)
    o, memory = dplr_step(*inputs, state.memory)
    last = x_t.astype(state.last.dtype)
    results = _output(params, cfg, inputs, o, gate), State(memory=memory, last=last)
    return _with_side(cfg, results, inputs, side)
