"""Parts that several layers share: projections, norms, short convolutions, rotary positions, checks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
    """The empty window of a short convolution: `[B, taps-1, channels]`."""
    return jnp.zeros((batch, taps - 1, channels))


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


def state_space_output(params: Params, x: Array, y: Array) -> Array:
    """The block around a state space: `GLU(W_out gelu(y + D x))`, w_out `[D, 2D]`, in x's dtype."""
    y = jax.nn.gelu((wide(y) + params["D"] * wide(x)).astype(x.dtype), approximate=False)
    value, gate = jnp.split(dense(y, params["w_out"]), 2, -1)
    return value * jax.nn.sigmoid(gate)


def dt_bias_init(key: Array, shape: tuple[int, ...], low: float = 1e-3, high: float = 1e-1) -> Array:
    """b with softplus(b) log-uniform in [low, high] (Mamba, arXiv 2312.00752 sec. 3.6)."""
    dt = jnp.maximum(jnp.exp(log_uniform(key, shape, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def rotary(x: Array, position: Array, base: float = 10000.0) -> Array:
    """Rotate the pairs (i, i + D/2) of the last axis by `position * base^(-2i/D)`.

    `x [..., H, D]`, `position [...]`. Su et al. 2021 (arXiv 2104.09864), half-split layout.
    """
    half = x.shape[-1] // 2
    y = wide(x)
    angle = position[..., None, None] * base ** (-jnp.arange(half, dtype=y.dtype) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = y[..., :half], y[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


__all__ = [
    "Params", "conv_init", "conv_state", "dense", "dense_heads", "dt_bias_init", "hippo_legs", "l2_norm",
    "log_uniform", "merge_heads", "require", "require_choice", "require_divides", "require_positive",
    "rms_norm", "rotary", "short_conv", "short_conv_step", "state_space_output", "weight", "wide",
]  # fmt: skip
