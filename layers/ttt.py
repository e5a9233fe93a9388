"""Test-time training (TTT): the state is a small model per head, trained to reconstruct the stream.

With f the inner model, `f(x) = x W + b` or `f(x) = gelu(x W_1 + b_1) W_2 + b_2`, all its weights learned
initial values, and M(x) = x + LN(f(x)) with a learned scale and bias per head,

    l_j(W) = 1/2 |M(k_j; W) - v_j|^2                    reconstruct v - k by LN(f(k))
    W_i = W_c - s_i sum_{j <= i} r_j grad l_j(W_c)      over the tokens j of token i's mini-batch
    r_j = base_rate sigmoid(w x_j + b) / D,             s_i = max(1/(n+1) + tau_n, 0)
    z_i = M(q_i; W_i),    y_i = W_out( LN(z_i) * gelu(W_gate x_i) )

W_c are the weights at the start of the mini-batch of `chunk` tokens, which are those of the last token of the
one before; n counts the tokens in it, from the start of the document, and tau is learned. Note that s belongs
to the token that reads and r to the one that writes. q and k are one projection of x followed by a short
convolution each (no activation), then turned by rotary angles of n. With `conv=0` each has a projection,
as in the paper's Transformer backbone, which has no gate either (`gate=False`).

Source: Sun et al. 2024 (arXiv 2407.04620) sec. 2.1-2.7: the mini-batch and its dual form, the layer norm and
the residual of f, learned initial weights and rates; 16 tokens, base rates 1 and 0.1, MLP of width 4 D. The
factor s, the shared projection, the convolutions and the positions within the mini-batch are those of the
authors' code. Rotation pairs channel i with i + D/2 where theirs pairs neighbours: a permutation of channels.
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import (
    require,
    require_choice,
    require_divides,
    require_not_negative,
    require_positive,
    require_rotary,
)
from layers.common import (
    Params,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    layer_norm,
    rotary,
    weight,
)
from layers.heads import merge_heads, split_heads
from layers.memories import gate_logits, initial_memory
from pallas_kernels.attention import positions
from pallas_kernels.memory_update import (
    Memory,
    empty_memory,
    flops_per_token,
    memory_update,
    memory_update_step,
)

BASE_RATES = {"linear": 1.0, "mlp": 0.1}


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together or an unknown inner model."""

    width: int
    heads: int = 4
    inner: str = "linear"
    expand: int = 4  # hidden width of the inner MLP / D
    chunk: int = 16  # tokens of a mini-batch
    base_rate: float | None = None  # default 1 for the linear model, 0.1 for the MLP
    inner_norm: bool = True  # the LN of M
    rope_base: float | None = 10000.0  # None: no positions
    conv: int = 4  # taps of the short convolutions; 0: q and k have their own projections instead
    gate: bool = True

    def __post_init__(self):
        require_positive(self, "width", "heads", "expand", "chunk")
        require_divides(self, "heads", "width")
        require_choice(self, "inner", tuple(BASE_RATES))
        require(self.rate > 0, f"ttt: base_rate={self.base_rate} must be > 0")
        require_not_negative(self, "conv")
        require_rotary(self, self.D)

    @property
    def D(self) -> int:
        return self.width // self.heads

    @property
    def rate(self) -> float:
        return BASE_RATES[self.inner] if self.base_rate is None else self.base_rate

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(H, in + 1, out) of each inner matrix with its bias."""
        widths = [self.D, self.D] if self.inner == "linear" else [self.D, self.expand * self.D, self.D]
        return [(self.heads, i + 1, o) for i, o in pairwise(widths)]

    @property
    def rule(self) -> dict:
        """What the op has to know besides arrays."""
        return {"chunk": self.chunk, "activation": "gelu", "residual": True}

    def state_bytes(self) -> int:
        """`4 (2 P + (conv - 1) width + 1)`, P the number of inner weights and biases of all heads."""
        inner = sum(h * i * o for h, i, o in self.shapes)
        return 4 * (2 * inner + max(self.conv - 1, 0) * self.width + 1)

    def flops_per_token(self, length: int) -> int:
        matrices = 3 + (not self.conv) + self.gate
        projections = self.width * (matrices * self.width + self.heads + 2 * self.conv)
        mix = flops_per_token(
            length, self.shapes, self.chunk, momentum=False, activation="gelu", read_scale=True
        )
        return 2 * projections + mix


@struct.dataclass
class State:
    memory: Memory  # inner weights less their initial values, phase within the mini-batch
    conv: Array  # [B, conv - 1, D] the input of both convolutions


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs, inner weights of deviation 0.02, s = 1/(n+1)."""
    keys = iter(jax.random.split(key, 8 + len(cfg.shapes)))
    streams = 2 if cfg.conv else 3
    params = {
        "w_qkv": weight(next(keys), cfg.width, streams * cfg.width),
        "w_rate": 0.02 * jax.random.normal(next(keys), (cfg.width, cfg.heads)),
        "rate_bias": jnp.zeros(cfg.heads),
        "w_out": weight(next(keys), cfg.width, cfg.width),
        "read_offset": jnp.zeros(cfg.chunk),
        "norm_scale": jnp.ones(cfg.width),
        "norm_bias": jnp.zeros(cfg.width),
    }
    if cfg.inner_norm:
        params["inner_scale"] = jnp.ones((cfg.heads, cfg.D))
        params["inner_bias"] = jnp.zeros((cfg.heads, cfg.D))
    if cfg.conv:
        params["conv_q"] = conv_init(next(keys), cfg.conv, cfg.width)
        params["conv_k"] = conv_init(next(keys), cfg.conv, cfg.width)
    if cfg.gate:
        params["w_gate"] = weight(next(keys), cfg.width, cfg.width)
    for i, (heads, rows, columns) in enumerate(cfg.shapes):
        matrix = 0.02 * jax.random.normal(next(keys), (heads, rows - 1, columns))
        params[f"memory_{i}"] = jnp.pad(matrix, ((0, 0), (0, 1), (0, 0)))  # the bias
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=empty_memory(cfg.shapes, batch, momentum=False),
        conv=conv_state(batch, cfg.conv, cfg.width),
    )


def _streams(cfg: Config, q: Array, k: Array, v: Array, phase: Array) -> tuple[Array, Array, Array]:
    """Heads `[..., H, D]`, q and k rotated by the place in the mini-batch."""
    q, k, v = (split_heads(x, cfg.heads) for x in (q, k, v))
    return rotary(q, phase, cfg.rope_base), rotary(k, phase, cfg.rope_base), v


def _rates(params: Params, cfg: Config, x: Array) -> tuple[Array, Array]:
    """The rate of each write, and the log of what is kept: all; `[..., H]`."""
    rate = jax.nn.sigmoid(gate_logits(params, "rate", x))
    # The op's loss is the square without the half.
    return rate * (0.5 * cfg.rate / cfg.D), jnp.zeros_like(rate)


def _more(params: Params, cfg: Config, phase: Array) -> dict:
    """The inner norm, and the factor s of each read `[..., H]`."""
    scale = jnp.maximum(1 / (phase + 1.0) + params["read_offset"][phase], 0)
    norm = (params["inner_scale"], params["inner_bias"]) if cfg.inner_norm else None
    return {"norm": norm, "read_scale": jnp.broadcast_to(scale[..., None], (*scale.shape, cfg.heads))}


def _output(params: Params, cfg: Config, x: Array, z: Array) -> Array:
    z = layer_norm(merge_heads(z), params["norm_scale"], params["norm_bias"], eps=1e-6)
    return dense(z * jax.nn.gelu(dense(x, params["w_gate"])) if cfg.gate else z, params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; see the package docstring for the contract.

    `aux["surprise"]` is the mean inner loss per channel of v.
    """
    *qk, v = jnp.split(dense(x, params["w_qkv"]), 2 if cfg.conv else 3, -1)
    past = init_state(cfg, x.shape[0]) if state is None else state
    q, _ = convolved(params, cfg, qk[0], past.conv, segment_ids, "conv_q")
    k, conv = convolved(params, cfg, qk[-1], past.conv, segment_ids, "conv_k")
    phase = positions(past.memory.phase, segment_ids, x.shape[1]) % cfg.chunk
    (z, surprise), memory = memory_update(
        initial_memory(params, len(cfg.shapes)),
        *_streams(cfg, q, k, v, phase),
        *_rates(params, cfg, x),
        None,
        None if state is None else state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
        **_more(params, cfg, phase),
        **cfg.rule,
    )
    surprise = 0.5 * jnp.mean(surprise) / cfg.D
    return _output(params, cfg, x, z), State(memory=memory, conv=conv), {"surprise": surprise}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    *qk, v = jnp.split(dense(x_t, params["w_qkv"]), 2 if cfg.conv else 3, -1)
    q, _ = convolved_step(params, cfg, qk[0], state.conv, "conv_q")
    k, conv = convolved_step(params, cfg, qk[-1], state.conv, "conv_k")
    phase = state.memory.phase
    (z, _), memory = memory_update_step(
        initial_memory(params, len(cfg.shapes)),
        *_streams(cfg, q, k, v, phase),
        *_rates(params, cfg, x_t),
        None,
        state.memory,
        **_more(params, cfg, phase),
        **cfg.rule,
    )
    return _output(params, cfg, x_t, z), State(memory=memory, conv=conv)
