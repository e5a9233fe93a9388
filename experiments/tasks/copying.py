"""Selective copying: the tokens among the blanks, in order (Gu and Dao, arXiv 2312.00752, Section 4.1).

M data tokens from [1, A - 1) stand, in random order, at M places drawn without replacement from a context of
C tokens that are blank (0) otherwise. M markers A - 1 follow, and at the j-th of them the j-th data token is
to be said; nothing else is labelled:

    T = C + M,    x_{C+j} = A - 1,    y_{C+j} = the j-th non-blank token of x_0 ... x_{C-1}.

A fixed convolution cannot do it, because the distance between token and answer varies: the model has to
select by content. With `selective=False` the data tokens come first and the blanks after them, at fixed
distances from the answers: the ordinary copying task (Arjovsky et al., arXiv 1511.06464), which a
time-invariant memory can do. Every place of the context can hold data, the last one too.

    CopyingData(context=256).build()
    CopyingData.mamba().build()
"""

from dataclasses import dataclass
from math import log2

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types
from experiments.tasks.recall import draw_distinct
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class CopyingData:
    """Selective copying of `copied` tokens out of `context`; `vocab_size` counts blank and marker."""

    vocab_size: int = 16
    context: int = 256
    copied: int = 16
    selective: bool = True
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 3, "vocab_size")
        require_at_least(self, 1, "context", "copied", "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        room = self.copied <= self.context
        require(room, f"CopyingData: copied={self.copied} does not fit context={self.context}")
        require(self.vocab_size < 2**31, f"CopyingData: vocab_size={self.vocab_size} does not fit 32 bits")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.context + self.copied

    @classmethod
    def mamba(cls) -> "CopyingData":
        """The published size: 16 tokens out of a context of 4,096.

        There: two layers of width 64, 64 sequences a step, 400,000 steps at a learning rate of 1e-4.
        """
        return cls(context=4096)

    def build(self) -> "CopyingSource":
        """The source; examples are made when first asked for."""
        return CopyingSource(self)


class CopyingSource(GeneratedSource):
    """Batches `{"tokens" [B,T], "positions" [B,M], "targets" [B,M]}`, all int32."""

    kind = "language"
    tokenizer = None

    def __init__(self, cfg: CopyingData):
        super().__init__(cfg, 2 * cfg.copied)
        self.vocab_size = cfg.vocab_size
        self.chance = 1 / (cfg.vocab_size - 2)  # accuracy of guessing among the data tokens
        # Where so many sequences differ, none is drawn twice.
        self.disjoint = cfg.copied * log2(cfg.vocab_size - 2) < 64

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count = self.cfg, len(words)
        data = 1 + below(words[:, : cfg.copied], cfg.vocab_size - 2).astype(np.int32)
        places = np.tile(np.arange(cfg.copied), (count, 1))
        if cfg.selective:
            places = np.sort(draw_distinct(words[:, cfg.copied : 2 * cfg.copied], cfg.context), 1)
        tokens = np.zeros((count, cfg.length), np.int32)
        np.put_along_axis(tokens, places, data, axis=1)
        tokens[:, cfg.context :] = cfg.vocab_size - 1
        positions = np.tile(np.arange(cfg.context, cfg.length, dtype=np.int32), (count, 1))
        return {"tokens": tokens, "positions": positions, "targets": data}

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"{'selective' if cfg.selective else 'plain'} copying: {cfg.copied} tokens out of "
            f"{cfg.context:,}, vocabulary {cfg.vocab_size}, {pool}, chance {self.chance:.2%}"
        )
