"""What people call: `generate`, and `stream`, which gives the same in parts."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.checks import require
from zoo import lm
from zoo.generation import layout
from zoo.generation.reading import PIECE, prefill
from zoo.generation.sampling import Sampling, checked
from zoo.generation.session import Session
from zoo.generation.text import Decoder, Writer, checked_strings
from zoo.generation.writing import NOTHING, Rules, Sampler, write

STREAMED, LOOKED_AT = 8, 32  # tokens between two looks: of a stream, and where stop strings are looked for


class Stream:
    """A generation under way: iterate to get its parts as they come. `stream` makes it.

    A part is the new text (for a prompt that is a string), a list of texts (for several), or tokens `[B, n]`
    with -1 after a row's end. `session` is where the texts stand after the last part.
    """

    def __init__(self, params, cfg: lm.Config, session: Session, steps: int, rules: Rules, chunk: int):
        self.session = session
        self._model, self._rules = (layout.model(params, cfg), cfg), rules
        self._left = np.full(len(session), steps)
        self._size = min(chunk, 1 << (steps - 1).bit_length())
        self._writers: list[Writer] | None = None
        self._one = False

    def as_text(self, writers: list[Writer], one: bool) -> "Stream":
        """Give texts; one string where there is `one` prompt."""
        self._writers, self._one = writers, one
        return self

    def __iter__(self) -> Iterator[Any]:
        while self._left.any():
            tokens, ended = self._chunk()
            self._left = np.where(ended, 0, self._left - (tokens != NOTHING).sum(1))
            yield tokens if self._writers is None else self._texts()

    def _chunk(self) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens `[B, n]`, and which rows end with them."""
        chunk = write(*self._model, self.session, self._left, self._rules, self._size)
        tokens, ended = np.array(chunk.tokens), np.array(chunk.stopped)
        count = (tokens != NOTHING).sum(1)
        told = self._tell(tokens, count)
        if (told < count).any():  # the text ended inside of the chunk: again, so that states end there too
            chunk = write(*self._model, self.session, told, self._rules, self._size)
            tokens, ended = np.array(chunk.tokens), ended | (told < count)
        self.session = chunk.session
        return tokens[:, : max(told.max(), 1)], ended | self._stopped()

    def _tell(self, tokens: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Tokens of every row up to a stop string, `[B]`."""
        told = count.copy()
        for row, writer in enumerate(self._writers or ()):
            for number, token in enumerate(tokens[row, : count[row]].tolist()):
                if writer.add(token):
                    told[row] = number + 1
                    break
        return told

    def _stopped(self) -> np.ndarray:
        return np.array([writer.stopped for writer in self._writers or ()] or [False] * len(self.session))

    def _texts(self) -> Any:
        assert self._writers is not None
        for writer, left in zip(self._writers, self._left, strict=True):
            if not left:
                writer.end()
        texts = [writer.text() for writer in self._writers]
        return texts[0] if self._one else texts


def _keys(key: Array | None, rows: int) -> Array:
    """One for each row."""
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    require(key.shape == (rows,), f"generate: {key.shape} keys for {rows} rows")
    return key


def encoded(tokenizer: Any, prompt: Any, session: Session | None = None) -> list[np.ndarray]:
    """Tokens of a text or several, as prompts; without a `session` that they go on from they begin with the
    separator, as documents do in training."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    start = [] if session is not None or tokenizer.separator is None else [tokenizer.separator]
    return [np.array([*start, *tokenizer.encode(text)], np.int32) for text in texts]


def _is_text(prompt: Any) -> bool:
    several = isinstance(prompt, list | tuple) and len(prompt) > 0
    return isinstance(prompt, str) or (several and all(isinstance(p, str) for p in prompt))


def _stops(stop: Any, limit: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop tokens and stop strings, from one of them or several of both."""
    every = (stop,) if isinstance(stop, str | int | np.integer) else tuple(stop)
    ids = tuple(int(s) for s in every if isinstance(s, int | np.integer))
    outside = [i for i in ids if not 0 <= i < limit]
    require(not outside, f"generate: stop token {outside[:1]} is outside [0, {limit})")
    return ids, checked_strings(s for s in every if not isinstance(s, int | np.integer))


def stream(
    params,
    cfg: lm.Config,
    prompt: Any = None,
    steps: int = 100,
    *,
    session: Session | None = None,
    tokenizer: Any = None,
    key: Array | None = None,
    temperature: float | None = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    sampler: Sampler | None = None,
    stop: Any = (),
    limit: int | None = None,
    piece: int = PIECE,
    chunk: int = STREAMED,
    dtype: str | None = None,
) -> Stream:
    """As `generate`, `chunk` tokens at a time: a `Stream`, whose parts put together are what that gives.

    The prompt has been read when this returns.
    """
    text = _is_text(prompt) or (prompt is None and tokenizer is not None)
    require(prompt is not None or session is not None, "generate: neither a prompt nor a session is given")
    require(not text or tokenizer is not None, "generate: a prompt that is text needs a tokenizer")
    for name, value in (("steps", steps), ("chunk", chunk)):
        ok = isinstance(value, int) and value >= 1
        require(ok, f"generate: {name}={value!r} must be an integer of at least 1")
    most = cfg.vocab_size if tokenizer is None else min(tokenizer.vocab_size, cfg.vocab_size)
    limit = most if limit is None else limit
    require(1 <= limit <= cfg.vocab_size, f"generate: limit={limit} must be in [1, {cfg.vocab_size}]")
    settings = checked(Sampling(temperature, top_k, top_p, min_p, repetition_penalty), limit)
    ids, strings = _stops(stop, limit)
    require(not strings or text, "generate: stop strings go with prompts that are text")
    if session is not None and prompt is None:
        prompt = np.zeros((len(session), 0), np.int32)
    rows = encoded(tokenizer, prompt, session) if _is_text(prompt) else prompt
    session = prefill(params, cfg, rows, session, piece=piece, dtype=dtype)
    keep = len(session) > 1 and bool(ids or strings)
    rules = Rules(_keys(key, len(session)), sampler or settings, ids, limit, dtype, keep)
    out = Stream(params, cfg, session, steps, rules, chunk)
    if not text:
        return out
    writers = [Writer(Decoder(tokenizer, row), strings, ids) for row in rows]
    return out.as_text(writers, isinstance(prompt, str) or (len(writers) == 1 and not _is_text(prompt)))


def generate(params, cfg: lm.Config, prompt: Any = None, steps: int = 100, *, with_session=False, **settings):
    """Continue `prompt` by `steps` tokens.

    A prompt is tokens (`[T]`, `[B, T]`, or B rows of unequal length), and `[B, steps]` int32 comes back, with
    -1 after a row's end; or text (a string or several), with `tokenizer`, and text comes back, without the
    prompt. Row by row the result is that of the prompt alone (to rounding), whatever its neighbours are.

    `session` goes on from where an earlier call stopped; with `with_session=True` the result is
    `(tokens or text, Session)`. A session of one text is forked for several prompts; without a prompt its
    texts go on as they are.

    Sampling, in this order: `repetition_penalty` (above 1 makes tokens of the text less likely),
    `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`; or `sampler(key, logits [V], seen [V]) -> token`
    in place of them all. `key` (default `jax.random.key(0)`) may be one for every row, `[B]`. Token ids from
    `limit` on, which a padded vocabulary has, are never produced.

    `stop`: token ids and strings, one or several. A row ends with its stop token, which its session has read;
    text ends before it, or before the stop string, and the session at the token that completed the string.

    At most `piece` tokens of a prompt are worked on at once. The state does not grow while tokens are
    written. `dtype` is that of activations.

    Raises ValueError for an empty prompt, token ids outside the vocabulary or settings that mean nothing,
    RuntimeError where logits are not finite.
    """
    ends = _is_text(prompt) or settings.get("tokenizer") is not None
    looks = LOOKED_AT if ends and settings.get("stop") else max(steps if isinstance(steps, int) else 1, 1)
    out = stream(params, cfg, prompt, steps, **{"chunk": looks, **settings})
    parts = list(out)
    if isinstance(parts[0], np.ndarray):
        whole = np.concatenate(parts, 1)
        found: Any = np.pad(whole, ((0, 0), (0, steps - whole.shape[1])), constant_values=NOTHING)
    elif isinstance(parts[0], str):
        found = "".join(parts)
    else:
        found = ["".join(texts) for texts in zip(*parts, strict=True)]
    return (found, out.session) if with_session else found
