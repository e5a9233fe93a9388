"""Parameters that the blocks of a model share over its depth (`over_depth` in layers/__init__.py)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

# A group's blocks, and how often they are repeated.
Groups = tuple[tuple[tuple[Any, ...], int], ...]


def _sharing(groups: Groups) -> dict[tuple[str, Callable], list[tuple[int, int]]]:
    """Which blocks, by group and place in it, put a parameter through a function together."""
    found: dict[tuple[str, Callable], list[tuple[int, int]]] = {}
    for number, (group, _) in enumerate(groups):
        for place, block in enumerate(group):
            for shared in getattr(block.mixer, "over_depth", {}).items():
                found.setdefault(shared, []).append((number, place))
    return found


def _order(groups: Groups, spots: list[tuple[int, int]]) -> np.ndarray:
    """Indices that bring the repeats of `spots`, one spot after the other, from bottom to top."""
    starts = np.cumsum([0, *(len(group) * repeats for group, repeats in groups)])
    heights = [starts[g] + place + len(groups[g][0]) * np.arange(groups[g][1]) for g, place in spots]
    return np.argsort(np.concatenate(heights))


def shared(params: list[list[Any]], groups: Groups) -> list[list[Any]]:
    """`params` of blocks as the blocks use them: theirs, but for what is made of several blocks' together."""
    sharing = _sharing(groups)
    params = [list(group) for group in params] if sharing else params
    for (name, function), spots in sharing.items():
        order = _order(groups, spots)
        rows = jnp.concatenate([params[g][place]["mixer"][name] for g, place in spots])
        made = function(rows[order])[np.argsort(order)]
        cuts = np.cumsum([groups[g][1] for g, _ in spots])[:-1]
        for (g, place), part in zip(spots, jnp.split(made, cuts), strict=True):
            block = params[g][place]
            params[g][place] = {**block, "mixer": {**block["mixer"], name: part}}
    return params
