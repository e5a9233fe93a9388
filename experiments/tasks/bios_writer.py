"""Writes the biographies of `experiments.tasks.bios`, many at a time, and says which tokens tell what."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from experiments.sources import Stream, below, random_words
from experiments.tasks.bios_text import ATTRIBUTES, NAMES, POOLS, SENTENCES, Entry, pieces, words_of
from experiments.tokenizer import ByteTokenizer

OTHER, NAME, VALUE = range(3)  # kinds of tokens
POSSIBLE_NAMES = math.prod(len(pool) for pool in NAMES.values())


class Writer:
    """The people of a `BiosData`, and their lives in tokens.

    Token lists of several lengths are rows of arrays that end with -1s. Text on its way is `[2, n, W]`: ids
    and, for each of them, its kind.
    """

    def __init__(self, cfg: Any):
        self.cfg = cfg
        self.tokenizer = ByteTokenizer() if cfg.text == "bytes" else None
        self._pieces = ["", *pieces()]  # the first ends a text
        self._number = {piece: i for i, piece in enumerate(self._pieces)}
        self.vocab_size = self.tokenizer.vocab_size if self.tokenizer else len(self._pieces)
        self.end = 256 if self.tokenizer else 0
        self._pools = {name: self._table(pool) for name, pool in POOLS.items()}
        self._sentences = {about: self._wordings(*wordings) for about, wordings in SENTENCES.items()}
        self._subject = max(sum(map(self._width, NAMES)), self._width("pronoun"))
        pronouns = (len(SENTENCES) - 2) * self._width("pronoun")
        self.length = 2 + pronouns + sum(map(self._width, POOLS)) + sum(map(self._longest, SENTENCES))

    def _encode(self, entry: Entry) -> list[int]:
        if self.tokenizer:
            return self.tokenizer.encode("".join(entry)).tolist()
        return [self._number[piece] for piece in entry]

    def _table(self, entries: Sequence[Entry]) -> np.ndarray:
        """`[n, longest]` ids."""
        rows = [self._encode(entry) for entry in entries]
        table = np.full((len(rows), max(map(len, rows))), -1)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = ids
        return table

    def _width(self, name: str) -> int:
        return self._pools[name].shape[1]

    def _wordings(self, *wordings: str) -> tuple[np.ndarray, np.ndarray]:
        """What comes before and after the attributes, in each wording that is used."""
        parts = [sentence.split("{}") for sentence in wordings[: self.cfg.variants]]
        before, after = zip(*parts, strict=True)
        return self._table([words_of(part) for part in before]), self._table(
            [words_of(part) for part in after]
        )

    def _longest(self, about: tuple[str, ...]) -> int:
        before, after = self._sentences[about]
        return int(((before >= 0).sum(1) + (after >= 0).sum(1)).max())

    @cached_property
    def people(self) -> dict[str, np.ndarray]:
        """`[N]` numbers of each pool's entries: names all different, attributes independent."""
        count, seed = self.cfg.people, self.cfg.data_seed
        drawn = below(random_words(count + count // 4 + 64, Stream.TASK, seed), POSSIBLE_NAMES)
        name = drawn[np.sort(np.unique(drawn, return_index=True)[1])[:count]]
        found = {}
        for part, pool in NAMES.items():
            name, found[part] = np.divmod(name, len(pool))
        for number, (part, pool) in enumerate(ATTRIBUTES.items()):
            found[part] = below(random_words(count, Stream.TASK, seed, salt=1 + number), len(pool))
        return found

    def write(self, who: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Biographies of people `who [n]`, worded by `words [n, 12]`: tokens and their kinds, `[n,T]` int32.

        Kinds are -1 behind the end-of-text token that follows a biography, as it goes before.
        """
        count, sentences = len(who), len(SENTENCES)
        bodies = [self._sentence(about, who, words[:, i]) for i, about in enumerate(SENTENCES)]
        width = max(body.shape[2] for body in bodies)
        text = np.full((2, count, sentences, self._subject + width), -1)
        for i, body in enumerate(bodies):
            text[:, :, i, self._subject : self._subject + body.shape[2]] = body
        if self.cfg.shuffled:
            order = np.argsort(words[:, sentences : 2 * sentences], axis=1, kind="stable")
            text = np.take_along_axis(text, order[None, :, :, None], 2)
        # The first pronoun tells, the others repeat it.
        names = np.concatenate([self._known(name, who, NAME) for name in NAMES], 2)
        pronoun = self._known("pronoun", who, OTHER)
        text[:, :, 0, : names.shape[2]] = names
        text[:, :, 1:, : pronoun.shape[2]] = pronoun[:, :, None]
        text[1, :, 1, : pronoun.shape[2]] = VALUE
        end = _of_kind(np.full((count, 1), self.end), OTHER)
        return self._in_a_row(*np.concatenate([end, text.reshape(2, count, -1), end], 2))

    def _sentence(self, about: tuple[str, ...], who: np.ndarray, words: np.ndarray) -> np.ndarray:
        """One sentence for each person, without its subject."""
        variant = below(words, self.cfg.variants)
        before, after = (_of_kind(table[variant], OTHER) for table in self._sentences[about])
        return np.concatenate([before, *(self._known(name, who, VALUE) for name in about), after], 2)

    def _known(self, name: str, who: np.ndarray, kind: int) -> np.ndarray:
        return _of_kind(self._pools[name][self.people[name][who]], kind)

    def _in_a_row(self, ids: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids >= 0 of every row moved together, end-of-text behind them."""
        rows, columns = np.nonzero(ids >= 0)
        place = ((ids >= 0).cumsum(1) - 1)[rows, columns]
        tokens = np.full((len(ids), self.length), self.end, np.int32)
        kind = np.full(tokens.shape, -1, np.int32)
        tokens[rows, place], kind[rows, place] = ids[rows, columns], kinds[rows, columns]
        return tokens, kind

    def read(self, tokens: np.ndarray) -> str:
        """The text of a row of tokens."""
        if self.tokenizer:
            return self.tokenizer.decode(tokens).strip()
        return "".join(self._pieces[token] for token in tokens).strip()


def _of_kind(ids: np.ndarray, kind: int) -> np.ndarray:
    return np.stack([ids, np.full_like(ids, kind)])
