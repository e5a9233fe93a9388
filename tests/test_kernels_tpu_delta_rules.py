"""The gated delta rule and the DPLR rule on a TPU, in the interpreter: against the definitions."""

import jax
import jax.numpy as jnp
import pytest
from kernels import BOUND, assert_parity

from pallas_kernels import dplr, gated_delta_rule

OPS = {"delta": gated_delta_rule.gated_delta_rule, "dplr": dplr.dplr}
CASES = [(1, False, "head"), (13, True, "channel"), (53, True, "head"), (53, True, "channel")]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """53 tokens are then four chunks, ragged; the first document continues the carried state."""
    for op in (gated_delta_rule, dplr):
        monkeypatch.setattr(op.api.tpu, "CHUNK", {"float32": {16: 16}, "bfloat16": {16: 16}})


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def arguments(op, length, decay, dtype, correlation=0.0, H=2, K=8, V=16):
    shape = (2, length, H, K)
    q, k, v = (
        normal(0, *shape) * K**-0.5,
        normal(1, *shape) + correlation * normal(6, K),
        normal(2, *shape[:3], V),
    )
    k, beta = unit(k), jax.nn.sigmoid(normal(4, *shape[:3], 1))
    g = -0.2 * jax.random.exponential(jax.random.key(5), shape if decay == "channel" else shape[:3])
    tokens = (q, k, beta * v, beta * k) if op == "delta" else (q, normal(7, *shape), v, -k, beta * k)
    state = normal(3, 2, H, K, V)
    return *(x.astype(dtype) for x in tokens), g.astype(jnp.float32), state.astype(jnp.float32)


def ids_of(length):
    return jnp.sort(jax.random.randint(jax.random.key(5), (2, length), 0, 5), 1)


def assert_op(op, length, packed, dtype, arguments):
    ids = ids_of(length) if packed else None

    def run(*args, implementation):
        return OPS[op](*args, segment_ids=ids, implementation=implementation)

    assert_parity(run, arguments, "tpu", BOUND[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("length", "packed", "decay"), CASES)
def test_values_and_gradients(length, packed, decay, op, dtype):
    assert_op(op, length, packed, dtype, arguments(op, length, decay, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_that_are_nearly_one(dtype):
    """Correlated keys: the inverse of a chunk has large entries that cancel."""
    assert_op("delta", 53, False, dtype, arguments("delta", 53, "head", dtype, correlation=2.0))


def test_no_separate_key():
    q, _, v, a, b, g, state = arguments("dplr", 53, "channel", "float32")
    assert_op("dplr", 53, True, "float32", (q, None, v, a, b, g, state))
