"""The words of `experiments.tasks.lexicon`: spelling, probabilities, and how probable every beginning is."""

from functools import cached_property
from typing import Any

import numpy as np

from experiments.sources import Stream, below, random_words
from experiments.tasks.entropy import entropy, whole_counts

MARKER, SPACE, FIRST_TOPIC = 0, 1, 2
WORD_BITS, TOPIC_BITS = 32, 16


def weights(cfg: Any) -> np.ndarray:
    """`[K]`: what the probabilities of words are in proportion to."""
    return (np.arange(cfg.words) + cfg.head) ** -(1.0 + cfg.tail)


def words_by_size(cfg: Any) -> np.ndarray:
    """How many words have `shortest`, ..., `longest` letters: K in all, about a constant factor apart."""
    kinds = cfg.longest - cfg.shortest + 1
    ends = np.rint((cfg.words + 1.0) ** (np.arange(kinds + 1) / kinds)) - 1
    return np.diff(ends).astype(np.int64)


def _spell(cfg: Any, topic: int) -> np.ndarray:
    """The words of a topic, the most frequent first: `[K, longest + 1]` letters, a space, zeros."""
    spelled, first = np.zeros((cfg.words, cfg.longest + 1), np.int32), 0
    for size, count in enumerate(words_by_size(cfg), cfg.shortest):
        words = random_words(16 * int(count) + 64, Stream.TASK, cfg.data_seed, salt=topic << 32 | size)
        drawn = below(words, cfg.letters**size)
        different = drawn[np.sort(np.unique(drawn, return_index=True)[1])[:count]]
        digits = different[:, None] // cfg.letters ** np.arange(size) % cfg.letters
        spelled[first : first + count, :size] = FIRST_TOPIC + cfg.topics + digits
        spelled[first : first + count, size] = SPACE
        first += count
    return spelled


class Words:
    """The lexicon of a `LexiconData`, for K words in each of M topics."""

    def __init__(self, cfg: Any):
        self.vocab_size = cfg.vocab_size
        self.spelled = np.stack([_spell(cfg, topic) for topic in range(cfg.topics)])  # [M, K, longest + 1]
        self.sizes = np.repeat(np.arange(cfg.shortest, cfg.longest + 1), words_by_size(cfg)) + 1  # with space
        self.edges = np.cumsum(whole_counts(weights(cfg), WORD_BITS)).astype(np.uint64)
        topics = whole_counts(1 / np.arange(1, cfg.topics + 1), TOPIC_BITS)
        self.topic_edges = np.cumsum(topics).astype(np.uint64)
        self.p = np.diff(self.edges, prepend=np.uint64(0)) * 2.0**-WORD_BITS  # [K], of every topic
        self.tau = np.diff(self.topic_edges, prepend=np.uint64(0)) * 2.0**-TOPIC_BITS  # [M]

    @cached_property
    def phrases(self) -> np.ndarray:
        """All that a slot can say, `[M K, 2 + longest + 1]` int32: marker, topic, word, space, zeros."""
        topics, words, _ = self.spelled.shape
        header = np.stack([np.full(topics, MARKER), FIRST_TOPIC + np.arange(topics)], 1)
        header = np.broadcast_to(header[:, None], (topics, words, 2))
        return np.concatenate([header, self.spelled], -1).astype(np.int32).reshape(topics * words, -1)

    def _columns(self) -> np.ndarray:
        """`[longest + 1, M K]`: letter j of every word."""
        return self.spelled.reshape(-1, self.spelled.shape[2]).T

    @cached_property
    def _joint(self) -> np.ndarray:
        return np.outer(self.tau, self.p).reshape(-1)

    @cached_property
    def _beginnings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For j = 0, 1, ...: codes of (topic, first j tokens of a word), sorted, and their probabilities.

        A code begins as the topic's token; one token more multiplies it by V and adds the token.
        """
        code = np.repeat(FIRST_TOPIC + np.arange(len(self.tau)), len(self.p))
        codes = [code] + [code := code * self.vocab_size + column for column in self._columns()]
        groups = (np.unique(code, return_inverse=True) for code in codes)
        return [(found, np.bincount(place, self._joint)) for found, place in groups]

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        codes, masses = (np.concatenate(parts) for parts in zip(*self._beginnings, strict=True))
        order = np.argsort(codes)
        return codes[order], np.log(masses[order])

    def log_mass(self, codes: np.ndarray) -> np.ndarray:
        """log of the probability of each beginning; minus infinity for what no word begins with."""
        known, log_mass = self._index
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(known[place] == codes, log_mass[place], -np.inf)

    @cached_property
    def letter_entropy(self) -> np.ndarray:
        """`[longest + 1]`: expected surprisal of token j of a word, given those before; 0 beyond its end."""
        return np.diff([entropy(mass) for _, mass in self._beginnings])

    @cached_property
    def letter_frequency(self) -> np.ndarray:
        """`[longest + 1, V]`: how probable it is that token j of a word exists and is this one."""
        counts = [np.bincount(column, self._joint, self.vocab_size) for column in self._columns()]
        return np.where(np.arange(self.vocab_size) == MARKER, 0.0, np.stack(counts))  # zeros past the end
