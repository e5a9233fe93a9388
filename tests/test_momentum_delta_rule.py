"""The delta rule with momentum: the chunkwise form against NumPy's recurrence, and what it contains."""

import functools

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import momentum_delta, titans
from pallas_kernels.dplr import dplr
from pallas_kernels.momentum_delta_rule import (
    flops_per_token,
    momentum_delta_rule,
    momentum_delta_rule_step,
)

B, H, K, V = 2, 2, 6, 5


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def inputs(length=37, strength=1.0):
    """q, k, v, p, log decay, log momentum and an initial state."""
    keys = jax.random.split(jax.random.key(length), 7)
    q, k = (unit(jax.random.normal(key, (B, length, H, K))) for key in keys[:2])
    v = jax.random.normal(keys[2], (B, length, H, V))
    beta = 0.3 * jax.random.uniform(keys[3], (B, length, H, 1))
    gates = [-strength * jax.random.uniform(key, (B, length, H)) for key in keys[4:6]]
    return q, k, beta * v, beta * k, *gates, jax.random.normal(keys[6], (B, H, 2, K, V))


def values_and_gradients(args, implementation, segment_ids=None):
    return chains.values_and_gradients(
        functools.partial(momentum_delta_rule, segment_ids=segment_ids, implementation=implementation), *args
    )


assert_close = functools.partial(chains.assert_close, tolerance=1e-10)


def naive(q, k, v, p, log_decay, log_momentum, state, starts=()):
    """Token by token in NumPy, a new document at every token of `starts`."""
    q, k, v, p, decay, left = (np.asarray(x) for x in (q, k, v, p, jnp.exp(log_decay), jnp.exp(log_momentum)))
    state, out = np.array(state), np.zeros(v.shape)
    for n, h in np.ndindex(B, H):
        w, m = state[n, h]
        for t in range(q.shape[1]):
            at = (n, t, h)
            if t in starts:
                w, m = 0 * w, 0 * m
            m = left[at] * m + np.outer(k[at], v[at] - p[at] @ w)
            w = decay[at] * w + m
            out[at] = q[at] @ w
        state[n, h] = w, m
    return out, state


@pytest.mark.parametrize("length", [1, 7, 37, 70])
def test_equals_the_recurrence(length):
    args = inputs(length)
    result = values_and_gradients(args, "xla")
    assert_close(result, values_and_gradients(args, "reference"))
    assert_close(result[0], naive(*args))


def test_documents_are_apart():
    """Boundaries inside and at the end of a chunk, and a document of one token; an id that comes again."""
    args, starts = inputs(), [9, 32, 33]
    ids = jnp.broadcast_to(jnp.array(np.repeat([4, 7, 4, 7], np.diff([0, *starts, 37]))), (B, 37))
    result = values_and_gradients(args, "xla", ids)
    assert_close(result, values_and_gradients(args, "reference", ids))
    assert_close(result[0], naive(*args, starts))


def test_extreme_gates():
    """Gates of up to e^-50 a token, among tokens that keep everything."""
    *tokens, decay, momentum, state = inputs(67)
    decay, momentum = (jnp.clip(jnp.where(g < -0.5, 100 * g, 0), -50) for g in (decay, momentum))
    args = (*tokens, decay, momentum, state)
    expected = values_and_gradients(args, "reference")
    assert_close(values_and_gradients(args, "xla"), expected)
    narrow = values_and_gradients([a.astype(jnp.float32) for a in args], "xla")
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(expected), strict=True):
        assert jnp.max(jnp.abs(a - b)) < 1e-5 * jnp.max(jnp.abs(b))


def test_without_momentum_it_is_a_delta_rule():
    """Which recalls from the memory before its decay."""
    q, k, v, p, decay, momentum, state = inputs()
    out, new = jax.jit(momentum_delta_rule)(q, k, v, p, decay, jnp.full_like(momentum, -1e3), state)
    expected = jax.jit(dplr)(q, k, v, -p, k, decay, state[:, :, 0])
    assert_close((out, new[:, :, 0]), expected)


def test_step_is_one_token():
    *tokens, state = inputs(1)
    out, new = momentum_delta_rule(*tokens, state, implementation="reference")
    assert_close(momentum_delta_rule_step(*[x[:, 0] for x in tokens], state), (out[:, 0], new))


def test_bfloat16_keeps_a_wide_state():
    tokens = inputs()[:6]
    out, state = jax.jit(momentum_delta_rule)(*[a.astype(jnp.bfloat16) for a in tokens])
    assert out.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    exact, _ = jax.jit(momentum_delta_rule)(*tokens)
    assert jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)) < 2e-2


def test_unknown_implementation():
    with pytest.raises(ValueError, match="momentum_delta_rule: no implementation 'abacus'"):
        momentum_delta_rule(*inputs(1), implementation="abacus")


def test_flops_do_not_grow_with_the_length():
    assert flops_per_token(1, 2, 16, 16) < flops_per_token(64, 2, 16, 16) == flops_per_token(4096, 2, 16, 16)


def test_layer_is_titans_with_a_linear_memory_and_chunks_of_one():
    """The same parameters in both layers, the initial memory being 0; over two documents."""
    cfg = momentum_delta.Config(8, heads=2, max_rate=0.3)
    other = titans.Config(8, heads=2, depth=1, chunk=1, clip=None, max_rate=0.3)
    params = momentum_delta.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 21, 8))
    ids = jnp.array([np.repeat([0, 1], [8, 13]), np.repeat([0, 1], [20, 1])])
    y, _, _ = jax.jit(momentum_delta.apply, static_argnums=1)(params, cfg, x, segment_ids=ids)
    params = {**params, "memory_0": jnp.zeros((2, 4, 4))}
    expected, _, _ = jax.jit(titans.apply, static_argnums=1)(params, other, x, segment_ids=ids)
    assert_close(y, expected)
