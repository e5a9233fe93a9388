"""Heads: their widths, splitting and merging, block-diagonal maps, unit queries and keys, the gated read."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import Params, dense, l2_norm, rms_norm, rotary, wide


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


def split_heads(x: Array, heads: int) -> Array:
    """`[..., H*V] -> [..., H, V]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Array) -> Array:
    """`[..., H, V] -> [..., H*V]`."""
    return x.reshape(*x.shape[:-2], -1)


def dense_heads(x: Array, w: Array, heads: int) -> Array:
    """`x @ w` split into heads: `[..., D] -> [..., H, D_out/H]`."""
    y = dense(x, w)
    return y.reshape(*y.shape[:-1], heads, -1)


def block_dense(x: Array, w: Array) -> Array:
    """`x @ diag(w_1 .. w_H)` in x's dtype: `x [..., H K]`, `w [H, K, V]` -> `[..., H V]`."""
    heads = x.reshape(*x.shape[:-1], *w.shape[:2])
    return merge_heads(jnp.einsum("...hk,hkv->...hv", heads, w.astype(x.dtype)))


def block_weight(key: Array, blocks: int, fan_in: int, fan_out: int) -> Array:
    """`[H, K, V]` for `block_dense`, normal with standard deviation `1 / sqrt(K)`."""
    return jax.random.normal(key, (blocks, fan_in, fan_out)) * fan_in**-0.5


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


def rotary_thirds(qkv: Array, heads: int, position: Array, base: float | None) -> tuple[Array, Array, Array]:
    """`[..., 3HD]` as rotated q over sqrt(D), rotated k, and v, `[..., H, D]`; no rotation for base None."""
    q, k, v = (split_heads(x, heads) for x in jnp.split(qkv, 3, -1))
    return rotary(q * q.shape[-1] ** -0.5, position, base), rotary(k, position, base), v


def gated_output(params: Params, o: Array, gate: Array, eps: float = 1e-5) -> Array:
    """`W_out( RMSNorm_head(o) * gate )` for a read `o [..., H, V]` and `gate [..., H V]`, in gate's dtype."""
    o = merge_heads(rms_norm(o, params["norm_scale"], eps)).astype(gate.dtype)
    return dense(o * gate, params["w_out"])
