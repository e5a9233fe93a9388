"""Recall from a context that is rewritten, has keys of two tokens, or is shown several times.

As in `recall.py` a context of entries, key and value, comes before an area of slots in which every key is
asked for once, at places drawn with weights i^(a - 1); the label is the key's value. What varies:

    rewritten   after the K pairs, U of their keys come again, each with a new value: the last value counts
    compound    a key is two tokens, the first of sqrt(K), the second of sqrt(K), all combinations of them
                in random order: neither token alone tells the value
    repeated    the context, rewritten entries and all, is shown `passes` times in the same order before the
                queries (Arora et al., "Just read twice", arXiv 2407.05483: what a recurrent memory needs to
                know at the first reading, it may know at the second)

They go together. Rewriting and compound keys follow the generators of the Zoology project; different here:
all K + U values of a context are distinct, so that no value is right by having been seen twice, and every
query's label stands at the last token of its key, as in the plain task.

Token 0 is filler. Keys of one token lie in [1, V/2), values from V/2 on; of compound keys the first tokens
lie in [1, V/3), the second in [V/3, 2V/3), values from 2V/3 on.

    VariedRecall(pairs=8, rewritten=4).build()
    VariedRecall(pairs=9, compound=True).build()
    VariedRecall(pairs=8, passes=2).build()
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types
from experiments.tasks.recall import draw_distinct, draw_slots
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class VariedRecall:
    """Recall with `rewritten` of the keys, `compound` keys or several `passes` over the context.

    Other fields are those of `RecallData`.
    """

    vocab_size: int = 512
    length: int = 96
    pairs: int = 8
    rewritten: int = 0
    compound: bool = False
    passes: int = 1
    train_examples: int = 20_000
    eval_examples: int = 1_000
    random_filler: bool = False
    power: float = 0.01
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "length", "pairs", "passes", "eval_examples")
        require_at_least(self, 0, "rewritten", "train_examples", "data_seed")
        pairs, rewritten = self.pairs, self.rewritten
        require(rewritten <= pairs, f"VariedRecall: rewritten={rewritten} is more than pairs={pairs}")
        square = not self.compound or isqrt(pairs) ** 2 == pairs
        require(square, f"VariedRecall: compound keys need a square number of pairs, not pairs={pairs}")
        least = self.context + pairs * self.entry
        require(self.length >= least, f"VariedRecall: length={self.length} must be at least {least}")
        require(0 < self.power <= 1, f"VariedRecall: power={self.power} must lie in (0, 1]")
        require(self.vocab_size < 2**31, f"VariedRecall: vocab_size={self.vocab_size} does not fit 32 bits")
        low, high = self.bounds[-1], self.vocab_size
        key_tokens = isqrt(pairs) if self.compound else pairs
        enough = high - low >= pairs + rewritten and self.bounds[1] - 1 >= key_tokens
        require(
            enough, f"VariedRecall: vocab_size={high} is too small for pairs={pairs}, rewritten={rewritten}"
        )

    @property
    def entry(self) -> int:
        """Tokens of a key and its value, and of a slot for a query."""
        return 3 if self.compound else 2

    @property
    def context(self) -> int:
        """Tokens before the slots."""
        return self.passes * self.entry * (self.pairs + self.rewritten)

    @property
    def bounds(self) -> list[int]:
        """Where the tokens of each place in an entry begin."""
        return [1, *(i * self.vocab_size // self.entry for i in range(1, self.entry))]

    def build(self) -> "VariedRecallSource":
        """The source; examples are made when first asked for."""
        return VariedRecallSource(self)


class VariedRecallSource(GeneratedSource):
    """Batches `{"tokens" [B,L], "positions" [B,K], "targets" [B,K]}`, all int32."""

    kind = "language"
    tokenizer = None

    def __init__(self, cfg: VariedRecall):
        key_words = 2 * isqrt(cfg.pairs) + cfg.pairs if cfg.compound else cfg.pairs
        slots = (cfg.length - cfg.context) // cfg.entry
        filler = cfg.length if cfg.random_filler else 0
        self._counts = [key_words, cfg.pairs + cfg.rewritten, cfg.rewritten, slots, filler]
        super().__init__(cfg, sum(self._counts))
        self.vocab_size = cfg.vocab_size
        self.chance = 1 / (cfg.vocab_size - cfg.bounds[-1])  # accuracy of guessing among the values

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, entry = self.cfg, self.cfg.entry
        key_words, value_words, again_words, slot_words, filler_words = np.split(
            words[:, : sum(self._counts)], np.cumsum(self._counts)[:-1], axis=1
        )
        keys = self._keys(key_words)
        values = cfg.bounds[-1] + draw_distinct(value_words, cfg.vocab_size - cfg.bounds[-1])
        again = draw_distinct(again_words, cfg.pairs)  # which keys are rewritten
        shown = np.concatenate([keys, np.take_along_axis(keys, again[..., None], 1)], 1)
        entries = np.concatenate([shown, values[..., None]], -1).reshape(len(words), -1)
        tokens = np.zeros((len(words), cfg.length), np.int32)
        if cfg.random_filler:
            tokens[:] = below(filler_words, cfg.vocab_size)
        tokens[:, : cfg.context] = np.tile(entries, (1, cfg.passes))
        first = cfg.context + entry * draw_slots(slot_words, cfg.power, cfg.pairs)
        for i in range(entry - 1):
            np.put_along_axis(tokens, first + i, keys[..., i], axis=1)
        targets = values[:, : cfg.pairs].copy()
        np.put_along_axis(targets, again, values[:, cfg.pairs :], axis=1)
        return {"tokens": tokens, "positions": (first + entry - 2).astype(np.int32), "targets": targets}

    def _keys(self, words: np.ndarray) -> np.ndarray:
        """`[count, K, tokens of a key]`, in the order of the context."""
        cfg = self.cfg
        if not cfg.compound:
            return 1 + draw_distinct(words, cfg.bounds[1] - 1)[..., None]
        side = isqrt(cfg.pairs)
        first = 1 + draw_distinct(words[:, :side], cfg.bounds[1] - 1)
        second = cfg.bounds[1] + draw_distinct(words[:, side : 2 * side], cfg.bounds[2] - cfg.bounds[1])
        row, column = np.divmod(draw_distinct(words[:, 2 * side :], cfg.pairs), side)
        return np.stack([np.take_along_axis(first, row, 1), np.take_along_axis(second, column, 1)], -1)

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"multi-query recall: {cfg.pairs} {'compound ' if cfg.compound else ''}pairs, {cfg.rewritten} "
            f"rewritten, {cfg.passes} passes in {cfg.length} tokens, vocabulary {cfg.vocab_size}, "
            f"{'random' if cfg.random_filler else 'zero'} filler, {pool}, chance {self.chance:.2%}"
        )
