"""Large-chunk test-time training (LaCT): SwiGLU fast weights that take one step per chunk of tokens.

Per head, with q, k, v = silu(W x), q and k of unit length, and f(x; W) = (silu(x W_g) * (x W_u)) W_d,

    o_t = f(q_t; W_c)                                                  c: the chunk of token t
    S_c = sum_t r_t grad <f(k_t; W_c), v_t> + m_c S_{c-1}              over the tokens of the chunk
    W_{c+1} = rescale(W_c + mu orthogonalize(S_c))
    y_t = W_out( RMSNorm_head(o_t) * silu(w x_t) )                     one gate per head

r_t = softplus(w x_t + b), one rate per matrix and head; m_c is the mean of sigmoid(w x_t + b); orthogonalize
is five Newton-Schulz steps (Muon), and rescale gives every column (the weights into one unit) the norm it had
in the learned initial weights. A token reads the weights that earlier chunks have left: what is nearer is for
window attention in other layers. A chunk counts from the start of the document; one that is not full moves
nothing.

Source: Zhang et al. 2025 (arXiv 2505.23884): the dot-product loss, SwiGLU memory, read before update, Muon,
momentum and the weight norm, for language models. The state holds the sum of the gradients of the chunk's
tokens rather than the tokens, which is the same and does not grow with the chunk. Ours: the chunk, short for
small experiments, the hidden width E = `expand` D, and mu = `step_size`.

Why mu is not 1, as it is in the publication with chunks of 2,048 tokens and more: 0.1 moves the weights about
as far per token when a chunk has 256. rescale bounds weights and outputs whatever mu is; it does not bound
the gradient, because S_c depends on W_c and orthogonalize has a slope of up to 493 / |S_c| (the product of
its linear coefficients) where S_c has directions that hardly any token writes to. Steps of full size multiply
a difference between two W at every chunk, so what counts is how many chunks a document has.

    |gradient| with respect to W_g    chunk 256                chunk 16
    (width 32, 4 heads)               mu = 0.1    mu = 1       mu = 0.1    mu = 1
    T = 4,096                         10          22           25          7e19
    T = 65,536                        22          8e3

A document of a few dozen chunks may have the published step (step_size=1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.checks import require_above_zero, require_divides, require_positive
from layers.common import Params, dense, rms_norm, weight, wide
from layers.heads import merge_heads, split_heads, unit_thirds
from pallas_kernels.chunk_update import (
    FastWeights,
    chunk_update,
    chunk_update_step,
    empty_fast_weights,
    flops_per_token,
)

# Before training: r = 0.01, m = 0.5.
RATE = 0.01


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together."""

    width: int
    heads: int = 4
    expand: int = 2  # hidden width of the fast weights / (width / heads)
    chunk: int = 256
    momentum: bool = True
    muon: bool = True  # orthogonal steps
    step_size: float = 0.1  # singular values of an orthogonal step
    weight_norm: bool = True  # rescaled weights

    def __post_init__(self):
        require_positive(self, "width", "heads", "expand", "chunk")
        require_divides(self, "heads", "width")
        require_above_zero(self, "step_size")

    @property
    def D(self) -> int:
        return self.width // self.heads

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(H, in, out) of gate, up and down."""
        hidden = self.expand * self.D
        return [(self.heads, self.D, hidden)] * 2 + [(self.heads, hidden, self.D)]

    @property
    def rule(self) -> dict:
        """What the op has to know besides arrays."""
        return {
            "chunk": self.chunk,
            "orthogonal": self.muon,
            "step_size": self.step_size,
            "normalize": self.weight_norm,
        }

    def state_bytes(self) -> int:
        """`4 ((2 + momentum) P + momentum H + 1)`, P the number of fast weights of all heads."""
        fast = sum(h * i * o for h, i, o in self.shapes)
        return 4 * ((2 + self.momentum) * fast + self.momentum * self.heads + 1)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * (4 * self.width + (4 + self.momentum) * self.heads)
        return 2 * projections + flops_per_token(length, self.shapes, self.chunk, orthogonal=self.muon)


@struct.dataclass
class State:
    fast: FastWeights  # less their initial values; gradient and momentum of the chunk so far; phase


def init(key: Array, cfg: Config) -> Params:
    """Projections and fast weights with unit gain."""
    keys = iter(jax.random.split(key, 8))
    params = {
        "w_qkv": weight(next(keys), cfg.width, 3 * cfg.width),
        "w_out": weight(next(keys), cfg.width, cfg.width),
        "w_rate": weight(next(keys), cfg.width, 3 * cfg.heads),
        "rate_bias": jnp.full(3 * cfg.heads, np.log(np.expm1(RATE))),
        "w_gate": weight(next(keys), cfg.width, cfg.heads),
        "norm_scale": jnp.ones(cfg.D),
    }
    if cfg.momentum:
        params["w_momentum"] = weight(next(keys), cfg.width, cfg.heads)
        params["momentum_bias"] = jnp.zeros(cfg.heads)
    for name, shape in zip(("gate", "up", "down"), cfg.shapes, strict=True):
        params[f"memory_{name}"] = jax.random.normal(next(keys), shape) * shape[1] ** -0.5
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(fast=empty_fast_weights(cfg.shapes, batch, momentum=cfg.momentum))


def _arguments(params: Params, cfg: Config, x: Array) -> tuple:
    """Initial weights, q, k, v `[..., H, D]`, rates `[..., H, 3]` and momentum `[..., H]` or None."""
    initial = (params["memory_gate"], params["memory_up"], params["memory_down"])
    qkv = unit_thirds(dense(x, params["w_qkv"]), cfg.heads)
    rate = jax.nn.softplus(wide(dense(x, params["w_rate"])) + params["rate_bias"])
    momentum = None
    if cfg.momentum:
        momentum = jax.nn.sigmoid(wide(dense(x, params["w_momentum"])) + params["momentum_bias"])
    return initial, *qkv, split_heads(rate, cfg.heads), momentum


def _output(params: Params, x: Array, o: Array) -> Array:
    gate = jax.nn.silu(dense(x, params["w_gate"]))
    return dense(merge_heads(rms_norm(o, params["norm_scale"]) * gate[..., None]), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    o, fast = chunk_update(
        *_arguments(params, cfg, x),
        None if state is None else state.fast,
        segment_ids=segment_ids,
        implementation=implementation,
        **cfg.rule,
    )
    return _output(params, x, o), State(fast=fast), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    o, fast = chunk_update_step(*_arguments(params, cfg, x_t), state.fast, **cfg.rule)
    return _output(params, x_t, o), State(fast=fast)
