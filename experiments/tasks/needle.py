"""One fact in a long text, asked for at its end: pass keys and the single needles of RULER, as bytes.

    kind        haystack   the fact                       the answer
    passkey     noise      a pass key, said twice         1 to 50,000, and a full stop
    passkey5    noise      a pass key, said twice         5 digits
    niah1       noise      the number of a made-up word   7 digits, the first not 0
    niah2       prose      the number of a made-up word   7 digits, the first not 0
    niah3       prose      the code of a made-up word     32 hexadecimal digits in the form of a UUID

`passkey` follows Landmark Attention (Mohtashami and Jaggi 2023, arXiv 2305.16300), `passkey5` Stuffed Mamba
(Chen et al. 2024, arXiv 2410.07145), the others are S-NIAH-1 to 3 of RULER (Hsieh et al. 2024, arXiv
2404.06654). Sentences, words and prose are our own and lengths are in bytes. Noise is five short sentences
over and over; prose is made of generated sentences, or is the text at `path`. The fact stands between two
sentences, at `depth` (0: the beginning of the haystack, 1: its end; None: anywhere). Published grids of
depths are `stratified(cfg, n)`, one config for each of (i + 1/2) / n, i = 0, ..., n - 1; published lengths
are 0 to 38,000 characters of noise (Landmark) and 1, 2, 4, 8 thousand tokens (S-NIAH).

Haystack fills a row to exactly `length` tokens, and the row ends with the answer but for its last byte;
labelled are the positions from which bytes of the answer are to be predicted. `exact`, the share of rows with
every label right, is the share that greedy decoding gets right: as long as what was decoded agrees with the
answer, the next byte is decoded from the very tokens that stand in the row, so that a first wrong byte of the
one is a first wrong byte of the other.

No answer occurs in two splits.
"""

import re
from dataclasses import asdict, dataclass, replace

import numpy as np

from experiments import corpora
from experiments.sources import (
    IGNORED,
    Batch,
    GeneratedSource,
    below,
    fingerprint,
    require_at_least,
    require_types,
    uniform,
)
from experiments.tasks.prose import NOISE, made_up_word, prose
from experiments.tokenizer import ByteTokenizer
from layers.checks import require

KEY = 6  # letters of a made-up word
TERMS = 8  # random words of an example: where, which haystack, key (3), value (2)


@dataclass(frozen=True)
class _Form:
    """What stands before the haystack, in it and after it, around `{key}` and `{value}`."""

    head: str
    fact: str
    question: str
    longest: int  # bytes of an answer
    prose: bool = False  # which haystack

    def text(self, key: str, value: str) -> str:
        """The row without haystack and answer."""
        return self.head + self.fact.format(key=key, value=value) + self.question.format(key=key)


def _needle(longest: int, thing: str = "number", prose: bool = False) -> _Form:
    return _Form(
        head=f"A secret {thing} is hidden in this text. Keep it in mind: you will be asked for it.\n",
        fact=f"The secret {thing} of {{key}} is {{value}}. ",
        question=f"\nWhat is the secret {thing} of {{key}}? The secret {thing} of {{key}} is ",
        longest=longest,
        prose=prose,
    )


def _passkey(longest: int) -> _Form:
    return _Form(
        head="A pass key is hidden in this text. Keep it in mind: you will be asked for it.\n",
        fact="The pass key is {value}. Keep it in mind, {value} is the pass key. ",
        question="\nWhat is the pass key? The pass key is ",
        longest=longest,
    )


FORMS = {
    "passkey": _passkey(6),
    "passkey5": _passkey(5),
    "niah1": _needle(7),
    "niah2": _needle(7, prose=True),
    "niah3": _needle(36, "code", prose=True),
}


@dataclass(frozen=True, kw_only=True)
class NeedleData:
    """A needle in a haystack; `length` in bytes, `path` a text for the haystacks of niah2 and niah3.

    `train_examples` is the size of a fixed training pool, 0 for examples that never repeat.
    """

    kind: str = "passkey5"
    length: int = 1_024
    depth: float | int | None = None
    path: str | None = None
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require(self.kind in FORMS, f"NeedleData: kind={self.kind!r}; choose from {', '.join(FORMS)}")
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        ok = self.depth is None or 0 <= self.depth <= 1
        require(ok, f"NeedleData: depth={self.depth} must lie in [0, 1], or be None")
        form = FORMS[self.kind]
        require(self.path is None or form.prose, f"NeedleData: path: {self.kind} is hidden in noise")
        least = len(form.text("k" * KEY, "v" * form.longest)) + form.longest
        require(self.length >= least, f"NeedleData: length={self.length} must be at least {least}")

    def build(self) -> "NeedleSource":
        """The source. FileNotFoundError or ValueError, one line, for a `path` that cannot be read."""
        return NeedleSource(self)


def stratified(cfg: NeedleData, n: int) -> tuple[NeedleData, ...]:
    """`cfg` at the depths (i + 1/2) / n."""
    return tuple(replace(cfg, depth=(i + 0.5) / n) for i in range(n))


class NeedleSource(GeneratedSource):
    """Batches `{"tokens" [B,T], "positions" [B,P], "targets" [B,P]}`, int32, P bytes of an answer at most."""

    kind = "language"
    disjoint = True

    def __init__(self, cfg: NeedleData):
        super().__init__(cfg, TERMS)
        self.tokenizer = ByteTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.form = FORMS[cfg.kind]
        text = (
            "".join(corpora.read_path(cfg.path, "text"))
            if cfg.path
            else prose()
            if self.form.prose
            else NOISE
        )
        once = text.encode()
        self._starts = _sentences(once)
        # Round and round, far enough for a row that begins anywhere.
        self._haystack = once * (2 + cfg.length // len(once))
        rounds = np.arange(len(self._haystack) // len(once)) * len(once)
        self._boundaries = (rounds[:, None] + self._starts).reshape(-1)
        self.chance = _chance(cfg.kind)
        settings = {"source": type(cfg).__name__, **asdict(cfg)}
        self.fingerprint = fingerprint(settings, np.frombuffer(once, np.uint8))

    def content(self, batch: Batch) -> np.ndarray:
        """The answer: none of another split is ever given in training."""
        return batch["targets"] + 1

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        rows = [self._row(row) for row in words]
        longest = self.form.longest
        tokens = np.stack([np.frombuffer(text + answer, np.uint8) for text, answer in rows]).astype(np.int32)
        sizes = np.array([len(answer) for _, answer in rows])[:, None]
        place = np.arange(longest)
        positions = np.where(place < sizes, self.length - sizes + place, 0)
        targets = np.where(place < sizes, np.take_along_axis(tokens, positions + 1, 1), IGNORED)
        return {"tokens": tokens[:, :-1], "positions": positions.astype(np.int32), "targets": targets}

    def _row(self, words: np.ndarray) -> tuple[bytes, bytes]:
        """One example: all that comes before the answer, and the answer; `length + 1` bytes together."""
        value, answer = _value(self.cfg.kind, words[5:7])
        key = made_up_word(words[2:5])
        form = self.form
        head, fact, question = (
            part.format(key=key, value=value).encode() for part in (form.head, form.fact, form.question)
        )
        room = self.length + 1 - len(head + fact + question + answer)
        begin = int(self._starts[below(words[1:2], len(self._starts))[0]])
        depth = self.cfg.depth if self.cfg.depth is not None else float(uniform(words[:1])[0])
        place = self._boundary(begin, begin + round(depth * room), begin + room)
        before, after = self._haystack[begin:place], self._haystack[place : begin + room]
        return head + before + fact + after + question, answer

    def _boundary(self, first: int, place: int, last: int) -> int:
        """The beginning of a sentence nearest to `place` among those from `first` to `last`."""
        inside = self._boundaries[np.searchsorted(self._boundaries, first) :][: last - first + 1]
        inside = inside[inside <= last]
        return int(inside[np.abs(inside - place).argmin()])

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        depth = "any depth" if cfg.depth is None else f"depth {cfg.depth:g}"
        where = cfg.path or ("prose" if self.form.prose else "noise")
        return f"{cfg.kind}: in {cfg.length} bytes of {where}, {depth}, {pool}, chance {self.chance:.2%}"


def _sentences(text: bytes) -> np.ndarray:
    """Where sentences begin: at the beginning, and after a full stop and a space, or a line break."""
    return np.array([0, *(m.end() for m in re.finditer(rb"[.!?] +|\n+", text) if m.end() < len(text))])


def _value(kind: str, words: np.ndarray) -> tuple[str, bytes]:
    """What is hidden, and the answer that is asked for."""
    if kind == "passkey":  # its digits vary in number: the full stop ends the answer
        value = str(1 + below(words[:1], 50_000)[0])
        return value, f"{value}.".encode()
    if kind == "passkey5":
        value = f"{below(words[:1], 10**5)[0]:05d}"
    elif kind == "niah3":
        digits = "".join(f"{int(word):016x}" for word in words)
        value = "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    else:
        value = str(10**6 + below(words[:1], 9 * 10**6)[0])
    return value, value.encode()


def _chance(kind: str) -> float:
    """Accuracy of the most frequent byte at each place of the answer."""
    if kind == "passkey":
        answers = np.array([f"{n}.".encode() for n in range(1, 50_001)], "S6").view(np.uint8).reshape(-1, 6)
        best = [np.bincount(column[column > 0]).max() for column in answers.T]
        return float(sum(best) / (answers > 0).sum())
    return {"passkey5": 1 / 10, "niah3": (32 / 16 + 4) / 36}.get(kind, (1 / 9 + 6 / 10) / 7)
