"""Pathfinder: are two marked ends those of one dashed curve? (Linsley et al. 2018, arXiv 1805.08315)

The images are those of Long Range Arena (Tay et al. 2021, arXiv 2011.04006), sequences of 32 x 32 pixels. Two
winding curves of `dashes` dashes begin `apart` pixels from each other near the middle, and short curves
distract. A disc marks the beginning of one of the two, another the end of the same one (class 1) or of the
other (class 0). Pixels are read line by line: `[B, size^2, 1]`, from 0 (dark) to 1.

A dash is 2 pixels long. Two dashes of a curve are 1.5 pixels apart along their directions, which differ by
less than 90 degrees, each turn t that has room being drawn with probability proportional to cos^2 t; where
there is no room, the last few dashes are drawn anew. Positions have steps of 1/8 pixel, directions of 1/32 of
a turn, and brightness is the part of a pixel that is covered, times 3/4 in dashes (a pixel covered less than
a quarter stays dark): only a disc reaches 1.

Unlike the published generator, which keeps all dashes equally far apart, so that two curves may come as near
to each other as the dashes of one, here the answer is certain. Lit pixels of a curve hang together by steps
of at most 2 in each coordinate; those of different curves, discs included, are more than 2 apart. The gap
between dashes is published as 2 pixels, and discs as not kept apart from curves. Published are 160,000 images
to train on and 20,000 each to validate and to test (`train_examples=160_000, eval_examples=20_000`); one core
draws about 300 in a second, hundreds at a time.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types
from experiments.tasks.dashes import (
    DIRECTIONS,
    DISC_LEVEL,
    DISCS,
    MARGIN,
    STEPS,
    Curves,
    Words,
    border,
    brighten,
    move,
)
from experiments.tasks.list_ops import mixed
from layers.checks import require

ATTEMPTS = 200  # drawings of one image before it counts as impossible
PATIENCE = 6  # steps for each dash of the long curves, those back included, before the drawing is given up
TRIES = 3  # of placing a distractor before it is left out
PLACES = 16  # that are looked at for a free one to begin it


@dataclass(frozen=True, kw_only=True)
class PathfinderData:
    """Pathfinder images of `size x size` pixels; `for_size` has settings for other sizes than 32.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    size: int = 32
    dashes: int = 14
    apart: int = 7
    distractors: int = 5
    distractor_dashes: int = 4
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples", "distractor_dashes")
        require_at_least(self, 2, "dashes")
        require_at_least(self, 0, "train_examples", "data_seed", "distractors")
        require(16 <= self.size <= 512, f"PathfinderData: size={self.size} must lie between 16 and 512")
        ok = 7 <= self.apart <= self.size // 3 + 2
        require(ok, f"PathfinderData: apart={self.apart} must lie between 7 and {self.size // 3 + 2}")
        # Two curves with room around them fill this much of an image that can still be drawn.
        most = self.size**2 // 48
        ok = self.dashes <= most
        require(ok, f"PathfinderData: dashes={self.dashes} must be at most {most} with size={self.size}")

    @classmethod
    def for_size(cls, size: int, **settings) -> "PathfinderData":
        """Curves as long, for their image, as the published ones of 14 dashes in 32 x 32 pixels."""
        sizes = {"dashes": 14 * size // 32 - 3 * (size < 32), "distractors": 5 * size**2 // 32**2}
        return cls(**{"size": size, **sizes, **settings})

    @property
    def length(self) -> int:
        """T, the number of pixels."""
        return self.size**2

    def build(self) -> "PathfinderSource":
        """The source; examples are made when first asked for."""
        return PathfinderSource(self)


class PathfinderSource(GeneratedSource):
    """Batches `{"inputs" [B,T,1] float32, "targets" [B] int32}`."""

    kind = "classification"
    features, classes = 1, 2
    chance = 0.5  # classes are drawn with equal probability

    def __init__(self, cfg: PathfinderData):
        super().__init__(cfg, 1)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg, keys = self.cfg, words[:, 0]
        inputs = np.zeros((len(keys), cfg.length, 1), np.float32)
        missing = np.arange(len(keys))
        targets = below(mixed(keys, 0), 2)
        for attempt in range(1, ATTEMPTS):
            if not missing.size:
                return {"inputs": inputs, "targets": targets.astype(np.int32)}
            drawn, images = _draw(cfg, mixed(keys[missing], attempt), targets[missing])
            inputs[missing[drawn], :, 0] = images.reshape(len(images), cfg.length) / np.float32(DISC_LEVEL)
            missing = np.delete(missing, drawn)
        raise ValueError(f"PathfinderData: no room for dashes={cfg.dashes} in size={cfg.size}")

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"Pathfinder: {cfg.size} x {cfg.size} pixels, curves of {cfg.dashes} dashes, "
            f"{cfg.distractors} distractors, {pool}, chance {self.chance:.2%}"
        )


def _draw(cfg: PathfinderData, keys: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One attempt at an image for each key: the numbers of those that succeeded, and these, uint8."""
    words = Words(keys)
    first, second = _two_curves(cfg, words)
    drawn = np.flatnonzero(first.done & second.done)
    words.keys = keys[drawn]
    image = np.zeros((len(drawn), cfg.size + 2 * MARGIN, cfg.size + 2 * MARGIN), np.uint8)
    for curve in (first, second):
        curve.only(drawn)
        curve.draw(image, np.arange(len(drawn)))
    taken = first.reach + second.reach + border(cfg.size)
    for _ in range(cfg.distractors):
        _distract(cfg, words, image, taken)
    begin = below(words.next(), 2)
    end = np.where(same[drawn] == 1, begin, 1 - begin)
    for number, curve in enumerate((first, second)):
        for chosen, (y, x) in ((begin, curve.start), (end, curve.head)):
            rows = np.flatnonzero(chosen == number)
            brighten(image, rows, y[rows], x[rows], DISCS[y[rows] % STEPS, x[rows] % STEPS])
    inside = slice(MARGIN, MARGIN + cfg.size)
    return drawn, image[:, inside, inside]


def _two_curves(cfg: PathfinderData, words: Words) -> "tuple[Curves, Curves]":
    """The long curves, with room for a disc at each end."""
    spread = max(cfg.size - 4 * cfg.apart, cfg.size // 8) * STEPS
    y, x = ((cfg.size * STEPS - spread) // 2 + below(words.next(), spread) for _ in range(2))
    dy, dx = move(cfg.apart)[:, below(words.next(), DIRECTIONS)]
    starts = (y, x), (y + dy, x + dx)
    curves = [Curves(cfg.size, cfg.dashes, at[0], at[1], discs=True) for at in starts]
    for _ in range(PATIENCE * cfg.dashes):
        for this, other in (curves, curves[::-1]):
            this.extend(other.reach + border(cfg.size), words)
    return curves[0], curves[1]


def _distract(cfg: PathfinderData, words: Words, image: np.ndarray, taken: np.ndarray) -> None:
    """One short curve more in every image that has room for it."""
    missing = np.ones(len(image), bool)
    for _ in range(TRIES):
        places = below(words.next(PLACES), (cfg.size * STEPS) ** 2)
        y, x = places // (cfg.size * STEPS), places % (cfg.size * STEPS)
        free = taken[np.arange(len(y))[:, None], y // STEPS + MARGIN, x // STEPS + MARGIN] == 0
        first = np.arange(len(y)), free.argmax(1)
        curve = Curves(cfg.size, cfg.distractor_dashes, y[first], x[first])
        curve.placed[~missing] = cfg.distractor_dashes
        for _ in range(cfg.distractor_dashes + 2):
            curve.extend(taken, words)
        rows = np.flatnonzero(curve.done & missing)
        curve.draw(image, rows)
        taken[rows] += curve.reach[rows]
        missing[rows] = False
