"""Writing: token after token in one compiled loop, with a state that does not grow."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from zoo import lm
from zoo.generation import layout
from zoo.generation.sampling import Sampling
from zoo.generation.session import Session, choose

Sampler = Callable[[Array, Array, Array], Array]
NOTHING = -1  # in the place of a token after a row's end


class Rules(NamedTuple):
    """How tokens are chosen and where rows end."""

    keys: Array  # [B]
    sampler: Sampling | Sampler
    stop: tuple[int, ...] = ()  # ids that end a row; they are its last token
    limit: int | None = None  # ids from here on are never produced
    dtype: str | None = None  # of activations
    keep: bool = False  # rows may end before others, and keep their state then


class Chunk(NamedTuple):
    session: Session
    tokens: Array  # [B, n], NOTHING after a row's end
    stopped: Array  # [B] bool: by a stop token
    sound: Array  # [B] bool: all logits that a token was drawn from were numbers


class _Carry(NamedTuple):
    time: Array
    chunk: Chunk


def _advance(params, cfg: lm.Config, session: Session, token: Array, active: Array, keep: bool, dtype):
    """After one more token in every `active` row; the others stay if `keep`, else they come to nothing.

    The state of `session` is bare (see `layout`).
    """
    old = layout.dressed(cfg, session.state)
    logits, state = lm.step(params, cfg, token, old, dtype=dtype)
    if keep:
        state = choose(active, state, old)
        logits = jnp.where(active[:, None], logits, session.logits)
    here = jnp.arange(token.shape[0])
    return Session(
        state=layout.bare(cfg, state),
        logits=logits.astype(session.logits.dtype),
        seen=session.seen.at[here, token].max(active),
        length=session.length + active,
    )


@partial(jax.jit, static_argnames=("cfg", "stacked", "size", "stop", "limit", "dtype", "keep", "draw"))
def _write(
    params, cfg: lm.Config, session, left, keys, settings, stacked, stop, limit, dtype, size, keep, draw
):
    """Up to `left [B]` tokens in each row, at most `size`; it ends when all rows have.

    `params` are those of `cfg`, the state in `session` that of `stacked`, which may be laid out otherwise.
    """
    sampler = draw or settings
    alike, state = layout.alike(cfg, stacked), session.state
    state = state if alike else layout.unstacked(stacked, state)
    session = dataclasses.replace(session, state=layout.bare(cfg, state))

    def live(carry: _Carry) -> Array:
        return (carry.time < left) & ~carry.chunk.stopped

    def one(key: Array, length: Array, logits: Array, seen: Array) -> Array:
        return sampler(jax.random.fold_in(key, length), logits[:limit], seen[:limit])

    def body(carry: _Carry) -> _Carry:
        time, (session, tokens, stopped, sound) = carry
        active = live(carry)
        token = jax.vmap(one)(keys, session.length, session.logits, session.seen).astype(jnp.int32)
        tokens = tokens.at[:, time].set(jnp.where(active, token, NOTHING))
        stopped = stopped | (active & jnp.isin(token, jnp.array(stop, jnp.int32)))
        sound = sound & (jnp.isfinite(session.logits[:, :limit]).all(-1) | ~active)
        session = _advance(params, cfg, session, token, active, keep, dtype)
        return _Carry(time + 1, Chunk(session, tokens, stopped, sound))

    rows = left.shape[0]
    none = jnp.zeros(rows, bool)
    first = Chunk(session, jnp.full((rows, size), NOTHING, jnp.int32), none, ~none)
    done = jax.lax.while_loop(
        lambda carry: jnp.any(live(carry)), body, _Carry(jnp.zeros((), jnp.int32), first)
    )
    session, state = done.chunk.session, layout.dressed(cfg, done.chunk.session.state)
    state = state if alike else layout.stacked(stacked, state)
    return done.chunk._replace(session=dataclasses.replace(session, state=state))


def write(
    model: tuple[Any, lm.Config], cfg: lm.Config, session: Session, left: np.ndarray, rules: Rules, size: int
) -> Chunk:
    """One chunk: up to `left` tokens in each row, none more than `size`.

    `model` are parameters and Config as `layout.model` gives them, `cfg` that of the session's state.
    Row b draws with its own key and its own number of tokens, so that neither its neighbours nor the size of
    chunks make a difference. Raises RuntimeError where logits are not finite.
    """
    plain = isinstance(rules.sampler, Sampling)
    chunk = _write(
        *model,
        session,
        jnp.asarray(np.minimum(left, size), jnp.int32),
        rules.keys,
        rules.sampler if plain else None,
        stacked=cfg,
        stop=rules.stop,
        limit=rules.limit,
        dtype=rules.dtype,
        size=size,
        keep=rules.keep,
        draw=None if plain else rules.sampler,
    )
    sound = np.asarray(chunk.sound)
    if not sound.all():
        raise RuntimeError(f"generate: the logits of row {int(np.argmin(sound))} are not finite")
    return chunk
