"""Reading: prompts in parallel form, in pieces of bounded memory, rows of unequal length side by side.

Prompts end together: shorter ones have padding in front. Fresh texts are one call of the model in which the
padding is a document of its own (`segment_ids`), so that every layer begins the text with an empty state,
ring buffer and position 0. Texts that go on from a state cannot have anything in front of them; there each
row's first tokens are read one by one until a whole number of pieces is left, and rows whose turn has not
come keep their state.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.checks import require
from zoo import lm
from zoo.generation.session import Session, choose

PIECE = 4096  # tokens read at once, where nothing else is said
ROUND = 64  # of texts of unequal length that go on from a state


def rows_of(prompt: Any, vocab_size: int) -> list[np.ndarray]:
    """`prompt`, one row of tokens or several, as 1-D arrays. Raises ValueError for what are no tokens."""
    if not hasattr(prompt, "ndim"):
        nested = len(prompt) > 0 and all(np.ndim(row) == 1 for row in prompt)
        prompt = list(prompt) if nested else np.asarray(prompt)
    if hasattr(prompt, "ndim"):
        require(prompt.ndim in (1, 2), f"generate: a prompt has 1 or 2 axes, not {prompt.ndim}")
        prompt = np.atleast_2d(np.asarray(prompt))
    rows = [np.asarray(row) for row in prompt]
    require(len(rows) > 0, "generate: no prompt is given")
    for row in rows:
        ok = row.size == 0 or np.issubdtype(row.dtype, np.integer)
        require(ok, f"generate: a prompt holds token ids, not {row.dtype}")
        inside = bool(((row >= 0) & (row < vocab_size)).all())
        require(inside, f"generate: token ids must be in [0, {vocab_size})")
    return [row.astype(np.int32) for row in rows]


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _read(params, cfg: lm.Config, tokens: Array, ids, begins, state, active, *, dtype):
    """One piece `[B, P]`: `(logits of its last token [B, V], state)`.

    Rows that `begin` here do so from the empty state; only `active` rows move; None for all or none.
    """
    old = state
    if begins is not None:
        state = choose(begins, lm.init_state(cfg, tokens.shape[0]), state)
    h, state, _ = lm.hidden(params, cfg, tokens, state, segment_ids=ids, dtype=dtype)
    if active is not None:
        state = choose(active, state, old)
    return lm.logits(params, cfg, h[:, -1]), state


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _steps(params, cfg: lm.Config, tokens: Array, count: Array, state, logits: Array, *, dtype):
    """The first `count [B]` tokens of every row of `tokens [B, P]`, one by one: `(logits, state)`."""

    def body(carry):
        t, logits, state = carry
        active = t < count
        new, moved = lm.step(params, cfg, tokens[:, t], state, dtype=dtype)
        new = jnp.where(active[:, None], new.astype(logits.dtype), logits)
        return t + 1, new, choose(active, moved, state)

    _, logits, state = jax.lax.while_loop(lambda c: c[0] < jnp.max(count), body, (0, logits, state))
    return logits, state


def _padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """`[B, length]`, zeros in front."""
    return np.stack([np.pad(row, (length - len(row), 0)) for row in rows])


def _cuts(length: int, piece: int) -> list[slice]:
    """Pieces of time; what is left over comes first, so that all others share a program."""
    first = length % piece or min(piece, length)
    ends = range(first, length + 1, piece)
    return [slice(max(end - piece, 0), end) for end in ends]


def _fresh(params, cfg, rows, piece: int, dtype):
    """New texts: `(logits, state)`."""
    lengths = np.array([len(row) for row in rows])
    require(bool(lengths.min() >= 1), "generate: the prompt is empty; give at least one token")
    length = int(lengths.max())
    tokens = _padded(rows, length)
    own = np.arange(length) >= (length - lengths)[:, None]
    ids = None if own.all() else own.astype(np.int32)
    if length <= piece:
        return _read(params, cfg, tokens, ids, None, None, None, dtype=dtype)
    # What a layer refuses to read whole, it refuses in pieces.
    jax.eval_shape(partial(lm.hidden, cfg=cfg), params, tokens=jax.ShapeDtypeStruct(tokens.shape, np.int32))
    state, logits = lm.init_state(cfg, len(rows)), None
    for cut in _cuts(length, piece):
        begins = None if ids is None or cut.start == 0 else ids[:, cut.start] != ids[:, cut.start - 1]
        here = None if ids is None else ids[:, cut]
        logits, state = _read(params, cfg, tokens[:, cut], here, begins, state, None, dtype=dtype)
    return logits, state


def _further(params, cfg, rows, session: Session, piece: int, dtype):
    """Texts that go on: `(logits, state)`; rows may be empty."""
    lengths = np.array([len(row) for row in rows])
    length, logits, state = int(lengths.max()), session.logits, session.state
    if lengths.min() == length:
        for cut in _cuts(length, piece) if length else ():
            logits, state = _read(params, cfg, np.stack(rows)[:, cut], None, None, state, None, dtype=dtype)
        return logits, state
    piece = min(piece, ROUND)
    count = lengths % piece
    first = np.stack([np.pad(row[:n], (0, piece - n)) for row, n in zip(rows, count, strict=True)])
    logits, state = _steps(params, cfg, first, count, state, logits, dtype=dtype)
    tokens = _padded([row[n:] for row, n in zip(rows, count, strict=True)], length - length % piece)
    for cut in _cuts(tokens.shape[1], piece) if tokens.shape[1] else ():
        active = cut.start >= tokens.shape[1] - (lengths - count)
        new, state = _read(params, cfg, tokens[:, cut], None, None, state, active, dtype=dtype)
        logits = jnp.where(active[:, None], new.astype(logits.dtype), logits)
    return logits, state


def prefill(
    params,
    cfg: lm.Config,
    prompt: Any,
    session: Session | None = None,
    *,
    piece: int = PIECE,
    dtype=None,
) -> Session:
    """Read B prompts, `[B, T]` or B rows of unequal length, from the start or going on from `session`.

    A session of one text is forked for several prompts. At most `piece` tokens are worked on at once.
    Memory is that of a piece and of the states. Raises ValueError for token ids outside the vocabulary, an
    empty prompt at the start of a text, or prompts that are not as many as the texts of `session`.
    """
    rows = rows_of(prompt, cfg.vocab_size)
    ok = isinstance(piece, int) and piece >= 1
    require(ok, f"generate: piece={piece!r} must be an integer of at least 1")
    if session is None:
        logits, state = _fresh(params, cfg, rows, piece, dtype)
    else:
        session = session.rows([0] * len(rows)) if len(session) == 1 < len(rows) else session
        ok = len(session) == len(rows)
        require(ok, f"generate: {len(rows)} prompts for {len(session)} texts that go on")
        logits, state = _further(params, cfg, rows, session, piece, dtype)
    return _noted(cfg, rows, session, logits, state)


def _noted(cfg, rows: Sequence[np.ndarray], session: Session | None, logits: Array, state: Any) -> Session:
    """The session after `rows`."""
    seen = np.zeros((len(rows), cfg.vocab_size), bool)
    for number, row in enumerate(rows):
        seen[number, row] = True
    length = jnp.array([len(row) for row in rows], jnp.int32)
    if session is None:
        return Session(state, logits, jnp.asarray(seen), length)
    return Session(state, logits, session.seen | seen, session.length + length)
