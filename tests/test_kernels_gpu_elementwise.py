"""Element-wise ops on a GPU, in the interpreter: values and gradients against the definitions."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import BOUND, assert_parity, results

from pallas_kernels import dispatch
from pallas_kernels.diagonal_scan import api as diagonal
from pallas_kernels.diagonal_scan import gpu as diagonal_gpu
from pallas_kernels.gpu_lanes import Filling
from pallas_kernels.selective_scan import api as selective
from pallas_kernels.selective_scan import gpu as selective_gpu
from pallas_kernels.short_conv import api as conv
from pallas_kernels.short_conv import gpu as conv_gpu

deep = pytest.mark.deep


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def documents(length, packed):
    """Two samples, cut elsewhere in each; one document alone in the middle."""
    if not packed:
        return None
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (2, length), 0, 5), 1)
    return ids.at[:, length // 2].set(7)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 8 tokens; 23 tokens are two segments of two chunks, ragged at the end."""
    for module, names in (
        (selective_gpu, ("FORWARD", "BACKWARD")),
        (diagonal_gpu, ("FILLING",)),
        (conv_gpu, ("FILLING",)),
    ):
        monkeypatch.setattr(module, "CHUNK", 8)
        for name in names:
            monkeypatch.setattr(module, name, Filling(enough=1000, wanted=8, shortest=8))


def selective_scan(ids):
    def op(x, dt, a, b, c, state, implementation):
        options = {"segment_ids": ids, "implementation": implementation}
        return selective.selective_scan(x, dt, a, b, c, None, state, **options)

    return op


def selective_arguments(length, dtype, D=20, N=3):
    x, b, c = (normal(i, 2, length, width, dtype=dtype) for i, width in enumerate((D, N, N)))
    dt = jax.nn.softplus(normal(3, 2, length, D) - 1).astype(dtype)
    return x, dt, -jnp.exp(normal(4, D, N)), b, c, normal(5, 2, D, N)


@pytest.mark.parametrize(
    ("length", "packed", "D", "dtype"),
    [
        (1, False, 20, "float32"),
        (7, True, 130, "bfloat16"),
        (23, True, 20, "float32"),
        pytest.param(37, True, 130, "bfloat16", marks=deep),
        pytest.param(32, False, 130, "float32", marks=deep),
    ],
)
def test_selective_scan(length, packed, D, dtype):
    op = selective_scan(documents(length, packed))
    assert_parity(op, selective_arguments(length, dtype, D), "gpu", BOUND[dtype])


def test_selective_scan_refuses_many_states():
    with pytest.raises(ValueError, match="at most 32 states"):
        results(selective_scan(None), selective_arguments(1, "float32", N=33), "gpu")


def diagonal_scan(ids):
    def op(*arguments, implementation):
        joined = (x[0] if len(x) == 1 else jax.lax.complex(*x) for x in arguments)
        found = diagonal.diagonal_scan(*joined, segment_ids=ids, implementation=implementation)
        return tuple((x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in found)

    return op


def diagonal_arguments(length, constant, dtype, pair, sizes=(2, 65)):
    """Tuples `(real,)` or `(real, imaginary)` of a, b and the state."""
    shapes = sizes if constant else (2, length, *sizes), (2, length, *sizes), (2, *sizes)
    a, b, state = ([normal(2 * i + part, *s) for part in range(1 + pair)] for i, s in enumerate(shapes))
    a = [x / (1 + sum(y * y for y in a) ** 0.5) for x in a]
    dtypes = dtype, dtype, "float32"
    return tuple(tuple(x.astype(t) for x in y) for y, t in zip((a, b, state), dtypes, strict=True))


@pytest.mark.parametrize(
    ("length", "packed", "constant", "dtype", "pair"),
    [
        (1, False, False, "float32", False),
        (23, True, False, "float32", False),
        (13, False, True, "bfloat16", False),
        (23, True, True, "float32", True),
        pytest.param(37, True, False, "bfloat16", False, marks=deep),
        pytest.param(37, False, True, "float32", False, marks=deep),
        pytest.param(32, True, False, "float32", True, marks=deep),
    ],
)
def test_diagonal_scan(length, packed, constant, dtype, pair):
    op = diagonal_scan(documents(length, packed))
    assert_parity(op, diagonal_arguments(length, constant, dtype, pair), "gpu", BOUND[dtype])


@deep
def test_diagonal_scan_twice():
    """The adjoint is the same op: gradients of gradients, also through the final state."""

    def slopes(*arguments, implementation):
        op = diagonal_scan(documents(9, True))

        def energy(*arguments):
            found = jax.tree.leaves(op(*arguments, implementation=implementation))
            return sum(jnp.sum(x**2) for x in found)

        return jax.grad(energy, argnums=(0, 1, 2))(*arguments)

    assert_parity(slopes, diagonal_arguments(9, False, "float32", False, (20,)), "gpu", BOUND["float32"])


def short_conv(ids):
    def op(x, weight, state, implementation):
        return conv.short_conv(x, weight, state, segment_ids=ids, implementation=implementation)

    return op


def conv_arguments(length, taps, dtype, D=130):
    return normal(0, 2, length, D, dtype=dtype), normal(1, taps, D), normal(2, 2, taps - 1, D)


@pytest.mark.parametrize(
    ("length", "packed", "taps", "dtype"),
    [
        (1, False, 4, "float32"),
        (23, True, 4, "float32"),
        (23, True, 3, "bfloat16"),
        (20, False, 2, "float32"),
    ],
)
def test_short_conv(length, packed, taps, dtype):
    op = short_conv(documents(length, packed))
    assert_parity(op, conv_arguments(length, taps, dtype), "gpu", BOUND[dtype])


def test_short_conv_refuses_masks_and_many_taps():
    x, weight, state = conv_arguments(5, 9, "float32")
    with pytest.raises(ValueError, match="2 to 8 taps"):
        results(short_conv(None), (x, weight, state), "gpu")
    with dispatch.interpreted(), pytest.raises(ValueError, match="takes no mask"):
        conv.short_conv(x, weight[:4], mask=jnp.ones(x.shape[:2], bool), implementation="gpu")


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        pytest.param(selective_scan, lambda: selective_arguments(32, "float32"), marks=deep),
        (diagonal_scan, lambda: diagonal_arguments(32, False, "bfloat16", False, (20,))),
        (short_conv, lambda: conv_arguments(32, 4, "bfloat16", 20)),
    ],
)
def test_no_races(op, arguments, monkeypatch):
    """Copies that are on their way against reads and writes, forward and backward."""
    monkeypatch.setattr(
        dispatch, "interpretation", lambda platform: plgpu.InterpretGPUParams(detect_races=True)
    )
    jax.block_until_ready(results(op(documents(32, True)), arguments(), "gpu"))
    assert not gpu_callbacks.get_races().races_found
