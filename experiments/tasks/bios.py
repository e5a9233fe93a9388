"""bioS: how many bits of knowledge a parameter holds (Allen-Zhu and Li 2024, arXiv 2404.05405).

N people have different names, drawn from N0 = 400 x 400 x 1000 of them, and attributes drawn at random, a
pronoun (2), birthday (12 x 28 x 200), city (200), university (300), major (100) and employer (263). A
biography says all of it in five sentences, whose wording (one of `variants` for each) and, if `shuffled`,
order are drawn anew every time; the first sentence has the full name, the others the pronoun. An epoch shows
every person once: a person is exposed `steps * batch_size / people` times.

    Nemar Galine Goldford was born on March 27, 1950. She is a native of Newhaven. ...

What is to be learnt are S0 = 2 (12 * 28 * 200) 200 * 300 * 100 * 263 combinations of attributes, 47.59 bits a
person, and which N names of N0 there are. With p1 and p2 the mean loss in nats of the tokens of a name, and
of all attribute values, summed over a biography, a model of P parameters holds

    R = N (log2(N0 / e^p1) + log2(S0 / e^p2)) / P      bits per parameter.

Both losses are subtracted: Definition 1 as printed adds p2, a slip, since what is not predicted is not known.
Who knows all has p1 = log N and p2 = 0. Published for attention: about 2 bits per parameter after 1000
exposures, about 1 after 100.

    source = BiosData(people=5_000).build()
    name, value = (evaluate(run, params, source, split) for split in ("name", "value"))
    source.capacity(name, value, lm.param_count(run.model))

Evaluation is about the people trained on, in wordings drawn for it: knowledge, not generalisation, is what
counts. Split "validation" labels every token, "name" and "value" those of a kind. Unlike the published data,
pools are our own combinations of pieces (same sizes), sentences have 4 wordings each instead of about 50, and
a sequence holds one biography instead of a window of 512 tokens of several.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from experiments.sources import (
    IGNORED,
    Batch,
    Stream,
    batches_of,
    fingerprint,
    random_words,
    require_at_least,
    require_split,
    require_types,
    shuffled_indices,
)
from experiments.tasks.bios_text import ATTRIBUTES, VARIANTS
from experiments.tasks.bios_writer import NAME, POSSIBLE_NAMES, VALUE, Writer
from layers.checks import require, require_choice

BITS_PER_PERSON = sum(math.log2(len(pool)) for pool in ATTRIBUTES.values())
SPLITS = {"validation": None, "name": NAME, "value": VALUE}  # and the kind of tokens they label
WORDS = 12  # random words for one biography, in whole blocks of four
MEASURED = 500  # people whose biographies say how frequent each token is


def bits_per_parameter(people: int, name_loss: float, value_loss: float, params: int) -> float:
    """R above, from losses in nats per person. What was learnt wrong counts as less than nothing."""
    nats = math.log(POSSIBLE_NAMES) + BITS_PER_PERSON * math.log(2) - name_loss - value_loss
    return people * nats / math.log(2) / params


@dataclass(frozen=True, kw_only=True)
class BiosData:
    """Biographies of `people` persons, as `text` of "pieces" (338 tokens) or "bytes" (257)."""

    people: int = 5_000
    variants: int = VARIANTS
    shuffled: bool = False
    text: str = "pieces"
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "people", "variants")
        require_at_least(self, 0, "data_seed")
        require_choice(self, "text", ("pieces", "bytes"))
        require(self.variants <= VARIANTS, f"BiosData: variants={self.variants} must be at most {VARIANTS}")
        most = POSSIBLE_NAMES // 100
        require(self.people <= most, f"BiosData: people={self.people} must be at most {most:,}")

    def build(self) -> "BiosSource":
        """The source; biographies are written when first asked for."""
        return BiosSource(self)


class BiosSource:
    """Batches `{"tokens" [B,T], "targets" [B,T]}`, int32: one biography a row, after an end-of-text token."""

    kind = "language"
    splits = tuple(SPLITS)

    def __init__(self, cfg: BiosData):
        self.cfg = cfg
        self.fingerprint = fingerprint({"source": "BiosData", **asdict(cfg)})
        self._writer = Writer(cfg)
        self.tokenizer = self._writer.tokenizer
        self.vocab_size, self.length = self._writer.vocab_size, self._writer.length

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        who = shuffled_indices(seed, self.cfg.people, step * size, size)
        start = step * size * (WORDS // 4)
        words = random_words(WORDS * size, Stream.FRESH, seed, start=start, salt=self.cfg.data_seed)
        return _batch(*self._writer.write(who, words.reshape(size, -1)), None)

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """One new biography of every person, in the order of people."""
        require_split(self.splits, split)
        return batches_of(_batch(*self._all, SPLITS[split]), size)

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        people = self.cfg.people
        words = random_words(WORDS * people, Stream.VALIDATION, self.cfg.data_seed)
        return self._writer.write(np.arange(people), words.reshape(people, -1))

    @cached_property
    def chance(self) -> float:
        """Of the most frequent token of each place, in biographies that nothing else shows: its share."""
        who = np.arange(MEASURED) % self.cfg.people
        words = random_words(WORDS * MEASURED, Stream.TEST, self.cfg.data_seed).reshape(MEASURED, -1)
        targets = _batch(*self._writer.write(who, words), None)["targets"]
        counts = [np.bincount(column[column != IGNORED], minlength=1).max() for column in targets.T]
        return float(sum(counts) / (targets != IGNORED).sum())

    def exposures(self, steps: int, batch_size: int) -> float:
        """How often each person is shown in so many steps."""
        return steps * batch_size / self.cfg.people

    def capacity(self, name: Mapping[str, float], value: Mapping[str, float], params: int) -> float:
        """Bits per parameter, from what `experiments.evaluate.evaluate` says of splits "name" and "value".

        Raises ValueError when one of them is not of the whole split.
        """
        people, nats = self.cfg.people, {}
        for split, result in (("name", name), ("value", value)):
            tokens = int((self._all[1] == SPLITS[split]).sum())
            found = result["tokens"]
            require(
                found == tokens, f"split {split!r} has {tokens} labelled tokens, not {found}: evaluate it all"
            )
            nats[split] = result["loss"] * tokens / people
        return bits_per_parameter(people, nats["name"], nats["value"], params)

    def read(self, tokens: np.ndarray) -> str:
        """The text of a row of tokens."""
        return self._writer.read(tokens)

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        bits = cfg.people * (BITS_PER_PERSON + math.log2(POSSIBLE_NAMES / cfg.people))
        return (
            f"biographies of {cfg.people:,} people in {cfg.text}, up to {self.length} tokens, "
            f"{BITS_PER_PERSON:.2f} bits a person and {bits:,.0f} with their names, chance {self.chance:.2%}"
        )


def _batch(tokens: np.ndarray, kinds: np.ndarray, kind: int | None) -> Batch:
    """Next tokens as targets, of one kind (or all), up to the first end-of-text."""
    wanted = (kinds >= 0) if kind is None else (kinds == kind)
    targets = np.full_like(tokens, IGNORED)
    targets[:, :-1] = np.where(wanted[:, 1:], tokens[:, 1:], IGNORED)
    return {"tokens": tokens, "targets": targets}
