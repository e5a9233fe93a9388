"""What kernels are measured on: named sizes, and arguments drawn from the ranges that layers live in.

Streams have the dtype of the case. Gates, and parameters of state spaces and memories, are float32: so layers
hand them over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from layers import titans

TAPS = 4  # of the short convolution


class Sizes(NamedTuple):
    """Batch, tokens, heads (0: none), channels per head or in all, state per channel (0: none)."""

    B: int
    T: int
    H: int
    D: int
    N: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self._asdict().items() if size)

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.B, self.T, self.H

    @property
    def vectors(self) -> tuple[int, int, int, int]:
        return self.B, self.T, self.H, self.D

    @property
    def channels(self) -> tuple[int, int, int]:
        return self.B, self.T, self.D


HEADS = (
    Sizes(1, 8192, 96, 128),
    Sizes(2, 16384, 16, 128),
    Sizes(4, 2048, 16, 128),
    Sizes(4, 4096, 64, 128),
    Sizes(8, 2048, 32, 256),
    Sizes(8, 1024, 8, 64),
)
MAMBA = tuple(Sizes(1, 1024 * k, 0, 2048, 16) for k in (2, 4, 8, 16, 32, 64))
CHANNELS = (Sizes(4, 4096, 0, 2048), Sizes(1, 65536, 0, 2048))
MEMORY = (Sizes(8, 1024, 8, 64), Sizes(4, 2048, 16, 128))
# For CPUs: a length that no chunk divides.
SMALL_HEADS = Sizes(1, 100, 2, 64)
SMALL_MAMBA = Sizes(1, 100, 0, 128, 16)
SMALL_CHANNELS = Sizes(1, 100, 0, 128)


class Draw:
    """Random arrays of one case: streams in its dtype, gates in float32."""

    def __init__(self, key: Array, dtype: str):
        self._key, self._dtype = key, jnp.dtype(dtype)

    def key(self) -> Array:
        self._key, key = jax.random.split(self._key)
        return key

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return (scale * jax.random.normal(self.key(), shape)).astype(self._dtype)

    def unit(self, *shape: int) -> Array:
        x = jax.random.normal(self.key(), shape)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(self._dtype)

    def gate(self, *shape: int, least: float = 0.0, most: float = 1.0) -> Array:
        return jax.random.uniform(self.key(), shape, jnp.float32, least, most)


def gla(draw: Draw, s: Sizes, channels: bool) -> dict[str, Array]:
    return {
        "q": draw.normal(*s.vectors, scale=s.D**-0.5),
        "k": draw.normal(*s.vectors, scale=s.D**-0.5),
        "v": draw.normal(*s.vectors),
        "log_decay": draw.gate(*(s.vectors if channels else s.heads), least=-0.2, most=0.0),
    }


def delta(draw: Draw, s: Sizes, channels: bool) -> dict[str, Array]:
    arguments = gla(draw, s, channels)
    return arguments | {"k": draw.unit(*s.vectors), "beta": draw.gate(*s.heads)}


def dplr(draw: Draw, s: Sizes) -> dict[str, Array]:
    """RWKV-7's: it removes along a unit vector at a rate per channel, and forgets e^{-0.61} at most."""
    arguments = gla(draw, s, True)
    removed = draw.unit(*s.vectors)
    rate = draw.gate(*s.vectors).astype(removed.dtype)
    own = {"a": -removed, "b": rate * removed, "log_decay": draw.gate(*s.vectors, least=-0.6, most=0.0)}
    return arguments | own


def selective(draw: Draw, s: Sizes) -> dict[str, Array]:
    return {
        "x": draw.normal(*s.channels),
        "dt": draw.gate(*s.channels, least=0.001, most=0.1),
        "a": -jnp.broadcast_to(jnp.arange(1, s.N + 1, dtype=jnp.float32), (s.D, s.N)),
        "b": draw.normal(s.B, s.T, s.N),
        "c": draw.normal(s.B, s.T, s.N),
        "d": jnp.ones(s.D, jnp.float32),
    }


def diagonal(draw: Draw, s: Sizes) -> dict[str, Array]:
    return {"a": draw.gate(*s.channels, least=0.8), "b": draw.normal(*s.channels)}


def complex_diagonal(draw: Draw, s: Sizes) -> dict[str, Array]:
    radius, angle = draw.gate(*s.channels, least=0.8), draw.gate(*s.channels, most=3.0)
    b = jax.lax.complex(*(draw.normal(*s.channels).astype(jnp.float32) for _ in range(2)))
    return {"a": jax.lax.complex(radius * jnp.cos(angle), radius * jnp.sin(angle)), "b": b}


def memory_layer(s: Sizes) -> titans.Config:
    return titans.Config(width=s.H * s.D, heads=s.H)


def memory(draw: Draw, s: Sizes) -> dict[str, Array]:
    """As the layer's gates are at first: it forgets little, and its surprise echoes for some tokens."""
    weights = {
        f"memory_{i}": jax.random.normal(draw.key(), shape, jnp.float32) * shape[1] ** -0.5
        for i, shape in enumerate(memory_layer(s).shapes)
    }
    streams = {"q": draw.unit(*s.vectors), "k": draw.unit(*s.vectors), "v": draw.normal(*s.vectors)}
    gates = {"rate": (0.0, 0.03), "log_keep": (-0.005, -0.001), "log_momentum": (-0.2, -0.05)}
    return weights | streams | {n: draw.gate(*s.heads, least=a, most=b) for n, (a, b) in gates.items()}


def conv(draw: Draw, s: Sizes) -> dict[str, Array]:
    return {"x": draw.normal(*s.channels), "weight": draw.normal(TAPS, s.D, scale=TAPS**-0.5)}
