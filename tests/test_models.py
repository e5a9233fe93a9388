"""Whole models: one step at a time equals all at once, patterns and their tail, counts from the config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import TOLERANCE, assert_close, values_and_gradients

from zoo import classifier, lm, registry, trunk
from zoo.generation import generate

HYBRID = lm.Config(vocab_size=11, width=16, depth=5, pattern=("gla", "attention"), mlp="gelu")


def tokens(batch=2, length=13, vocab=11):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, vocab)


@pytest.mark.parametrize(("tie", "mlp"), [(True, "swiglu"), (False, "none")])
def test_language_model_by_steps(tie, mlp):
    cfg = dataclasses.replace(HYBRID, tie=tie, mlp=mlp)
    params, x = lm.init(jax.random.key(0), cfg), tokens()

    def by_steps(params, state):
        def body(state, token):
            logits, state = lm.step(params, cfg, token, state)
            return state, logits

        state, logits = jax.lax.scan(body, state, x.T)
        return jnp.swapaxes(logits, 0, 1), state

    def whole(params, state):
        return lm.apply(params, cfg, x, state)[:2]

    state = lm.init_state(cfg, 2)
    assert_close(
        values_and_gradients(whole, params, state),
        values_and_gradients(by_steps, params, state),
    )


def test_tail_of_a_pattern_that_does_not_divide_the_depth():
    assert [len(layers) * repeats for layers, repeats in HYBRID.groups] == [4, 1]
    names = [type(layer).__module__ for layer in HYBRID.layers]
    assert names == ["layers.gated_linear_attention", "layers.attention"] * 2 + names[:1]


def test_scanned_blocks_are_the_blocks_one_by_one():
    cfg = dataclasses.replace(HYBRID, depth=4, remat=False)
    params = trunk.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    expected = x
    for i in range(4):
        one = dataclasses.replace(cfg, depth=1, pattern=(cfg.layers[i],))
        block = jax.tree.map(lambda p, i=i: p[i // 2 : i // 2 + 1], params[0][i % 2])
        expected, _, _ = trunk.apply([[block]], one, expected)
    assert_close(trunk.apply(params, cfg, x)[0], expected)


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        cfg = dataclasses.replace(HYBRID, depth=depth)
        params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
        return len(jax.jit(lambda p, x: lm.apply(p, cfg, x)[0]).lower(params, tokens()).as_text())

    assert size(40) < 1.01 * size(4)


def test_documents_do_not_see_each_other():
    params, x = lm.init(jax.random.key(0), HYBRID), tokens()
    ids = jnp.array([[0] * 6 + [1] * 7, [0] * 13])
    packed, _, _ = lm.apply(params, HYBRID, x, segment_ids=ids)
    apart, _, _ = lm.apply(params, HYBRID, x[:1, 6:])
    np.testing.assert_allclose(packed[:1, 6:], apart, rtol=TOLERANCE, atol=TOLERANCE)


def test_counts_come_from_the_config(float32):
    params = lm.init(jax.random.key(0), HYBRID)
    assert lm.param_count(HYBRID) == sum(p.size for p in jax.tree.leaves(params))
    state = lm.init_state(HYBRID, 1)
    assert lm.state_bytes(HYBRID) == sum(s.nbytes for s in jax.tree.leaves(state))


def test_flops_of_the_linear_parts_are_what_xla_counts(float32):
    """Without a mixer's own arithmetic: attention over a span of 1 token, all else matrix products."""
    layer = registry.config("attention", 64, heads=1, window=1, rope_base=None)
    cfg = lm.Config(vocab_size=128, width=64, depth=1, pattern=(layer,), remat=False)
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
    x = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    compiled = jax.jit(lambda p, x: lm.apply(p, cfg, x)[0]).lower(params, x).compile()
    counted = compiled.cost_analysis()["flops"] / 32
    assert lm.flops_per_token(cfg, 32) == pytest.approx(counted, rel=0.05)


def test_compute_dtype_is_that_of_the_activations(float32):
    params, x = lm.init(jax.random.key(0), HYBRID), tokens()
    h, _, _ = lm.hidden(params, HYBRID, x, dtype=jnp.bfloat16)
    assert h.dtype == jnp.bfloat16
    assert lm.logits(params, HYBRID, h).dtype == jnp.float32


def test_classifier_by_steps_and_in_pieces():
    cfg = classifier.Config(features=3, classes=4, width=16, depth=2, pattern=("gla",))
    params = classifier.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 9, 3))
    whole, _, _ = classifier.apply(params, cfg, x)
    state = classifier.init_state(cfg, 2)
    assert classifier.state_bytes(cfg) == sum(s.nbytes for s in jax.tree.leaves(state)) // 4
    for t in range(9):
        logits, state = classifier.step(params, cfg, x[:, t], state)
    assert_close(logits, whole)
    _, state, _ = classifier.apply(params, cfg, x[:, :4])
    assert_close(classifier.apply(params, cfg, x[:, 4:], state)[0], whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ()}, "pattern=.* must be a tuple"),
        ({"pattern": ("nothing",)}, "unknown layer 'nothing'"),
        ({"pattern": (registry.config("gla", 8),)}, "width=8 in a model of width=16"),
        ({"width": 10}, "does not divide width=10"),
        ({"mlp": "relu"}, "mlp='relu'; choose from"),
        ({"depth": 0}, "depth=0"),
        ({"expansion": -1.0}, "expansion"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **fields)


def test_greedy_generation_is_the_argmax_of_the_whole_sequence(float32):
    params = jax.tree.map(lambda p: 3 * p, lm.init(jax.random.key(0), HYBRID))
    prompt = tokens()
    out = generate(params, HYBRID, prompt, 6, temperature=0)
    full = jnp.concatenate([prompt, out], 1)
    logits, _, _ = lm.apply(params, HYBRID, full)
    np.testing.assert_array_equal(out, jnp.argmax(logits[:, 12:-1], -1))


def test_sampling_is_seeded_and_top_1_is_greedy(float32):
    params = lm.init(jax.random.key(0), HYBRID)
    draw = [generate(params, HYBRID, tokens(), 8, key=jax.random.key(s)) for s in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert np.any(draw[0] != draw[2])
    top = generate(params, HYBRID, tokens(), 8, top_k=1)
    np.testing.assert_array_equal(top, generate(params, HYBRID, tokens(), 8, temperature=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": jnp.zeros((1, 0), jnp.int32)}, "prompt is empty"),
        ({"prompt": jnp.array([[11]])}, r"in \[0, 11\)"),
        ({"steps": 0}, "steps=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 12}, "top_k=12"),
    ],
)
def test_bad_generation_requests_are_refused(changes, message):
    params = lm.init(jax.random.key(0), HYBRID)
    with pytest.raises(ValueError, match=message):
        generate(params, HYBRID, **{"prompt": tokens(), "steps": 2, **changes})
