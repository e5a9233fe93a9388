"""Text to token ids and back: bytes, characters, or any Hugging Face tokenizer.

A tokenizer has `vocab_size`, `separator` (the id that stands between documents, or None), `encode`, `decode`
and `to_dict`; `from_dict` brings it back, so that a run directory can keep it beside the weights.
The separator decodes to nothing.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from layers.checks import require

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(Protocol):
    """What every tokenizer does."""

    vocab_size: int
    separator: int | None

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, 1-D; ValueError where it cannot be written in this vocabulary."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; ValueError for an id outside the vocabulary."""

    def to_dict(self) -> dict:
        """Everything `from_dict` needs, as plain JSON types."""


class ByteTokenizer:
    """UTF-8 bytes 0..255, and 256 between documents."""

    vocab_size = 257
    separator: int | None = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8)

    def decode(self, ids) -> str:
        """Bytes that are not UTF-8, such as half a character at the end, become U+FFFD."""
        ids = _checked(ids, self.vocab_size)
        return bytes(ids[ids != self.separator].tolist()).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        return {"kind": "byte"}


class CharTokenizer:
    """One id per character, in the order of `characters`; after them, if asked for, a document separator."""

    def __init__(self, characters: str, separator: bool):
        require(len(characters) > 0, "char tokenizer: no characters")
        require(list(characters) == sorted(set(characters)), "char tokenizer: characters must be sorted")
        self.characters = characters
        self.separator: int | None = len(characters) if separator else None
        self.vocab_size = len(characters) + separator

    @classmethod
    def fit(cls, texts: Iterable[str], separator: bool) -> "CharTokenizer":
        """The alphabet of `texts`."""
        return cls("".join(sorted(set().union(*texts))), separator)

    @cached_property
    def _points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(f"char tokenizer: {text[at]!r} at character {at} is not in the vocabulary")
        return ids.astype(np.uint32)

    def decode(self, ids) -> str:
        ids = _checked(ids, self.vocab_size)
        return "".join(self.characters[i] for i in ids if i != self.separator)

    def to_dict(self) -> dict:
        return {"kind": "char", "characters": self.characters, "separator": self.separator is not None}


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, special tokens never added.

    Its own end-of-text token separates documents; where it has none known by name, one more id does.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=-1)
        own = next((vocabulary[name] for name in END_OF_TEXT if name in vocabulary), None)
        self.separator: int | None = largest + 1 if own is None else own
        self.vocab_size = largest + 1 + (own is None)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids) -> str:
        ids = _checked(ids, self.vocab_size)
        return self._tokenizer.decode(ids[ids != self.separator].tolist(), skip_special_tokens=False)

    def to_dict(self) -> dict:
        return {"kind": "huggingface", "json": self._tokenizer.to_str()}


def from_dict(saved: dict) -> Tokenizer:
    """The tokenizer whose `to_dict` gave `saved`."""
    match saved:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "char", "characters": str(characters), "separator": bool(separator)}:
            return CharTokenizer(characters, separator)
        case {"kind": "huggingface", "json": str(text)}:
            return _loaded(tokenizers.Tokenizer.from_str, text, "as it was saved")
    raise ValueError(f"not a saved tokenizer: {str(saved)[:80]!r}")


def _loaded(load: Callable[[str], tokenizers.Tokenizer], what: str, name: str) -> HuggingFaceTokenizer:
    """What the library's `load` makes of `what`; ValueError, one line, for what is no tokenizer.

    It raises bare Exception, and where its own code panics something that is none.
    """
    try:
        return HuggingFaceTokenizer(load(what))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizer {name} cannot be loaded: {first_line(error)}") from None


def load_huggingface(name: str) -> HuggingFaceTokenizer:
    """From a `tokenizer.json`, a directory that holds one, or the hub.

    ValueError for a file that holds no tokenizer, FileNotFoundError for a name found in neither place.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    local = path.is_file()
    if not local and path.suffix == ".json":
        raise FileNotFoundError(f"no such tokenizer file: {path}")
    if local:
        return _loaded(tokenizers.Tokenizer.from_file, str(path), repr(name))
    try:
        return _loaded(tokenizers.Tokenizer.from_pretrained, name, repr(name))
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None


def load(name: str) -> Tokenizer:
    """As `load_huggingface`; `tokenizer.json` may also be that of a run directory."""
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        saved = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:  # which is said below
        saved = None
    return from_dict(saved) if isinstance(saved, dict) and "kind" in saved else load_huggingface(name)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        message = f"{text[at]!r} at character {at} is half a surrogate pair, not text"
        raise ValueError(message) from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _checked(ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids).reshape(-1)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    require(outside.size == 0, f"token id {outside[:1].tolist()} is outside [0, {vocab_size})")
    return ids
