"""The test-time memory on a GPU, in the interpreter: values and gradients against the definition."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import BOUND, assert_parity, results
from test_kernels_tpu_memory_update import narrowed

from pallas_kernels import dispatch
from pallas_kernels.memory_update import empty_memory, gpu_forward, memory_update

deep = pytest.mark.deep
# 14 tokens of a carried chunk, a document of one token, one longer than a chunk.
LENGTHS = [14, 1, 22]


def problem(length, widths, momentum, dtype):
    """One sample, one head; keys of unit length, gates all over their range."""
    keys = iter(jax.random.split(jax.random.key(0), 10))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    initial = tuple(normal(1, i, o) * i**-0.5 for i, o in pairwise(widths))
    q, k, v = (normal(1, length, 1, width) for width in (widths[0], widths[0], widths[-1]))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    rate, keep, stay = (normal(1, length, 1) for _ in range(3))
    gates = 0.1 * jax.nn.sigmoid(rate), jax.nn.log_sigmoid(keep + 3), jax.nn.log_sigmoid(stay + 1)
    gates = gates if momentum else (*gates[:2], None)
    return narrowed(initial), *narrowed((q, k, v), jnp.dtype(dtype)), *narrowed(gates)


def carried_memory(initial, momentum, phase):
    empty = empty_memory([w.shape for w in initial], 1, momentum=momentum)
    leaves, tree = jax.tree.flatten(empty)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    leaves = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return narrowed(jax.tree.unflatten(tree, leaves)).replace(phase=jnp.array([phase], jnp.int32))


def op_of(packed, **settings):
    ids = jnp.array([np.repeat([3, 1, 3], LENGTHS)]) if packed else None

    def op(arrays, state, norm=None, implementation=None):
        rule = {"norm": norm, "segment_ids": ids, **settings}
        return memory_update(*arrays, state, implementation=implementation, **rule)

    return op


@pytest.mark.parametrize(
    ("length", "widths", "momentum", "carried", "packed", "dtype", "more"),
    [
        (sum(LENGTHS), (64, 64), True, True, True, "float32", {"chunk": 16}),
        pytest.param(1, (64, 64), False, False, False, "bfloat16", {"chunk": 64}, marks=deep),
        pytest.param(35, (64, 64), False, True, False, "bfloat16", {"chunk": 20}, marks=deep),
        pytest.param(35, (64, 128, 64), True, False, False, "float32", {"clip": 1.0}, marks=deep),
        pytest.param(
            sum(LENGTHS), (64, 128, 64), True, True, True, "bfloat16", {"chunk": 32, "clip": 1.0}, marks=deep
        ),
        pytest.param(
            20, (24, 40, 24), False, True, False, "float32",
            {"chunk": 8, "activation": "gelu", "residual": True}, marks=deep,
        ),
    ],
)  # fmt: skip
def test_values_and_gradients(length, widths, momentum, carried, packed, dtype, more):
    arrays = problem(length, widths, momentum, dtype)
    state = carried_memory(arrays[0], momentum, 3) if carried else None
    assert_parity(op_of(packed, **more), (arrays, state), "gpu", BOUND[dtype])


@deep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(dtype):
    arrays = problem(20, (64, 64), False, dtype)
    scale, bias = 0.1 * jax.random.normal(jax.random.key(3), (2, 1, 64), jnp.float32)
    op = op_of(False, activation="gelu", residual=True)
    assert_parity(op, (arrays, None, (1 + scale, bias)), "gpu", BOUND[dtype])


def test_what_does_not_fit_on_the_chip_is_worked_on_in_main_memory(monkeypatch):
    """Values only: of the three states one, or none, lies in shared memory."""
    arrays = problem(17, (64, 64), True, "float32")

    def values(states):
        monkeypatch.setattr(gpu_forward, "on_chip", lambda network, other: states)
        with dispatch.interpreted():
            return jax.jit(lambda *x: memory_update(*x, chunk=16, implementation="gpu"))(*arrays)

    one, none = values(("momentum",)), values(())
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, none))


def test_what_the_kernel_cannot_take():
    arrays = problem(5, (64, 64), True, "float32")
    wide = problem(5, (64, 512, 64), True, "float32")
    biased = (jnp.zeros((1, 65, 64), jnp.float32),), *arrays[1:]
    norm = (jnp.ones((1, 24), jnp.float32),) * 2
    for given, settings, message in (
        (arrays, {"window": 2}, "takes linear retention, window=1 and loss='square' only"),
        (arrays, {"loss": "cube"}, "takes linear retention, window=1 and loss='square' only"),
        (arrays, {"read_scale": jnp.ones((1, 5, 1), jnp.float32)}, "takes no read_scale"),
        (biased, {}, "takes inner weights without biases only"),
        (wide, {}, "takes inner weights of at most 32768 numbers a head, not 65536"),
        (problem(5, (128, 128), True, "float32"), {}, "takes heads of at most 64 channels"),
        (problem(5, (24, 24), True, "float32"), {"norm": norm}, "takes a norm of 64 channels only"),
    ):
        with dispatch.interpreted(), pytest.raises(ValueError, match=f"'gpu' {message}"):
            memory_update(*given, implementation="gpu", **settings)


@deep
def test_no_races(monkeypatch):
    """Copies that are on their way against reads and writes, forward and backward."""
    monkeypatch.setattr(
        dispatch, "interpretation", lambda platform: plgpu.InterpretGPUParams(detect_races=True)
    )
    arguments = problem(35, (64, 64), True, "bfloat16"), None
    jax.block_until_ready(results(op_of(False, chunk=16), arguments, "gpu"))
    assert not gpu_callbacks.get_races().races_found
