"""MIRAS: test-time memories that differ in the loss they are trained on and in how they retain.

The memory of each head is M(x) = x + LN(gelu(x W_1) W_2), and with e_t = M(k_t; W_c) - v_t, alpha the share
kept and eta the step size, both functions of the token,

    A_t = alpha_t A_{t-1} - eta_t grad loss(e_t)           A_0 learned
    W_t = retention(A_t),      o_t = M(q_t; W_t),      y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

    name      loss                                                       retention, of each matrix
    moneta    sum |e_i|^3                                                W = A / sqrt(|A|_4^4 + 1)
    yaad      |e|^2 where |e| <= delta_t, else delta_t sum |e_i|         W = A
    memora    |e|^2                                                      W = c softmax(A) by rows

W_c are the weights at the start of the token's chunk; the chunk counts from the start of the document and is
part of the model, 1 being the papers' recurrence. Reads are at W_t in every case. k and q are of unit length,
q, k, v = silu(conv(W x)), and alpha = sigmoid(w x + b), eta = eta_max sigmoid(w x + b),
delta = softplus(w x + b).

Source: Behrouz, Razaviyayn, Zhong, Mirrokni 2025 (arXiv 2504.13173) sec. 5: Moneta with (p, q) = (3, 4), Yaad
with the Huber loss and Memora with the KL divergence on the simplex, and the memory. In Memora
W_t = c softmax(alpha log W_{t-1} - eta grad): the normaliser of the logarithm shifts a whole row and cancels,
so A alone is carried. |e| is smoothed as sqrt(e^2 + 1e-6), which gives a smooth sign. Left open there and
chosen here: c, so that a row's mean weight is 1 / sqrt(in); the initial values; eta_max; gates per head; and
`clip`, the soft bound on one token's gradient that titans has too. Two more keep the gradient through many
chunks finite where forgetting has made A small: `norm_eps` in the LN of M, whose curvature grows as one over
the size of what it divides by, and the 1 in Moneta's retention, without which W grows as 1 / |A|. eta_max is
0.1: with 1, the gradient of Yaad's loss grew to 2e6 in 256 tokens and to 2e64 in 4,096.
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
    require_divides,
    require_not_negative,
    require_positive,
)
from layers.common import Params, conv_init, conv_state, convolved, convolved_step, dense, weight
from layers.heads import gated_output, unit_thirds
from layers.memories import gate_logits, initial_memory
from pallas_kernels.memory_update import (
    LOSSES,
    RETENTIONS,
    Memory,
    empty_memory,
    flops_per_token,
    memory_update,
    memory_update_step,
)

# Before training: eta = eta_max / 2, alpha = 0.9975, delta = 1.3.
KEEP_BIAS, THRESHOLD_BIAS = 6.0, 1.0


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together, or an unknown loss or retention."""

    width: int
    heads: int = 4
    loss: str = "cube"  # "square", "cube" or "huber"
    retention: str = "l4"  # "linear", "l4" or "softmax"
    expand: int = 4  # hidden width of the memory / (width / heads)
    chunk: int = 16  # tokens whose gradients are taken at the same weights
    max_rate: float = 0.1  # eta_max
    clip: float | None = 1.0
    norm_eps: float = 0.1  # of the memory's LN
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "heads", "expand", "chunk")
        require_divides(self, "heads", "width")
        require_choice(self, "loss", tuple(LOSSES))
        require_choice(self, "retention", tuple(RETENTIONS))
        require_above_zero(self, "max_rate", "norm_eps")
        require(self.clip is None or self.clip > 0, f"miras: clip={self.clip} must be > 0 or None")
        require_not_negative(self, "conv")

    @property
    def D(self) -> int:
        return self.width // self.heads

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(H, in, out) of both matrices of the memory."""
        return [(self.heads, self.D, self.expand * self.D), (self.heads, self.expand * self.D, self.D)]

    @property
    def gates(self) -> dict[str, float]:
        """Names and initial biases."""
        gates = {"rate": 0.0, "keep": KEEP_BIAS}
        return gates | ({"threshold": THRESHOLD_BIAS} if self.loss == "huber" else {})

    @property
    def rule(self) -> dict:
        """What the op has to know besides arrays."""
        return {
            "chunk": self.chunk,
            "activation": "gelu",
            "residual": True,
            "clip": self.clip,
            "loss": self.loss,
            "retention": self.retention,
            "norm_eps": self.norm_eps,
        }

    def state_bytes(self) -> int:
        """`4 (2 P + (conv - 1) 3 D + 1)`, P the number of weights of all heads' memories, D the width."""
        inner = sum(h * i * o for h, i, o in self.shapes)
        return 4 * (2 * inner + max(self.conv - 1, 0) * 3 * self.width + 1)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * (5 * self.width + len(self.gates) * self.heads + 3 * self.conv)
        mix = flops_per_token(
            length,
            self.shapes,
            self.chunk,
            momentum=False,
            activation="gelu",
            written_out=self.retention != "linear",
        )
        return 2 * projections + mix


@struct.dataclass
class State:
    memory: Memory  # A less its initial value, at the chunk's start and now; phase within the chunk
    conv: Array  # [B, conv - 1, 3 D]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit gain, A with unit gain (deviation 1 under the softmax); gates as above."""
    keys = iter(jax.random.split(key, 10))
    params = {
        "w_qkv": weight(next(keys), cfg.width, 3 * cfg.width),
        "w_gate": weight(next(keys), cfg.width, cfg.width),
        "w_out": weight(next(keys), cfg.width, cfg.width),
        "norm_scale": jnp.ones(cfg.D),
        "inner_scale": jnp.ones((cfg.heads, cfg.D)),
        "inner_bias": jnp.zeros((cfg.heads, cfg.D)),
    }
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, 3 * cfg.width)
    for name, bias in cfg.gates.items():
        params[f"w_{name}"] = weight(next(keys), cfg.width, cfg.heads)
        params[f"{name}_bias"] = jnp.full(cfg.heads, bias)
    for i, shape in enumerate(cfg.shapes):
        size = 1.0 if cfg.retention == "softmax" else shape[1] ** -0.5
        params[f"memory_{i}"] = jax.random.normal(next(keys), shape) * size
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=empty_memory(cfg.shapes, batch, momentum=False),
        conv=conv_state(batch, cfg.conv, 3 * cfg.width),
    )


def _gates(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, dict]:
    """eta, log alpha, and what else the rule wants; `[..., H]`."""
    logits = {name: gate_logits(params, name, x) for name in cfg.gates}
    threshold = jax.nn.softplus(logits["threshold"]) if "threshold" in logits else None
    more = {"threshold": threshold, "norm": (params["inner_scale"], params["inner_bias"])}
    return cfg.max_rate * jax.nn.sigmoid(logits["rate"]), jax.nn.log_sigmoid(logits["keep"]), more


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.silu(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; see the package docstring for the contract.

    `aux["surprise"]` is the mean inner loss per channel of v.
    """
    window = (init_state(cfg, x.shape[0]) if state is None else state).conv
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), window, segment_ids)
    rate, log_keep, more = _gates(params, cfg, x)
    (o, surprise), memory = memory_update(
        initial_memory(params, 2),
        *unit_thirds(qkv, cfg.heads),
        rate,
        log_keep,
        None,
        None if state is None else state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
        **more,
        **cfg.rule,
    )
    return _output(params, x, o), State(memory=memory, conv=conv), {"surprise": jnp.mean(surprise) / cfg.D}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    rate, log_keep, more = _gates(params, cfg, x_t)
    (o, _), memory = memory_update_step(
        initial_memory(params, 2),
        *unit_thirds(qkv, cfg.heads),
        rate,
        log_keep,
        None,
        state.memory,
        **more,
        **cfg.rule,
    )
    return _output(params, x_t, o), State(memory=memory, conv=conv)
