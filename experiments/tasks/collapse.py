"""A probe for state collapse: loss and states of a model along sequences far longer than it was trained on.

Recurrent models trained at one length can fail beyond it: a state that never filled up in training overflows,
and the loss explodes ("Stuffed Mamba", Chen et al. 2024, arXiv 2410.07145, who look at the loss per position
and at mean and variance of every head's state, on text and on a prompt that is nothing but line breaks).

    source = TextData(length=65_536).build()                     any source whose every token is labelled
    probe = collapse.measure(params, model, source, rows=4, piece=1_024)
    probe.loss                       [T]: loss at every position, in nats
    probe.states[name].variance      [pieces, blocks, heads]: of the state, at the end of every piece
    probe.table(trained=1_024)       a row for each doubling of the length

Sequences are worked through in pieces, each going on where the state stopped: memory does not grow with T,
and the numbers are those of the whole. `measure_batch` takes any batch; `newlines` makes the other prompt.
That one says nothing new after its first tokens: where the loss rises on it, the state has gone astray.

    Stretch.at(TextData(length=256), 65_536)                     what a comparison asks as a probe

scores the last eighth of longer rows of the same text, as one row of the table does.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.losses import cross_entropy
from experiments.sources import IGNORED, Batch, fingerprint, require_at_least
from layers.checks import require
from zoo import lm

NEWLINE = ord("\n")
MOST_HEADS = 64  # a state with more parts is looked at as one: channels of Mamba, places in a cache
LOSS_CHUNK = 4_096  # positions whose logits exist at once


class Statistics(NamedTuple):
    """Of one array of the states, `[pieces, blocks, heads]` each; means over the rows of the batch."""

    mean: np.ndarray
    variance: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class Probe:
    """What was measured; `ends [pieces]` is the number of tokens read when the states were looked at."""

    loss: np.ndarray  # [T] mean over rows, nats; NaN where no target is labelled
    ends: np.ndarray
    states: dict[str, Statistics]

    def table(self, trained: int) -> list[dict[str, float]]:
        """Rows for the lengths `trained`, 2 `trained`, 4 `trained`, ...; ValueError for more than there is.

        `loss` is the mean over the last eighth of the length, `above` what it is more than in the first row,
        `growth` the norm of the state at its end over that in the first row, of the array that grew the most.
        """
        require(0 < trained <= len(self.loss), f"trained={trained} is not in 1..{len(self.loss)}")
        lengths = [trained]
        while 2 * lengths[-1] <= len(self.loss):
            lengths.append(2 * lengths[-1])
        losses = [float(np.nanmean(self.loss[last_eighth(n) : n])) for n in lengths]
        norms = [self._norms(n) for n in lengths]
        return [
            {"length": n, "loss": loss, "above": loss - losses[0], "growth": float((norm / norms[0]).max())}
            for n, loss, norm in zip(lengths, losses, norms, strict=True)
        ]

    def _norms(self, length: int) -> np.ndarray:
        """Mean norm of each array of the states at the end of the piece that `length` falls into."""
        piece = np.searchsorted(self.ends, length)
        return np.array([s.norm[piece].mean() for s in self.states.values()]) + 1e-30


def last_eighth(length: int) -> int:
    """Where the last eighth of `length` places, at least one, begins."""
    return length - max(1, length // 8)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Rows of `data`, a language source with a target for every token, scored from place `first` on."""

    data: Any
    first: int

    def __post_init__(self):
        require_at_least(self, 0, "first")
        length = self.data.length
        require(self.first < length, f"Stretch: first={self.first} lies beyond length={length}")

    @classmethod
    def at(cls, data: Any, length: int) -> "Stretch":
        """The last eighth of rows of `length` tokens."""
        return cls(data=dataclasses.replace(data, length=length), first=last_eighth(length))

    def build(self) -> "StretchSource":
        """The source; whatever `data` raises."""
        return StretchSource(self)


class StretchSource:
    """Batches `{"tokens" [B,T], "positions" [B,T - first], "targets" [B,T - first]}`, all int32."""

    kind = "language"

    def __init__(self, cfg: Stretch):
        self._source, self._first = cfg.data.build(), cfg.first
        self.length, self.splits = self._source.length, self._source.splits
        self.vocab_size, self.tokenizer = self._source.vocab_size, self._source.tokenizer
        self.fingerprint = fingerprint({"first": cfg.first, "of": self._source.fingerprint})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        return self._end(self._source.batch(seed, step, size))

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The whole split in a fixed order."""
        return map(self._end, self._source.eval_batches(split, size))

    def _end(self, batch: Batch) -> Batch:
        targets = batch["targets"]
        require(targets.shape == batch["tokens"].shape, "Stretch needs a target for every token")
        places = np.arange(self._first, targets.shape[1], dtype=np.int32)
        scored = {"positions": np.tile(places, (len(targets), 1)), "targets": targets[:, places]}
        return {**batch, **scored}

    def describe(self) -> str:
        """One line for people."""
        return f"places {self._first:,} to {self.length:,} of: {self._source.describe()}"


def newlines(rows: int, length: int, token: int = NEWLINE) -> Batch:
    """Rows of nothing but `token`: in bytes the line break."""
    tokens = np.full((rows, length), token, np.int32)
    return {"tokens": tokens, "targets": tokens}


def measure(
    params: Any,
    model: lm.Config,
    source: Any,
    *,
    rows: int = 4,
    piece: int = 1_024,
    split: str = "validation",
) -> Probe:
    """`measure_batch` on the first `rows` rows of a split of a language source, whose length may be any."""
    return measure_batch(params, model, next(source.eval_batches(split, rows)), piece=piece)


def measure_batch(params: Any, model: lm.Config, batch: Batch, *, piece: int = 1_024) -> Probe:
    """Read `tokens [B,T]` in pieces of `piece` tokens, the last one shorter.

    Raises ValueError for a batch with labels at few positions or with several documents in a row.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    require(
        tokens.shape == targets.shape, "the probe needs a target for every token, not for a few positions"
    )
    require("segment_ids" not in batch, "the probe needs rows of one document each, not packed ones")
    require(piece >= 1, f"piece={piece} must be at least 1")
    state, losses, found = lm.init_state(model, len(tokens)), [], []
    for start in range(0, tokens.shape[1], piece):
        here = slice(start, start + piece)
        loss, state, statistics = _read(params, model, tokens[:, here], targets[:, here], state)
        losses.append(np.asarray(loss))
        found.append(jax.device_get(statistics))
    labelled = (targets != IGNORED).sum(0)
    with np.errstate(invalid="ignore"):
        loss = np.concatenate(losses, 1).sum(0) / np.where(labelled, labelled, np.nan)
    ends = np.minimum(piece * np.arange(1, len(found) + 1), tokens.shape[1])
    return Probe(loss, ends, {name: _stacked([piece[name] for piece in found]) for name in found[0]})


@partial(jax.jit, static_argnames="model")
def _read(params, model: lm.Config, tokens: Array, targets: Array, state):
    """One piece: `(loss [B,P], state, statistics of the state)`."""
    h, state, _ = lm.hidden(params, model, tokens, state)
    loss, _ = cross_entropy(partial(lm.logits, params, model), h, targets, LOSS_CHUNK)
    return loss, state, state_statistics(state)


def state_statistics(state: Any) -> dict[str, tuple[Array, Array, Array]]:
    """Mean, variance and norm, `[blocks, heads]`, of every array of numbers (but whole ones) in a state.

    Names say where in the repeated pattern the layer stands, and which of its arrays it is. The state of a
    head is what one index of the axis after the batch holds, unless that axis is the last one or long.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}
    return {
        name: _moments(x) for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact) and x.size
    }


def _moments(x: Array) -> tuple[Array, Array, Array]:
    blocks, rows = x.shape[:2]
    heads = x.shape[2] if x.ndim > 3 and x.shape[2] <= MOST_HEADS else 1
    parts = x.reshape(blocks, rows, heads, -1)
    if jnp.iscomplexobj(parts):
        parts = jnp.concatenate([parts.real, parts.imag], -1)
    return parts.mean(-1).mean(1), parts.var(-1).mean(1), jnp.sqrt(jnp.square(parts).sum(-1)).mean(1)


def _stacked(pieces: list[tuple]) -> Statistics:
    return Statistics(*(np.stack(values) for values in zip(*pieces, strict=True)))
