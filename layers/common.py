"""Parts that several layers share: projections, norms, short convolutions, rotary positions, checks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.chunks import segment_starts
from pallas_kernels.short_conv import short_conv, short_conv_step

Params = dict


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`: how every Config validates itself."""
    if not condition:
        raise ValueError(message)


def require_positive(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is an integer of at least 1."""
    for name in names:
        value = getattr(cfg, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(ok, f"{_layer(cfg)}: {name}={value!r} must be an integer >= 1")


def require_not_negative(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is at least 0."""
    for name in names:
        value = getattr(cfg, name)
        require(value >= 0, f"{_layer(cfg)}: {name}={value} must be >= 0")


def require_above_zero(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is a number > 0."""
    for name in names:
        value = getattr(cfg, name)
        require(value > 0, f"{_layer(cfg)}: {name}={value} must be > 0")


def require_divides(cfg: object, divisor: str, dividend: str) -> None:
    """Field `divisor` divides field `dividend`."""
    a, b = getattr(cfg, divisor), getattr(cfg, dividend)
    require(b % a == 0, f"{_layer(cfg)}: {divisor}={a} does not divide {dividend}={b}")


def require_choice(cfg: object, name: str, choices: tuple[str, ...]) -> None:
    """Field `name` is one of `choices`."""
    value = getattr(cfg, name)
    require(value in choices, f"{_layer(cfg)}: {name}={value!r}; choose from {', '.join(choices)}")


def _layer(cfg: object) -> str:
    return type(cfg).__module__.rsplit(".", 1)[-1]


def weight(key: Array, fan_in: int, *shape: int, gain: float = 1.0) -> Array:
    """A `[fan_in, *shape]` matrix, normal with standard deviation `gain / sqrt(fan_in)`."""
    return jax.random.normal(key, (fan_in, *shape)) * (gain * fan_in**-0.5)


def dense(x: Array, w: Array) -> Array:
    """`x @ w` in x's dtype, over x's last axis; `w` may have any number of output axes."""
    return jnp.tensordot(x, w.astype(x.dtype), 1)


def dense_heads(x: Array, w: Array, heads: int) -> Array:
    """`x @ w` split into heads: `[..., D] -> [..., H, D_out/H]`."""
    y = dense(x, w)
    return y.reshape(*y.shape[:-1], heads, -1)


def low_rank(params: Params, name: str, x: Array, activation=lambda x: x) -> Array:
    """`activation(x @ w_down) @ w_up`, the matrices being `params["w_{name}_down"]` and `..._up`."""
    return dense(activation(dense(x, params[f"w_{name}_down"])), params[f"w_{name}_up"])


def merge_heads(x: Array) -> Array:
    """`[..., H, V] -> [..., H*V]`."""
    return x.reshape(*x.shape[:-2], -1)


def wide(x: Array) -> Array:
    """At least float32: for gates, norms and states."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: Array, scale: Array | None = None, eps: float = 1e-5) -> Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, reduced in float32, in x's dtype."""
    y = wide(x)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


def l2_norm(x: Array, eps: float = 1e-6) -> Array:
    """`x / sqrt(sum(x^2) + eps)` over the last axis."""
    y = wide(x)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), -1, keepdims=True) + eps)).astype(x.dtype)


def conv_init(key: Array, taps: int, channels: int) -> Array:
    """Short-convolution filter `[taps, channels]`: uniform within 1/sqrt(taps)."""
    return jax.random.uniform(key, (taps, channels), minval=-1.0, maxval=1.0) * taps**-0.5


def conv_state(batch: int, taps: int, channels: int) -> Array:
    """The empty window of a short convolution: `[B, taps-1, channels]`, of length 0 for no taps."""
    return jnp.zeros((batch, max(taps - 1, 0), channels))


def convolved(
    params: Params,
    cfg: Any,
    x: Array,
    window: Array,
    segment_ids: Array | None = None,
    name: str = "conv",
) -> tuple[Array, Array]:
    """`x [B,T,D]` through the short convolution `params[name]`, and the window that it leaves behind.

    Where `cfg.conv` is 0 there is none, and both stay as they are.
    """
    if cfg.conv:
        return short_conv(x, params[name], window, segment_ids=segment_ids)
    return x, window


def convolved_step(
    params: Params, cfg: Any, x_t: Array, window: Array, name: str = "conv"
) -> tuple[Array, Array]:
    """One token of `convolved`."""
    return short_conv_step(x_t, params[name], window) if cfg.conv else (x_t, window)


def log_uniform(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Logarithms of numbers that are log-uniform in [low, high]."""
    return jax.random.uniform(key, shape, minval=np.log(low), maxval=np.log(high))


def hippo_legs(states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS as a diagonal minus a rank one: `(lam, P, B)`, each `[states/2]` complex128.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k; A + P P^T = -I/2 + (skew), P_n = sqrt(n + 1/2),
    is normal, hence V diag(lam) V* with a unitary V; P and B (B_n = sqrt(2n+1)) are returned in its basis,
    one of each conjugate pair. Gu et al. 2021 (arXiv 2111.00396) theorem 1 and appendix C.1.
    """
    n = np.arange(states)
    b = np.sqrt(2 * n + 1.0)
    p = b / np.sqrt(2)
    skew = np.outer(b, b) / 2 * (np.tri(states, k=-1).T - np.tri(states, k=-1))
    # i times a skew-symmetric matrix is Hermitian: real frequencies, orthonormal modes, in pairs +-w.
    frequency, modes = np.linalg.eigh(-1j * skew)
    upper = modes[:, frequency > 0].conj().T
    return -0.5 + 1j * frequency[frequency > 0], upper @ p, upper @ b


def dense_to_complex(x: Array, re: Array, im: Array) -> Array:
    """`x @ (re + i im)` for real x, at least complex64."""
    return jax.lax.complex(wide(dense(x, re)), wide(dense(x, im)))


def dense_to_real(h: Array, re: Array, im: Array) -> Array:
    """`Re(h @ (re + i im))` for complex h."""
    return dense(h.real, re) - dense(h.imag, im)


def block_dense(x: Array, w: Array) -> Array:
    """`x @ diag(w_1 .. w_H)` in x's dtype: `x [..., H K]`, `w [H, K, V]` -> `[..., H V]`."""
    heads = x.reshape(*x.shape[:-1], *w.shape[:2])
    return merge_heads(jnp.einsum("...hk,hkv->...hv", heads, w.astype(x.dtype)))


def block_weight(key: Array, blocks: int, fan_in: int, fan_out: int) -> Array:
    """`[H, K, V]` for `block_dense`, normal with standard deviation `1 / sqrt(K)`."""
    return jax.random.normal(key, (blocks, fan_in, fan_out)) * fan_in**-0.5


def positive(x: Array) -> Array:
    """`x + 1/2` where x >= 0, else `sigmoid(x)`: continuous, increasing, > 0."""
    return jnp.where(x >= 0, jnp.maximum(x, 0) + 0.5, jax.nn.sigmoid(x))


def orthogonal_gates(key: Array, size: int, gates: int) -> Array:
    """`[E, gates E]`: an orthogonal matrix for each gate of a recurrent cell."""
    make = jax.nn.initializers.orthogonal()
    return jnp.concatenate([make(k, (size, size)) for k in jax.random.split(key, gates)], 1)


def state_space_output(params: Params, x: Array, y: Array) -> Array:
    """The block around a state space: `GLU(W_out gelu(y + D x))`, w_out `[D, 2D]`, in x's dtype."""
    y = jax.nn.gelu((wide(y) + params["D"] * wide(x)).astype(x.dtype), approximate=False)
    value, gate = jnp.split(dense(y, params["w_out"]), 2, -1)
    return value * jax.nn.sigmoid(gate)


def dt_bias_init(key: Array, shape: tuple[int, ...], low: float = 1e-3, high: float = 1e-1) -> Array:
    """b with softplus(b) log-uniform in [low, high] (Mamba, arXiv 2312.00752 sec. 3.6)."""
    dt = jnp.maximum(jnp.exp(log_uniform(key, shape, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def rotate(x: Array, angle: Array) -> Array:
    """Turn the pairs (i, i + A) of the last axis by `angle [..., A]`; channels from 2 A on stay."""
    pairs = angle.shape[-1]
    y = wide(x)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = y[..., :pairs], y[..., pairs : 2 * pairs]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, y[..., 2 * pairs :]], -1).astype(x.dtype)


def rotary(x: Array, position: Array, base: float | None = 10000.0) -> Array:
    """Rotate the pairs (i, i + D/2) of the last axis by `position * base^(-2i/D)`; not at all for base None.

    `x [..., H, D]`, `position [...]`. Su et al. 2021 (arXiv 2104.09864), half-split layout.
    """
    if base is None:
        return x
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=wide(x).dtype) / half)
    return rotate(x, position[..., None, None] * frequency)


def require_head_dims(cfg: object) -> None:
    """`width`, `heads`, `key_dim` and `value_dim` are positive; the last two may be None, width / heads."""
    require_positive(cfg, "width", "heads")
    for name in ("key_dim", "value_dim"):
        if getattr(cfg, name) is None:
            require_divides(cfg, "heads", "width")
        else:
            require_positive(cfg, name)


class HeadDims:
    """Widths of keys and values per head of a Config with these fields: width / heads unless given."""

    width: int
    heads: int
    key_dim: int | None
    value_dim: int | None

    @property
    def K(self) -> int:
        return self.key_dim or self.width // self.heads

    @property
    def V(self) -> int:
        return self.value_dim or self.width // self.heads

    @property
    def stream(self) -> int:
        """Channels of q, k and v together."""
        return self.heads * (2 * self.K + self.V)


class ExpandedHeads:
    """Heads of a Config with these fields: E = expand * width channels in heads of width P."""

    width: int
    expand: int
    head_dim: int | None

    @property
    def channels(self) -> int:
        """E."""
        return self.expand * self.width

    @property
    def P(self) -> int:
        """By default the largest power of two up to 64 that divides E."""
        return math.gcd(64, self.channels) if self.head_dim is None else self.head_dim

    @property
    def heads(self) -> int:
        return self.channels // self.P


def require_expanded_heads(cfg: ExpandedHeads) -> None:
    """`width` and `expand` are positive; `head_dim` divides their product."""
    require_positive(cfg, "width", "expand")
    require(
        cfg.P >= 1 and cfg.channels % cfg.P == 0,
        f"{_layer(cfg)}: head_dim={cfg.head_dim} does not divide expand * width = {cfg.channels}",
    )


def split_heads(x: Array, heads: int) -> Array:
    """`[..., H*V] -> [..., H, V]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def unit_heads(qkv: Array, heads: int, key_dim: int) -> tuple[Array, Array, Array]:
    """SiLU, then `[..., 2HK + HV]` as q, k and v, `[..., H, K or V]`, q and k of length 1.

    q and k are at least float32: the delta rule's reflections are stable only as far as |k| = 1.
    """
    q, k, v = jnp.split(jax.nn.silu(qkv), [heads * key_dim, 2 * heads * key_dim], -1)
    q, k = (l2_norm(wide(split_heads(x, heads))) for x in (q, k))
    return q, k, split_heads(v, heads)


def unit_thirds(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """SiLU, then `[..., 3HD]` as q, k and v, `[..., H, D]`, q and k of length 1, in qkv's dtype."""
    q, k, v = (split_heads(x, heads) for x in jnp.split(jax.nn.silu(qkv), 3, -1))
    return l2_norm(q), l2_norm(k), v


def gated_output(params: Params, o: Array, gate: Array) -> Array:
    """`W_out( RMSNorm_head(o) * gate )` for a read `o [..., H, V]` and `gate [..., H V]`, in gate's dtype."""
    o = merge_heads(rms_norm(o, params["norm_scale"])).astype(gate.dtype)
    return dense(o * gate, params["w_out"])


def softplus_decay(logits: Array, A_log: Array, dt_bias: Array) -> Array:
    """The log decay `-exp(A_log) softplus(logits + dt_bias)`, at least float32."""
    return -jnp.exp(wide(A_log)) * jax.nn.softplus(wide(logits) + dt_bias)


def layer_norm(x: Array, scale: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis, reduced in float32, in x's dtype."""
    y = wide(x)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def token_shift(x: Array, last: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """Every token's predecessor in its document (0 for the first), and the new last token.

    `x [B,T,...]`; `last [B,...]` is the token before the first, 0 where there is none.
    """
    before = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], 1)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)
        before = jnp.where(starts.reshape(*starts.shape, *[1] * (x.ndim - 2)), 0, before)
    return before, x[:, -1].astype(last.dtype)


def memory_gates(params: Params, x: Array, max_rate: float) -> tuple[Array, Array, Array | None]:
    """Step size theta, log(1 - alpha) and log eta of a test-time memory, each `[..., H]`, at least float32.

    alpha = sigmoid(forget), eta = sigmoid(momentum), theta = max_rate (1 - eta) sigmoid(rate), each the
    logits `w_* x + *_bias`; eta = 0, and None instead of its log, without parameters of that name.
    """

    def logits(name: str) -> Array:
        return wide(dense(x, params[f"w_{name}"])) + params[f"{name}_bias"]

    rate = max_rate * jax.nn.sigmoid(logits("rate"))
    log_keep = jax.nn.log_sigmoid(-logits("forget"))
    if "w_momentum" not in params:
        return rate, log_keep, None
    momentum = logits("momentum")
    return rate * jax.nn.sigmoid(-momentum), log_keep, jax.nn.log_sigmoid(momentum)


def memory_gates_init(key: Array, width: int, heads: int, momentum: bool = True) -> Params:
    """Parameters of `memory_gates`: at first theta = max_rate (1 - eta) / 2, alpha = 0.0025, eta = 0.88."""
    biases = {"rate": 0.0, "forget": -6.0} | ({"momentum": 2.0} if momentum else {})
    params = {}
    for name, k in zip(biases, jax.random.split(key, len(biases)), strict=True):
        params[f"w_{name}"] = weight(k, width, heads)
        params[f"{name}_bias"] = jnp.full(heads, biases[name])
    return params


def require_sets(cfg: object) -> None:
    """`sets`, how many parameter sets the channels share, is None (one each) or divides `width`."""
    if getattr(cfg, "sets", None) is not None:
        require_positive(cfg, "sets")
        require_divides(cfg, "sets", "width")


def per_channel(x: Array, width: int) -> Array:
    """`[..., S, N] -> [..., D, N]`: channel d gets row d mod S."""
    return x if x.shape[-2] == width else jnp.tile(x, (width // x.shape[-2], 1))


__all__ = [
    "ExpandedHeads", "HeadDims", "Params", "block_dense", "block_weight", "conv_init", "conv_state",
    "convolved", "convolved_step", "dense", "dense_heads", "dense_to_complex", "dense_to_real",
    "dt_bias_init", "gated_output", "hippo_legs", "l2_norm", "layer_norm", "log_uniform", "low_rank",
    "memory_gates", "memory_gates_init", "merge_heads", "orthogonal_gates", "per_channel", "positive",
    "require", "require_above_zero", "require_choice", "require_divides", "require_expanded_heads",
    "require_head_dims", "require_not_negative", "require_positive", "require_sets", "rms_norm", "rotary",
    "rotate", "short_conv", "short_conv_step", "softplus_decay", "split_heads", "state_space_output",
    "token_shift", "unit_heads", "unit_thirds", "weight", "wide",
]  # fmt: skip
