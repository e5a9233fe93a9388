"""Gated linear attention on a TPU, in the interpreter: values and gradients against the definition."""

import jax
import jax.numpy as jnp
import pytest
from kernels import BOUND, assert_parity

from pallas_kernels import dispatch
from pallas_kernels.gated_linear_attention import gated_linear_attention, tpu


def arguments(length, decay, dtype, heads=(2, 4), K=8, V=16):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    q = normal(keys[0], (2, length, heads[0], K)) * K**-0.5
    k = normal(keys[1], (2, length, heads[0], K))
    v, state = normal(keys[2], (2, length, heads[1], V)), normal(keys[3], (2, heads[1], K, V))
    shape = {"none": None, "head": (2, length, heads[1]), "channel": (2, length, heads[1], K)}[decay]
    g = None if shape is None else -0.2 * jax.random.exponential(keys[4], shape).astype(jnp.float32)
    return *(x.astype(dtype) for x in (q, k, v)), g, state.astype(jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize(("length", "packed"), [(1, False), (13, True), (53, True)])
def test_values_and_gradients(length, packed, decay, dtype, monkeypatch):
    """53 tokens: four chunks of 16, ragged; the first document continues the carried state."""
    monkeypatch.setattr(tpu, "CHUNK", {"float32": {16: 16}, "bfloat16": {16: 16}})
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (2, length), 0, 5), 1) if packed else None

    def op(*args, implementation):
        return gated_linear_attention(*args, segment_ids=ids, implementation=implementation)

    assert_parity(op, arguments(length, decay, dtype), "tpu", BOUND[dtype])


def test_what_the_kernel_cannot_take():
    """One clear line, for the machine as for the arguments."""
    q = jnp.zeros((1, 4, 1, 512), jnp.float32)
    with pytest.raises(ValueError, match="'tpu' needs a TPU; the default device is a CPU"):
        gated_linear_attention(q, q, q, implementation="tpu")
    with dispatch.interpreted():
        with pytest.raises(ValueError, match="'tpu' takes heads of at most 256 channels, not 512"):
            gated_linear_attention(q, q, q, implementation="tpu")
        with pytest.raises(ValueError, match="'tpu' takes no float64"):
            gated_linear_attention(*[q.astype(jnp.float64)] * 3, implementation="tpu")
