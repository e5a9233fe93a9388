"""Parts that several layers share: projections, norms, short convolutions, rotary positions, token shift."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import sequence
from pallas_kernels.chunks import segment_starts
from pallas_kernels.short_conv import short_conv, short_conv_step

Params = dict


def weight(key: Array, fan_in: int, *shape: int, gain: float = 1.0) -> Array:
    """A `[fan_in, *shape]` matrix, normal with standard deviation `gain / sqrt(fan_in)`."""
    return jax.random.normal(key, (fan_in, *shape)) * (gain * fan_in**-0.5)


def dense(x: Array, w: Array) -> Array:
    """`x @ w` in x's dtype, over x's last axis; `w` may have any number of output axes."""
    return jnp.tensordot(x, w.astype(x.dtype), 1)


def low_rank(params: Params, name: str, x: Array, activation=lambda x: x) -> Array:
    """`activation(x @ w_down) @ w_up`, the matrices being `params["w_{name}_down"]` and `..._up`."""
    return dense(activation(dense(x, params[f"w_{name}_down"])), params[f"w_{name}_up"])


def adapter_init(key: Array, rank: int, fan_in: int, widths: dict[str, int]) -> Params:
    """Low-rank additions to matrices `[fan_in, width]`, by name: `w_{name}_down`, `w_{name}_up` (zeros)."""
    params: Params = {}
    for name, k in zip(widths, jax.random.split(key, len(widths)), strict=True):
        up = jnp.zeros((rank, widths[name]))
        params |= {f"w_{name}_down": weight(k, fan_in, rank), f"w_{name}_up": up}
    return params


def adapted(params: Params, names: Iterable[str], x: Array) -> Array:
    """What the additions of `adapter_init` make of x, side by side."""
    return jnp.concatenate([low_rank(params, name, x) for name in names], -1)


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


def positive(x: Array) -> Array:
    """`x + 1/2` where x >= 0, else `sigmoid(x)`: continuous, increasing, > 0."""
    return jnp.where(x >= 0, jnp.maximum(x, 0) + 0.5, jax.nn.sigmoid(x))


def orthogonal_gates(key: Array, size: int, gates: int) -> Array:
    """`[E, gates E]`: an orthogonal matrix for each gate of a recurrent cell."""
    make = jax.nn.initializers.orthogonal()
    return jnp.concatenate([make(k, (size, size)) for k in jax.random.split(key, gates)], 1)


def sinusoids(position: Array, width: int) -> Array:
    """Absolute positions, `[...] -> [..., D]`: sines in the first half of the channels, then cosines.

    Wavelengths go from 2 pi to almost 20,000 pi (Vaswani et al. 2017, arXiv 1706.03762, Section 3.5).
    """
    half = -(-width // 2)
    angle = position[..., None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :width]


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
    last = sequence.passed(last, x[:, -1], segment_ids)
    before = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], 1)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)
        before = jnp.where(starts.reshape(*starts.shape, *[1] * (x.ndim - 2)), 0, before)
    return before, x[:, -1].astype(last.dtype)
