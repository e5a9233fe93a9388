"""Handwritten digits of 8 by 8 pixels as sequences of 64: scikit-learn's `load_digits`, row by row.

1,797 images with 17 shades, from the UCI repository (Alpaydin and Kaynak 1998, "Optical recognition of
handwritten digits"); they come with scikit-learn, an optional dependency: nothing is downloaded. A hash of an
image decides its split, whatever the order of the file: about an eighth for validation, an eighth to test,
equal images together. `shuffled=True` applies one fixed permutation to the pixels.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import content_hash, fingerprint, require_at_least, require_types
from experiments.tasks.signals import ArraySource, time_order

INSTALL = "DigitsData: the images come with scikit-learn; pip install scikit-learn (or the extra 'digits')"


@dataclass(frozen=True, kw_only=True)
class DigitsData:
    """Scikit-learn's digits, pixel by pixel."""

    shuffled: bool = False
    data_seed: int = 0  # of the permutation

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 0, "data_seed")

    def build(self) -> ArraySource:
        """The source. ValueError, one line, where scikit-learn is not installed."""
        pixels, labels = _load()
        time = time_order(pixels.shape[1], self.data_seed, self.shuffled)
        part = content_hash(pixels) >> np.uint64(61)  # 0 to 7
        chosen = {"train": part > 1, "validation": part == 0, "test": part == 1}
        parts = {name: (pixels[here, :, None], labels[here]) for name, here in chosen.items()}
        content = fingerprint({"order": time.tolist()}, pixels, labels)
        return ArraySource(self, f"{'shuffled ' if self.shuffled else ''}digits", parts, time, content)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """`[n, 64]` shades 0 to 16, `[n]` digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(INSTALL) from None
    data = load_digits()
    return data.data.astype(np.int64), data.target.astype(np.int64)
