"""Mamba-2: a state space with one decay per head, which is gated linear attention (SSD).

With E = expand * width channels in H heads of width P, N states and B, C shared by the heads of each of G
groups,

    [z | x | B | C | dt] = W_in u                   E, E, G N, G N and H columns
    [x | B | C] = silu(conv([x | B | C]) + b_conv)
    dt = softplus(dt + b_dt),      A = -exp(A_log)                  per head
    S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + D x_t,    S in R^{N x P} per head
    out = W_out( RMSNorm_group(y * silu(z)) )

that is keys B, values dt x, queries C (not scaled) and log decay dt A. The gate comes before the norm, and
each group of E / G channels is normalised by itself; with G = 1 that is all of them. dt is at least `dt_min`.

Source: Dao & Gu 2024 (arXiv 2405.21060), sec. 6 and 7 (block, heads, groups; chunkwise algorithm).
A starts uniform in -[1, 16], softplus(b_dt) log-uniform in [1e-3, 1e-1], D = 1 per head. The order of gate
and norm, and the norm by groups, are those of the published models.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_expanded_heads, require_not_negative, require_positive
from layers.common import Params, conv_init, conv_state, dense, rms_norm, weight, wide
from layers.fields import later
from layers.heads import ExpandedHeads, merge_heads
from layers.state_spaces import dt_bias_init
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)
from pallas_kernels.short_conv import short_conv, short_conv_step


@dataclass(frozen=True)
class Config(ExpandedHeads):
    """Raises ValueError for sizes below 1 or that do not divide each other."""

    sequence_way = "scan"

    width: int
    expand: int = 2
    head_dim: int | None = None  # P; default the largest power of two up to 64 that divides E
    state_dim: int = 128  # N
    groups: int = 1  # G pairs of B and C
    conv: int = 4  # taps of the short convolution
    eps: float = later(1e-5)  # of the norm
    dt_min: float = later(0.0)

    def __post_init__(self):
        require_expanded_heads(self)
        require_positive(self, "state_dim", "groups", "conv")
        require_not_negative(self, "dt_min")
        require(
            self.heads % self.groups == 0,
            f"mamba2: groups={self.groups} does not divide the {self.heads} heads",
        )

    @property
    def stream(self) -> int:
        """Channels of x, B and C together, those of the convolution."""
        return self.channels + 2 * self.groups * self.state_dim

    def state_bytes(self) -> int:
        """`4 (E N + (conv - 1)(E + 2 G N))`."""
        return 4 * (self.channels * self.state_dim + (self.conv - 1) * self.stream)

    def flops_per_token(self, length: int) -> int:
        projections = self.width * (2 * self.channels + self.stream + self.heads) + self.conv * self.stream
        sizes = self.heads, self.state_dim, self.P
        mix = flops_per_token(length, *sizes, channels=False, key_heads=self.groups)
        return 2 * projections + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, N, P]
    conv: Array  # [B, conv - 1, E + 2 G N]


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; matrices with unit-variance outputs."""
    keys = iter(jax.random.split(key, 6))
    return {
        "w_in": weight(next(keys), cfg.width, cfg.channels + cfg.stream + cfg.heads),
        "conv": conv_init(next(keys), cfg.conv, cfg.stream),
        "conv_bias": jax.random.uniform(next(keys), (cfg.stream,), minval=-1, maxval=1) * cfg.conv**-0.5,
        "dt_bias": dt_bias_init(next(keys), (cfg.heads,)),
        "A_log": jnp.log(jax.random.uniform(next(keys), (cfg.heads,), minval=1.0, maxval=16.0)),
        "D": jnp.ones(cfg.heads),
        "norm_scale": jnp.ones(cfg.channels),
        "w_out": weight(next(keys), cfg.channels, cfg.width),
    }


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.state_dim, cfg.P)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _project(params: Params, cfg: Config, u: Array) -> tuple[Array, Array, Array]:
    """The gate z `[..., E]`, the stream `[..., E + 2GN]` before its convolution and dt `[..., H]`."""
    z, stream, dt = jnp.split(dense(u, params["w_in"]), [cfg.channels, cfg.channels + cfg.stream], -1)
    dt = jax.nn.softplus(wide(dt) + params["dt_bias"])
    return z, stream, jnp.maximum(dt, cfg.dt_min) if cfg.dt_min else dt


def _heads(params: Params, cfg: Config, stream: Array) -> tuple[Array, Array, Array]:
    """C and B `[..., G, N]` and x `[..., H, P]` from the convolved stream; x at least float32."""
    stream = jax.nn.silu(stream + params["conv_bias"].astype(stream.dtype))
    x, b, c = jnp.split(stream, [cfg.channels, cfg.channels + cfg.groups * cfg.state_dim], -1)
    b, c = (m.reshape(*m.shape[:-1], cfg.groups, cfg.state_dim) for m in (b, c))
    return c, b, wide(x.reshape(*x.shape[:-1], cfg.heads, cfg.P))


def _output(params: Params, cfg: Config, u: Array, y: Array, x: Array, z: Array) -> Array:
    """Skip, gate, norm by groups and projection of the read `y [..., H, P]`."""
    y = merge_heads(y + params["D"][:, None] * x) * jax.nn.silu(wide(z))
    grouped = y.reshape(*y.shape[:-1], cfg.groups, -1)
    normed = merge_heads(rms_norm(grouped, eps=cfg.eps)) * params["norm_scale"]
    return dense(normed.astype(u.dtype), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    z, stream, dt = _project(params, cfg, x)
    stream, conv = short_conv(stream, params["conv"], state.conv, segment_ids=segment_ids)
    c, b, values = _heads(params, cfg, stream)
    y, memory = gated_linear_attention(
        c,
        b,
        dt[..., None] * values,
        -jnp.exp(params["A_log"]) * dt,
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, cfg, x, y, values, z), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    z, stream, dt = _project(params, cfg, x_t)
    stream, conv = short_conv_step(stream, params["conv"], state.conv)
    c, b, values = _heads(params, cfg, stream)
    y, memory = gated_linear_attention_step(
        c, b, dt[..., None] * values, -jnp.exp(params["A_log"]) * dt, state.memory
    )
    return _output(params, cfg, x_t, y, values, z), State(memory=memory, conv=conv)
