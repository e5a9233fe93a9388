"""Digits as short noisy curves, after MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439).

Ten templates of 12 points, one a digit: the sideways place of a pen that draws it from top to bottom. Each is
stretched, put somewhere in a longer signal, and spoiled:

    padded with 36 to 60 points and stretched back to 72, which makes it 1 to 1.5 times as long
    scaled by 1 +- 0.2, and begun at a place up to 48
    outside the template, white noise of 0.25 behind a Gaussian low pass of width 2
    everywhere, white noise of 0.02
    sheared: a slope of up to 0.375 from end to end added
    sampled at 40 places, linearly in between

`shuffled=True` applies one fixed permutation to time: nothing is lost to a model that ignores order.
The points of the templates are our own, and so is their height, chosen to make the task as hard as the
original (4,000 training examples, 1,000 to test) for models that know nothing of time:

                                        original, published   original   here
    logistic regression                        32                33       34
    two hidden layers of 100                   68                62       69
    nearest neighbour                                            62       63
    recurrent (GRU) / convolutions / people    91 / 94 / 96

(the last two columns by the same few lines of numpy). `signals.ArrayData` reads the original from a file.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types, uniform
from experiments.tasks.signals import normal, time_order

TEMPLATES = np.array(
    [
        [0, 3, 5, 6, 7, 7, 7, 7, 6, 5, 3, 0],  # the right side of a ring
        [0, -5, -2, 1, 1, 1, 1, 1, 1, 1, 1, 0],  # a flag and a stem
        [0, 4, 6, 6, 4, 1, -2, -4, -6, -6, -2, 0],  # a bow to the right, a foot to the left
        [0, 5, 7, 5, 1, 0, 0, 1, 5, 7, 5, 0],  # two bows to the right
        [0, -2, -4, -6, -8, -7, 3, 3, 3, 3, 3, 0],  # a slope to the left, a stem
        [0, -5, -6, -6, -5, 0, 4, 6, 6, 4, 1, 0],  # a neck to the left, a bow to the right
        [0, -3, -6, -7, -7, -6, -1, 2, 3, 2, -1, 0],  # a bow to the left, a small one to the right
        [0, 7, 7, 6, 4, 3, 1, 0, -1, -3, -4, 0],  # a roof, a slope to the left
        [0, -4, -6, -4, -1, 2, 2, -1, -4, -6, -4, 0],  # two bows to the left
        [0, -5, -7, -3, 4, 5, 5, 4, 3, 2, 1, 0],  # a small bow to the left, a stem
    ],
    np.float64,
)
POINTS, CANVAS, LENGTH = 12, 72, 40
PADDING, SCALE, SHIFT, SHEAR = (36, 60), 0.4, 48.0, 0.75
BLURRED_NOISE, WHITE_NOISE, BLUR = 0.25, 0.02, 2.0
HEIGHT = 0.24  # standard deviation of a template, so that the task is as hard as the original
GAIN = 6.0  # brings inputs to a standard deviation of about 1


@dataclass(frozen=True, kw_only=True)
class Mnist1dData:
    """Ten kinds of curves, 40 samples long; sizes as published.

    `train_examples` is the size of a fixed pool, gone through in a new order every epoch, or 0 for examples
    that never repeat.
    """

    train_examples: int = 4_000
    eval_examples: int = 1_000
    shuffled: bool = False
    data_seed: int = 0

    length = LENGTH

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")

    def build(self) -> "Mnist1dSource":
        """The source; examples are made when first asked for."""
        return Mnist1dSource(self)


class Mnist1dSource(GeneratedSource):
    """Batches `{"inputs" [B,40,1] float32, "targets" [B] int32}`."""

    kind = "classification"
    features, classes, chance = 1, len(TEMPLATES), 1 / len(TEMPLATES)

    def __init__(self, cfg: Mnist1dData):
        super().__init__(cfg, 5 + 2 * CANVAS)
        self.templates = _standardised(TEMPLATES)
        self._time = time_order(LENGTH, cfg.data_seed, cfg.shuffled)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        targets = below(words[:, 0], self.classes)
        padding = PADDING[0] + below(words[:, 1:2], PADDING[1] - PADDING[0] + 1)
        height, shift, slope = (uniform(words[:, i : i + 1]) for i in (2, 3, 4))
        signal, inside = self.render(targets, CANVAS / (POINTS + padding), SHIFT * shift)
        noise = normal(words[:, 5 : 5 + 2 * CANVAS])
        blurred = BLURRED_NOISE * _low_pass(noise[:, :CANVAS])
        canvas = np.where(inside, (1 + SCALE * (height - 0.5)) * signal, blurred)
        canvas += WHITE_NOISE * noise[:, CANVAS:]
        canvas += SHEAR * (slope - 0.5) * np.linspace(-0.5, 0.5, CANVAS)
        inputs = GAIN * _sample(canvas)[:, self._time, None]
        return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.int32)}

    def render(
        self, classes: np.ndarray, stretch: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Templates of `classes [B]`, `stretch [B,1]` times as long, from `start [B,1]` on.

        `(signal [B,72], whether a place is inside the template [B,72])`.
        """
        place = (np.arange(CANVAS) - start) / stretch
        inside = (place >= 0) & (place <= POINTS - 1)
        left = np.floor(place.clip(0, POINTS - 2)).astype(np.int64)
        points = self.templates[classes]
        low, high = (np.take_along_axis(points, left + i, 1) for i in (0, 1))
        return np.where(inside, low + (place - left) * (high - low), 0.0), inside

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        shuffled = "shuffled " if cfg.shuffled else ""
        return f"{shuffled}digits as curves of {LENGTH} steps, {pool}, chance {self.chance:.2%}"


def _standardised(templates: np.ndarray) -> np.ndarray:
    """Unit variance each, beginning at 0."""
    return HEIGHT * (templates - templates[:, :1]) / templates.std(1, keepdims=True)


def _low_pass(x: np.ndarray) -> np.ndarray:
    """A Gaussian of width BLUR along time, reflected at the ends; term by term: the same bits everywhere."""
    reach = int(4 * BLUR)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / BLUR) ** 2)
    padded = np.pad(x, ((0, 0), (reach, reach)), mode="symmetric")
    terms = (w * padded[:, i : i + x.shape[1]] for i, w in enumerate(weights / weights.sum()))
    return np.add.reduce(list(terms))


def _sample(x: np.ndarray) -> np.ndarray:
    """`[B, 72] -> [B, 40]`: linear interpolation at places from end to end."""
    place = np.linspace(0, CANVAS - 1, LENGTH)
    left = np.minimum(place.astype(np.int64), CANVAS - 2)
    return x[:, left] + (place - left) * (x[:, left + 1] - x[:, left])
