"""RG-LRU: the recurrent block of Hawk and Griffin, a real diagonal recurrence with gates.

With E channels (`channels`), gates that mix the channels of each of H blocks only, and c = 8,

    u = conv(W_x x + b_x) + b_conv                              no activation
    r_t = sigmoid(W_r u_t + b_r),      i_t = sigmoid(W_i u_t + b_i)         W_r, W_i block-diagonal
    log a_t = -c r_t softplus(Lambda)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
    y = W_out( h * gelu(W_gate x + b_gate) ) + b_out

At the first token of a document h_t = i_t u_t: the factor sqrt(1 - a^2) balances what is kept, here nothing.
The root's slope is unbounded where a is nearly 1, hence cut to 1000 in the backward pass.

Source: De et al. 2024 (arXiv 2402.19427) sec. 2 (blocks, RG-LRU, c = 8). Biases, tanh-GELU, the input at
document starts, the cut slope and the initial values (a convolution of variance 0.01 / taps, biases 0) are
those of the published code. So is `ring = "a"`: |e^{-softplus(Lambda)}|^2 starts uniform in [0.9^2, 0.999^2];
the paper places its c-th power instead (`ring = "a^c"`: uniform in [0.9, 0.999]), which remembers 8 times
longer at the same gate.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_choice, require_positive
from layers.common import Params, conv_state, dense, weight, wide
from layers.heads import block_dense, block_weight
from pallas_kernels import sequence
from pallas_kernels.chunks import segment_starts
from pallas_kernels.diagonal_scan import diagonal_scan, diagonal_scan_step, flops_per_token
from pallas_kernels.short_conv import short_conv, short_conv_step

RINGS = ("a", "a^c")
RADII = (0.9, 0.999)
C = 8.0
LARGEST_SLOPE = 1000.0


@dataclass(frozen=True)
class Config:
    """Raises ValueError for a size below 1, channels that heads do not divide, or an unknown ring."""

    sequence_way = "scan"

    width: int
    channels: int | None = None  # E; default width (the paper's models have 4/3 of it)
    heads: int = 4  # H blocks of the gates
    conv: int = 4  # taps of the short convolution
    ring: str = "a"  # what starts in [0.9, 0.999]

    def __post_init__(self):
        require_positive(self, "width", "heads", "conv")
        if self.channels is not None:
            require_positive(self, "channels")
        require(self.E % self.heads == 0, f"rg_lru: heads={self.heads} does not divide channels={self.E}")
        require_choice(self, "ring", RINGS)

    @property
    def E(self) -> int:
        return self.channels or self.width

    def state_bytes(self) -> int:
        """`4 E conv + 1`: one number and conv - 1 inputs per channel, one flag."""
        return 4 * self.E * self.conv + 1

    def flops_per_token(self, length: int) -> int:
        """The same at every length; 5 per channel for the decay, its root and the two gates."""
        matrices = 3 * self.width * self.E + 2 * self.E**2 // self.heads + self.conv * self.E
        return 2 * matrices + 5 * self.E + flops_per_token(self.E)


@struct.dataclass
class State:
    memory: Array  # [B, E]
    conv: Array  # [B, conv - 1, E]
    started: Array  # [B] bool: a token of the document has been seen


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; gate matrices have unit-variance outputs, their biases are 0."""
    keys = iter(jax.random.split(key, 7))
    E, blocks = cfg.E, (cfg.heads, cfg.E // cfg.heads, cfg.E // cfg.heads)
    if cfg.ring == "a":
        squared = jax.random.uniform(next(keys), (E,), minval=RADII[0] ** 2, maxval=RADII[1] ** 2)
        rate = -0.5 * jnp.log(squared)
    else:
        rate = -jnp.log(jax.random.uniform(next(keys), (E,), minval=RADII[0], maxval=RADII[1])) / C
    return {
        "w_x": weight(next(keys), cfg.width, E),
        "x_bias": jnp.zeros(E),
        "w_gate": weight(next(keys), cfg.width, E),
        "gate_bias": jnp.zeros(E),
        "conv": jax.random.normal(next(keys), (cfg.conv, E)) * (0.01 / cfg.conv) ** 0.5,
        "conv_bias": jnp.zeros(E),
        "w_r": block_weight(next(keys), *blocks),
        "r_bias": jnp.zeros(E),
        "w_i": block_weight(next(keys), *blocks),
        "i_bias": jnp.zeros(E),
        "Lambda": jnp.log(jnp.expm1(rate)),
        "w_out": weight(next(keys), E, cfg.width),
        "out_bias": jnp.zeros(cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.E)),
        conv=conv_state(batch, cfg.conv, cfg.E),
        started=jnp.zeros(batch, bool),
    )


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    """`sqrt(x)`, x >= 0, with a slope of at most `LARGEST_SLOPE`."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx / jnp.sqrt(jnp.maximum(4 * x, LARGEST_SLOPE**-2))


def _biased(x: Array, w: Array, bias: Array) -> Array:
    return dense(x, w) + bias.astype(x.dtype)


def _recurrence(params: Params, u: Array, first: Array) -> tuple[Array, Array]:
    """a and the gated input, `[..., E]`, from the convolved stream; `first [...]`: it starts a document."""
    u = u + params["conv_bias"].astype(u.dtype)
    r = jax.nn.sigmoid(wide(block_dense(u, params["w_r"])) + params["r_bias"])
    i = jax.nn.sigmoid(wide(block_dense(u, params["w_i"])) + params["i_bias"])
    log_a = -C * r * jax.nn.softplus(params["Lambda"])
    scale = jnp.where(first[..., None], 1, _sqrt(-jnp.expm1(2 * log_a)))
    return jnp.exp(log_a), scale * i * wide(u)


def _output(params: Params, x: Array, h: Array) -> Array:
    gate = jax.nn.gelu(_biased(x, params["w_gate"], params["gate_bias"]))
    return _biased(h.astype(x.dtype) * gate, params["w_out"], params["out_bias"])


def _first(shape: tuple[int, int], started: Array, segment_ids: Array | None) -> Array:
    """`[B, T]`: the tokens before which there is no state."""
    started = sequence.passed(started, jnp.ones_like(started), segment_ids)
    starts = jnp.zeros(shape, bool) if segment_ids is None else segment_starts(segment_ids)
    return jnp.concatenate([~started[:, None], starts[:, 1:]], 1)


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    u = _biased(x, params["w_x"], params["x_bias"])
    u, conv = short_conv(u, params["conv"], state.conv, segment_ids=segment_ids)
    first = _first(x.shape[:2], state.started, segment_ids)
    h, memory = diagonal_scan(
        *_recurrence(params, u, first), state.memory, segment_ids=segment_ids, implementation=implementation
    )
    return _output(params, x, h), State(memory, conv, jnp.ones_like(state.started)), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    u = _biased(x_t, params["w_x"], params["x_bias"])
    u, conv = short_conv_step(u, params["conv"], state.conv)
    memory = diagonal_scan_step(*_recurrence(params, u, ~state.started), state.memory)
    return _output(params, x_t, memory), State(memory, conv, jnp.ones_like(state.started))
