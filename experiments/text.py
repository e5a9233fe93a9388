"""Language modelling on text: local files, a hub dataset, or (given neither) Python's own library sources.

    TextData(path="input.txt", tokenizer="char", length=256).build()                       as nanoGPT
    TextData(path="stories.jsonl", mode="packed", length=512).build()
    TextData(hub="wikitext", hub_config="wikitext-2-raw-v1", validation="validation", documents="joined")

In mode "windows" the documents form one long stream, and a training row is a window of it at a random
offset. In mode "packed" a row holds whole documents or pieces of them, each marked by `segment_ids` so that
neither state nor attention passes from one to the next. In mode "best_fit" only documents longer than a row
are cut, and rows are filled as well as that allows (see `experiments.packing`). A document of tokens t1..tn
is laid out as `S t1 .. tn`, S the separator, with targets `t1 .. tn S`: it is scored as it would be alone,
its beginning and its end included, and no target comes from another document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from experiments import corpora
from experiments.packing import Documents, pack, packed_row
from experiments.sources import (
    IGNORED,
    Batch,
    Stream,
    below,
    epoch_order,
    fingerprint,
    pad_batch,
    random_words,
    require_at_least,
    require_split,
    require_types,
)
from experiments.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load
from layers.checks import require, require_choice

OF_WEIGHTS = "weights"


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Text for a language model.

    `path` is a file, a directory or a glob; `hub` a dataset's name, with `hub_config` and `hub_split`.
    `validation` and `test` are paths, or names of the hub dataset's splits. Without `validation`, what is
    beyond `train_fraction` serves: the end of a single document, or a fixed random sample of several.
    `field` is where rows of .jsonl, .parquet and hub data have their text. `documents` says what a document
    is: "each" file or row, each of the "lines" in them, or all "joined" into one.
    `tokenizer` is "byte", "char", a Hugging Face tokenizer's hub name or file, a run directory whose
    tokenizer it is to be, or "weights": that of the run's initial weights.
    `eval_limit` caps the number of evaluation batches (0: the whole split).
    """

    length: int = 256
    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    validation: str | None = None
    test: str | None = None
    field: str = "text"
    documents: str = "each"
    tokenizer: str = "byte"
    mode: str = "windows"
    train_fraction: float = 0.9
    eval_limit: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "length")
        require_at_least(self, 0, "eval_limit")
        require_choice(self, "mode", ("windows", "packed", "best_fit"))
        require_choice(self, "documents", ("each", "lines", "joined"))
        require(0 < self.train_fraction < 1, f"TextData: train_fraction={self.train_fraction} not in (0, 1)")
        require(self.path is None or self.hub is None, "TextData: give path or hub, not both")
        require(self.hub_config is None or self.hub is not None, "TextData: hub_config needs hub")
        given = self.path is not None or self.hub is not None
        held_out = self.validation is not None or self.test is not None
        require(given or not held_out, "TextData: validation and test need path or hub")

    def build(self) -> "TextSource":
        """Read and tokenise everything. FileNotFoundError or ValueError, one line, for what cannot be."""
        return TextSource(self)


class Layout(NamedTuple):
    """One packed epoch: the shuffled documents make a ring, which rows cut from a random place on.

    The rows come in an order of their own, or a long document would fill whole batches; they cover the ring
    once, but for the last one, which overlaps the first.
    """

    starts: np.ndarray  # where each document begins in the source
    edges: np.ndarray  # where it begins on the ring, and the ring's length
    rows: np.ndarray  # where each row begins on the ring


class TextSource:
    """Batches `{"tokens" [B,T], "targets" [B,T]}`, and `"segment_ids" [B,T]` when packed; all int32."""

    kind = "language"

    def __init__(self, cfg: TextData):
        texts = _read(cfg)
        separated = cfg.mode != "windows" or any(len(documents) > 1 for documents in texts.values())
        self.cfg = cfg
        self.length = cfg.length
        self.tokenizer = _tokenizer(cfg.tokenizer, texts, separated)
        self.vocab_size = self.tokenizer.vocab_size
        self._parts = {name: _tokenise(self.tokenizer, docs, separated) for name, docs in texts.items()}
        self.splits = tuple(name for name in self._parts if name != "train")
        self._check_sizes()
        self.fingerprint = fingerprint(
            {"mode": cfg.mode, "length": cfg.length, "tokenizer": self.tokenizer.to_dict()},
            *(part.tokens for part in self._parts.values()),
            *(part.starts for part in self._parts.values()),
        )
        self._layout = lru_cache(maxsize=4)(self._layout_of_epoch)
        self._bins = lru_cache(maxsize=4)(partial(pack, self._parts["train"], cfg.length))

    def _check_sizes(self) -> None:
        need = self.cfg.length + 1
        have = len(self._parts["train"].tokens)
        require(
            have >= need, f"training text has {have} tokens, one window of length {need - 1} takes {need}"
        )
        for name in self.splits:
            require(self._parts[name].size >= 1, f"{name} text has fewer than 2 tokens")

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        if self.cfg.mode == "packed":
            return self._packed(seed, step * size, size)
        if self.cfg.mode == "best_fit":
            return self._best_fit(seed, step * size, size)
        tokens = self._parts["train"].tokens
        words = random_words(size, Stream.OFFSET, seed, salt=step)
        offsets = below(words, len(tokens) - self.length)
        rows = tokens[offsets[:, None] + np.arange(self.length + 1)].astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    def _layout_of_epoch(self, seed: int, epoch: int) -> Layout:
        part = self._parts["train"]
        order = epoch_order(seed, epoch, len(part.starts), Stream.DOCUMENTS)
        edges = np.concatenate([[0], np.cumsum(part.lengths[order])])
        offset = below(random_words(1, Stream.OFFSET, seed, salt=epoch), part.size)
        rows = epoch_order(seed, epoch, -(-part.size // self.length))
        return Layout(part.starts[order], edges, int(offset[0]) + self.length * rows)

    def _packed(self, seed: int, first: int, size: int) -> Batch:
        """Rows `first .. first + size` of the endless sequence of epochs."""
        part = self._parts["train"]
        epoch, within = np.divmod(first + np.arange(size), -(-part.size // self.length))
        source = np.empty((size, self.length), np.int64)
        begins = np.empty((size, self.length), bool)
        for e in range(epoch[0], epoch[-1] + 1):
            here, layout = epoch == e, self._layout(seed, e)
            place = (layout.rows[within[here], None] + np.arange(self.length)) % part.size
            document = np.searchsorted(layout.edges, place, side="right") - 1
            into = place - layout.edges[document]
            source[here], begins[here] = layout.starts[document] + into, into == 0
        flat = source.reshape(-1)
        return cut_rows(part.tokens[flat], part.tokens[flat + 1], begins.reshape(-1), self.length)

    def _best_fit(self, seed: int, first: int, size: int) -> Batch:
        """As `_packed`; every epoch has as many rows as any other."""
        part, per_epoch = self._parts["train"], self._bins(seed, 0).rows
        places = (divmod(row, per_epoch) for row in range(first, first + size))
        rows = [packed_row(part, self._bins(seed, epoch), row, self.length) for epoch, row in places]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The split from end to end in rows side by side: every target once, padding ignored."""
        require_split(self.splits, split)
        return islice(self._side_by_side(self._parts[split], size), self.cfg.eval_limit or None)

    def _side_by_side(self, part: Documents, size: int) -> Iterator[Batch]:
        begins = np.zeros(part.size, bool)
        begins[part.starts] = True
        for start in range(0, part.size, size * self.length):
            here = slice(start, min(part.size, start + size * self.length))
            after = slice(start + 1, here.stop + 1)
            rows = cut_rows(part.tokens[here], part.tokens[after], begins[here], self.length)
            if self.cfg.mode == "windows":
                del rows["segment_ids"]
            yield pad_batch(rows, size)

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        sizes = ", ".join(
            f"{name} {len(part.tokens):,} tokens in {len(part.starts):,} documents"
            for name, part in self._parts.items()
        )
        where = cfg.path or cfg.hub or "Python's standard library"
        return f"{where}: {sizes}; {cfg.tokenizer} vocabulary {self.vocab_size}; {cfg.mode} of {cfg.length}"


def _read(cfg: TextData) -> dict[str, list[str]]:
    """Documents by split, "train" first and "validation" next."""

    def read(where: str | None) -> list[str]:
        if where is None:
            found = list(corpora.read_stdlib())
        elif cfg.hub is None:
            found = corpora.read_path(where, cfg.field)
        else:
            found = corpora.read_hub(cfg.hub, cfg.hub_config, where, cfg.field)
        if cfg.documents == "joined":
            return ["".join(found)]
        if cfg.documents == "lines":
            found = [line for text in found for line in text.splitlines() if line]
            require(len(found) > 0, f"{where}: empty, every line is blank")
        return found

    training = read(cfg.path if cfg.hub is None else cfg.hub_split)
    if cfg.validation is None:
        training, validation = _split(training, cfg.train_fraction)
    else:
        validation = read(cfg.validation)
    texts = {"train": training, "validation": validation}
    return texts if cfg.test is None else texts | {"test": read(cfg.test)}


def _split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """`fraction` of the text, and the rest: of one document its beginning, of several a fixed random sample.

    A sample, because documents often come sorted (names by frequency, files by directory).
    """
    total = len(documents)
    if total == 1:
        text, cut = documents[0], int(fraction * len(documents[0]))
        return [text[:cut]], [text[cut:]]
    cut = min(max(1, int(fraction * total)), total - 1)
    order = np.argsort(random_words(total, Stream.TASK, 0), kind="stable")
    return [documents[i] for i in np.sort(order[:cut])], [documents[i] for i in np.sort(order[cut:])]


def _tokenizer(name: str, texts: dict[str, list[str]], separated: bool) -> Tokenizer:
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.fit((text for documents in texts.values() for text in documents), separated)
    require(name != OF_WEIGHTS, "TextData: tokenizer='weights' needs initial_weights, and none are given")
    return load(name)


def _tokenise(tokenizer: Tokenizer, documents: list[str], separated: bool) -> Documents:
    encoded = [tokenizer.encode(text) for text in documents]
    if separated:
        separator = np.array([tokenizer.separator])
        pieces = [piece for ids in encoded for piece in (separator, ids)] + [separator]
        starts = np.cumsum([0] + [1 + len(ids) for ids in encoded[:-1]])
    else:
        pieces, starts = encoded, np.zeros(1, np.int64)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return Documents(np.concatenate(pieces, dtype=dtype, casting="unsafe"), starts)


def cut_rows(tokens: np.ndarray, targets: np.ndarray, begins: np.ndarray, length: int) -> Batch:
    """Cut flat arrays into rows of `length`, the last one padded; `segment_ids` count from 0 in each row."""
    pad = -len(tokens) % length

    def cut(x: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(x.astype(np.int32), (0, pad), constant_values=fill).reshape(-1, length)

    segments = np.cumsum(cut(begins, 0), axis=1, dtype=np.int32)
    return {
        "tokens": cut(tokens, 0),
        "targets": cut(targets, IGNORED),
        "segment_ids": segments - segments[:, :1],
    }
