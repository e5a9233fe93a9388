"""The inner network entry by entry, on stacks of tiles (see `gpu_tiles`): values and gradients of two orders.

Derived by hand: Mosaic GPU does not lower `add_any`, which every `jax.vjp` of a value used twice makes.
Activations are x sigma(p(x)), for silu with p = x, for gelu with twice the argument of its tanh: an
approximate tanh of the chip would be good to 3 digits, its exponential is good to 7.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gpu_math import BLOCK, across
from pallas_kernels.memory_update.gpu_tiles import Network, Stack, sums

CUBIC, GELU = 0.044715, 2 * math.sqrt(2 / math.pi)


def _gate(x: Array, kind: str) -> tuple[Array, Array | float, Array | float]:
    """sigma(p), p', p''."""
    if kind == "silu":
        return 1 / (1 + jnp.exp(-x)), 1.0, 0.0
    p = GELU * x * (1 + CUBIC * x * x)
    return 1 / (1 + jnp.exp(-p)), GELU * (1 + 3 * CUBIC * x * x), 6 * GELU * CUBIC * x


def activated(stack: Stack, network: Network) -> Stack:
    return [x * _gate(x, network.activation)[0] for x in stack]


def slopes(stack: Stack, network: Network) -> Stack:
    def slope(x):
        gate, first, _ = _gate(x, network.activation)
        return gate + x * gate * (1 - gate) * first

    return [slope(x) for x in stack]


def curvatures(stack: Stack, network: Network) -> Stack:
    def curvature(x):
        gate, first, second = _gate(x, network.activation)
        return gate * (1 - gate) * (2 * first + x * second + x * first * first * (1 - 2 * gate))

    return [curvature(x) for x in stack]


def _dot(a: Stack, b: Stack) -> Array:
    """Of every token, as a tile."""
    return across(sums([x * y for x, y in zip(a, b, strict=True)]))


def each(f, *stacks: Stack) -> Stack:
    return [f(*tiles) for tiles in zip(*stacks, strict=True)]


class Norm(NamedTuple):
    """Scale and bias of the network's LayerNorm, a tile each for 64 channels: the same in every column."""

    scale: Stack
    bias: Stack


class _Unit(NamedTuple):
    """z less its mean and of unit variance, and what it was multiplied with."""

    value: Stack
    inverse: Array


def _unit(z: Stack, network: Network) -> _Unit:
    assert network.norm_eps is not None
    size = 1 / (BLOCK * len(z))
    mean = across(sums(z)) * size
    z = [x - mean for x in z]
    inverse = lax.rsqrt(_dot(z, z) * size + network.norm_eps)
    return _Unit([x * inverse for x in z], inverse)


def _pull_unit(unit: _Unit, g: Stack) -> Stack:
    """The cotangent of z, from that of its unit; linear and symmetric."""
    size = 1 / (BLOCK * len(g))
    mean, along = across(sums(g)) * size, _dot(g, unit.value) * size
    return each(lambda g, u: unit.inverse * (g - mean - u * along), g, unit.value)


def head(z: Stack, x: Stack, norm: Norm | None, network: Network) -> Stack:
    """`[x +] [LayerNorm] z`."""
    if norm is not None:
        z = each(lambda u, s, b: u * s + b, _unit(z, network).value, norm.scale, norm.bias)
    return each(jnp.add, x, z) if network.residual else z


class Pulled(NamedTuple):
    """Cotangents: of z, of the network's output (that of x, if it is residual), of scale and bias."""

    z: Stack
    out: Stack
    scale: Stack
    bias: Stack


def pull_head(z: Stack, dout: Stack, norm: Norm | None, network: Network) -> Pulled:
    if norm is None:
        return Pulled(dout, dout, [], [])
    unit = _unit(z, network)
    dz = _pull_unit(unit, each(jnp.multiply, norm.scale, dout))
    return Pulled(dz, dout, each(jnp.multiply, unit.value, dout), dout)


def loss_gradient(z: Stack, k: Stack, v: Stack, norm: Norm | None, network: Network) -> tuple[Stack, Array]:
    """The gradient in z of |head(z, k) - v|^2, and this loss `[C]`."""
    error = each(jnp.subtract, head(z, k, norm, network), v)
    delta = [2 * e for e in error]
    if norm is not None:
        delta = _pull_unit(_unit(z, network), each(jnp.multiply, norm.scale, delta))
    return delta, sums([e * e for e in error])


def pull_loss_gradient(
    z: Stack, k: Stack, v: Stack, norm: Norm | None, network: Network, c: Stack, dloss: Array
) -> Pulled:
    """Cotangents from `c`, that of the gradient, and from that of the loss, a tile; `out` is that of -v."""
    error = each(jnp.subtract, head(z, k, norm, network), v)
    if norm is None:
        dz = each(lambda c, e: 2 * (c + e * dloss), c, error)
        return Pulled(dz, dz, [], [])
    unit, size = _unit(z, network), 1 / (BLOCK * len(z))
    g = each(lambda s, e: 2 * s * e, norm.scale, error)
    dg = _pull_unit(unit, c)
    dout = each(lambda dg, s, e: 2 * (dg * s + e * dloss), dg, norm.scale, error)
    along_g, along_c = _dot(g, unit.value) * size, _dot(c, unit.value) * size
    dunit = each(
        lambda d, s, c, g: d * s - unit.inverse * (along_g * c + along_c * g), dout, norm.scale, c, g
    )
    shrink = (_dot(dunit, unit.value) + _dot(c, _pull_unit(unit, g))) * size
    dz = each(lambda d, u: unit.inverse * (d - u * shrink), dunit, unit.value)
    mean = across(sums(dz)) * size
    dscale = each(lambda dg, e, d, u: 2 * dg * e + d * u, dg, error, dout, unit.value)
    return Pulled([d - mean for d in dz], dout, dscale, dout)


def clipped(x: Stack, delta: Stack, network: Network) -> Stack:
    """`|x d^T| = |x| |d|` softly bounded."""
    if network.clip is None:
        return delta
    factor = lax.rsqrt(1 + _dot(x, x) * _dot(delta, delta) * network.clip**-2)
    return [d * factor for d in delta]


def pull_clipped(x: Stack, delta: Stack, c: Stack, network: Network) -> tuple[Stack, Stack]:
    """Cotangents of delta, and of x beyond what it has otherwise, where there is a clip."""
    assert network.clip is not None
    xx, dd = _dot(x, x), _dot(delta, delta)
    factor = lax.rsqrt(1 + xx * dd * network.clip**-2)
    common = factor**3 * _dot(c, delta) * network.clip**-2
    dx = [-x * dd * common for x in x]
    return each(lambda c, d: factor * c - d * xx * common, c, delta), dx
