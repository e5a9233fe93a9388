"""MAD's fuzzy in-context recall: keys and values of several tokens (Poli et al. 2024, arXiv 2403.17844).

Keys are 1 to `motif` distinct tokens of the lower half of the vocabulary, each order another key, values
likewise of the upper half (without the last token, which pads); where the model is examined all keys have
`motif` tokens. Each sequence has its own values for its keys. Pairs are drawn until the next might not fit;
one more asks for one of those shown. Wherever a key comes again, its value has to be predicted.

`every_token=True`, as published, trains on every next token; see `mad_recall.py`, which this task shares its
ways with. Unlike in the published generator, the pair that is asked for at the end was always shown (there,
the sequence could end before its place came), and padding follows instead of leading.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.sources import IGNORED, Batch, below, require_at_least, require_types
from experiments.tasks.mad_recall import RecallSource, first_places
from experiments.tasks.recall import draw_distinct
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class MadFuzzyRecallData:
    """MAD's fuzzy in-context recall; `motif` is the largest number of tokens of a key or a value.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    vocab_size: int = 16
    length: int = 128
    motif: int = 3
    every_token: bool = False
    train_examples: int = 12_800
    eval_examples: int = 1_280
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples", "motif")
        require_at_least(self, 0, "train_examples", "data_seed")
        motif, length = self.motif, self.length
        ok = 2 * motif + 1 <= self.vocab_size < 10**5
        text = f"vocab_size={self.vocab_size} must lie between {2 * motif + 1} and 100,000"
        require(ok, f"MadFuzzyRecallData: {text} with motif={motif}")
        ok = 4 * motif <= length
        require(ok, f"MadFuzzyRecallData: length={length} must be at least {4 * motif} with motif={motif}")
        require(motif <= 3, f"MadFuzzyRecallData: motif={motif} must be at most 3")

    @property
    def keys(self) -> int:
        """How many tokens make up keys."""
        return (self.vocab_size - 1) // 2

    @property
    def values(self) -> int:
        """How many tokens make up values; the first of them is token number `keys`."""
        return self.vocab_size - 1 - self.keys

    def build(self) -> "MadFuzzyRecallSource":
        """The source; examples are made when first asked for."""
        return MadFuzzyRecallSource(self)


class MadFuzzyRecallSource(RecallSource):
    """Pairs of 2 to `2 motif` tokens one after the other, padded with the last token of the vocabulary."""

    name = "fuzzy recall"

    def __init__(self, cfg: MadFuzzyRecallData, examining: bool = False):
        self._examining = examining
        self._pairs = (cfg.length - 2 * cfg.motif) // 2  # more than ever fit before the last
        super().__init__(cfg, 1 + self._pairs * (2 + 2 * cfg.motif))

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The `eval_examples` of the split, whose keys all have `motif` tokens."""
        if self._examining:
            return super().eval_batches(split, size)
        return MadFuzzyRecallSource(self.cfg, examining=True).eval_batches(split, size)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count, pairs, motif = self.cfg, len(words), self._pairs, self.cfg.motif
        asked, words = words[:, :1], words[:, 1 : 1 + pairs * (2 + 2 * motif)].reshape(count, pairs, -1)
        sizes = 1 + below(words[..., :2], motif)
        if self._examining:
            sizes[..., 0] = motif
        keys = _motifs(words[..., 2 : 2 + motif], cfg.keys, sizes[..., 0])
        values = _motifs(words[..., 2 + motif :], cfg.values, sizes[..., 1])
        first = first_places((keys + 1) @ (cfg.keys + 1) ** np.arange(motif))
        values = np.take_along_axis(values, first[..., None], 1)
        fits = ((keys >= 0).sum(-1) + (values >= 0).sum(-1)).cumsum(1) + 2 * motif <= cfg.length
        last = below(asked, fits.sum(1, keepdims=True))[..., None]
        parts = np.concatenate([keys, np.where(values >= 0, values + cfg.keys, values)], -1)
        parts[~fits] = -1
        parts = np.concatenate([parts, np.take_along_axis(parts, last, 1)], 1)
        asks = np.zeros(parts.shape, bool)
        asks[:, :-1, motif:] = (first < np.arange(pairs))[..., None]
        asks[:, -1, motif:] = True
        return self._in_a_row(parts.reshape(count, -1), asks.reshape(count, -1))

    def _in_a_row(self, parts: np.ndarray, asks: np.ndarray) -> Batch:
        """The tokens >= 0 of each row, moved together; the place before one that is asked for is labelled."""
        tokens = np.full((len(parts), self.length), self.vocab_size - 1, np.int32)
        targets = np.full(tokens.shape, IGNORED, np.int32)
        place = (parts >= 0).cumsum(1) - 1
        rows, columns = np.nonzero(parts >= 0)
        tokens[rows, place[rows, columns]] = parts[rows, columns]
        rows, columns = np.nonzero((parts >= 0) & asks)
        targets[rows, place[rows, columns] - 1] = parts[rows, columns]
        return {"tokens": tokens, "targets": targets}

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        targets = super().next_tokens(tokens)
        return np.where(targets == self.vocab_size - 1, IGNORED, targets).astype(np.int32)


def _motifs(words: np.ndarray, n: int, sizes: np.ndarray) -> np.ndarray:
    """`words [B,P,M]` -> for each pair M distinct tokens of `range(n)`, of which the first `sizes` stay."""
    motif = words.shape[-1]
    drawn = draw_distinct(words.reshape(-1, motif), n).reshape(words.shape).astype(np.int64)
    return np.where(np.arange(motif) < sizes[..., None], drawn, -1)
