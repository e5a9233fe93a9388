"""Word problems of finite groups: the product so far, at every position; and parity, which is that of Z_2.

A word of n group elements follows a token that marks its beginning, and the label at each of them is the
product up to there (Merrill, Petty and Sabharwal, arXiv 2404.08819):

    s_0 = identity,    s_t = s_{t-1} followed by g_t,    y_t = s_t.

Elements are drawn uniformly from the group or, with `moved`, from the permutations that move at most so many
things: for 2 the swaps and the identity, the "only swaps" of Grazzi et al. (arXiv 2411.12537, Section 5.2).
The identity is among them because without it the length alone would tell even products from odd ones. n is
uniform in [min_length, length]; shorter words are padded at the end with token 0. Z_n is a counter; S_3 and
A_4 are solvable, A_5 and S_5 are not, and their words are complete for NC^1.

    WordProblemData.parity().build()  # trained on lengths 3 to 40 ...
    WordProblemData.parity(min_length=40, length=256).build()  # ... and tested on 40 to 256, as published
    WordProblemData(group="S5", moved=2, length=32).build()

Short words are few, so a word belongs to one split by its content, also across configs that differ in their
lengths. Token ids: 0 pads, 1 begins, 2 + i is element i of `groups.py`, in the labels too.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import IGNORED, Batch, GeneratedSource, below, require_at_least, require_types
from experiments.tasks.groups import elements_moving, group_table
from layers.checks import require

LABELS = ("every", "last")
BEGIN, FIRST = 1, 2  # token ids: what begins, and element 0


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for no error: how formal-language tasks are reported in print."""
    return (accuracy - chance) / (1 - chance)


@dataclass(frozen=True, kw_only=True)
class WordProblemData:
    """Words over `group`, "S5", "A4xZ5", ...; `labels` at "every" element or at the "last" only.

    `moved`, for S_n and A_n, restricts the elements to those that move at most so many things; None: all.
    """

    group: str = "S5"
    moved: int | None = None
    min_length: int = 3
    length: int = 40
    labels: str = "every"
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "min_length", "length", "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        ordered = self.min_length <= self.length
        require(ordered, f"WordProblemData: min_length={self.min_length} is above length={self.length}")
        require(
            self.labels in LABELS, f"WordProblemData: labels={self.labels!r}; choose from {', '.join(LABELS)}"
        )
        if self.moved is not None:
            require_at_least(self, 2, "moved")
        try:
            group_table(self.group)
            if self.moved is not None:
                elements_moving(self.group, self.moved)
        except ValueError as error:
            raise ValueError(f"WordProblemData: group={self.group!r}, moved={self.moved}: {error}") from None

    @classmethod
    def parity(cls, min_length: int = 3, length: int = 40, labels: str = "last") -> "WordProblemData":
        """Whether a word of bits has an odd number of ones; trained on the published lengths.

        With `labels="every"` the same function is far easier to learn: a DeltaNet layer with negative
        eigenvalues had it after 400 steps, and with labels at the last bit alone not after 1,000.
        """
        return cls(group="Z2", min_length=min_length, length=length, labels=labels)

    def build(self) -> "WordProblemSource":
        """The source; examples are made when first asked for."""
        return WordProblemSource(self)


class WordProblemSource(GeneratedSource):
    """Batches `{"tokens" [B,1+n], "targets" [B,1+n]}` or, with labels at the last element only,

    `{"tokens" [B,1+n], "positions" [B,1], "targets" [B,1]}`, all int32.
    """

    kind = "language"
    tokenizer = None
    disjoint = True

    def __init__(self, cfg: WordProblemData):
        super().__init__(cfg, 1 + cfg.length)
        self.length = 1 + cfg.length
        self._table = group_table(cfg.group)
        order = len(self._table)
        self._letters = np.arange(order) if cfg.moved is None else elements_moving(cfg.group, cfg.moved)
        self.vocab_size = FIRST + order
        self.chance = self._chance()

    def _chance(self) -> float:
        """Accuracy of the likeliest product at each position, from the distribution of a random walk."""
        cfg, order = self.cfg, len(self._table)
        step = np.zeros((order, order))
        for letter in self._letters:
            step[np.arange(order), self._table[:, letter]] += 1 / len(self._letters)
        here, walk = np.eye(order)[0], []
        for _ in range(cfg.length):
            here = here @ step
            walk.append(here)
        if cfg.labels == "last":
            return float(np.mean(walk[cfg.min_length - 1 :], axis=0).max())
        ends = np.arange(cfg.min_length, cfg.length + 1)
        labelled = (np.arange(1, cfg.length + 1) <= ends[:, None]).mean(0)
        return float(np.max(walk, axis=1) @ labelled / labelled.sum())

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count = self.cfg, len(words)
        lengths = cfg.min_length + below(words[:, 0], cfg.length - cfg.min_length + 1)
        letters = self._letters[below(words[:, 1 : 1 + cfg.length], len(self._letters))]
        inside = np.arange(cfg.length) < lengths[:, None]
        tokens = np.zeros((count, 1 + cfg.length), np.int32)
        tokens[:, 0] = BEGIN
        tokens[:, 1:] = np.where(inside, FIRST + letters, 0)
        targets = np.full_like(tokens, IGNORED)
        targets[:, 1:] = np.where(inside, FIRST + self._products(letters), IGNORED)
        if cfg.labels == "every":
            return {"tokens": tokens, "targets": targets}
        positions = lengths[:, None].astype(np.int32)
        targets = np.take_along_axis(targets, positions, axis=1)
        return {"tokens": tokens, "positions": positions, "targets": targets}

    def _products(self, letters: np.ndarray) -> np.ndarray:
        """`[count, n]` elements -> the products up to each."""
        products = np.empty_like(letters)
        state = np.zeros(len(letters), letters.dtype)
        for t in range(letters.shape[1]):
            products[:, t] = state = self._table[state, letters[:, t]]
        return products

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        moved = "" if cfg.moved is None else f" from elements that move at most {cfg.moved}"
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"word problem of {cfg.group}{moved}: {cfg.min_length} to {cfg.length} elements, label at "
            f"{cfg.labels}, {pool}, chance {self.chance:.2%}"
        )
