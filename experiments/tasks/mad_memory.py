"""MAD's memorization, compression and selective copying (Poli et al. 2024, arXiv 2403.17844).

`MadMemorizationData`. One map from keys, the tokens [0, n), n = (V - 1)//2, to distinct values of [n, V - 1)
holds for the whole task. A sequence asks for keys, `k INSERT` L/2 times with INSERT = V - 1; where it says
INSERT the value of k has to be given. The map never stands in the input: it has to be learnt by training.

`MadCompressionData`. L - 1 tokens of [0, V - noise_vocab - 1) and a last one, V - 1, at which the model has
to hold all of them: a decoder that sees only its output there reproduces every token (`zoo.autoencoder`).

`MadCopyingData`. n tokens of [0, V - 2) among blanks V - 2, then the marker V - 1, then n blanks at which the
n tokens are to be given in order. Each of the L - 2n - 1 blanks before the marker falls with equal
probability into one of the n + 1 gaps before, between and after the tokens.

Unlike the published generator: the training pool of the memorization task shows every key (drawn at random,
256 sequences of 16 pairs leave out 37 % of 4,095 keys, whose values nothing tells); in compression the last
token is not scored, which all examples share, and neither are noise tokens (there the mask is made and
dropped); the gap after the last token to copy gets blanks as well (there none, and the other places from a
generator that no seed reaches). Accuracy is over labelled positions, not averaged over classes, and there is
a validation split beside the test.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.sources import (
    IGNORED,
    Batch,
    GeneratedSource,
    Stream,
    below,
    random_words,
    require_at_least,
    require_types,
    shuffled_indices,
    uniform,
)
from experiments.tasks.recall import draw_distinct
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class MadMemorizationData:
    """MAD's memorization; `train_examples=0` draws keys afresh for ever, else the pool shows each of them."""

    vocab_size: int = 256
    length: int = 32
    train_examples: int = 256
    eval_examples: int = 1_280
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        length, examples = self.length, self.train_examples
        ok = length >= 2 and length % 2 == 0
        require(ok, f"MadMemorizationData: length={length} must be even and positive")
        ok = 5 <= self.vocab_size < 2**31
        require(ok, f"MadMemorizationData: vocab_size={self.vocab_size} must be at least 5")
        ok = examples == 0 or examples * length // 2 >= self.keys
        text = f"train_examples={examples} of length={length} cannot show {self.keys} keys"
        require(ok, f"MadMemorizationData: {text}")

    @property
    def keys(self) -> int:
        """How many tokens are keys; as many others are their values."""
        return (self.vocab_size - 1) // 2

    def build(self) -> "MadMemorizationSource":
        """The source; examples are made when first asked for."""
        return MadMemorizationSource(self)


@dataclass(frozen=True, kw_only=True)
class MadCompressionData:
    """MAD's compression; `noise` is the probability of a token that need not be reproduced.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    vocab_size: int = 16
    noise_vocab: int = 0
    noise: float = 0.0
    length: int = 32
    train_examples: int = 12_800
    eval_examples: int = 1_280
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 2, "length")
        require_at_least(self, 0, "train_examples", "data_seed", "noise_vocab")
        require(0 <= self.noise < 1, f"MadCompressionData: noise={self.noise} must lie in [0, 1)")
        ok = self.noise == 0 or self.noise_vocab > 0
        require(
            ok, f"MadCompressionData: noise={self.noise} needs noise tokens: noise_vocab={self.noise_vocab}"
        )
        ok = self.words >= 2 and self.vocab_size < 2**31
        text = f"vocab_size={self.vocab_size} with noise_vocab={self.noise_vocab}"
        require(ok, f"MadCompressionData: {text} must leave at least 2 tokens besides the last")

    @property
    def words(self) -> int:
        """How many tokens there are to reproduce: the first of the vocabulary."""
        return self.vocab_size - self.noise_vocab - 1

    def build(self) -> "MadCompressionSource":
        """The source; examples are made when first asked for."""
        return MadCompressionSource(self)


@dataclass(frozen=True, kw_only=True)
class MadCopyingData:
    """MAD's selective copying of `copied` tokens.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    vocab_size: int = 16
    length: int = 256
    copied: int = 16
    train_examples: int = 12_800
    eval_examples: int = 1_280
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples", "copied")
        require_at_least(self, 0, "train_examples", "data_seed")
        ok = 4 <= self.vocab_size < 2**31
        require(ok, f"MadCopyingData: vocab_size={self.vocab_size} must be at least 4")
        least = 2 * self.copied + 1
        ok = self.length >= least
        require(
            ok, f"MadCopyingData: length={self.length} must be at least {least} with copied={self.copied}"
        )

    def build(self) -> "MadCopyingSource":
        """The source; examples are made when first asked for."""
        return MadCopyingSource(self)


class _MadSource(GeneratedSource):
    kind = "language"
    tokenizer = None

    def __init__(self, cfg, words_per_example: int, chance: float):
        super().__init__(cfg, words_per_example)
        self.vocab_size = cfg.vocab_size
        self.chance = chance

    def _describe(self, what: str) -> str:
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        vocabulary = f"vocabulary {cfg.vocab_size}"
        return f"MAD {what} in {cfg.length} tokens, {vocabulary}, {pool}, chance {self.chance:.2%}"


class MadMemorizationSource(_MadSource):
    """Batches `{"tokens" [B,L], "positions" [B,L/2], "targets" [B,L/2]}`, int32."""

    def __init__(self, cfg: MadMemorizationData):
        super().__init__(cfg, cfg.length // 2, 1 / cfg.keys)  # keys are equally likely, values distinct

    @cached_property
    def values(self) -> np.ndarray:
        """The value of every key, `[n]`: what is to be learnt."""
        words = random_words(self.cfg.keys, Stream.TASK, self.cfg.data_seed)[None]
        return self.cfg.keys + draw_distinct(words, self.vocab_size - 1 - self.cfg.keys)[0]

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        return self._ask(below(words[:, : self.length // 2], self.cfg.keys))

    @cached_property
    def _pool(self) -> Batch:
        # Dealt out like cards: none comes again before each of them came.
        examples, pairs = self.cfg.train_examples, self.length // 2
        keys = shuffled_indices(self.cfg.data_seed, self.cfg.keys, 0, examples * pairs)
        return self._ask(keys.reshape(examples, pairs))

    def _ask(self, keys: np.ndarray) -> Batch:
        tokens = np.full((len(keys), self.length), self.vocab_size - 1, np.int32)
        tokens[:, ::2] = keys
        positions = np.tile(np.arange(1, self.length, 2, dtype=np.int32), (len(keys), 1))
        return {"tokens": tokens, "positions": positions, "targets": self.values[keys]}

    def describe(self) -> str:
        """One line for people."""
        return self._describe(f"memorization: {self.length // 2} of {self.cfg.keys} keys")


class MadCompressionSource(_MadSource):
    """Batches `{"tokens" [B,L], "targets" [B,L]}`, int32: the tokens once more, for an autoencoder."""

    kind = "reconstruction"

    def __init__(self, cfg: MadCompressionData):
        super().__init__(cfg, cfg.length * (2 if cfg.noise else 1), 1 / cfg.words)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, length = self.cfg, self.length
        tokens = below(words[:, :length], cfg.words)
        targets = tokens.copy()
        if cfg.noise:
            noisy = uniform(words[:, length : 2 * length]) < cfg.noise
            tokens[noisy] = cfg.words + below(words[:, :length][noisy], cfg.noise_vocab)
            targets[noisy] = IGNORED
        tokens[:, -1], targets[:, -1] = cfg.vocab_size - 1, IGNORED
        return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}

    def describe(self) -> str:
        """One line for people."""
        return self._describe(f"compression: {self.cfg.words} words and {self.cfg.noise:.0%} noise")


class MadCopyingSource(_MadSource):
    """Batches `{"tokens" [B,L], "positions" [B,n], "targets" [B,n]}`, int32."""

    def __init__(self, cfg: MadCopyingData):
        self._blanks = cfg.length - 2 * cfg.copied - 1
        super().__init__(cfg, cfg.copied + self._blanks, 1 / (cfg.vocab_size - 2))

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count, n = self.cfg, len(words), self.cfg.copied
        copied = below(words[:, :n], cfg.vocab_size - 2).astype(np.int32)
        gaps = below(words[:, n : n + self._blanks], n + 1)
        before = np.stack([(gaps <= i).sum(1) for i in range(n)], 1)
        tokens = np.full((count, self.length), cfg.vocab_size - 2, np.int32)
        tokens[:, n + self._blanks] = cfg.vocab_size - 1
        np.put_along_axis(tokens, before + np.arange(n), copied, 1)
        positions = np.tile(np.arange(self.length - n, self.length, dtype=np.int32), (count, 1))
        return {"tokens": tokens, "positions": positions, "targets": copied}

    def describe(self) -> str:
        """One line for people."""
        return self._describe(f"selective copying: {self.cfg.copied} words")
