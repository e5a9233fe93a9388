"""Points of a sweep: what is varied, combined by product, zip and chain.

    sizes = zipped(axis("width", 32, 64), axis("lr", 1e-2, 5e-3))
    product(axis("layer", "mamba", "gla"), sizes, axis("seed", 0, 1))

is 2 x 2 x 2 points, each a dict `{"layer": "mamba", "width": 32, "lr": 0.01, "seed": 0}`; the last axis turns
fastest.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from layers.checks import require

Point = dict[str, Any]


def axis(name: str, *values: Any) -> list[Point]:
    """One point for every value of `name`."""
    return [{name: value} for value in values]


def product(*points: Sequence[Point]) -> list[Point]:
    """Every combination of one point of each. ValueError where two of them set the same name."""
    return [_merged(group) for group in itertools.product(*points)]


def zipped(*points: Sequence[Point]) -> list[Point]:
    """The first of each together, the second of each, and so on. ValueError for unequal lengths."""
    lengths = [len(each) for each in points]
    require(len(set(lengths)) <= 1, f"zipped: lengths differ: {', '.join(map(str, lengths))}")
    return [_merged(group) for group in zip(*points, strict=True)]


def chain(*points: Sequence[Point]) -> list[Point]:
    """All points of the first, then of the second, and so on."""
    return [dict(point) for each in points for point in each]


def _merged(group: Sequence[Point]) -> Point:
    merged: Point = {}
    for point in group:
        twice = sorted(merged.keys() & point.keys())
        require(not twice, f"{', '.join(twice)} varied twice in one point")
        merged |= point
    return merged
