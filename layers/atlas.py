"""OmegaNet and ATLAS: a test-time memory that learns a window of tokens at a time.

Per head, with q, k, v = silu(conv(W x)), q and k of unit length, polynomial features phi and M a network with
weights W,

    S_t = eta_t S_{t-1} - theta_t sum_{t-c < i <= t} gamma_i grad |M(phi(k_i); W_c) - v_i|^2     Omega rule
    W_t = (1 - alpha_t) W_{t-1} + mu_t orthogonalize(S_t)                                        W_0 learned
    o_t = M(phi(q_t); W_t),      y_t = W_out( RMSNorm_head(o_t) * silu(W_gate x_t) )

    phi(x) = (a_0, a_1 x, a_2 x (x) x, ...) up to `degree`, a_i learned, a_i^2 = 1/i! at first

alpha, eta, theta, gamma, mu are sigmoids of projections of x_t, theta scaled as in `titans`, mu by
`step_size` and gamma by 1 / window (it is 1 with a window of 1). orthogonalize is five Newton-Schulz steps
on S_t / sqrt(|S_t|^2 + s^2), s being `floor` times the largest |S_t|. Without `muon` W_t receives S_t itself,
which is OmegaNet, and Titans on phi when the window is 1. W_c are the weights at the start of the token's
chunk, which counts from the start of the document and is part of the model; 1 is the paper's recurrence. The
window's gradients of earlier chunks are taken there too.

Why s, and which Newton-Schulz steps. Where the memory knows its window S_t is small, and dividing by |S_t|
gives a step of full size with a slope of 1 / |S_t|: W jumps about the minimum, and chunks expand a difference
between two W. Muon's coefficients bring a slope of 485 besides, and a polynomial that falls in places.
Gradients then grow exponentially in T. Depth 1, no window or more forgetting change the rate only. With s a
slope is bounded, and what decides is mu * chunk * slope / s. The classical step 1.5 x - 0.5 x x^T x has slope
7.6 after five and never falls; it is also the one that converges to the nearest semi-orthogonal matrix.

    |gradient| after T tokens            classical                    muon
    (width 8, 2 heads, mu < 0.05)        floor 1     floor 1e-6       floor 1     floor 1e-6
    T = 256                              1.4         1.3              1.8         2.8
    T = 4,096                            1.3         7e3              9e7         6e17
    T = 65,536                           1.3

With theta, gamma and mu all near their largest it is 1 at 4,096 and 16 at 16,384 tokens; 2e19 at 4,096 if
`step_size` is 0.1. A longer chunk wants a smaller `step_size`.

Source: Behrouz et al. 2025 (arXiv 2505.23735): the Omega rule, polynomial features, OmegaNet and ATLAS. Ours:
the range of mu, because what is orthogonal has lost its size; `floor` and the classical coefficients
(newton_schulz="muon" and a floor of 1e-6 give Muon's step, for short documents); c; biases of gates; `clip`,
as in titans; and the monomials of degree 2 each once (off the diagonal times sqrt 2, which leaves
phi(q) . phi(k) the same).
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from layers.checks import require, require_above_zero, require_choice, require_divides, require_positive
from layers.common import Params, conv_init, conv_state, convolved, convolved_step, dense, weight, wide
from layers.heads import gated_output, unit_thirds
from layers.memories import gate_logits, initial_memory, initial_memory_init, memory_gates, memory_gates_init
from pallas_kernels.memory_update import (
    NEWTON_SCHULZ,
    Memory,
    empty_memory,
    flops_per_token,
    memory_update,
    memory_update_step,
)


@dataclass(frozen=True)
class Config:
    """Raises ValueError for sizes that do not fit together, or a degree that is not 1 or 2."""

    width: int
    heads: int = 4
    degree: int = 2  # of the features
    window: int = 8  # c, tokens whose gradients enter a write
    chunk: int = 16  # tokens whose gradients are taken at the same weights
    depth: int = 2  # matrices of the memory
    expand: int = 2  # hidden width of the memory / (width / heads)
    muon: bool = False  # orthogonal steps: ATLAS
    newton_schulz: str = "classical"  # with muon: coefficients, or "muon"
    step_size: float = 0.05  # largest mu, with muon
    floor: float = 1.0  # of |S|, where a step divides by it, / the largest that |S| can be
    max_rate: float = 0.3  # theta_max
    clip: float | None = 1.0
    conv: int = 4  # taps of the short convolution on q, k, v; 0 for none

    def __post_init__(self):
        require_positive(self, "width", "heads", "degree", "window", "chunk", "depth", "expand")
        require_divides(self, "heads", "width")
        require_choice(self, "newton_schulz", tuple(NEWTON_SCHULZ))
        require(self.degree <= 2, f"atlas: degree={self.degree} must be 1 or 2")
        require_above_zero(self, "step_size", "floor", "max_rate")
        require(self.clip is None or self.clip > 0, f"atlas: clip={self.clip} must be > 0 or None")
        require(self.conv >= 0, f"atlas: conv={self.conv} must be >= 0")

    @property
    def D(self) -> int:
        return self.width // self.heads

    @property
    def features(self) -> int:
        return 1 + self.D + (self.degree == 2) * self.D * (self.D + 1) // 2

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(H, in, out) of each inner matrix."""
        widths = [self.features, *[self.expand * self.D] * (self.depth - 1), self.D]
        return [(self.heads, i, o) for i, o in pairwise(widths)]

    @property
    def rule(self) -> dict:
        """What the op has to know besides arrays."""
        largest = self.max_rate * (self.clip or 1.0)
        return {
            "chunk": self.chunk,
            "clip": self.clip,
            "window": self.window,
            "newton_schulz": self.newton_schulz,
            "floor": self.floor * largest,
        }

    @property
    def gates(self) -> tuple[str, ...]:
        """Those that `memory_gates` does not have."""
        return ("gain",) * (self.window > 1) + ("step",) * self.muon

    def state_bytes(self) -> int:
        """`4 (3 P + (c - 1) H (F + D + 1) + (conv - 1) 3 H D + 1)`, P inner weights and F features."""
        inner = sum(h * i * o for h, i, o in self.shapes)
        past = (self.window - 1) * self.heads * (self.features + self.D + 1)
        return 4 * (3 * inner + past + max(self.conv - 1, 0) * 3 * self.width + 1)

    def flops_per_token(self, length: int) -> int:
        gates = (3 + len(self.gates)) * self.heads
        projections = self.width * (5 * self.width + gates + 3 * self.conv)
        mix = flops_per_token(
            length,
            self.shapes,
            self.chunk,
            momentum=True,
            window=self.window,
            orthogonal=self.newton_schulz if self.muon else None,
        )
        return 2 * projections + mix


@struct.dataclass
class State:
    memory: Memory  # inner weights less their initial values, momentum, phase, the window's tokens
    conv: Array  # [B, conv - 1, 3 D]


def init(key: Array, cfg: Config) -> Params:
    """Projections and initial memory with unit gain; gates as `memory_gates_init` says, the others 1/2."""
    keys = iter(jax.random.split(key, 7 + cfg.depth))
    params = {
        "w_qkv": weight(next(keys), cfg.width, 3 * cfg.width),
        "w_gate": weight(next(keys), cfg.width, cfg.width),
        "w_out": weight(next(keys), cfg.width, cfg.width),
        "norm_scale": jnp.ones(cfg.D),
        "coefficients": jnp.array([1.0, 1.0, np.sqrt(0.5)][: cfg.degree + 1]),
        **memory_gates_init(next(keys), cfg.width, cfg.heads),
    }
    for name in cfg.gates:
        params[f"w_{name}"] = weight(next(keys), cfg.width, cfg.heads)
        params[f"{name}_bias"] = jnp.zeros(cfg.heads)
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, 3 * cfg.width)
    return params | initial_memory_init(keys, cfg.shapes)


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=empty_memory(cfg.shapes, batch, window=cfg.window),
        conv=conv_state(batch, cfg.conv, 3 * cfg.width),
    )


def _features(params: Params, cfg: Config, x: Array) -> Array:
    """phi: `[..., D] -> [..., F]`, at least float32."""
    x, a = wide(x), params["coefficients"]
    parts = [jnp.broadcast_to(a[0], (*x.shape[:-1], 1)), a[1] * x]
    if cfg.degree == 2:
        i, j = np.triu_indices(cfg.D)
        parts.append(a[2] * np.where(i == j, 1.0, np.sqrt(2.0)).astype(x.dtype) * x[..., i] * x[..., j])
    return jnp.concatenate([p.astype(x.dtype) for p in parts], -1)


def _streams(params: Params, cfg: Config, qkv: Array) -> tuple[Array, Array, Array]:
    """phi of q and k of unit length `[..., H, F]`, and v `[..., H, D]`."""
    q, k, v = unit_thirds(qkv, cfg.heads)
    return _features(params, cfg, q), _features(params, cfg, k), v


def _more(params: Params, cfg: Config, x: Array) -> dict:
    """gamma and mu, where the rule has them; `[..., H]`."""

    def gate(name: str, largest: float) -> Array:
        return largest * jax.nn.sigmoid(gate_logits(params, name, x))

    return {
        "gain": gate("gain", 1 / cfg.window) if cfg.window > 1 else None,
        "orthogonal": gate("step", cfg.step_size) if cfg.muon else None,
    }


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
        *_streams(params, cfg, qkv),
        *memory_gates(params, x, cfg.max_rate),
        None if state is None else state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
        **_more(params, cfg, x),
        **cfg.rule,
    )
    return _output(params, x, o), State(memory=memory, conv=conv), {"surprise": jnp.mean(surprise) / cfg.D}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    (o, _), memory = memory_update_step(
        initial_memory(params, cfg.depth),
        *_streams(params, cfg, qkv),
        *memory_gates(params, x_t, cfg.max_rate),
        state.memory,
        **_more(params, cfg, x_t),
        **cfg.rule,
    )
    return _output(params, x_t, o), State(memory=memory, conv=conv)
