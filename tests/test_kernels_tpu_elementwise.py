"""Element-wise ops on a TPU, in the interpreter: values and gradients against the definitions."""

import jax
import jax.numpy as jnp
import pytest
from kernels import BOUND, assert_parity

from pallas_kernels import dispatch
from pallas_kernels.diagonal_scan import diagonal_scan
from pallas_kernels.diagonal_scan import tpu as diagonal_tpu
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan import tpu as selective_tpu
from pallas_kernels.short_conv import short_conv
from pallas_kernels.short_conv import tpu as short_conv_tpu


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def documents(length):
    """Two samples, cut elsewhere in each; one document alone in the middle of a block."""
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (2, length), 0, 5), 1)
    return ids.at[:, length // 2].set(7)


def diagonal_arguments(length, constant, dtype, pair, sizes=(3, 100)):
    """Tuples `(real,)` or `(real, imaginary)` of a, b and the state."""
    parts = 2 if pair else 1
    a, b, state = (
        [normal(3 * n + part, *shape) for part in range(parts)]
        for n, shape in enumerate(
            [(*(() if constant else (2, length)), *sizes), (2, length, *sizes), (2, *sizes)]
        )
    )
    a = [x / (1 + sum(y * y for y in a) ** 0.5) for x in a]
    return tuple(tuple(x.astype(t) for x in y) for y, t in ((a, dtype), (b, dtype), (state, "float32")))


def diagonal_scan_of_parts(*arguments, **options):
    found = diagonal_scan(*(x[0] if len(x) == 1 else jax.lax.complex(*x) for x in arguments), **options)
    return tuple((x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in found)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens and 128 channels: 37 tokens and 300 channels are ragged."""
    for module in (diagonal_tpu, short_conv_tpu):
        monkeypatch.setattr(module, "BLOCK", dict.fromkeys(module.BLOCK, module.Block(16, 128)))
    monkeypatch.setattr(selective_tpu, "TOKENS", 16)
    monkeypatch.setattr(selective_tpu, "LANES", 128)


def slopes_of(op, ids):
    """Gradients of a smooth number made of the outputs, whose gradients then are second derivatives."""

    def slopes(*arguments, implementation):
        def loss(*arguments):
            out, last = op(*arguments, segment_ids=ids, implementation=implementation)
            return jnp.sum(jnp.sin(out)) + jnp.sum(last**3)

        return jax.grad(loss, range(len(arguments)))(*arguments)

    return slopes


deep = pytest.mark.deep


@pytest.mark.parametrize(
    ("length", "packed", "constant", "dtype", "pair"),
    [
        (1, False, False, "float32", False),
        (37, True, False, "float32", False),
        (37, False, True, "bfloat16", False),
        (37, True, False, "float32", True),
        pytest.param(13, True, True, "float32", False, marks=deep),
        pytest.param(37, True, False, "bfloat16", False, marks=deep),
        pytest.param(32, True, False, "bfloat16", False, marks=deep),
        pytest.param(1, False, True, "float32", True, marks=deep),
        pytest.param(37, True, True, "float32", True, marks=deep),
    ],
)
def test_diagonal_scan(length, packed, constant, dtype, pair, small_blocks):
    def op(*args, implementation):
        ids = documents(length) if packed else None
        return diagonal_scan_of_parts(*args, segment_ids=ids, implementation=implementation)

    assert_parity(op, diagonal_arguments(length, constant, dtype, pair), "tpu", BOUND[dtype])


def test_diagonal_scan_twice(small_blocks):
    """The adjoint is the same op: gradients of gradients, also through the final state."""
    arguments = (x[0] for x in diagonal_arguments(19, False, "float32", False, sizes=(5,)))
    assert_parity(slopes_of(diagonal_scan, documents(19)), tuple(arguments), "tpu", BOUND["float32"])


def test_diagonal_scan_refuses_double():
    z = jnp.zeros((1, 2, 3), jnp.complex128)
    with dispatch.interpreted(), pytest.raises(ValueError, match="takes no float64"):
        diagonal_scan(z, z, implementation="tpu")


def selective_arguments(length, dtype, channels, states):
    """`x, dt, a, b, c, d, state`; the step sizes stay float32, as layers have them."""
    shapes = [(2, length, channels)] * 2 + [(2, length, states)] * 2
    x, dt, b, c = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    a, d, state = normal(4, channels, states), normal(5, channels), normal(6, 2, channels, states)
    x, b, c = (z.astype(dtype) for z in (x, b, c))
    return x, jax.nn.softplus(2 * dt - 1), -jnp.exp(a), b, c, d, state


@pytest.mark.parametrize(
    ("length", "packed", "dtype", "channels", "states"),
    [
        (1, False, "float32", 5, 4),
        (37, True, "float32", 200, 16),
        (37, True, "bfloat16", 200, 16),
        pytest.param(7, True, "float32", 130, 3, marks=deep),
        pytest.param(37, False, "float32", 256, 8, marks=deep),
        pytest.param(32, False, "bfloat16", 128, 24, marks=deep),
    ],
)
def test_selective_scan(length, packed, dtype, channels, states, small_blocks):
    def op(*args, implementation):
        ids = documents(length) if packed else None
        return selective_scan(*args, segment_ids=ids, implementation=implementation)

    assert_parity(op, selective_arguments(length, dtype, channels, states), "tpu", BOUND[dtype])


@deep
def test_selective_scan_twice(small_blocks):
    arguments = selective_arguments(37, "float32", 5, 3)
    assert_parity(slopes_of(selective_scan, documents(37)), arguments, "tpu", BOUND["float32"])


def test_selective_scan_refuses_many_states():
    x, a, b = (jnp.zeros(shape, jnp.float32) for shape in ((1, 2, 3), (3, 129), (1, 2, 129)))
    with dispatch.interpreted(), pytest.raises(ValueError, match="takes at most 128 states"):
        selective_scan(x, x, a, b, b, implementation="tpu")


def short_conv_arguments(length, dtype, taps, channels=150):
    x, weight, state = (
        normal(0, 2, length, channels),
        normal(1, taps, channels),
        normal(2, 2, taps - 1, channels),
    )
    return x.astype(dtype), weight, state


@pytest.mark.parametrize(
    ("length", "packed", "masked", "dtype", "taps"),
    [
        (1, False, False, "float32", 4),
        (37, True, False, "float32", 4),
        (37, True, True, "bfloat16", 3),
        pytest.param(37, False, True, "float32", 4, marks=deep),
        pytest.param(13, True, False, "bfloat16", 9, marks=deep),
        pytest.param(48, True, False, "float32", 2, marks=deep),
        pytest.param(2, True, True, "float32", 4, marks=deep),
    ],
)
def test_short_conv(length, packed, masked, dtype, taps, small_blocks):
    ids = documents(length) if packed else None
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, length)) if masked else None

    def op(*args, implementation):
        return short_conv(*args, segment_ids=ids, mask=mask, implementation=implementation)

    assert_parity(op, short_conv_arguments(length, dtype, taps), "tpu", BOUND[dtype])


@deep
def test_short_conv_twice(small_blocks):
    arguments = short_conv_arguments(19, "float32", 4, channels=5)
    assert_parity(slopes_of(short_conv, documents(19)), arguments, "tpu", BOUND["float32"])


def test_short_conv_refuses_long_windows():
    with dispatch.interpreted(), pytest.raises(ValueError, match="takes 2 to 9 taps"):
        short_conv(jnp.zeros((1, 2, 3), jnp.float32), jnp.zeros((10, 3), jnp.float32), implementation="tpu")
