"""Text in sequences whose length changes as training goes on: a bucket for every length.

    Curriculum(text=TextData(path="stories.jsonl", mode="packed", length=512),
               lengths=(64, 128, 512), steps=(1000, 1000, 2000))

trains 1,000 steps on rows of 64 tokens, 1,000 on rows of 128, then on rows of 512; with `cycle` it begins
again after the last. A step is compiled once for every length. All rows come from one stream: training reads
on where it stopped, whatever the length, so that every position of the text is a target once in an epoch, at
the length whose turn it is. Evaluation is that of `text`, at its own length.

Sources: Li et al. 2022, "The Stability-Efficiency Dilemma" (arXiv 2108.06084), which grows the length; cycles
over lengths as in Pouransari et al. 2024 (arXiv 2405.13226).
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import IGNORED, Batch, fingerprint, require_types
from experiments.text import TextData, TextSource, cut_rows
from layers.checks import require


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """`steps[i]` steps of rows of `lengths[i]` tokens, the last stage without end unless `cycle`.

    `text` is "packed", and its `length` the longest: rows are cut from pieces of so many tokens, which come
    in an order of their own, or a long document would fill whole batches. Every length divides it.
    """

    text: TextData
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    cycle: bool = False

    def __post_init__(self):
        require_types(self)
        require(self.text.mode == "packed", f"Curriculum: text has mode={self.text.mode!r}, not 'packed'")
        whole = all(type(n) is int and n > 0 for n in (*self.lengths, *self.steps))
        require(whole and len(self.lengths) > 0, "Curriculum: lengths and steps must be integers >= 1")
        same = len(self.lengths) == len(self.steps)
        require(same, f"Curriculum: {len(self.lengths)} lengths for {len(self.steps)} numbers of steps")
        wrong = [n for n in self.lengths if self.text.length % n]
        require(not wrong, f"Curriculum: length {wrong[:1]} does not divide that of text, {self.text.length}")

    def build(self) -> "CurriculumSource":
        """As `TextData.build`."""
        return CurriculumSource(self)


class CurriculumSource(TextSource):
    """Batches `{"tokens" [B,L], "targets" [B,L], "segment_ids" [B,L]}`; L is that of the step."""

    def __init__(self, cfg: Curriculum):
        super().__init__(cfg.text)
        self._lengths, self._cycle = np.array(cfg.lengths), cfg.cycle
        self._ends = np.cumsum(cfg.steps)  # the step at which each stage is over
        self._used = np.cumsum(self._lengths * cfg.steps)  # tokens of one row of every batch until then
        stages = {"lengths": cfg.lengths, "steps": cfg.steps, "cycle": cfg.cycle}
        self.fingerprint = fingerprint({"text": self.fingerprint, **stages})

    def _stage(self, step: int) -> tuple[int, int]:
        """The length of a step's rows, and how many tokens of a row all steps before it have used."""
        cycles, step = divmod(step, int(self._ends[-1])) if self._cycle else (0, step)
        stage = min(int(np.searchsorted(self._ends, step, side="right")), len(self._ends) - 1)
        length = int(self._lengths[stage])
        before = int(self._used[stage]) - (int(self._ends[stage]) - step) * length
        return length, cycles * int(self._used[-1]) + before

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`: a pure function of its arguments."""
        length, before = self._stage(step)
        return self._stream(seed, before * size, size, length)

    def alike(self, seed: int, steps: int, size: int) -> list[tuple[int, int]]:
        """Steps whose batches have one shape, as (how many of them, one of them): see `budget.costs`."""
        lengths = [self._stage(step)[0] for step in range(steps)]
        return [(lengths.count(length), lengths.index(length)) for length in sorted(set(lengths))]

    def _stream(self, seed: int, first: int, size: int, length: int) -> Batch:
        """`size` rows of `length` from position `first` on of the endless stream: epoch after epoch, each the
        pieces of the shuffled documents in an order of their own."""
        part, piece = self._parts["train"], self.length
        pieces = -(-part.size // piece)
        number, within = np.divmod(first + np.arange(size * length), piece)
        epoch, number = np.divmod(number, pieces)
        source, begins, twice = (np.empty(len(within), kind) for kind in (np.int64, bool, bool))
        for e in range(epoch[0], epoch[-1] + 1):
            here, layout = epoch == e, self._layout(seed, e)
            into = layout.rows[number[here]] + within[here]
            twice[here] = into - layout.rows.min() >= part.size  # the last piece overlaps the first
            place = into % part.size
            document = np.searchsorted(layout.edges, place, side="right") - 1
            source[here] = layout.starts[document] + place - layout.edges[document]
            begins[here] = (place == layout.edges[document]) | (within[here] == 0)
        targets = np.where(twice, IGNORED, part.tokens[source + 1].astype(np.int32))
        return cut_rows(part.tokens[source], targets, begins, length)

    def describe(self) -> str:
        """One line for people."""
        stages = " then ".join(str(length) for length in self._lengths)
        return f"{super().describe()}, in lengths {stages}{' and again' if self._cycle else ''}"
