"""Padding never touches a state: of every layer, a batch of unequal prompts is each prompt alone, to 1e-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sessions
from chains import assert_close
from rows import FIRST_ROWS, ROWS, WIDTH

from zoo import lm
from zoo.generation import generate

VOCAB, STEPS = 11, 9
# Shorter and longer than chunks, windows and segments of the rows, which are 3 to 9 tokens long.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 9, 8, 7], [3, 1, 4, 1, 5]]

marked = [pytest.param(name, marks=() if name in FIRST_ROWS else pytest.mark.deep) for name in ROWS]


@pytest.mark.timeout(600)  # three programs, of which some layers' take long to compile
@pytest.mark.parametrize("name", marked)
def test_the_shorter_prompt_is_what_it_is_alone(name):
    """Its tokens, its expectations and its state, read at once without padding or generation."""
    cfg = lm.Config(vocab_size=VOCAB, width=WIDTH, depth=1, pattern=(ROWS[name],), mlp="none")
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = jax.jit(lambda: lm.init(jax.random.key(0, impl="rbg"), cfg))()
    params = jax.tree.map(lambda p: p + 0.1 * random.standard_normal(p.shape), params)
    params["w_embed"] = jnp.asarray(random.standard_normal((VOCAB, WIDTH)))
    found, session = generate(params, cfg, PROMPTS, STEPS, temperature=0, with_session=True)
    text = jnp.array([[*PROMPTS[1], *found[1]]])
    logits, state, _ = jax.jit(lambda params, x: lm.apply(params, cfg, x))(params, text)
    np.testing.assert_array_equal(found[1], jnp.argmax(logits[0, len(PROMPTS[1]) - 1 : -1], -1))
    own = session.rows([1])
    assert_close(own.logits, logits[:, -1])
    assert_close(sessions.visible(own.state), sessions.visible(state))
    jax.clear_caches()
