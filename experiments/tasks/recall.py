"""Multi-query associative recall (Arora et al., "Zoology", ICLR 2024, Section 3 and Appendix E).

An example of length L shows K pairs `k1 v1 ... kK vK`, then asks for every key once more. Keys are distinct
tokens of [1, V/2), values distinct tokens of [V/2, V); token 0 fills the rest. The query area after the
pairs has (L - 2K)/2 slots of two tokens; K of them are drawn without replacement with weights i^(a - 1),
i = 1, 2, ..., in that order, for keys 1..K. A query's label is its key's value, and nothing else is scored.

Filler, too, is a function of the example's number alone, and training and test come from separate streams.
Mixtures of lengths and numbers of pairs stand in `recall_mixture.py`, rewritten, compound and repeated
context in `recall_variants.py`.

    RecallData(vocab_size=512, length=64, pairs=8, train_examples=20_000).build()
    RecallData.zoology(512).build()  # a cell of the paper's Figure 2
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import (
    Batch,
    GeneratedSource,
    below,
    require_at_least,
    require_types,
    uniform,
)
from layers.checks import require

# Length -> pairs, in Figure 2 of the paper.
ZOOLOGY_CELLS = {64: 4, 128: 8, 256: 16, 512: 64}


@dataclass(frozen=True, kw_only=True)
class RecallData:
    """Multi-query associative recall.

    `train_examples` is the size of a fixed training pool, gone through in a new order every epoch, or 0 for
    examples that never repeat. `random_filler` puts uniform tokens of the whole vocabulary where the filler
    would be. `power` is a above: the smaller, the closer behind the pairs the queries come.
    """

    vocab_size: int = 512
    length: int = 64
    pairs: int = 8
    train_examples: int = 20_000
    eval_examples: int = 1_000
    random_filler: bool = False
    power: float = 0.01
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "pairs", "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        length, pairs, vocab_size = self.length, self.pairs, self.vocab_size
        require(length >= 2 and length % 2 == 0, f"RecallData: length={length} must be even and positive")
        require(4 * pairs <= length, f"RecallData: pairs={pairs} needs length >= {4 * pairs}, not {length}")
        require(vocab_size > length, f"RecallData: vocab_size={vocab_size} must exceed length={length}")
        require(vocab_size < 2**31, f"RecallData: vocab_size={vocab_size} does not fit 32 bits")
        require(0 < self.power <= 1, f"RecallData: power={self.power} must lie in (0, 1]")

    @classmethod
    def zoology(cls, length: int) -> "RecallData":
        """A cell of Figure 2 of the paper: 64, 128, 256 or 512 tokens, of 8,192.

        There: two layers without an MLP, AdamW with weight decay 0.1, 64 epochs of cosine decay, the best
        of four learning rates from 1e-4 to 1e-2, 512 sequences a step (256 at 256 tokens, 128 at 512).
        """
        known = ", ".join(map(str, ZOOLOGY_CELLS))
        require(
            length in ZOOLOGY_CELLS, f"RecallData: no published cell has length={length}; there are {known}"
        )
        pairs = ZOOLOGY_CELLS[length]
        return cls(vocab_size=8192, length=length, pairs=pairs, train_examples=100_000, eval_examples=3_000)

    def build(self) -> "RecallSource":
        """The source; examples are made when first asked for."""
        return RecallSource(self)


class RecallSource(GeneratedSource):
    """Batches `{"tokens" [B,L], "positions" [B,K], "targets" [B,K]}`, all int32."""

    kind = "language"
    tokenizer = None

    def __init__(self, cfg: RecallData):
        self._slots = cfg.length // 2 - cfg.pairs
        filler = cfg.length if cfg.random_filler else 0
        super().__init__(cfg, 2 * cfg.pairs + self._slots + filler)
        self.vocab_size = cfg.vocab_size
        self.chance = 1 / (cfg.vocab_size - cfg.vocab_size // 2)  # accuracy of guessing among the values

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count = self.cfg, len(words)
        key_words, value_words, slot_words, filler_words = np.split(
            words, np.cumsum([cfg.pairs, cfg.pairs, self._slots]), axis=1
        )
        half = cfg.vocab_size // 2
        keys = 1 + draw_distinct(key_words, half - 1)
        values = half + draw_distinct(value_words, cfg.vocab_size - half)
        tokens = np.zeros((count, cfg.length), np.int32)
        if cfg.random_filler:
            tokens[:] = below(filler_words[:, : cfg.length], cfg.vocab_size)
        tokens[:, 0 : 2 * cfg.pairs : 2] = keys
        tokens[:, 1 : 2 * cfg.pairs : 2] = values
        slots = draw_slots(slot_words, cfg.power, cfg.pairs)
        positions = (2 * cfg.pairs + 2 * slots).astype(np.int32)
        np.put_along_axis(tokens, positions, keys, axis=1)
        return {"tokens": tokens, "positions": positions, "targets": values}

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"multi-query recall: {cfg.pairs} pairs in {cfg.length} tokens, vocabulary {cfg.vocab_size}, "
            f"{'random' if cfg.random_filler else 'zero'} filler, {pool}, chance {self.chance:.2%}"
        )


def draw_distinct(words: np.ndarray, n: int) -> np.ndarray:
    """`[count, k]` words -> in each row k distinct numbers of `range(n)`, in random order, int32.

    The first k steps of a Fisher-Yates shuffle, all rows at once: every ordered choice is equally likely.
    """
    count, k = words.shape
    rows = np.arange(count)
    deck = np.tile(np.arange(n, dtype=np.int32), (count, 1))
    where = np.arange(k) + below(words, n - np.arange(k))
    drawn = np.empty((count, k), np.int32)
    for i in range(k):
        drawn[:, i] = deck[rows, where[:, i]]
        deck[rows, where[:, i]] = deck[:, i]
    return drawn


def draw_weighted(words: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """`[count, n]` words -> k distinct numbers of `range(n)` drawn one after the other by `weights [n]`.

    An exponential race: with arrival times E_i / w_i the order of arrival is that of successive draws
    without replacement (Efraimidis and Spirakis, 2006).
    """
    return np.argsort(-np.log(uniform(words)) / weights, axis=1, kind="stable")[:, :k]


def draw_slots(words: np.ndarray, power: float, k: int) -> np.ndarray:
    """`[count, n]` words -> in each row k distinct numbers of `range(n)`, i by weight (i + 1)^(power - 1)."""
    return draw_weighted(words, np.arange(1, words.shape[1] + 1) ** (power - 1.0), k)
