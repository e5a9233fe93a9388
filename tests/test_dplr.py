"""Diagonal plus low rank: the chunkwise form against NumPy's recurrence, and the ops that it contains."""

import functools

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dplr import dplr, dplr_step, flops_per_token
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention

B, H, K, V = 2, 2, 6, 5
DECAYS = {"none": None, "constant": (H,), "head": (B, -1, H), "channel": (B, -1, H, K)}


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def inputs(length=37, decay="channel", strength=1.0, separate=True):
    """q, k, v, a, b, log decay and an initial state; b a^T takes away less than all of what a recalls."""
    keys = jax.random.split(jax.random.key(length), 7)
    q, k, a = (unit(jax.random.normal(key, (B, length, H, K))) for key in keys[:3])
    v = jax.random.normal(keys[3], (B, length, H, V))
    b = -jax.random.uniform(keys[4], (B, length, H, K)) * a
    shape = DECAYS[decay]
    if shape is not None:
        shape = tuple(length if n == -1 else n for n in shape)
    log_decay = None if shape is None else -strength * jax.random.uniform(keys[5], shape)
    return q, k if separate else None, v, a, b, log_decay, jax.random.normal(keys[6], (B, H, K, V))


def values_and_gradients(args, implementation, segment_ids=None):
    return chains.values_and_gradients(
        functools.partial(dplr, segment_ids=segment_ids, implementation=implementation), *args
    )


assert_close = functools.partial(chains.assert_close, tolerance=1e-10)


def naive(q, k, v, a, b, log_decay, state, starts=()):
    """The transition as a matrix, token by token, in NumPy; a new document at every token of `starts`."""
    q, k, v, a, b, state = (np.asarray(x) for x in (q, b if k is None else k, v, a, b, state))
    length = q.shape[1]
    decay = 0 if log_decay is None else np.asarray(log_decay)
    decay = decay[..., None] if np.ndim(decay) in (1, 3) else decay
    decay = np.broadcast_to(np.exp(decay), (B, length, H, K))
    state, out = state.copy(), np.zeros((B, length, H, V))
    for n in range(B):
        for h in range(H):
            s = state[n, h]
            for t in range(length):
                s = np.zeros_like(s) if t in starts else s
                at = (n, t, h)
                transition = np.diag(decay[at]) + np.outer(b[at], a[at])
                s = transition @ s + np.outer(k[at], v[at])
                out[at] = s.T @ q[at]
            state[n, h] = s
    return out, state


FORMS = [("none", False), ("constant", True), ("head", False), ("channel", True)]


@pytest.mark.parametrize(("decay", "separate"), FORMS)
def test_equals_the_recurrence(decay, separate):
    args = inputs(decay=decay, separate=separate)
    result = values_and_gradients(args, "xla")
    assert_close(result, values_and_gradients(args, "reference"))
    assert_close(result[0], naive(*args))


@pytest.mark.parametrize("length", [1, 65])
def test_every_length(length):
    args = inputs(length)
    assert_close(values_and_gradients(args, None), values_and_gradients(args, "reference"))


@pytest.mark.parametrize(("decay", "separate"), [("head", True), ("channel", False)])
def test_documents_are_apart(decay, separate):
    """Boundaries inside and at the end of a chunk, and a document of one token; an id that comes again."""
    args = inputs(decay=decay, separate=separate)
    starts = [9, 32, 33]
    ids = jnp.broadcast_to(jnp.array(np.repeat([4, 7, 4, 7], np.diff([0, *starts, 37]))), (B, 37))
    result = values_and_gradients(args, "xla", ids)
    assert_close(result, values_and_gradients(args, "reference", ids))
    assert_close(result[0], naive(*args, starts))


@pytest.mark.deep
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_extreme_decay(decay):
    """Decays of up to e^-50 a token, among tokens that keep everything."""
    *tokens, log_decay, state = inputs(67, decay)
    log_decay = jnp.where(log_decay < -0.5, 100 * log_decay, 0)
    args = (*tokens, jnp.clip(log_decay, -50), state)
    expected = values_and_gradients(args, "reference")
    assert_close(values_and_gradients(args, "xla"), expected)
    narrow = values_and_gradients([a.astype(jnp.float32) for a in args], "xla")
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(expected), strict=True):
        assert jnp.max(jnp.abs(a - b)) < 1e-5 * jnp.max(jnp.abs(b))


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_contains_the_delta_rule(decay):
    """b = k and a = -e^g p, or k = b: what the delta rule recalls after the decay is recalled before it."""
    q, k, v, p, _, log_decay, state = inputs(decay=decay)
    expected = jax.jit(gated_delta_rule)(q, k, v, p, log_decay, state)
    g = 0 if log_decay is None else log_decay if log_decay.ndim == 4 else log_decay[..., None]
    for key in (k, None):
        assert_close(jax.jit(dplr)(q, key, v, -jnp.exp(g) * p, k, log_decay, state), expected)


def test_without_recall_it_is_linear_attention():
    q, k, v, a, b, log_decay, state = inputs()
    expected = gated_linear_attention(q, k, v, log_decay, state)
    for pair in ((jnp.zeros_like(a), b), (a, jnp.zeros_like(b))):
        assert_close(jax.jit(dplr)(q, k, v, *pair, log_decay, state), expected)


def test_correlated_keys():
    """Reflections along keys that are more and more alike (a = -2k, b = k, no decay), in float32."""
    keys = jax.random.split(jax.random.key(5), 5)
    rho = jnp.array([0.0, 0.5, 0.9, 1.0])[:, None, None, None]
    noise, common = (
        unit(jax.random.normal(keys[i], shape)) for i, shape in enumerate([(4, 70, 1, 16), (16,)])
    )
    k = unit(jnp.sqrt(1 - rho) * noise + jnp.sqrt(rho) * common)
    q, v = (jax.random.normal(key, k.shape) for key in keys[2:4])
    args = (q, k, v, -2 * k, k, None, jax.random.normal(keys[4], (4, 1, 16, 16)))
    expected = values_and_gradients(args, "reference")
    assert_close(values_and_gradients(args, "xla"), expected)
    narrow = values_and_gradients([None if a is None else a.astype(jnp.float32) for a in args], "xla")
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(expected), strict=True):
        assert jnp.max(jnp.abs(a - b)) < 3e-5 * jnp.max(jnp.abs(b))


@pytest.mark.parametrize("decay", DECAYS)
def test_step_is_one_token(decay):
    q, k, v, a, b, log_decay, state = inputs(1, decay)
    one = log_decay if decay in ("none", "constant") else log_decay[:, 0]
    for key in (k, None):
        out, new = dplr(q, key, v, a, b, log_decay, state, implementation="reference")
        stepped = dplr_step(*jax.tree.map(lambda x: x[:, 0], (q, key, v, a, b)), one, state)
        assert_close(stepped, (out[:, 0], new))


def test_bfloat16_keeps_a_wide_state():
    args = inputs()
    narrow = [a.astype(jnp.bfloat16) for a in args[:6]]
    out, state = jax.jit(dplr)(*narrow)
    assert out.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    exact, _ = jax.jit(dplr)(*args[:6])
    assert jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)) < 2e-2


def test_unknown_implementation():
    with pytest.raises(ValueError, match="dplr: no implementation 'abacus'"):
        dplr(*inputs(1), implementation="abacus")


def test_flops_tell_the_forms_apart():
    def count(**form):
        return flops_per_token(4096, 2, 16, 16, **form)

    assert count(channels=False, separate_key=False) < count(channels=False) < 2 * count(channels=True)
    assert count(channels=True) < count(channels=False)
