"""Finite groups as tables: the cyclic Z_n, the symmetric S_n, the alternating A_n, and products of these."""

from functools import lru_cache
from itertools import permutations
from math import prod

import numpy as np

from layers.checks import require

LARGEST = {"Z": 1000, "S": 6, "A": 6}
LARGEST_ORDER = 1000  # tables stay below a million entries


@lru_cache(maxsize=16)
def group_table(name: str) -> np.ndarray:
    """`[n, n]` int32, read-only: entry (a, b) is what a followed by b amounts to. Element 0 is the identity.

    `name` is "Z60", "S5", "A5", or a product such as "A4xZ5". Elements of S_n and A_n are in the
    lexicographic order of their permutations. ValueError for any other name, or more than 1,000 elements.
    """
    tables = [_table(part) for part in name.split("x")]
    order = prod(map(len, tables))
    require(order <= LARGEST_ORDER, f"group {name!r} has {order:,} elements, more than {LARGEST_ORDER:,}")
    product = tables[0]
    for table in tables[1:]:
        n = len(table)
        pairs = product[:, None, :, None] * n + table[None, :, None, :]
        product = pairs.reshape(len(product) * n, -1)
    product = product.astype(np.int32)
    product.flags.writeable = False
    return product


@lru_cache(maxsize=16)
def elements_moving(name: str, most: int) -> np.ndarray:
    """Elements of S_n or A_n that move at most so many of the n things: for 2 the identity and all swaps."""
    require(name[:1] in ("S", "A") and "x" not in name, f"{name!r} is not a group of permutations")
    perms = _permutations(name)
    return np.flatnonzero((perms != np.arange(perms.shape[1])).sum(1) <= most)


def _parts(name: str) -> tuple[str, int]:
    kind, degree = name[:1], name[1:]
    known = (
        kind in LARGEST
        and degree.isascii()
        and degree.isdigit()
        and len(degree) < 5
        and 2 <= int(degree) <= LARGEST[kind]
    )
    require(
        known,
        f"unknown group {name!r}; there are Z2 to Z1000, S2 to S6, A2 to A6, and products such as A4xZ5",
    )
    return kind, int(degree)


def _permutations(name: str) -> np.ndarray:
    """`[order, n]`: where each element sends 0 ... n - 1."""
    kind, n = _parts(name)
    perms = np.array(list(permutations(range(n))))
    if kind == "A":
        i, j = np.triu_indices(n, 1)
        perms = perms[(perms[:, i] > perms[:, j]).sum(1) % 2 == 0]
    return perms


def _table(name: str) -> np.ndarray:
    kind, n = _parts(name)
    if kind == "Z":
        return np.add.outer(np.arange(n), np.arange(n)) % n
    perms = _permutations(name)
    digits = n ** np.arange(n)[::-1]  # permutations as numbers in base n, which keeps their order
    # Row a, column b: first a, then b.
    return np.searchsorted(perms @ digits, perms.T[perms].transpose(0, 2, 1) @ digits)
