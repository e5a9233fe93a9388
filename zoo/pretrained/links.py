"""Where their tensors stand in our parameters: one description, read in both directions.

A `Link` says that a part of their tensor `key` and a part of our array `path` are the same numbers. Both are
views, so that importing fills the one and exporting the other, and nothing is computed.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

View = Callable[[np.ndarray], np.ndarray]


def whole(array: np.ndarray) -> np.ndarray:
    return array


class Link(NamedTuple):
    """`ours(block's array) == theirs(tensor)`."""

    path: str  # of our array, below the block: "mixer/w_in"; or of the whole model: "w_embed"
    key: str
    ours: View = whole
    theirs: View = whole
    shape: tuple[int, ...] | None = None  # of their tensor; None: that of our view


def same(path: str, key: str, ours: View = whole) -> Link:
    """Equal arrays."""
    return Link(path, key, ours)


def vector(path: str, key: str, start: int = 0, stop: int | None = None) -> Link:
    """Their vector is our entries from `start` to `stop`."""
    return Link(path, key, lambda a: a[start:stop])


def flat(path: str, key: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> Link:
    """The same numbers in the same order, in other axes."""
    return Link(path, key, whole, lambda a: a.reshape(ours), theirs)


def matrix(path: str, key: str, start: int = 0, stop: int | None = None) -> Link:
    """Their `[out, in]` is our `[in, out]`, its columns from `start` to `stop`."""
    return Link(path, key, lambda a: a[:, start:stop].T)


def taps(path: str, key: str, start: int = 0, stop: int | None = None) -> Link:
    """Their depthwise filter `[channels, 1, taps]` is our `[taps, channels]`, channels `start` to `stop`."""
    return Link(path, key, lambda a: a[:, start:stop].T[:, None])


def interleaved(path: str, key: str, at: tuple[int, int, int], columns: tuple[int, int], width: int) -> Link:
    """Their rows go by heads, `[heads * rows, in]`; of each head's, some are some of our columns.

    `at` is (heads, first, last) among each head's `width` rows, `columns` the first and last of ours, where
    they go by heads too.
    """
    heads, first, last = at

    def ours(a):
        return a[:, slice(*columns)].reshape(a.shape[0], heads, last - first).transpose(1, 2, 0)

    def theirs(a):
        return a.reshape(heads, width, a.shape[-1])[:, first:last]

    return Link(path, key, ours, theirs, (heads * width, -1))


def expert(path: str, key: str, number: int, start: int = 0, stop: int | None = None) -> Link:
    """`matrix` of one expert: ours is `[in, experts, out]`."""
    return Link(path, key, lambda a: a[:, number, start:stop].T)


def below(prefix: str, at: str, links: Iterable[Link]) -> list[Link]:
    """Links of a part of a block: `prefix` before our paths, `at` before their keys."""
    return [link._replace(path=prefix + link.path, key=at + link.key) for link in links]


def shape_of(link: Link, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their tensor where our block's array has shape `ours`; -1 is the width of its view."""
    dummy = np.broadcast_to(np.zeros((), np.int8), ours)
    if link.shape is None:
        return link.ours(dummy).shape
    return tuple(link.ours(dummy).shape[-1] if n == -1 else n for n in link.shape)


def size_of(link: Link, ours: tuple[int, ...]) -> int:
    """Of the part that is linked."""
    return link.ours(np.broadcast_to(np.zeros((), np.int8), ours)).size


def tree_get(tree: Any, path: str) -> Any:
    """The leaf at `a/b/c`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree
