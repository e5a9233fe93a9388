"""What the selective scan's GPU kernels share: tokens in shared memory, their numbers in registers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu_lanes import F32, LANES, LOG2_E, Cut, Walk

# More than 4 tokens at once take 236 registers in the backward kernel.
UNROLL = 4
Vectors = list[Array]  # N, each [128]


class Token(NamedTuple):
    """One token's numbers in registers."""

    dt: Array  # [128]
    e: Vectors
    b: list[Array]  # N scalars
    c: list[Array]


class Chunk(NamedTuple):
    """Tokens in shared memory, and the rates of their channels."""

    dt: Any  # [C,128]
    bc: Any  # [C,W]: b, c and, if there are segments, 0 or -inf
    rates: Vectors  # a log2(e)

    def token(self, t: Array) -> Token:
        dt, N = self.dt[t].astype(F32), len(self.rates)
        exponents = [dt * r for r in self.rates]
        if self.bc.shape[1] > 2 * N:
            start = self.bc[t, 2 * N]
            exponents = [x + start for x in exponents]
        b, c = ([self.bc[t, first + n] for n in range(N)] for first in (0, N))
        return Token(dt, [jnp.exp2(x) for x in exponents], b, c)


def each(f: Callable, *lists: Vectors) -> Vectors:
    return [f(*xs) for xs in zip(*lists, strict=True)]


def total(xs: Vectors) -> Array:
    """The sum, in a few chains rather than one."""
    chains = [sum(xs[i + 4 :: 4], xs[i]) for i in range(min(4, len(xs)))]
    return sum(chains[1:], chains[0])


def rows(ref) -> Vectors:
    """Of `[N,128]`."""
    return [ref[n] for n in range(ref.shape[0])]


def put_rows(ref, rows: Vectors) -> None:
    for n, row in enumerate(rows):
        ref[n] = row


def rates_of(a_ref, walk: Walk) -> Vectors:
    return [r * LOG2_E for r in rows(a_ref.at[:, walk.mine])]


def scratch(cut: Cut, width: int, kept: int = 0, **streams) -> dict[str, Any]:
    """Shared memory for chunks of `streams [B,T,D]`, of bc with this `width` and of `kept` states."""
    shared = {name: cut.buffered((cut.chunk, LANES), dtype) for name, dtype in streams.items()}
    shared["bc_s"] = cut.buffered((cut.chunk, width), F32)
    if kept:
        shared["kept_s"] = cut.buffered((kept, LANES), F32)
    return {**shared, "arrived": cut.barrier(len(shared))}
