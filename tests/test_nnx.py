"""The adapter shows the functions and nothing else."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import assert_close
from flax import linen, nnx
from rows import ROWS

import zoo.nnx
from zoo import classifier, generation, lm, registry
from zoo.nnx import Memory, Module

CFG = lm.Config(vocab_size=11, width=8, depth=2, pattern=("gla",), mlp="none")
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)


@pytest.fixture(scope="module")
def params():
    return lm.init(jax.random.key(0), CFG)


@pytest.fixture
def model(params):
    return Module(CFG, params=params, batch=2)


def test_it_computes_what_the_functions_do(model, params):
    """apply from nothing; apply that goes on; steps."""
    logits, state, _ = lm.apply(params, CFG, TOKENS)
    assert_close(model(TOKENS), logits)
    assert_close(model.state.get_value(), lm.init_state(CFG, 2))
    assert_close(model(TOKENS[:, :4], carry=True), logits[:, :4])
    assert_close(model.step(TOKENS[:, 4]), logits[:, 4])
    assert_close(model.step(TOKENS[:, 5]), logits[:, 5])
    assert_close(model.state.get_value(), state)
    model.reset(2)
    assert_close(model.step(TOKENS[:, 0]), logits[:, 0])


@pytest.mark.parametrize("name", ["mamba", "attention-window", "mixture_of_memories", "s5"])
def test_layers_too(name):
    cfg = ROWS[name]
    layer = Module(cfg, rngs=nnx.Rngs(3), batch=2)
    x = jax.random.normal(jax.random.key(2), (2, 5, cfg.width))
    y, state, aux = registry.module(cfg).apply(layer.functional, cfg, x)
    assert_close(layer(x, carry=True, with_aux=True), (y, aux))
    assert_close(layer.state.get_value(), state)


def test_segments_reach_the_layer(model, params):
    ids = jnp.array([[0, 0, 1, 1, 1, 1], [0] * 6])
    assert_close(model(TOKENS, segment_ids=ids), lm.apply(params, CFG, TOKENS, segment_ids=ids)[0])


def test_other_models():
    cfg = classifier.Config(features=3, classes=4, width=8, depth=1, pattern=("gla",))
    model = Module(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 4, 3))
    assert_close(model(x), classifier.apply(model.functional, cfg, x)[0])


def test_rngs_draw_what_init_draws(params):
    drawn = Module(CFG, rngs=nnx.Rngs(params=7)).functional
    assert_close(drawn, lm.init(nnx.Rngs(params=7).params(), CFG))
    assert jax.tree.structure(drawn) == jax.tree.structure(params)


def test_split_and_merge(model, params):
    graph, weights, memory = nnx.split(model, nnx.Param, Memory)
    assert len(jax.tree.leaves(weights)) == len(jax.tree.leaves(params))
    assert len(jax.tree.leaves(memory)) == len(jax.tree.leaves(lm.init_state(CFG, 2)))
    doubled = nnx.merge(graph, jax.tree.map(lambda p: 2 * p, weights), memory)
    assert_close(doubled.functional, jax.tree.map(lambda p: 2 * p, params))
    assert_close(doubled(TOKENS), lm.apply(doubled.functional, CFG, TOKENS)[0])


def test_jit_carries_the_state(model, params):
    logits, state, _ = lm.apply(params, CFG, TOKENS)
    run = nnx.jit(lambda model, x: model(x, carry=True))
    assert_close(jnp.concatenate([run(model, TOKENS[:, :3]), run(model, TOKENS[:, 3:])], 1), logits)
    assert_close(model.state.get_value(), state)


def test_gradients_and_an_optimizer(model, params):
    def loss(logits):
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])

    value, found = nnx.value_and_grad(lambda model: loss(model(TOKENS)))(model)
    expected = jax.value_and_grad(lambda p: loss(lm.apply(p, CFG, TOKENS)[0]))(params)
    assert_close((value, jax.tree.leaves(found)), (expected[0], jax.tree.leaves(expected[1])))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, found)
    assert_close(model.functional, jax.tree.map(lambda p, g: p - 0.1 * g, params, expected[1]))


def test_tabulate_counts_the_parameters(model):
    table = nnx.tabulate(model, TOKENS, console_kwargs={"force_terminal": False, "width": 160})
    state = sum(leaf.size for leaf in jax.tree.leaves(lm.init_state(CFG, 2)))
    assert f"{lm.param_count(CFG):,}" in table and f"{state:,}" in table and "Memory" in table


def test_generation_takes_its_parameters(model, params):
    found = generation.generate(model.functional, CFG, TOKENS, 3)
    np.testing.assert_array_equal(found, generation.generate(params, CFG, TOKENS, 3))


def test_the_lines_for_linen_do_what_they_say(params):
    """As the docstring has them."""
    code = textwrap.dedent(zoo.nnx.__doc__[zoo.nnx.__doc__.index("    class Linen") :])
    names = {"linen": linen, "lm": lm, "__name__": "docstring"}
    exec(code, names)
    model = names["Linen"](CFG)
    variables = model.init(jax.random.key(0), TOKENS)
    assert jax.tree.structure(variables["params"]["zoo"]) == jax.tree.structure(params)
    expected = lm.apply(variables["params"]["zoo"], CFG, TOKENS)[0]
    assert_close(model.apply(variables, TOKENS), expected)
    gradient = jax.grad(lambda v: model.apply(v, TOKENS).sum())(variables)
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("settings", [{}, {"rngs": nnx.Rngs(0), "params": {}}])
def test_parameters_come_from_one_place(settings):
    with pytest.raises(ValueError, match="give either rngs or params"):
        Module(CFG, **settings)


def test_what_is_no_config_is_refused():
    with pytest.raises(ValueError, match="not a layer config"):
        Module(object(), rngs=nnx.Rngs(0))
