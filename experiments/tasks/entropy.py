"""Corpora whose entropy is known, so that a fitted irreducible loss can be checked against the truth.

A model of language loses `H + KL`: the entropy of the text, and what the model does not know. For real text
nobody can tell the two apart; a law L(N, D) = E + A / N^alpha + B / D^beta fitted to runs estimates E by
extrapolation. Text drawn from a hidden Markov model has an entropy rate that can be computed, and more: what
the best predictor pays at every position of a row, and on every token of a given row.

    source.entropy_rate             nats per token of an endless text; exact, or with `entropy_bounds`
    source.conditional_entropy      [T]: expected loss of the best predictor at each target of a row
    source.window_entropy           their mean: the irreducible loss E of rows of this length
    source.surprisal(batch)         [B,T]: the best predictor's loss on these very targets

The last one takes the luck of the draw out of a comparison: on the same rows, mean loss of a model minus
mean surprisal is an unbiased estimate of its KL divergence from the truth, with a much smaller error.

Two sources: `lexicon.LexiconData`, unifilar, everything in closed form, made for scaling laws;
`hidden_markov.HiddenMarkovData`, general, by the forward algorithm.
"""

from abc import abstractmethod
from typing import Any

import numpy as np

from experiments.sources import IGNORED, Batch, GeneratedSource, require_split


def entropy(p: np.ndarray) -> np.ndarray:
    """`-sum p log p` over the last axis, in nats; 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def whole_counts(weights: np.ndarray, bits: int) -> np.ndarray:
    """Probabilities in proportion to `weights [n]` as integers that sum to 2^bits, int64.

    Drawing by comparing `bits` random bits with their running sum has exactly these probabilities.
    """
    shares = np.cumsum(weights) / np.sum(weights)
    shares[-1] = 1.0
    return np.diff(np.floor(shares * 2.0**bits + 0.5), prepend=0.0).astype(np.int64)


class KnownEntropySource(GeneratedSource):
    """A language source that knows what the best predictor loses."""

    kind = "language"
    tokenizer = None
    entropy_rate: Any  # float, nats per token
    conditional_entropy: Any  # [T] float64, nats

    @abstractmethod
    def log_likelihoods(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens [B,T+1] -> [B,T]`: log P(token t + 1 | tokens 0..t), minus infinity where impossible."""

    @property
    def window_entropy(self) -> float:
        """Mean over the targets of a row: what no model can do better than in expectation."""
        return float(np.mean(self.conditional_entropy))

    def surprisal(self, batch: Batch) -> np.ndarray:
        """The best predictor's loss on every target, `[B,T]` in nats; 0 where the target is ignored."""
        tokens = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)
        loss = np.zeros(batch["targets"].shape)
        known = (batch["targets"] != IGNORED).all(1)
        loss[known] = -self.log_likelihoods(tokens[known].astype(np.int64))
        return loss

    def ideal_loss(self, split: str) -> float:
        """The best predictor's mean loss on the rows of `split`."""
        require_split(self.splits, split)
        sums = [self.surprisal(batch).sum() for batch in self.eval_batches(split, 256)]
        return float(sum(sums) / (self.cfg.eval_examples * self.length))
