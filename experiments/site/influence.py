"""How much output t of a fresh layer depends on input s."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from zoo import registry

WIDTH = TOKENS = 32
# Windows, chunks and segments begin anew within the picture; a cache is no longer than it.
SHORT = {"window": 8, "chunk": 8, "segment": 8, "max_length": TOKENS}


def config(name: str) -> Any:
    """The layer called `name` at the picture's size."""
    cfg = registry.config(name, WIDTH)
    found = {field: getattr(cfg, field, None) for field in SHORT}
    short = {field: min(SHORT[field], value) for field, value in found.items() if value is not None}
    return dataclasses.replace(cfg, **short)


@partial(jax.jit, static_argnums=0)
def _slopes(cfg: Any, key: Array) -> Array:
    """Through `step`, which compiles in a moment and is the same function as `apply`."""
    layer = registry.module(cfg)
    params = layer.init(key, cfg)

    def outputs(x: Array) -> Array:
        def body(state, x_t):
            y_t, state = layer.step(params, cfg, x_t[None], state)
            return state, y_t[0]

        return jax.lax.scan(body, layer.init_state(cfg, 1), x)[1]

    x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
    return jnp.sqrt(jnp.sum(jax.jacfwd(outputs)(x) ** 2, (1, 3)))


def matrix(name: str) -> np.ndarray:
    """`[t, s]`: the Frobenius norm of dy_t / dx_s."""
    return np.asarray(_slopes(config(name), jax.random.key(0)))
