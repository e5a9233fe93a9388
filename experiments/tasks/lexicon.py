"""Known entropy, unifilar: words of a large lexicon, spelled out, in sentences about a topic.

A row is a sequence of slots. With probability rho (and always at the start of the row) a slot opens a new
sentence: a marker and a topic z, drawn from tau. Then it has a word of the topic's lexicon: word number k is
drawn with probability p_k, and its letters and a space follow. Every topic has K words of its own, strings of
letters drawn at random, all different, rarer ones longer, and

    p_k  proportional to  (k + head)^-(1 + tail),     k = 0, ..., K - 1          (Zipf and Mandelbrot)

The row so far determines the state, which is topic and letters of the word so far, and so what the best
predictor pays for every token. The entropy rate is the entropy of a slot over its mean length,

    h = (H(p) + H(rho) + rho H(tau)) / (E[letters] + 1 + 2 rho)      nats per token.

Probabilities are whole numbers of 2^-32 (words) and 2^-16 (sentences, topics): this holds for what is drawn,
not for what it approximates. A row has a beginning, so the expected loss at its t-th target depends on t,
through the probability that a word begins there, which obeys a renewal equation.

Made for scaling laws: beyond its entropy the loss is a power law by design. Who knows the n most frequent
words of each topic pays about n^-tail for the others (`loss_knowing(n)`, exactly), and D tokens show about
D^(1 / (1 + tail)) words more than a few times: Hutter 2021 (arXiv 2102.04074), Michaud et al. 2023 (arXiv
2303.13506). A learner that counts what follows (topic, letters so far) loses with D to the power of -0.31 to
-0.36 from 16 thousand to 2 million tokens at the default settings, and of -0.40 and -0.45 in the next two
octaves, where the words begin to run out: for larger budgets raise `words`. The topic has to be remembered
for a sentence, the letters for a word.

    LexiconData(length=256).build()
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from experiments.sources import Batch, fingerprint, require_at_least, require_types
from experiments.tasks.entropy import KnownEntropySource, entropy, whole_counts
from experiments.tasks.words import (
    FIRST_TOPIC,
    MARKER,
    SPACE,
    TOPIC_BITS,
    WORD_BITS,
    Words,
    weights,
    words_by_size,
)
from layers.checks import require

HEADER = 2  # tokens of a marker and a topic


@dataclass(frozen=True, kw_only=True)
class LexiconData:
    """Sentences of words with known entropy.

    `words` is K, per topic; `sentence` the mean number of words in one, 1 / rho; topic number i has weight
    1 / (i + 1); words have `shortest` to `longest` letters. `train_examples` is the size of a fixed pool of
    rows, 0 for rows that never repeat.
    """

    length: int = 256
    words: int = 65_536
    topics: int = 4
    letters: int = 26
    shortest: int = 3
    longest: int = 7
    tail: float = 0.5
    head: float = 10.0
    sentence: float = 16.0
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "length", "topics", "shortest", "eval_examples")
        require_at_least(self, 2, "words", "letters")
        require_at_least(self, 0, "train_examples", "data_seed")
        for name, least, most in (("tail", 0, 4), ("head", 0, 1e6), ("sentence", 1, 1e4)):
            value = getattr(self, name)
            require(least < value <= most, f"LexiconData: {name}={value} must lie in ({least}, {most:g}]")
        fits = self.shortest <= self.longest
        require(fits, f"LexiconData: shortest={self.shortest} exceeds longest={self.longest}")
        require(self.topics <= 1_000, f"LexiconData: topics={self.topics} must be at most 1000")
        bits = (self.longest + 2) * math.log2(self.vocab_size)
        require(bits < 63, f"LexiconData: longest={self.longest} letters do not fit into 63 bits")
        for letters, count in enumerate(words_by_size(self), self.shortest):
            # Half of them, or drawing different ones would take long.
            need = f"words={self.words} takes {count} of the {self.letters**letters} of {letters} letters"
            require(2 * count <= self.letters**letters, f"LexiconData: {need}; half of them there may be")
        rarest = int(whole_counts(weights(self), WORD_BITS).min())
        require(rarest > 0, f"LexiconData: words={self.words}: the rarest would never be drawn")

    @property
    def vocab_size(self) -> int:
        """Marker, space, topics, letters."""
        return FIRST_TOPIC + self.topics + self.letters

    def build(self) -> "LexiconSource":
        """The source; the lexicon is drawn at once."""
        return LexiconSource(self)


class LexiconSource(KnownEntropySource):
    """Batches `{"tokens" [B,T], "targets" [B,T]}`, int32: every token but the first is a target."""

    def __init__(self, cfg: LexiconData):
        self._slots = -(-max(1, cfg.length + 1 - HEADER) // (cfg.shortest + 1))
        super().__init__(cfg, self._slots)
        self.vocab_size = cfg.vocab_size
        self.words = Words(cfg)
        self._opening = round(2**TOPIC_BITS / cfg.sentence)
        self.rho = self._opening * 2.0**-TOPIC_BITS
        settings = {"source": type(cfg).__name__, **asdict(cfg)}
        tables = (self.words.spelled, self.words.edges, self.words.topic_edges)
        self.fingerprint = fingerprint(settings, *tables)

    def make(self, words: np.ndarray) -> Batch:
        """The rows that rows of random words stand for, a word of each for every slot."""
        words = words[:, : self._slots]
        rank = np.searchsorted(self.words.edges, words >> np.uint64(32), side="right")
        opens = (words & np.uint64(2**TOPIC_BITS - 1)) < self._opening
        opens[:, 0] = True
        topic_bits = (words >> np.uint64(TOPIC_BITS)) & np.uint64(2**TOPIC_BITS - 1)
        topic = np.searchsorted(self.words.topic_edges, topic_bits, side="right")
        begun = np.maximum.accumulate(np.where(opens, np.arange(self._slots), 0), axis=1)
        phrase = np.take_along_axis(topic, begun, 1) * self.cfg.words + rank
        tokens = self._spell(phrase, opens, self.words.sizes[rank] + HEADER * opens)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    def _spell(self, phrase: np.ndarray, opens: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """`[B,T+1]` tokens of slots `[B,slots]`, each a phrase of `sizes` tokens, with its header or without.

        Token t of a row stands at t + shift in the flat table of phrases; shift changes where a slot starts.
        """
        table, places = self.words.phrases, np.arange(self.length + 1)
        starts = np.cumsum(sizes, axis=1) - sizes
        shift = phrase * table.shape[1] + HEADER * ~opens - starts
        inside = starts < len(places)
        change = np.zeros((len(phrase), len(places)), np.int64)
        change[np.nonzero(inside)[0], starts[inside]] = np.diff(shift, axis=1, prepend=0)[inside]
        return table.reshape(-1)[np.cumsum(change, axis=1) + places]

    # ---- what is known

    def _rate(self, word_nats: float) -> float:
        """Nats per token in the long run, where a word costs so many."""
        opening = self._opening_entropy + self.rho * entropy(self.words.tau)
        return float((word_nats + opening) / (self.words.p @ self.words.sizes + HEADER * self.rho))

    @property
    def _opening_entropy(self) -> float:
        return float(entropy(np.array([self.rho, 1 - self.rho])))

    @cached_property
    def entropy_rate(self) -> float:
        """h: nats per token of an endless row."""
        return self._rate(float(entropy(self.words.p)))

    def loss_knowing(self, words: int) -> float:
        """Nats per token of a reader who knows the `words` most frequent words of each topic.

        Of the others it knows how often there is one of so many letters; all letters are alike to it.
        """
        p, rare, sizes = self.words.p[:words], self.words.p[words:], self.words.sizes[words:]
        spelling = float(rare @ (sizes - 1)) * math.log(self.cfg.letters)
        return self._rate(float(entropy(p) + entropy(np.bincount(sizes, rare, 1))) + spelling)

    def log_likelihoods(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens [B,T+1] -> [B,T]`: log P(token t + 1 | tokens 0..t), read off the tokens alone."""
        result = np.empty((len(tokens), tokens.shape[1] - 1))
        log_tau = np.full(self.vocab_size, -np.inf)
        log_tau[FIRST_TOPIC : FIRST_TOPIC + self.cfg.topics] = np.log(self.words.tau)
        topic = code = np.zeros(len(tokens), np.int64)  # code: the topic, then the word so far
        for t in range(result.shape[1]):
            before, now = tokens[:, t], tokens[:, t + 1]
            free, header = before == SPACE, before == MARKER
            longer = code * self.vocab_size + now
            with np.errstate(invalid="ignore"):  # after something impossible
                letter = self.words.log_mass(longer) - self.words.log_mass(code)
            letter += free * math.log1p(-self.rho)
            opening = np.where(free, math.log(self.rho), -np.inf)
            result[:, t] = np.where(header, log_tau[now], np.where(now == MARKER, opening, letter))
            topic = np.where(header, now, topic)
            code = np.where(header | (now == SPACE), topic, longer)
        return np.nan_to_num(result, nan=-np.inf, neginf=-np.inf)

    @cached_property
    def _starts(self) -> np.ndarray:
        """`[T+1]`: the probability that a word (its header not counted) starts at each place of a row."""
        size, gap = np.bincount(self.words.sizes, self.words.p), np.zeros(HEADER)
        step = (1 - self.rho) * np.append(size, gap) + self.rho * np.append(gap, size)  # to the next start
        starts = np.zeros(self.length + 1)
        starts[HEADER:][:1] = 1.0
        for place in range(HEADER + 1, len(starts)):
            recent = starts[max(0, place - len(step) + 1) : place]
            starts[place] = recent @ step[len(recent) : 0 : -1]
        return starts

    def _targets(self, letter: np.ndarray, opening, topic) -> np.ndarray:
        """`[T, ...]`: expectation of what every target adds up to.

        Token j of a word counts `letter[j]`, a place after a space `opening`, a topic `topic`.
        """
        starts, places = self._starts, self.length + 1
        ends = np.convolve(starts, np.bincount(self.words.sizes, self.words.p))[:places]
        topics = self.rho * np.append(0.0, ends[:-1])
        topics[1] = 1.0
        sum_ = np.multiply.outer(ends, opening) + np.multiply.outer(topics, topic)
        for j in range(min(len(letter), places)):
            sum_[j:] += np.multiply.outer(starts[: places - j], letter[j])
        return sum_[1:]

    @cached_property
    def conditional_entropy(self) -> np.ndarray:
        """`[T]`: the best predictor's expected loss at every target of a row, in nats."""
        return self._targets(self.words.letter_entropy, self._opening_entropy, entropy(self.words.tau))

    @cached_property
    def chance(self) -> float:
        """Accuracy of the most frequent token at each place: at most places the space."""
        marker = self.rho * np.eye(self.vocab_size)[MARKER]
        topic = np.pad(self.words.tau, (FIRST_TOPIC, self.cfg.letters))
        # A place after a space is a marker's with probability rho; that words start there with 1 - rho is in
        # the probabilities of starts.
        return float(self._targets(self.words.letter_frequency, marker, topic).max(-1).mean())

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training rows" if cfg.train_examples else "fresh rows"
        return (
            f"lexicon: {cfg.topics} topics of {cfg.words:,} words in rows of {cfg.length}, vocabulary "
            f"{self.vocab_size}, entropy {self.window_entropy:.4f} nats a target ({self.entropy_rate:.4f} in "
            f"the long run), {pool}, chance {self.chance:.2%}"
        )
