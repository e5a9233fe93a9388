"""The delta rule: the chunkwise form against the recurrence, its triangular inverse for every kind of key."""

import functools

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.gated_delta_rule import flops_per_token, gated_delta_rule, gated_delta_rule_step
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.triangular import unit_lower_inverse

B, H, K, V = 2, 2, 6, 5
DECAYS = {"none": None, "constant": (H,), "head": (B, -1, H), "channel": (B, -1, H, K)}
# Correlation of keys and write strength: at strength 2 every token reflects the memory.
PAIRS = [(rho, beta) for rho in (0.0, 0.5, 0.9, 1.0) for beta in (1.0, 2.0)]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def correlated_keys(key, shape, rho):
    """Unit keys `[..., K]` whose mean inner product is about rho (broadcast against the shape)."""
    own, common = jax.random.split(key)
    noise, direction = unit(jax.random.normal(own, shape)), unit(jax.random.normal(common, shape[-1:]))
    return unit(jnp.sqrt(1 - rho) * noise + jnp.sqrt(rho) * direction)


def inputs(length=37, decay="head", strength=1.0):
    """q, k, v, p, log decay and an initial state."""
    keys = jax.random.split(jax.random.key(length), 6)
    q, k = (unit(jax.random.normal(key, (B, length, H, K))) for key in keys[:2])
    v = jax.random.normal(keys[2], (B, length, H, V))
    beta = jax.random.uniform(keys[3], (B, length, H, 1), minval=0.5)
    shape = DECAYS[decay]
    if shape is not None:
        shape = tuple(length if n == -1 else n for n in shape)
    log_decay = None if shape is None else -strength * jax.random.uniform(keys[4], shape)
    return q, k, beta * v, beta * k, log_decay, jax.random.normal(keys[5], (B, H, K, V))


def values_and_gradients(args, implementation, segment_ids=None):
    return chains.values_and_gradients(
        functools.partial(gated_delta_rule, segment_ids=segment_ids, implementation=implementation), *args
    )


assert_close = functools.partial(chains.assert_close, tolerance=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_equals_the_recurrence(decay):
    args = inputs(decay=decay)
    assert_close(values_and_gradients(args, "xla"), values_and_gradients(args, "reference"))


@pytest.mark.parametrize("length", [1, 2, 7, 32, 65])
def test_every_length(length):
    args = inputs(length)
    assert_close(values_and_gradients(args, None), values_and_gradients(args, "reference"))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_documents_are_apart(decay):
    """Row 0: boundaries inside and at the end of a chunk, a document of one token; row 1 ends with one."""
    ids = jnp.array([np.repeat(np.arange(4), [9, 23, 1, 4]), np.repeat(np.arange(2), [36, 1])])
    args = inputs(decay=decay)
    expected = values_and_gradients(args, "reference", ids)
    assert_close(values_and_gradients(args, "xla", ids), expected)
    run = jax.jit(gated_delta_rule)
    *tokens, state = args
    out, final = expected[0]
    assert_close(out[:1, :9], run(*[a[:1, :9] for a in tokens], state[:1])[0])
    assert_close(out[:1, 9:32], run(*[a[:1, 9:32] for a in tokens])[0])
    assert_close(final[:1], run(*[a[:1, 33:] for a in tokens])[1])


def assert_single_precision(args, expected, bounds):
    """Each sample's outputs and gradients in float32 are within its bound of the largest entry."""
    narrow = values_and_gradients([a.astype(jnp.float32) for a in args], "xla")
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        rest = tuple(range(1, a.ndim))
        error = jnp.max(jnp.abs(a - b), rest) / jnp.max(jnp.abs(b), rest)
        assert jnp.all(error < bounds), error


def test_correlated_keys():
    """One sample per correlation and write strength; a nilpotent series would fail by orders.

    Equal keys at strength 2 are the worst: A's own rounding is amplified by the chunk's 32 reflections.
    """
    rho, beta = (jnp.array(x)[:, None, None, None] for x in zip(*PAIRS, strict=True))
    length, rows = 70, len(PAIRS)
    keys = jax.random.split(jax.random.key(5), 4)
    k = correlated_keys(keys[0], (rows, length, 1, 16), rho)
    q, v = (jax.random.normal(key, k.shape) for key in keys[1:3])
    state = jax.random.normal(keys[3], (rows, 1, 16, 16))
    args = (q, k, beta * v, beta * k, jnp.full((rows, length, 1), -0.01), state)
    expected = values_and_gradients(args, "reference")
    assert_close(values_and_gradients(args, "xla"), expected)
    assert_single_precision(args, expected, jnp.where(beta.ravel() == 1, 3e-6, 3e-5))


@pytest.mark.parametrize("size", [64, 4, 1])
def test_inverse_is_exact_at_any_correlation(size):
    rho, beta = (jnp.array(x)[:, None, None] for x in zip(*PAIRS, strict=True))
    k = correlated_keys(jax.random.key(2), (len(PAIRS), size, 48), rho)
    a = jnp.tril(beta * k @ jnp.swapaxes(k, -1, -2), -1)
    x = jax.jit(unit_lower_inverse)(a)
    assert_close(x, jnp.linalg.inv(jnp.eye(size) + a), tolerance=1e-12)
    assert jnp.all(jnp.triu(x, 1) == 0)
    narrow = jax.jit(unit_lower_inverse)(a.astype(jnp.float32))
    assert jnp.max(jnp.abs(narrow - x)) < 8e-6


def test_gradient_of_the_inverse():
    a = 0.3 * jax.random.normal(jax.random.key(0), (2, 16, 16))
    check_grads(lambda a: unit_lower_inverse(jnp.tril(a, -1)), (a,), 1, ["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.deep
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_extreme_decay(decay):
    """Decays of up to e^-50 a token, among tokens that keep everything."""
    *tokens, log_decay, state = inputs(67, decay)
    log_decay = jnp.where(log_decay < -0.5, 100 * log_decay, 0)
    args = (*tokens, jnp.clip(log_decay, -50), state)
    expected = values_and_gradients(args, "reference")
    assert_close(values_and_gradients(args, "xla"), expected)
    assert_single_precision(args, expected, 3e-6)


def test_without_recall_it_is_linear_attention():
    q, k, v, p, log_decay, state = inputs(decay="channel")
    expected = gated_linear_attention(q, k, v, log_decay, state)
    assert_close(gated_delta_rule(q, k, v, jnp.zeros_like(p), log_decay, state), expected)


def test_recalls_what_was_written_last():
    """With orthonormal keys and beta = 1 the memory is a dictionary: a key yields its newest value."""
    k = jnp.eye(K)[jnp.array([0, 1, 2, 1, 0, 4])][None, :, None]
    v = jax.random.normal(jax.random.key(1), (1, 6, 1, V))
    _, state = gated_delta_rule(k, k, v, k)
    newest = [v[0, 4, 0], v[0, 3, 0], v[0, 2, 0], 0 * v[0, 0, 0], v[0, 5, 0], 0 * v[0, 0, 0]]
    assert_close(state[0, 0], jnp.stack(newest))


@pytest.mark.parametrize("decay", DECAYS)
def test_step_is_one_token(decay):
    *tokens, log_decay, state = inputs(1, decay)
    out, new = gated_delta_rule(*tokens, log_decay, state, implementation="reference")
    one = log_decay if decay in ("none", "constant") else log_decay[:, 0]
    assert_close(gated_delta_rule_step(*[x[:, 0] for x in tokens], one, state), (out[:, 0], new))


def test_bfloat16_keeps_a_wide_state():
    args = inputs()
    narrow = [a.astype(jnp.bfloat16) for a in args[:5]]
    out, state = gated_delta_rule(*narrow)
    assert out.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    exact, _ = gated_delta_rule(*args[:5])
    assert jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)) < 2e-2


def test_unknown_implementation():
    with pytest.raises(ValueError, match="gated_delta_rule: no implementation 'abacus'"):
        gated_delta_rule(*inputs(1), implementation="abacus")


def test_flops_are_those_of_the_compiled_products():
    """One chunk's products, counted by hand: two scores, merges of the inverse, what it multiplies (values,
    recalling keys), the output from within; recall, read and write of the state."""
    C, K, V = 32, 16, 8
    scores, merges = 2 * (2 * C * C * K), 4 * 16**3 + 2 * 4 * 8**3
    products = 2 * C * C * (V + K) + 2 * C * C * V + 3 * (2 * C * K * V)
    counted = C * flops_per_token(4 * C, 1, K, V, channels=False)
    assert abs(counted - (scores + merges + products)) < 0.02 * counted
    assert flops_per_token(4 * C, 1, K, V, channels=True) < flops_per_token(4 * C, 1, K, V, channels=False)
