"""Our ops on the work of the peers' functions, by the peer's name; arguments are drawn by their names.

B T H as in the ops, K = V = width / 4. All give the output alone.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.diagonal_scan import diagonal_scan
from pallas_kernels.dplr import dplr
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.memory_update import memory_update
from pallas_kernels.momentum_delta_rule import momentum_delta_rule

HEADS = 4


def fla_simple_gla(q, k, v, log_decay):
    return gated_linear_attention(q, k, v, log_decay)[0]


def fla_linear_attn(q, k, v):
    return gated_linear_attention(q, k, v)[0]


def fla_gla(q, k, v, log_decays):
    return gated_linear_attention(q, k, v, log_decays)[0]


def fla_rwkv6(q, k, v, log_decays, bonus):
    """The read of S_{t-1}, asked one token early, and the token's own bonus."""
    early = jnp.roll(q, -1, 1).at[:, -1].set(0)
    o = jnp.roll(gated_linear_attention(early, k, v, log_decays)[0], 1, 1).at[:, 0].set(0)
    return o + jnp.sum(q * bonus * k, -1, keepdims=True) * v


def fla_delta_rule(q, k, v, beta):
    return fla_gated_delta_rule(q, k, v, None, beta)


def fla_gated_delta_rule(q, k, v, log_decay, beta):
    beta = beta[..., None]
    return gated_delta_rule(q, k, beta * v, beta * k, log_decay)[0]


def fla_kda(q, k, v, log_decays, beta):
    return fla_gated_delta_rule(q, k, v, log_decays, beta)


def fla_gdn2(q, k, v, log_decays, erase, write):
    return gated_delta_rule(q, k, write * v, erase * k, log_decays)[0]


def fla_comba(q, k, v, p, log_decay, beta):
    return dplr(q, None, v, -p, beta[..., None] * k, log_decay)[0]


def fla_dplr(q, k, v, a, b, log_decays):
    return dplr(q, k, v, a, b, log_decays)[0]


def fla_iplr(q, k, v, a, b):
    return dplr(q, k, v, a, b)[0]


def fla_momentum_delta_rule(q, k, v, p, log_decay, log_momentum, beta):
    return momentum_delta_rule(q, 0.3 * beta[..., None] * k, v, p, log_decay, log_momentum)[0]


def fla_ttt(q, k, v, scale, bias, beta):
    half = jnp.full(beta.shape, 0.5)
    initial = jnp.zeros((q.shape[2], q.shape[3] + 1, q.shape[3]))
    (y, _), _ = memory_update(
        (initial,), q, k, v, half, 0 * half, norm=(scale, bias), read_scale=0.3 * beta, chunk=16,
        residual=True,
    )  # fmt: skip
    return y


def fla_hgrn(x, x_decay):
    return diagonal_scan(jnp.exp(x_decay), x)[0]


def recurrentgemma_scan(x, radius):
    return diagonal_scan(radius, x)[0]


def recurrentgemma_complex_scan(x, x_imag, a_real, a_imag):
    h = diagonal_scan(jax.lax.complex(a_real, a_imag), jax.lax.complex(x, x_imag))[0]
    return jnp.stack([h.real, h.imag])


OPS = {name: f for name, f in globals().items() if name.startswith(("fla_", "recurrentgemma_"))}


def inputs(function: Callable, batch: int, length: int, width: int) -> list[Array]:
    """Random arrays for every argument."""
    heads = (batch, length, HEADS)
    vectors, channels = (*heads, width // HEADS), (batch, length, width)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("beta", "log_decay", "log_momentum"), heads)
    shapes |= dict.fromkeys(("x", "x_decay", "x_imag", "radius", "a_real", "a_imag"), channels)
    shapes |= dict.fromkeys(("bonus", "scale", "bias"), (HEADS, width // HEADS))
    keys = enumerate(inspect.signature(function).parameters)
    return [_draw(name, jax.random.key(i), shapes.get(name, vectors)) for i, name in keys]


def _draw(name: str, key: Array, shape: tuple[int, ...]) -> Array:
    uniform, normal = jax.random.uniform(key, shape), jax.random.normal(key, shape)
    unit = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
    if name in ("log_decay", "log_decays", "log_momentum", "x_decay"):
        return -0.1 * uniform
    own = {
        "k": unit, "p": unit, "a": unit, "b": -0.5 * unit, "beta": uniform, "erase": uniform,
        "write": uniform, "radius": jnp.exp(-0.1 * uniform), "a_real": 0.9 * jnp.cos(uniform),
        "a_imag": 0.9 * jnp.sin(uniform),
    }  # fmt: skip
    return own.get(name, normal)
