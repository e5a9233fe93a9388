"""Tokens to text as they come: characters that are whole, and stop strings."""

from collections.abc import Sequence
from typing import Any

from layers.checks import require

WINDOW = 8  # tokens before the present one that are decoded with it
HALF = "\ufffd"  # what decoding makes of half a character


class Decoder:
    """Text of one row, token by token.

    A token's text is what decoding makes of it behind the tokens before it. While the end is half a
    character it is held back. What comes out depends on the tokens alone, not on how many come at a time.
    """

    def __init__(self, tokenizer: Any, before: Any = ()):
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in before][-WINDOW:]
        self._told = len(self._ids)  # tokens whose text is out

    def add(self, token: int) -> str:
        """What became readable with this token."""
        self._ids.append(int(token))
        return self._new(final=False)

    def end(self) -> str:
        """What was held back."""
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        old = self._tokenizer.decode(self._ids[: self._told])
        text = self._tokenizer.decode(self._ids)[len(old) :]
        if not final and (not text or text.endswith(HALF)):
            return ""
        self._ids = self._ids[-WINDOW:]
        self._told = len(self._ids)
        return text


class Writer:
    """The text of one row up to a stop string or a stop token; `add` says when that has come."""

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str], stop_tokens: Sequence[int]):
        self._decoder, self._strings, self._tokens = decoder, tuple(stop_strings), frozenset(stop_tokens)
        self._ready, self._held, self.stopped = "", "", False

    def add(self, token: int) -> bool:
        """Whether this token is the last one."""
        if token in self._tokens:
            self.end()
        elif self._take(self._decoder.add(token)):
            self.stopped = True
        return self.stopped

    def end(self) -> None:
        """No more tokens."""
        if not self.stopped and not self._take(self._decoder.end()):
            self._ready, self._held = self._ready + self._held, ""
        self.stopped = True

    def text(self) -> str:
        """What is certain since the last call: it cannot be the beginning of a stop string."""
        ready, self._ready = self._ready, ""
        return ready

    def _take(self, text: str) -> bool:
        """Whether a stop string is there now; text from it on is dropped."""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._strings) if at >= 0]
        cut = min(found) if found else len(self._held) - self._open()
        self._ready, self._held = self._ready + self._held[:cut], "" if found else self._held[cut:]
        return bool(found)

    def _open(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._strings), default=0) - 1)
        for count in range(longest, 0, -1):
            if any(s.startswith(self._held[-count:]) for s in self._strings):
                return count
        return 0


def checked_strings(strings: Any) -> tuple[str, ...]:
    """Stop strings, one or several. Raises ValueError for one without a character."""
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    for text in strings:
        require(isinstance(text, str) and text != "", f"generate: a stop string must be text, not {text!r}")
    return strings
