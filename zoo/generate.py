"""Generation: the prompt in parallel form, then one token at a time with O(1) state, in one compiled loop."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require
from zoo import lm


def _choose(key: Array, logits: Array, temperature: float, top_k: int | None, limit: int) -> Array:
    """The next token `[B]`, below `limit`: the best one at temperature 0, else a sample."""
    logits = logits[:, :limit]
    if temperature == 0:
        return jnp.argmax(logits, -1)
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature)


@partial(jax.jit, static_argnames=("cfg", "steps", "temperature", "top_k", "limit"))
def _generate(params, cfg, prompt, key, *, steps, temperature, top_k, limit):
    h, state, _ = lm.hidden(params, cfg, prompt)
    logits = lm.logits(params, cfg, h[:, -1])

    def body(carry, key):
        logits, state = carry
        token = _choose(key, logits, temperature, top_k, limit)
        return lm.step(params, cfg, token, state), token

    _, tokens = jax.lax.scan(body, (logits, state), jax.random.split(key, steps))
    return tokens.T


def generate(
    params,
    cfg: lm.Config,
    prompt: Array,
    steps: int,
    *,
    key: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    limit: int | None = None,
) -> Array:
    """Continue `prompt [B, T]` (T >= 1) by `steps` tokens: `[B, steps]`.

    `temperature=0` is greedy; `top_k` samples among the k most likely tokens; ids from `limit` on, which a
    padded vocabulary has, are never produced. `key` defaults to `jax.random.key(0)`. Raises ValueError for
    an empty prompt, token ids outside the vocabulary or nonsensical settings.
    """
    prompt = jnp.atleast_2d(jnp.asarray(prompt))
    require(prompt.shape[1] >= 1, "generate: the prompt is empty; give at least one token")
    require(
        bool((prompt >= 0).all() and (prompt < cfg.vocab_size).all()),
        f"generate: token ids must be in [0, {cfg.vocab_size})",
    )
    require(steps >= 1, f"generate: steps={steps} must be at least 1")
    require(temperature >= 0, f"generate: temperature={temperature} must be at least 0")
    limit = cfg.vocab_size if limit is None else limit
    require(1 <= limit <= cfg.vocab_size, f"generate: limit={limit} must be in [1, {cfg.vocab_size}]")
    require(top_k is None or 1 <= top_k <= limit, f"generate: top_k={top_k} must be in [1, {limit}]")
    key = jax.random.key(0) if key is None else key
    settings = {"steps": steps, "temperature": temperature, "top_k": top_k, "limit": limit}
    return _generate(params, cfg, prompt, key, **settings)
