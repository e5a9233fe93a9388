"""The gated delta rule on a GPU, in the interpreter: values and gradients against the definition."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import BOUND, assert_parity, results

from pallas_kernels import dispatch
from pallas_kernels.gated_delta_rule import api

deep = pytest.mark.deep


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def arguments(length, decay, dtype, correlation=0.0, B=1, H=1, K=64, V=64):
    shape = (B, length, H, K)
    k = unit(normal(1, *shape) + correlation * normal(6, K))
    beta = jax.nn.sigmoid(normal(4, *shape[:3], 1))
    g = -0.2 * jax.random.exponential(jax.random.key(5), shape if decay == "channel" else shape[:3])
    tokens = normal(0, *shape) * K**-0.5, k, beta * normal(2, *shape[:3], V), beta * k
    state = normal(3, B, H, K, V)
    return *(x.astype(dtype) for x in tokens), g.astype(jnp.float32), state.astype(jnp.float32)


def documents(batch, length, packed):
    if not packed:
        return None
    return jnp.sort(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 1)


def rule(ids):
    def run(*args, implementation):
        return api.gated_delta_rule(*args, segment_ids=ids, implementation=implementation)

    return run


@pytest.mark.parametrize(
    ("length", "packed", "decay", "dtype", "sizes"),
    [
        (131, True, "head", "float32", {}),
        (131, True, "channel", "bfloat16", {"K": 16}),
        pytest.param(1, False, "head", "bfloat16", {"B": 2}, marks=deep),
        pytest.param(131, True, "channel", "float32", {"V": 128}, marks=deep),
        pytest.param(131, True, "channel", "bfloat16", {"K": 256, "V": 128, "H": 2}, marks=deep),
        pytest.param(131, False, "head", "bfloat16", {"K": 256, "B": 2}, marks=deep),
        pytest.param(53, True, "channel", "float32", {"V": 24}, marks=deep),
        pytest.param(192, True, "head", "bfloat16", {"H": 2}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, sizes):
    given = arguments(length, decay, dtype, **sizes)
    assert_parity(rule(documents(len(given[0]), length, packed)), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=deep), "bfloat16"])
def test_keys_that_are_nearly_one(dtype):
    """Correlated keys: the inverse of a chunk has large entries that cancel."""
    assert_parity(rule(None), arguments(131, "head", dtype, correlation=2.0), "gpu", BOUND[dtype])


def test_refuses_wide_heads():
    with pytest.raises(ValueError, match="at most 256 channels"):
        results(rule(None), arguments(1, "head", "float32", V=257), "gpu")


@deep
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_races(dtype, monkeypatch):
    """Copies that are on their way against reads and writes, forward and backward, groups of channels too."""
    monkeypatch.setattr(
        dispatch, "interpretation", lambda platform: plgpu.InterpretGPUParams(detect_races=True)
    )
    keys = {"bfloat16": 256, "float32": 64}[dtype]
    jax.block_until_ready(results(rule(None), arguments(256, "head", dtype, K=keys), "gpu"))
    assert not gpu_callbacks.get_races().races_found
