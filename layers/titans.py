"""Titans' neural long-term memory: a small network per head, trained on the stream while it is read.

With q, k, v = silu(conv(W x)), q and k of unit length, M a network with weights W, and per head

    alpha_t = sigmoid(w_alpha x_t + b_alpha)         forgetting
    eta_t   = sigmoid(w_eta x_t + b_eta)             momentum of the surprise
    theta_t = theta_max (1 - eta_t) sigmoid(w_theta x_t + b_theta)     step size

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t; W_c) - v_t|^2        S_0 = 0
    W_t = (1 - alpha_t) W_{t-1} + S_t                               W_0 learned
    o_t = M(q_t; W_t),      y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

W_c are the weights at the start of the token's chunk. The paper writes the gradient at W_{t-1}, which is
chunk = 1; its parallel form takes them at the start of longer chunks, so `chunk` is part of the model and not
a matter of speed. It counts from the start of the document. With `gradients="document"` they are all taken at
W_0 instead, as some public code does, and the memory is linear in its writes over the whole document.

Source: Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) eq. 8-15, sec. 3.2 (chunks) and 4.4 (convolution,
norm and gate). The paper leaves open W_0, the form and range of theta, the biases of the gates, the width of
M and the chunk. Three choices of ours keep a memory of two layers alive and the gradient through many chunks
finite, which steps of any length do not: the factor 1 - eta_t (a gradient moves W by theta_max in all,
however long it echoes in S); `clip`, a soft bound on the norm of one token's gradient per matrix,
g / sqrt(1 + |g|^2 / clip^2) (None: the bare rule); and slow forgetting at the start, because forgetting pulls
W to 0, where every gradient of a deep M vanishes.
"""

from dataclasses import dataclass
from itertools import pairwise

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
from layers.memories import initial_memory, initial_memory_init, memory_gates, memory_gates_init
from pallas_kernels.memory_update import (
    ACTIVATIONS,
    Memory,
    empty_memory,
    flops_per_token,
    memory_update,
    memory_update_step,
)

GRADIENTS = ("chunk", "document")


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together or an unknown activation."""

    width: int
    heads: int = 4
    head_dim: int | None = None  # width of q, k, v per head; default width / heads
    depth: int = 2  # matrices of the inner network; 1 is a linear memory
    expand: int = 2  # hidden width of the inner network / head_dim
    gradients: str = "chunk"  # taken at the weights of the chunk's start, or of the document's
    chunk: int = 16  # tokens whose gradients are taken at the same weights, with gradients="chunk"
    momentum: bool = True
    activation: str = "silu"
    residual: bool = False  # the inner network is x + MLP(x)
    max_rate: float = 0.3  # theta_max
    clip: float | None = 1.0
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "heads", "depth", "expand", "chunk")
        if self.head_dim is None:
            require_divides(self, "heads", "width")
        require(self.D >= 1, f"titans: head_dim={self.head_dim} must be >= 1")
        require_above_zero(self, "max_rate")
        require(self.clip is None or self.clip > 0, f"titans: clip={self.clip} must be > 0 or None")
        require_not_negative(self, "conv")
        require_choice(self, "activation", tuple(ACTIVATIONS))
        require_choice(self, "gradients", GRADIENTS)

    @property
    def D(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(H, in, out) of each inner matrix."""
        hidden = [self.expand * self.D] * (self.depth - 1)
        widths = [self.D, *hidden, self.D]
        return [(self.heads, i, o) for i, o in pairwise(widths)]

    @property
    def rule(self) -> dict:
        """What the op has to know besides arrays."""
        return {
            "chunk": self.chunk if self.gradients == "chunk" else None,
            "activation": self.activation,
            "residual": self.residual,
            "clip": self.clip,
        }

    def state_bytes(self) -> int:
        """`4 ((2 + momentum) P + (conv - 1) 3 H D + 1)`, P the number of inner weights of all heads."""
        inner = sum(h * i * o for h, i, o in self.shapes)
        window = max(self.conv - 1, 0) * 3 * self.heads * self.D
        return 4 * ((2 + self.momentum) * inner + window + 1)

    def flops_per_token(self, length: int) -> int:
        stream = self.heads * self.D
        projections = self.width * (5 * stream + (2 + self.momentum) * self.heads) + 3 * self.conv * stream
        mix = flops_per_token(
            length,
            self.shapes,
            self.rule["chunk"],
            momentum=self.momentum,
            activation=self.activation,
        )
        return 2 * projections + mix


@struct.dataclass
class State:
    memory: Memory  # inner weights less their initial values, momentum, phase within the chunk
    conv: Array  # [B, conv - 1, 3 H D]


def init(key: Array, cfg: Config) -> Params:
    """Projections and initial memory with unit gain; gates as `memory_gates_init` says."""
    keys = iter(jax.random.split(key, 7 + cfg.depth))
    stream = cfg.heads * cfg.D
    params = {
        "w_qkv": weight(next(keys), cfg.width, 3 * stream),
        "w_gate": weight(next(keys), cfg.width, stream),
        "w_out": weight(next(keys), stream, cfg.width),
        "norm_scale": jnp.ones(cfg.D),
        **memory_gates_init(next(keys), cfg.width, cfg.heads, cfg.momentum),
    }
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, 3 * stream)
    return params | initial_memory_init(keys, cfg.shapes)


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=empty_memory(cfg.shapes, batch, momentum=cfg.momentum),
        conv=conv_state(batch, cfg.conv, 3 * cfg.heads * cfg.D),
    )


def _output(params: Params, x: Array, o: Array) -> Array:
    return gated_output(params, o, jax.nn.silu(dense(x, params["w_gate"])))


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, aux)`; see the package docstring for the contract.

    `aux["surprise"]` is the mean inner loss per channel of v.
    """
    window = (init_state(cfg, x.shape[0]) if state is None else state).conv
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), window, segment_ids)
    (o, surprise), memory = memory_update(
        initial_memory(params, cfg.depth),
        *unit_thirds(qkv, cfg.heads),
        *memory_gates(params, x, cfg.max_rate),
        None if state is None else state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
        **cfg.rule,
    )
    return _output(params, x, o), State(memory=memory, conv=conv), {"surprise": jnp.mean(surprise) / cfg.D}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    (o, _), memory = memory_update_step(
        initial_memory(params, cfg.depth),
        *unit_thirds(qkv, cfg.heads),
        *memory_gates(params, x_t, cfg.max_rate),
        state.memory,
        **cfg.rule,
    )
    return _output(params, x_t, o), State(memory=memory, conv=conv)
