"""What memories that train on the stream share: gates and initial weights of the inner network."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import Params, dense, weight, wide


def gate_logits(params: Params, name: str, x: Array) -> Array:
    """`w_{name} x + {name}_bias`, `[..., H]`, at least float32."""
    return wide(dense(x, params[f"w_{name}"])) + params[f"{name}_bias"]


def memory_gates(params: Params, x: Array, max_rate: float) -> tuple[Array, Array, Array | None]:
    """Step size theta, log(1 - alpha) and log eta of a test-time memory, each `[..., H]`, at least float32.

    alpha = sigmoid(forget), eta = sigmoid(momentum), theta = max_rate (1 - eta) sigmoid(rate), each the
    logits `w_* x + *_bias`; eta = 0, and None instead of its log, without parameters of that name.
    """
    rate = max_rate * jax.nn.sigmoid(gate_logits(params, "rate", x))
    log_keep = jax.nn.log_sigmoid(-gate_logits(params, "forget", x))
    if "w_momentum" not in params:
        return rate, log_keep, None
    momentum = gate_logits(params, "momentum", x)
    return rate * jax.nn.sigmoid(-momentum), log_keep, jax.nn.log_sigmoid(momentum)


def memory_gates_init(key: Array, width: int, heads: int, momentum: bool = True) -> Params:
    """Parameters of `memory_gates`: at first theta = max_rate (1 - eta) / 2, alpha = 0.0025, eta = 0.88."""
    biases = {"rate": 0.0, "forget": -6.0} | ({"momentum": 2.0} if momentum else {})
    params = {}
    for name, k in zip(biases, jax.random.split(key, len(biases)), strict=True):
        params[f"w_{name}"] = weight(k, width, heads)
        params[f"{name}_bias"] = jnp.full(heads, biases[name])
    return params


def initial_memory_init(keys: Iterator[Array], shapes: list[tuple[int, int, int]]) -> Params:
    """The inner network's learned initial matrices `memory_0`, ... `[H, in, out]`, of unit gain."""
    return {
        f"memory_{i}": jax.random.normal(next(keys), shape) * shape[1] ** -0.5
        for i, shape in enumerate(shapes)
    }


def initial_memory(params: Params, depth: int) -> tuple[Array, ...]:
    """What `initial_memory_init` made, matrix by matrix."""
    return tuple(params[f"memory_{i}"] for i in range(depth))
