"""Ops of a few lines each: XLA form against definition, values and gradients, segments and states too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from pallas_kernels import chunks
from pallas_kernels.attention import attention, empty_cache
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.short_conv import short_conv


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def segments(length, batch=2):
    return jnp.sort(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 1)


def decay(form, length, scale):
    shape = {"constant": (4,), "head": (2, length, 4), "channel": (2, length, 4, 8)}
    return None if form == "none" else -scale * jax.random.exponential(jax.random.key(4), shape[form])


@pytest.mark.parametrize("form", ["none", "constant", "head", "channel"])
@pytest.mark.parametrize(("length", "packed"), [(1, True), (32, False), (75, True)])
def test_gated_linear_attention(form, length, packed):
    q, k, v = normal(0, 2, length, 2, 8), normal(1, 2, length, 2, 8), normal(2, 2, length, 4, 6)
    state, ids = normal(3, 2, 4, 8, 6), segments(length) if packed else None
    g = decay(form, length, 1.0)

    def run(implementation):
        def op(q, k, v, g, state):
            return gated_linear_attention(q, k, v, g, state, segment_ids=ids, implementation=implementation)

        return values_and_gradients(op, q, k, v, g, state)

    assert_close(run("xla"), run("reference"))


@pytest.mark.parametrize("rows", [1, 512])
def test_groups_of_chunks(rows, monkeypatch):
    """One chunk of 32 at a time, or two groups of three."""
    monkeypatch.setitem(chunks.ROWS, "cpu", rows)
    q, k, v, state = (
        normal(0, 2, 180, 2, 8),
        normal(1, 2, 180, 2, 8),
        normal(2, 2, 180, 2, 6),
        normal(3, 2, 2, 8, 6),
    )
    g, p, ids = decay("channel", 180, 0.1)[..., :2, :], 0.1 * k, segments(180)

    def run(implementation):
        how = {"segment_ids": ids, "implementation": implementation}

        def ops(q, k, v, p, g, state):
            return gated_linear_attention(q, k, v, g, state, **how), gated_delta_rule(
                q, 0.1 * k, v, p, g, state, **how
            )

        return values_and_gradients(ops, q, k, v, p, g, state)

    assert_close(run("xla"), run("reference"))


# At -50 a step the running sum of a chunk reaches -1,600, where float32 is spaced by 1.2e-4.
@pytest.mark.parametrize(("scale", "bound"), [(0.0, 1e-5), (5.0, 1e-5), (50.0, 1e-4)])
def test_channel_decay_never_overflows(scale, bound, float32):
    """64 steps at -5 each would need e^320; every exponent is formed as a difference <= 0 instead."""
    q, k, v = normal(0, 1, 96, 2, 8), normal(1, 1, 96, 2, 8), normal(2, 1, 96, 2, 8)
    g = -scale * jax.random.uniform(jax.random.key(3), (1, 96, 2, 8))

    def loss(q, k, v, g, implementation):
        out, state = gated_linear_attention(q, k, v, g, implementation=implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(state**2)

    fast, slow = (
        jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)(q, k, v, g, i) for i in ("xla", "reference")
    )
    for a, b in zip(fast, slow, strict=True):
        assert np.all(np.isfinite(a))
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


def test_key_heads_must_divide_value_heads():
    q, v = normal(0, 1, 4, 2, 8), normal(1, 1, 4, 3, 8)
    with pytest.raises(ValueError, match="3 value heads over 2 key heads"):
        gated_linear_attention(q, q, v)
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        attention(v, q, q, 4)


@pytest.mark.parametrize("length", [1, 3, 75])
@pytest.mark.parametrize(("packed", "masked"), [(False, False), (True, False), (True, True)])
def test_short_conv(length, packed, masked):
    x, weight, state = normal(0, 2, length, 3), normal(1, 4, 3), normal(2, 2, 3, 3)
    ids = segments(length) if packed else None
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, length)) if masked else None

    def run(implementation):
        def op(x, weight, state):
            return short_conv(x, weight, state, segment_ids=ids, mask=mask, implementation=implementation)

        return values_and_gradients(op, x, weight, state)

    assert_close(run("xla"), run("reference"))


def test_masked_tokens_are_no_part_of_the_stream():
    x, weight = normal(0, 1, 20, 3), normal(1, 4, 3)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (1, 20))
    out, state = short_conv(x, weight, mask=mask)
    alone, alone_state = short_conv(x[:, mask[0]], weight)
    assert_close((out[:, mask[0]], state), (alone, alone_state))
    assert np.all(out[:, ~mask[0]] == 0)


@pytest.mark.parametrize(
    ("length", "span", "packed"),
    [(1, 5, False), (37, 400, True), (300, 1, False), (300, 5, True), (300, 400, False)],
)
def test_attention(length, span, packed):
    q, k, v = normal(0, 2, length, 4, 6), normal(1, 2, length, 2, 6), normal(2, 2, length, 2, 3)
    past = empty_cache(2, span, 2, 6, 3)
    _, past = attention(q[:, :7], k[:, :7], v[:, :7], span, past)
    ids = segments(length) if packed else None

    def run(implementation):
        def op(q, k, v, past):
            out, cache = attention(q, k, v, span, past, segment_ids=ids, implementation=implementation)
            # Slots that no later query can see may differ: look at the cache through a query.
            return out, attention(q[:, :1], k[:, :1], v[:, :1], span, cache, implementation="reference")[0]

        return values_and_gradients(op, q, k, v, past)

    assert_close(run("xla"), run("reference"))


def test_attention_is_softmax_of_everything_before():
    """Against the textbook matrix form."""
    q, k, v = normal(0, 1, 9, 1, 4), normal(1, 1, 9, 1, 4), normal(2, 1, 9, 1, 4)
    logits = jnp.where(jnp.tril(jnp.ones((9, 9), bool)), q[0, :, 0] @ k[0, :, 0].T, -jnp.inf)
    assert_close(attention(q, k, v, 9)[0][0, :, 0], jax.nn.softmax(logits) @ v[0, :, 0])
