"""From logits to a token: pure functions of one row, put together as one likes.

A filter takes logits `[V]` and gives logits in which some are -inf; a sampler takes `(key, logits, seen)`,
`seen [V]` being the tokens that the row has in it, and gives a token. `Sampling` is the sampler of the usual
settings; any function of that signature does in its place.

Sources: Fan et al. 2018 (arXiv 1805.04833, top-k), Holtzman et al. 2020 (arXiv 1904.09751, top-p), Nguyen et
al. 2024 (arXiv 2407.01082, min-p), Keskar et al. 2019 (arXiv 1909.05858, the penalty; there for logits of one
sign, here as everybody reads it: a logit above 0 is divided, one below multiplied).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require


def penalised(logits: Array, seen: Array, penalty) -> Array:
    """Tokens seen before become less likely for a `penalty` above 1, more likely below."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _keep(logits: Array, index: Array, keep: Array | bool) -> Array:
    """The logits at `index` where `keep`, -inf elsewhere."""
    return jnp.where(jnp.zeros(logits.shape, bool).at[index].set(keep), logits, -jnp.inf)


def top_k(logits: Array, k: int) -> Array:
    """The k largest stay; of equal ones the lower ids."""
    return _keep(logits, jax.lax.top_k(logits, k)[1], True)


def top_p(logits: Array, p) -> Array:
    """The fewest of the most likely tokens stay that together have probability p; of equal ones lower ids."""
    order = jnp.argsort(-logits)
    likely = jax.nn.softmax(logits[order])
    return _keep(logits, order, jnp.cumsum(likely) - likely < p)


def min_p(logits: Array, p) -> Array:
    """Tokens stay that are at least p times as likely as the likeliest."""
    return jnp.where(logits >= jnp.max(logits) + jnp.log(p), logits, -jnp.inf)


def greedy(key: Array, logits: Array, seen: Array) -> Array:
    """The largest; of equal ones the lowest id."""
    return jnp.argmax(logits)


@struct.dataclass
class Sampling:
    """Penalty, temperature, top-k, top-p, min-p, in this order; None leaves a part out.

    Numbers are arguments of a compiled program, so that another temperature does not compile another one.
    """

    temperature: float | None = 1.0  # None or 0 is greedy
    top_k: int | None = struct.field(default=None, pytree_node=False)
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __call__(self, key: Array, logits: Array, seen: Array) -> Array:
        """A token `[]` from `logits [V]`."""
        if self.repetition_penalty is not None:
            logits = penalised(logits, seen, self.repetition_penalty)
        if self.temperature is None:
            return greedy(key, logits, seen)
        logits = logits / self.temperature
        filters: tuple = ((top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p))
        for keep, setting in filters:
            if setting is not None:
                logits = keep(logits, setting)
        return jax.random.categorical(key, logits)


def checked(settings: Sampling, limit: int) -> Sampling:
    """`settings` for a vocabulary of `limit` tokens, with None for what does nothing.

    Raises ValueError, naming the setting, for numbers that mean nothing.
    """
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = getattr(settings, name)
        real = value is None or (isinstance(value, int | float) and math.isfinite(value))
        require(real, f"generate: {name}={value!r} must be a finite number")
    temperature, penalty, k = settings.temperature, settings.repetition_penalty, settings.top_k
    require(
        temperature is None or temperature >= 0, f"generate: temperature={temperature} must be at least 0"
    )
    require(penalty is None or penalty > 0, f"generate: repetition_penalty={penalty} must be above 0")
    ok = k is None or (isinstance(k, int) and 1 <= k <= limit)
    require(ok, f"generate: top_k={k} must be an integer in [1, {limit}]")
    for name in ("top_p", "min_p"):
        value = getattr(settings, name)
        require(value is None or 0 < value <= 1, f"generate: {name}={value} must be in (0, 1]")
    return dataclasses.replace(
        settings,
        temperature=temperature or None,
        top_k=None if k == limit else k,
        top_p=None if settings.top_p == 1 else settings.top_p,
        repetition_penalty=None if penalty == 1 else penalty,
    )
