"""MAD's in-context recall and noisy recall (Poli et al. 2024, arXiv 2403.17844).

`MadRecallData`. Keys are tokens of [0, W/2), values of [W/2, W), noise of [W, V), W = V - noise_vocab. Each
sequence draws its own map from keys to values, and its L/2 pairs `k v` with replacement; each but the last is
replaced by two noise tokens with probability p, though one at least stays. The last pair has a key that was
shown. Wherever a key comes again, its value has to be predicted.

`every_token=True`, as published, trains on every next token and examines the values only; by default training
too has labels only where the answer is in the input. An example is published as L + 1 tokens, inputs and
targets being L of them each; here it has L, the last of which predicts nothing.

Unlike the published generator, the pair that is kept from noise is never the last one, so that there always
is a key to ask for. Published accuracies are averages over classes (macro), and their settings were chosen on
the test set; here accuracy is over labelled positions (micro), and there is a validation split beside the
test.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import (
    IGNORED,
    Batch,
    GeneratedSource,
    below,
    require_at_least,
    require_types,
    uniform,
)
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class MadRecallData:
    """MAD's in-context recall, and with `noise_vocab` and `noise`, the probability p, noisy recall.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    vocab_size: int = 16
    noise_vocab: int = 0
    noise: float = 0.0
    length: int = 128
    every_token: bool = False
    train_examples: int = 12_800
    eval_examples: int = 1_280
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed", "noise_vocab")
        length, words = self.length, self.vocab_size - self.noise_vocab
        require(
            length >= 4 and length % 2 == 0, f"MadRecallData: length={length} must be even and at least 4"
        )
        require(0 <= self.noise < 1, f"MadRecallData: noise={self.noise} must lie in [0, 1)")
        ok = self.noise == 0 or self.noise_vocab > 0
        require(ok, f"MadRecallData: noise={self.noise} needs noise tokens: noise_vocab={self.noise_vocab}")
        ok = words >= 4 and self.vocab_size < 2**31
        text = f"vocab_size={self.vocab_size} with noise_vocab={self.noise_vocab}"
        require(ok, f"MadRecallData: {text} must leave at least 4 tokens for keys and values")

    @property
    def keys(self) -> int:
        """How many tokens are keys."""
        return (self.vocab_size - self.noise_vocab) // 2

    @property
    def values(self) -> int:
        """How many tokens are values; the first of them is token number `keys`."""
        return self.vocab_size - self.noise_vocab - self.keys

    def build(self) -> "MadRecallSource":
        """The source; examples are made when first asked for."""
        return MadRecallSource(self)


class RecallSource(GeneratedSource):
    """Batches `{"tokens" [B,L], "targets" [B,L]}`, int32."""

    kind = "language"
    tokenizer = None
    name: str

    def __init__(self, cfg, words_per_example: int):
        super().__init__(cfg, words_per_example)
        self.vocab_size = cfg.vocab_size
        self.chance = 1 / cfg.values  # at every place all values are equally likely

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        batch = super().batch(seed, step, size)
        if self.cfg.every_token:
            batch["targets"] = self.next_tokens(batch["tokens"])
        return batch

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        targets = np.full_like(tokens, IGNORED)
        targets[:, :-1] = tokens[:, 1:]
        return targets

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        labels = "trained on every token" if cfg.every_token else "trained on the answers"
        return (
            f"MAD {self.name}: {cfg.length} tokens, vocabulary {cfg.vocab_size}, {labels}, {pool}, "
            f"chance {self.chance:.2%}"
        )


class MadRecallSource(RecallSource):
    """Pairs at places (0, 1), (2, 3), ...; what follows a key that was shown before is labelled."""

    def __init__(self, cfg: MadRecallData):
        self.name = f"recall among {cfg.noise:.0%} noise" if cfg.noise else "in-context recall"
        super().__init__(cfg, 2 + cfg.keys + 3 * (cfg.length // 2))

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, count, pairs = self.cfg, len(words), self.length // 2
        kept, asked, map_words, pair_words = np.split(words, [1, 2, 2 + cfg.keys], axis=1)
        pair_words = pair_words[:, : 3 * pairs].reshape(count, pairs, 3)
        real = uniform(pair_words[..., 0]) >= cfg.noise
        np.put_along_axis(real, below(kept, pairs - 1), True, 1)
        real[:, -1] = True
        keys = below(pair_words[..., 1], cfg.keys)
        # A noise pair is like no other, and so is the last one until its key is chosen.
        apart = ~real | (np.arange(pairs) == pairs - 1)
        first = first_places(np.where(apart, cfg.keys + np.arange(pairs), keys))
        keys[:, -1] = _one_of(keys, ~apart & (first == np.arange(pairs)), asked)
        seen = real & (first < np.arange(pairs))
        seen[:, -1] = True
        values = np.take_along_axis(cfg.keys + below(map_words, cfg.values), keys, 1)
        pair = np.stack([keys, values], -1)
        if cfg.noise:
            noise = cfg.vocab_size - cfg.noise_vocab + below(pair_words[..., 1:], cfg.noise_vocab)
            pair = np.where(real[..., None], pair, noise)
        targets = np.full((count, self.length), IGNORED, np.int32)
        targets[:, ::2] = np.where(seen, values, IGNORED)
        return {"tokens": pair.reshape(count, -1).astype(np.int32), "targets": targets}


def first_places(ids: np.ndarray) -> np.ndarray:
    """`ids [B,n]` -> `[B,n]`, for every entry the first place in its row that holds the same."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, 1)
    new = np.concatenate([np.ones((len(ids), 1), bool), ordered[:, 1:] != ordered[:, :-1]], 1)
    start = np.maximum.accumulate(np.where(new, np.arange(ids.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, start, 1), 1)
    return first


def _one_of(x: np.ndarray, among: np.ndarray, words: np.ndarray) -> np.ndarray:
    """`[B]`: in each row of `x [B,n]` one of the entries where `among`, by `words [B,1]`."""
    number = below(words, among.sum(1, keepdims=True))
    place = (among & (among.cumsum(1) == number + 1)).argmax(1)
    return np.take_along_axis(x, place[:, None], 1)[:, 0]
