"""The gated delta rule as GPU kernels throughout, in the interpreter: against the definition."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import BOUND, assert_parity, results

from pallas_kernels import dispatch, gpu_chunk_kernel, gpu_chunks, gpu_decay
from pallas_kernels.gated_delta_rule import api

deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """States are kept every 2 chunks for the decay's gradient; 4 chunks are walked through in two spans."""
    monkeypatch.setattr(gpu_chunks, "SHORTEST_SPAN", 2)
    for module in (gpu_chunk_kernel, gpu_decay):
        monkeypatch.setattr(module, "KEPT_EVERY", 2)


def arguments(length, decay, dtype, correlation=0.0, B=1, H=1, K=64, V=64):
    keys = jax.random.split(jax.random.key(0), 7)
    normal, shape = jax.random.normal, (B, length, H, K)
    k = normal(keys[1], shape) + correlation * normal(keys[6], (K,))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(normal(keys[4], (*shape[:3], 1)))
    g = -0.2 * jax.random.exponential(keys[5], shape if decay == "channel" else shape[:3])
    tokens = normal(keys[0], shape) * K**-0.5, k, beta * normal(keys[2], (*shape[:3], V)), beta * k
    state = normal(keys[3], (B, H, K, V)).astype(jnp.float32)
    return *(x.astype(dtype) for x in tokens), g.astype(jnp.float32), state


def rule(batch, length, packed):
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 1) if packed else None

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
        pytest.param(250, True, "head", "bfloat16", {"K": 256, "V": 128}, marks=deep),
        pytest.param(131, False, "channel", "bfloat16", {"K": 128, "H": 2}, marks=deep),
        pytest.param(53, True, "channel", "float32", {"V": 24, "B": 2}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, sizes):
    given = arguments(length, decay, dtype, **sizes)
    assert_parity(rule(len(given[0]), length, packed), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=deep), "bfloat16"])
def test_keys_that_are_nearly_one(dtype):
    """Correlated keys: the inverse of a chunk has large entries that cancel."""
    given = arguments(131, "head", dtype, correlation=2.0)
    assert_parity(rule(1, 131, False), given, "gpu", BOUND[dtype])


def test_refuses_what_shared_memory_cannot_hold():
    with pytest.raises(ValueError, match="float32 keys of at most 64 channels"):
        results(rule(1, 1, False), arguments(1, "head", "float32", K=65), "gpu")
    with pytest.raises(ValueError, match="at most 256 channels"):
        results(rule(1, 1, False), arguments(1, "head", "bfloat16", V=257), "gpu")


@deep
@pytest.mark.parametrize(("decay", "dtype"), [("head", "float32"), ("channel", "bfloat16")])
def test_no_races(decay, dtype, monkeypatch):
    """Copies that are on their way against reads and writes, forward and backward."""
    monkeypatch.setattr(
        dispatch, "interpretation", lambda platform: plgpu.InterpretGPUParams(detect_races=True)
    )
    jax.block_until_ready(results(rule(1, 250, True), arguments(250, decay, dtype), "gpu"))
    assert not gpu_callbacks.get_races().races_found
