"""Where a text stands: what the model remembers of it, and what it expects next."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from zoo import lm


@struct.dataclass
class Session:
    """B texts that were read, or written, so far; a pytree of arrays that never changes, so that a copy is
    free and any number of continuations can begin at one."""

    state: Any  # of the model; leaves [repeats, B, ...]
    logits: Array  # [B, V] of the next token
    seen: Array  # [B, V] bool: which tokens the text has in it
    length: Array  # [B] int32: its tokens

    def __len__(self) -> int:
        return self.length.shape[0]

    def rows(self, index: Sequence[int]) -> "Session":
        """The texts of these numbers; `rows([0, 0, 0])` forks the first into three."""
        of = jnp.asarray(index, jnp.int32)
        state = jax.tree.map(lambda leaf: leaf[:, of], self.state)
        return Session(state, self.logits[of], self.seen[of], self.length[of])


def choose(rows: Array, yes: Any, no: Any) -> Any:
    """States of the model, `yes` where `rows [B]` and `no` elsewhere."""

    def one(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape(1, -1, *[1] * (a.ndim - 2)), a, b)

    return jax.tree.map(one, yes, no)


def template(cfg: lm.Config, batch: int) -> Session:
    """Shapes and dtypes of a session of `batch` texts; nothing is allocated."""

    def make() -> Session:
        scores = jnp.zeros((batch, cfg.vocab_size))
        length = jnp.zeros(batch, jnp.int32)
        return Session(lm.init_state(cfg, batch), scores, scores > 0, length)

    return jax.eval_shape(make)
