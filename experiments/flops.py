"""Floating-point operations: what a batch asks for, and what this machine can do."""

import time
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from experiments.step import model_module


@cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product on this machine: what a perfect program could reach."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def train_flops(model: Any, batch: dict[str, Any]) -> float:
    """FLOPs of forward and backward of a batch, recomputation not counted; the head only where it is read."""
    inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
    size, length = inputs.shape[:2]
    flops = size * length * model_module(model).flops_per_token(model, length)
    if "positions" in batch:
        flops -= (size * length - batch["targets"].size) * 2 * model.width * model.vocab_size
    return 3 * flops
