"""Gated linear attention on a GPU, in the interpreter: values and gradients against the definition."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import BOUND, assert_parity, results

from pallas_kernels import dispatch, gpu_chunk_kernel, gpu_chunks, gpu_decay
from pallas_kernels.gated_linear_attention import api

deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """States are kept every 2 chunks for the decay's gradient; 4 chunks are walked through in two spans."""
    monkeypatch.setattr(gpu_chunks, "SHORTEST_SPAN", 2)
    for module in (gpu_chunk_kernel, gpu_decay):
        monkeypatch.setattr(module, "KEPT_EVERY", 2)


def arguments(length, decay, dtype, B=1, G=1, H=1, K=64, V=64):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    q = normal(keys[0], (B, length, G, K)) * K**-0.5
    k, v = normal(keys[1], (B, length, G, K)), normal(keys[2], (B, length, H, V))
    shape = {"none": None, "head": (B, length, H), "channel": (B, length, H, K)}[decay]
    g = None if shape is None else -0.2 * jax.random.exponential(keys[4], shape).astype(jnp.float32)
    return *(x.astype(dtype) for x in (q, k, v)), g, normal(keys[3], (B, H, K, V)).astype(jnp.float32)


def attention(batch, length, packed):
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 1) if packed else None

    def run(*args, implementation):
        return api.gated_linear_attention(*args, segment_ids=ids, implementation=implementation)

    return run


@pytest.mark.parametrize(
    ("length", "packed", "decay", "dtype", "sizes"),
    [
        (131, True, "head", "float32", {}),
        (250, True, "head", "bfloat16", {"H": 2}),
        (131, True, "channel", "bfloat16", {"K": 16}),
        pytest.param(1, False, "head", "float32", {"B": 2}, marks=deep),
        pytest.param(1, False, "channel", "bfloat16", {"B": 2}, marks=deep),
        pytest.param(53, False, "none", "float32", {"G": 2, "H": 2, "V": 72}, marks=deep),
        pytest.param(131, True, "head", "bfloat16", {"B": 2, "K": 256, "V": 128}, marks=deep),
        pytest.param(131, True, "channel", "bfloat16", {"K": 256, "H": 2, "V": 128}, marks=deep),
        pytest.param(131, False, "head", "float32", {"K": 128}, marks=deep),
        pytest.param(250, True, "channel", "float32", {"K": 72, "B": 2}, marks=deep),
        pytest.param(250, False, "channel", "bfloat16", {"H": 2}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, sizes):
    given = arguments(length, decay, dtype, **sizes)
    assert_parity(attention(len(given[0]), length, packed), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=deep)])
def test_decays_that_forget_at_once(decay):
    """A gate that closes within a chunk: no exponent is positive, and what is left of the rest is exact."""
    q, k, v, g, state = arguments(70, decay, "float32")
    g = g.at[:, 5::9].set(-400.0)
    assert_parity(attention(1, 70, False), (q, k, v, g, state), "gpu", BOUND["float32"])


def test_refuses_wide_heads_and_mixed_types():
    with pytest.raises(ValueError, match="at most 256 channels"):
        results(attention(1, 1, False), arguments(1, "head", "float32", V=257), "gpu")
    q, *rest = arguments(1, "head", "float32")
    with pytest.raises(ValueError, match="of one dtype"):
        results(attention(1, 1, False), (q.astype(jnp.bfloat16), *rest), "gpu")


@deep
@pytest.mark.parametrize(("decay", "dtype"), [("head", "bfloat16"), ("channel", "float32")])
def test_no_races(decay, dtype, monkeypatch):
    """Copies that are on their way against reads and writes, forward and backward."""
    monkeypatch.setattr(
        dispatch, "interpretation", lambda platform: plgpu.InterpretGPUParams(detect_races=True)
    )
    jax.block_until_ready(results(attention(1, 250, True), arguments(250, decay, dtype), "gpu"))
    assert not gpu_callbacks.get_races().races_found
