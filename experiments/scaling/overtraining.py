"""The law of runs far beyond the compute-optimal length: one exponent for both terms.

    L(N, M) = E + a N^eta + b 6^(eta / 2) (M N)^eta,      M = D / N tokens per parameter, eta < 0

At any fixed M the reducible loss is a power law of compute with the same exponent, eta / 2: over-trained
models lie on lines parallel to that of the optimal ones. Gadre et al., arXiv 2403.08540, section 3. Least
squares by variable projection, with one exponent to search.
"""

from dataclasses import dataclass

import numpy as np

from experiments.scaling import varpro
from experiments.scaling.data import Runs
from experiments.scaling.law import Law


@dataclass(frozen=True)
class Overtraining:
    """E, a, b (`scale`) and eta (`exponent`), in the units of the data."""

    E: float
    a: float
    scale: float
    exponent: float

    @property
    def law(self) -> Law:
        """The same as a `Law` of N and D = M N."""
        return Law(self.E, self.a, self.scale * 6 ** (self.exponent / 2), -self.exponent, -self.exponent)

    def loss(self, params, multiplier) -> np.ndarray:
        """L at N = `params` and M = `multiplier`, arrays of one shape."""
        return self.law.loss(params, np.asarray(multiplier, float) * np.asarray(params, float))

    def to_dict(self) -> dict[str, float]:
        return {"E": self.E, "a": self.a, "scale": self.scale, "exponent": self.exponent}


def fit(runs: Runs, start: Overtraining | None = None) -> Overtraining:
    """The law of least squares. Raises ValueError where fewer than four distinct runs leave it open."""
    law = varpro.fit(runs, tied=True, start=None if start is None else start.law)
    return Overtraining(law.E, law.A, law.B * 6 ** (law.alpha / 2), -law.alpha)
