"""What a data source promises to the training loop, and the counter-based randomness all sources share.

A data config is a frozen dataclass with `build() -> Source`. A training batch is a pure function of
(seed, step, size), so that a resumed run sees exactly the batches that the interrupted one would have seen.

    language        {"tokens" [B,T] int32, "targets" [B,T] int32, optional "segment_ids" [B,T] int32}
                    or, where few positions are labelled, {"tokens", "positions" [B,P], "targets" [B,P]}
    classification  {"inputs" [B,T,F] float32, "targets" [B] int32}

A target of -1 (`IGNORED`) is not scored.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, fields
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Protocol, cast, get_origin, runtime_checkable

import numpy as np

from layers.checks import require

IGNORED = -1
# A split counts as empty when an example was drawn so often in vain: (7/8)^(8 x 50) = 6e-24.
CANDIDATES, TURNS = 8, 50
Batch = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Training batches by number, evaluation batches in order."""

    kind: str  # "language" or "classification"
    length: int  # T
    fingerprint: str  # sha256 of the content and of what arranges it: a resumed run must find the same
    splits: tuple[str, ...]  # what `eval_batches` accepts; "validation" comes first

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The whole split in a fixed order; the last batch is filled up with ignored targets."""

    def describe(self) -> str:
        """One line for people."""


@runtime_checkable
class LanguageSource(Source, Protocol):
    """Sequences of token ids in `[0, vocab_size)`; `tokenizer` is None where the ids stand for no text."""

    vocab_size: int
    tokenizer: object | None


@runtime_checkable
class ClassificationSource(Source, Protocol):
    """Real-valued sequences of `features` channels, each of one of `classes` kinds."""

    features: int
    classes: int


class Stream(IntEnum):
    """The purposes of random numbers; each has a Philox key of its own, so that no two can overlap."""

    TRAIN = 1  # a fixed pool of training examples
    FRESH = 2  # training examples that never repeat
    VALIDATION = 3
    TEST = 4
    ORDER = 5  # permutations, one per epoch
    DOCUMENTS = 6  # the same, for documents to pack
    OFFSET = 7  # where windows of text begin
    TASK = 8  # what all examples of a task share
    SPLIT = 9  # multipliers of the hash that tells splits apart by content
    MIXTURE = 10  # which part of a mixture a batch is of


def random_words(count: int, stream: Stream, seed: int, *, start: int = 0, salt: int = 0) -> np.ndarray:
    """`count` random uint64, from word `4 * start` on of the Philox4x64 sequence of (stream, seed, salt).

    Only raw words are taken from numpy: unlike its distributions, they are fixed for all its versions.
    """
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Philox(key=key, counter=start + (salt % 2**64 << 128)).random_raw(count)


def uniform(words: np.ndarray) -> np.ndarray:
    """Random words as float64 in the open interval (0, 1)."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def below(words: np.ndarray, n) -> np.ndarray:
    """Random words as integers in `[0, n)`, for `n` a number or an array; the bias is `n / 2^64`."""
    return (words % np.asarray(n, np.uint64)).astype(np.int64)


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int, stream: Stream = Stream.ORDER) -> np.ndarray:
    """A permutation of `range(count)`: a pure function of (seed, epoch)."""
    order = np.argsort(random_words(count, stream, seed, salt=epoch), kind="stable")
    order.flags.writeable = False
    return order


def shuffled_indices(seed: int, count: int, start: int, size: int) -> np.ndarray:
    """Entries `start .. start + size` of the endless concatenation of one permutation per epoch."""
    epoch, within = np.divmod(np.arange(start, start + size), count)
    indices = np.empty(size, np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
        indices[epoch == e] = epoch_order(seed, e, count)[within[epoch == e]]
    return indices


def fingerprint(settings: dict, *contents: np.ndarray) -> str:
    """sha256, in hex, of settings and contents: equal exactly when both are."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for content in contents:
        array = np.ascontiguousarray(content)
        digest.update(f"|{array.dtype.str}{array.shape}|".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def pad_batch(batch: Batch, size: int) -> Batch:
    """Fill `batch` up to `size` rows: zeros everywhere, targets ignored."""
    missing = size - len(batch["targets"])

    def pad(name: str, x: np.ndarray) -> np.ndarray:
        fill = IGNORED if name == "targets" else 0
        return np.concatenate([x, np.full((missing, *x.shape[1:]), fill, x.dtype)])

    return {name: pad(name, x) for name, x in batch.items()} if missing else batch


def batches_of(rows: Batch, size: int) -> Iterator[Batch]:
    """Cut arrays that agree in their first axis into batches of `size`, the last one padded."""
    for start in range(0, len(rows["targets"]), size):
        yield pad_batch({name: x[start : start + size] for name, x in rows.items()}, size)


def require_split(splits: tuple[str, ...], split: str) -> None:
    """`split` is one of a source's `splits`."""
    require(split in splits, f"no split {split!r} here; choose from {', '.join(splits)}")


def require_types(cfg) -> None:
    """Every field of dataclass `cfg` has the type it was annotated with; an int passes for a float.

    Of a tuple the elements are not looked at.
    """
    for field in fields(cfg):
        value, annotated = getattr(cfg, field.name), cast(type, field.type)
        expected = tuple if get_origin(annotated) is tuple else annotated
        ok = isinstance(value, expected) or (expected is float and isinstance(value, int))
        ok = ok and (expected is bool or not isinstance(value, bool))
        name = expected.__name__ if isinstance(expected, type) else str(expected)
        require(ok, f"{type(cfg).__name__}: {field.name}={value!r} must be of type {name}")


def require_at_least(cfg, least: int, *names: str) -> None:
    """The named fields of `cfg` are not below `least`."""
    for name in names:
        value = getattr(cfg, name)
        require(value >= least, f"{type(cfg).__name__}: {name}={value} must be at least {least}")


def content_hash(rows: np.ndarray) -> np.ndarray:
    """`rows [n, ...]` of integers or float32 -> `[n]` uint64, a hash of what they hold.

    Zeros at the end change nothing, so padding does not either.
    """
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    bits = flat.view(np.uint32) if flat.dtype == np.float32 else flat
    h = bits.astype(np.uint64) @ random_words(flat.shape[1], Stream.SPLIT, 0)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # mixes high bits into low
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h ^ (h >> np.uint64(31))


class GeneratedSource(ABC):
    """A source whose example number i is a pure function of its own `words_per_example` random words.

    A subclass has `make(words [n, R] uint64) -> Batch` and says how many words R one example takes; its
    config has `train_examples` (0: training examples never repeat), `eval_examples` and `data_seed`.
    A fixed pool belongs to `data_seed` alone, and the run's seed decides its order in each epoch.

    Streams alone keep training and evaluation apart where chance would hardly draw an example twice. Where
    there are few different examples, a subclass sets `disjoint`: a hash of its content then assigns each
    example to validation (1/8 of all), test (1/8) or training, and a row of another split is drawn again.
    """

    splits: tuple[str, ...] = ("validation", "test")
    disjoint: bool = False

    def __init__(self, cfg, words_per_example: int):
        self.cfg = cfg
        self.length = cfg.length
        self.fingerprint = fingerprint({"source": type(cfg).__name__, **asdict(cfg)})
        self._blocks = -(-words_per_example // 4)  # Philox counts in blocks of four words

    @abstractmethod
    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""

    def content(self, batch: Batch) -> np.ndarray:
        """`[n, ...]`: what makes two examples the same one, for `disjoint`; zeros at the end do not count."""
        return batch["tokens" if "tokens" in batch else "inputs"]

    def _examples(self, stream: Stream, seed: int, start: int, count: int, salt: int = 0) -> Batch:
        words = random_words(4 * self._blocks * count, stream, seed, start=start * self._blocks, salt=salt)
        batch = self.make(words.reshape(count, -1))
        if self.disjoint:
            self._redraw(batch, stream, seed, start, salt)
        return batch

    def _redraw(self, batch: Batch, stream: Stream, seed: int, start: int, salt: int) -> None:
        """Replace the rows of `batch` that belong to another split, in place. ValueError if none is found."""
        wrong = np.flatnonzero(~self._belongs(batch, stream))
        for turn in range(1, TURNS + 1):
            if not wrong.size:
                break
            size = self._blocks * CANDIDATES
            places = ((start + int(i)) * size + (turn << 96) for i in wrong)
            words = [random_words(4 * size, stream, seed, start=place, salt=salt) for place in places]
            new = self.make(np.concatenate(words).reshape(len(wrong) * CANDIDATES, -1))
            fits = self._belongs(new, stream).reshape(-1, CANDIDATES)
            found = fits.any(1)
            first = np.arange(len(wrong)) * CANDIDATES + fits.argmax(1)
            for name, x in new.items():
                batch[name][wrong[found]] = x[first[found]]
            wrong = wrong[~found]
        kind, name = type(self.cfg).__name__, stream.name.lower()
        require(not wrong.size, f"{kind}: too few different examples to give {name} some of its own")

    def _belongs(self, batch: Batch, stream: Stream) -> np.ndarray:
        """`[n]`: whether the content of each row is of the stream's split."""
        part = content_hash(self.content(batch)) >> np.uint64(61)  # 0 to 7
        if stream in (Stream.VALIDATION, Stream.TEST):
            return part == (stream == Stream.TEST)
        return part > 1

    def _all_examples(self, stream: Stream, count: int, chunk: int = 512) -> Batch:
        parts = [
            self._examples(stream, self.cfg.data_seed, start, min(chunk, count - start))
            for start in range(0, count, chunk)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @cached_property
    def _pool(self) -> Batch:
        return self._all_examples(Stream.TRAIN, self.cfg.train_examples)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        if self.cfg.train_examples == 0:
            return self._examples(Stream.FRESH, seed, step * size, size, salt=self.cfg.data_seed)
        indices = shuffled_indices(seed, self.cfg.train_examples, step * size, size)
        return {name: x[indices] for name, x in self._pool.items()}

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The `eval_examples` of the split, from a stream that training never draws from."""
        require_split(self.splits, split)
        return batches_of(self._all_examples(Stream[split.upper()], self.cfg.eval_examples), size)
