"""Recall over a mixture of lengths and numbers of pairs (Arora et al., "Based", arXiv 2402.18668).

The examples are those of `recall.py`; a cell is (length, pairs, examples). All sequences of a batch come from
one cell, so that nothing is padded and a training step is compiled once for every length and number of pairs.
An epoch is as many batches of every cell as its examples fill, at least one, in an order of its own. What a
model does in one cell of the evaluation, such as 1,024 tokens with 256 pairs, is a split of that name:
"test-1024x256"; "validation" and "test" are all cells one after the other. Over these, `accuracy` is per
label, so cells with many pairs weigh more; the published accuracy, per example, is the mean of the cells'.

    RecallMixture.based().build()
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from experiments.sources import (
    Batch,
    Stream,
    epoch_order,
    fingerprint,
    require_at_least,
    require_split,
    require_types,
)
from experiments.tasks.recall import RecallData, RecallSource
from layers.checks import require

Cell = tuple[int, int, int]  # length, pairs, examples


@dataclass(frozen=True, kw_only=True)
class RecallMixture:
    """Cells to train on and cells to evaluate on.

    The examples of a training cell are a fixed pool; with `fresh` they never repeat and say only how often
    the cell is drawn. `random_filler` and `power` are those of `RecallData`.
    """

    vocab_size: int = 8192
    train: tuple[Cell, ...] = ((64, 4, 1_000), (128, 8, 1_000))
    evaluation: tuple[Cell, ...] = ((64, 4, 100), (128, 8, 100), (256, 16, 100))
    fresh: bool = False
    random_filler: bool = False
    power: float = 0.01
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 0, "data_seed")
        require(self.data_seed < 2**32, f"RecallMixture: data_seed={self.data_seed} must be below 2^32")
        require_at_least(self, 2, "vocab_size")
        require(0 < self.power <= 1, f"RecallMixture: power={self.power} must lie in (0, 1]")
        for field in ("train", "evaluation"):
            self._check_cells(field)

    def _check_cells(self, field: str) -> None:
        cells = getattr(self, field)
        require(len(cells) > 0, f"RecallMixture: {field} has no cell")
        for number, cell in enumerate(cells):
            ok = isinstance(cell, tuple) and len(cell) == 3 and all(type(n) is int and n > 0 for n in cell)
            require(ok, f"RecallMixture: {field} has {cell!r}, which is not (length, pairs, examples)")
            try:
                self.cell(field, number)
            except ValueError as error:
                raise ValueError(f"RecallMixture: {field} has {cell!r}: {error}") from None
        names = [cell[:2] for cell in cells]
        require(
            len(set(names)) == len(names), f"RecallMixture: {field} has two cells of one length and pairs"
        )

    @classmethod
    def based(cls) -> "RecallMixture":
        """The published mixture: 180,000 training examples of 64 to 256 tokens, tested on up to 1,024.

        There: two layers, a convolution over three tokens and the mixer in question, 32 epochs, the best of
        four learning rates from 1e-3 to 10^-1.5, 256 sequences a step.
        """
        train = ((64, 4, 100_000), (128, 8, 20_000), *((256, pairs, 20_000) for pairs in (16, 32, 64)))
        test = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        return cls(train=train, evaluation=tuple((*cell, 1_000) for cell in test))

    def cell(self, field: str, number: int) -> RecallData:
        """Cell `number` of `field`, "train" or "evaluation", as a task of its own."""
        length, pairs, examples = getattr(self, field)[number]
        fixed = 0 if self.fresh or field == "evaluation" else examples
        return RecallData(
            vocab_size=self.vocab_size,
            length=length,
            pairs=pairs,
            train_examples=fixed,
            eval_examples=examples,
            random_filler=self.random_filler,
            power=self.power,
            # Every cell has random words of its own, and none those of a task with a small seed.
            data_seed=self.data_seed + ((number + 1) << 32),
        )

    def build(self) -> "RecallMixtureSource":
        """The source; examples are made when first asked for."""
        return RecallMixtureSource(self)


class RecallMixtureSource:
    """Batches `{"tokens" [B,L], "positions" [B,K], "targets" [B,K]}`, all int32; L and K vary by batch."""

    kind = "language"
    tokenizer = None

    def __init__(self, cfg: RecallMixture):
        self.cfg = cfg
        self._train = self._cells("train")
        self._evaluation = {f"{s.length}x{s.cfg.pairs}": s for s in self._cells("evaluation")}
        self.length = max(s.length for s in (*self._train, *self._evaluation.values()))
        self.vocab_size, self.chance = cfg.vocab_size, self._train[0].chance
        both = ("validation", "test")
        self.splits = (*both, *(f"{split}-{name}" for split in both for name in self._evaluation))
        self.fingerprint = fingerprint({"source": type(cfg).__name__, **asdict(cfg)})

    def _cells(self, field: str) -> list[RecallSource]:
        return [self.cfg.cell(field, number).build() for number in range(len(getattr(self.cfg, field)))]

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Training batch number `step`, of one cell: a pure function of its arguments."""
        number, within = self._drawn(seed, step, size)
        return self._train[number].batch(seed, within, size)

    def alike(self, seed: int, steps: int, size: int) -> list[tuple[int, int]]:
        """Steps whose batches have one shape, as (how many of them, one of them): see `budget.costs`."""
        cells = [self._drawn(seed, step, size)[0] for step in range(steps)]
        return [(cells.count(number), cells.index(number)) for number in sorted(set(cells))]

    def _drawn(self, seed: int, step: int, size: int) -> tuple[int, int]:
        """The cell of a step, and the number of the batch within it."""
        per_epoch = [max(1, examples // size) for _, _, examples in self.cfg.train]
        ends = np.cumsum(per_epoch)
        epoch, place = divmod(step, int(ends[-1]))
        drawn = int(epoch_order(seed, epoch, int(ends[-1]), Stream.MIXTURE)[place])
        number = int(np.searchsorted(ends, drawn, side="right"))
        within = drawn - int(ends[number]) + per_epoch[number]
        return number, epoch * per_epoch[number] + within

    def eval_batches(self, split: str, size: int) -> Iterator[Batch]:
        """The cells of the split one after the other, each filled up to whole batches."""
        require_split(self.splits, split)
        kind, _, name = split.partition("-")
        for source in [self._evaluation[name]] if name else self._evaluation.values():
            yield from source.eval_batches(kind, size)

    def describe(self) -> str:
        """One line for people."""
        cells = ", ".join(f"{length}x{pairs}" for length, pairs, _ in self.cfg.train)
        pool = (
            "fresh examples" if self.cfg.fresh else f"{sum(c[2] for c in self.cfg.train):,} training examples"
        )
        return (
            f"multi-query recall, tokens x pairs {cells}, vocabulary {self.vocab_size}, "
            f"{'random' if self.cfg.random_filler else 'zero'} filler, {pool}, "
            f"tested on {', '.join(self._evaluation)}, chance {self.chance:.2%}"
        )
