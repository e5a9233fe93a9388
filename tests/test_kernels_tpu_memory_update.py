"""The test-time memory on a TPU, in the interpreter: values and gradients against the definition."""

import jax
import jax.numpy as jnp
import pytest
from kernels import BOUND, assert_parity, results
from test_memory_update import CHUNK, busy_memory, documents, problem

from pallas_kernels import dispatch
from pallas_kernels.memory_update import memory_update, tpu

deep = pytest.mark.deep
CASES = [
    pytest.param(1, 2, True, False, False, {}, marks=deep),
    (CHUNK + 1, 1, False, False, False, {}),
    pytest.param(37, 2, True, True, False, {"clip": 1.0, "residual": True}, marks=deep),
    (21, 2, True, True, True, {"activation": "gelu"}),
]


def narrowed(tree, dtype=jnp.float32):
    def narrow(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(narrow, tree)


def op_of(packed, length, **settings):
    ids = documents(length) if packed else None

    def op(arrays, state, norm=None, implementation=None):
        return memory_update(
            *arrays, state, norm=norm, chunk=CHUNK, segment_ids=ids, implementation=implementation, **settings
        )

    return op


@pytest.mark.parametrize(("length", "depth", "momentum", "carried", "packed", "more"), CASES)
def test_values_and_gradients(length, depth, momentum, carried, packed, more, monkeypatch):
    """Chunks of 8 in blocks of 4, entered in the middle, with documents that begin anywhere."""
    monkeypatch.setattr(tpu, "BLOCK", 4)
    arrays = problem(length, depth, momentum)
    state = busy_memory(arrays[0], momentum) if carried else None
    arguments = narrowed((arrays, state))
    assert_parity(op_of(packed, length, **more), arguments, "tpu", BOUND["float32"])


@deep
def test_layer_norm_and_narrow_streams():
    """bfloat16 tokens, the network in float32."""
    initial, *streams = problem(21)
    streams = [*narrowed(streams[:3], jnp.bfloat16), *narrowed(streams[3:])]
    norm = jnp.ones((2, 4), jnp.float32) * 1.1, jnp.full((2, 4), 0.1, jnp.float32)
    arguments = (narrowed(initial), *streams), None, norm
    assert_parity(op_of(True, 21), arguments, "tpu", BOUND["bfloat16"])


def test_what_the_kernel_cannot_take():
    arrays = narrowed(problem(5))
    for settings, message in (
        ({"window": 2}, "takes linear retention and window=1 only"),
        ({"read_scale": jnp.ones((2, 5, 2), jnp.float32)}, "takes no read_scale"),
    ):
        with dispatch.interpreted(), pytest.raises(ValueError, match=f"'tpu' {message}"):
            memory_update(*arrays, implementation="tpu", **settings)


@deep
def test_phase_goes_on():
    """The state that comes out is the one the XLA form would carry: the chunk ends where it would."""
    arrays = narrowed(problem(13))
    state = narrowed(busy_memory(arrays[0]))
    (_, kernel), _ = results(op_of(True, 13), (arrays, state), "tpu")
    (_, xla), _ = results(op_of(True, 13), (arrays, state), "xla")
    assert jnp.array_equal(kernel.phase, xla.phase)
