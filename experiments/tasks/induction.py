"""Induction heads: what followed the special token, when it comes again? (Gu and Dao, arXiv 2312.00752, 4.1)

A sequence of T tokens ends with a special token, V - 1. It also stands at one earlier place, drawn uniformly
among those that leave room for an answer; all other tokens are drawn uniformly from [0, V - 1). The label, at
the last position only, is the token that followed the special one:

    x_p = x_{T-1} = V - 1,    p uniform in [0, T - 3],    y = x_{p+1}.

A memory has to keep one token for up to T steps, and to let nothing else in. Trained at one length and tested
at others (the paper: 256, and 2^6 to 2^20), the task shows whether what was learnt depends on the length: a
config that differs in `length` alone evaluates a trained model there. V counts the special token; the
published description does not say whether its 16 do.

    InductionData().build()
    InductionData(length=2**20, eval_examples=8).build()
"""

from dataclasses import dataclass
from math import log2

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class InductionData:
    """Induction heads; the defaults are the published training data, which never repeat.

    There: two layers of width 64 (Mamba) or 128, 8 sequences a step, Adam at a constant 2e-4 or 1e-3,
    204,800 steps (fewer for convolutions, more for attention with relative positions).
    """

    vocab_size: int = 16
    length: int = 256
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 3, "vocab_size", "length")
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        require(self.vocab_size < 2**31, f"InductionData: vocab_size={self.vocab_size} does not fit 32 bits")

    def build(self) -> "InductionSource":
        """The source; examples are made when first asked for."""
        return InductionSource(self)


class InductionSource(GeneratedSource):
    """Batches `{"tokens" [B,T], "positions" [B,1], "targets" [B,1]}`, all int32."""

    kind = "language"
    tokenizer = None

    def __init__(self, cfg: InductionData):
        super().__init__(cfg, cfg.length)
        self.vocab_size = cfg.vocab_size
        self.chance = 1 / (cfg.vocab_size - 1)  # accuracy of guessing among the ordinary tokens
        # Where so many sequences differ, none is drawn twice.
        self.disjoint = cfg.length * log2(cfg.vocab_size) < 64

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, rows = self.cfg, np.arange(len(words))
        tokens = below(words[:, : cfg.length], cfg.vocab_size - 1).astype(np.int32)
        place = below(
            words[:, cfg.length - 1], cfg.length - 2
        )  # the last token is not drawn: its word is free
        tokens[rows, place] = tokens[:, -1] = cfg.vocab_size - 1
        positions = np.full((len(words), 1), cfg.length - 1, np.int32)
        return {"tokens": tokens, "positions": positions, "targets": tokens[rows, place + 1][:, None]}

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"induction heads: {cfg.length:,} tokens, vocabulary {cfg.vocab_size}, {pool}, "
            f"chance {self.chance:.2%}"
        )
