"""Blocks in pieces of the sequence: the numbers of the whole, and less to keep."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from zoo import blocks, lm, registry, trunk

ATTENTION = registry.config("attention", 16, heads=2, max_length=32)
PATTERNS = [("mamba", ATTENTION), ("titans", "slstm")]
# Within a piece, at the end of one, and an id that comes again in the next one.
IDS = np.array([[0] * 3 + [1] * 5 + [2] * 11, [7] * 8 + [3] * 8 + [7] * 3])


def model(pattern, **fields):
    return blocks.Config(width=16, depth=len(pattern), pattern=pattern, mlp="none", **fields)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: str(p[0]))
def test_in_pieces_is_the_whole(pattern):
    """19 tokens in pieces of 8, from a state that 3 tokens left, and one more step."""
    cfg, ids = model(pattern), jnp.asarray(IDS)
    params = trunk.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 22, 16))
    _, state, _ = jax.jit(lambda p, x: trunk.apply(p, cfg, x))(params, x[:, :3])

    def run(piece):
        def outputs(params, x, state):
            here = dataclasses.replace(cfg, piece=piece)
            y, state, _ = trunk.apply(params, here, x, state, segment_ids=ids)
            # Not the states: attention keeps what was before the document, and masks it.
            return y, trunk.step(params, here, x[:, 0], state)[0]

        return values_and_gradients(outputs, params, x[:, 3:], state)

    assert_close(run(8), run(0))


def test_no_state_is_the_empty_state():
    cfg = model(("gla",), piece=4)
    params = trunk.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 11, 16))
    run = jax.jit(lambda s: trunk.apply(params, cfg, x, s))
    assert_close(run(None), run(trunk.init_state(cfg, 2)))


def test_losses_of_the_pieces_are_weighed_by_their_tokens():
    cfg = model(("mixture_of_memories",))
    params = trunk.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 10, 16))

    @partial(jax.jit, static_argnums=2)
    def aux(x, state=None, piece=0):
        _, state, aux = trunk.apply(params, dataclasses.replace(cfg, piece=piece), x, state)
        return state, aux

    state, first = aux(x[:, :6])
    _, second = aux(x[:, 6:], state)
    _, both = aux(x, None, 6)
    assert set(both) == set(first) and len(both) > 0
    for name, value in both.items():
        np.testing.assert_allclose(value, 0.6 * first[name] + 0.4 * second[name], rtol=1e-12)


def test_what_is_kept_does_not_grow_with_the_inside_of_a_layer(float32):
    cfg = lm.Config(vocab_size=11, width=32, depth=2, pattern=("mamba",))
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))

    def kept(piece):
        here = dataclasses.replace(cfg, piece=piece)
        loss = jax.grad(lambda p, x: jnp.sum(lm.hidden(p, here, x)[0] ** 2))
        program = jax.jit(loss).lower(params, jax.ShapeDtypeStruct((1, 4096), jnp.int32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert kept(256) < kept(0) / 2


def test_bad_pieces_are_refused():
    with pytest.raises(ValueError, match="piece=-1 must be an integer >= 0"):
        model(("gla",), piece=-1)
