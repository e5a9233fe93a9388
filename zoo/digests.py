"""A digest of an array that does not depend on how the array is cut over devices and processes.

Sum over elements of mix(bits + GOLDEN * place) modulo 2^64, `place` counting through the whole array: the
incremental hashing of Bellare and Micciancio ("A new paradigm for collision-free hashing", 1997), whose sum
every holder of a part can contribute to, with the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014) as the hash of an element. That is a bijection of the
element at its place, so one changed element always changes the sum; any other damage passes with chance
2^-64. It guards against accidents, not against an adversary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from zoo import processes

GOLDEN, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
MASK = 2**64 - 1
BLOCK = 1 << 17  # elements that are looked at together: their temporaries stay in a core's cache


def _mixed(z: np.ndarray) -> np.ndarray:
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z ^= z >> np.uint64(shift)
        z *= factor
    z ^= z >> np.uint64(31)
    return z


def _sum(part: np.ndarray, begin: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The sum over `part`, whose first element stands at `begin` of the whole array."""
    if part.size > BLOCK:
        axis = int(np.argmax(part.shape))
        half = part.shape[axis] // 2
        low, high = np.split(part, [half], axis)
        there = (*begin[:axis], begin[axis] + half, *begin[axis + 1 :])
        return (_sum(low, begin, strides) + _sum(high, there, strides)) & MASK
    bits = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}").astype(np.uint64)
    places = np.zeros(part.shape, np.uint64)
    for axis, (size, start, stride) in enumerate(zip(part.shape, begin, strides, strict=True)):
        along = np.arange(start, start + size, dtype=np.uint64) * np.uint64(stride)
        places += along.reshape(-1, *[1] * (part.ndim - 1 - axis))
    return int(_mixed(bits + places * GOLDEN).sum(dtype=np.uint64))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def _own(leaf: Any) -> int:
    """This process's share of the sum: each element is counted by one of those that hold it."""
    strides = _strides(leaf.shape)
    if not isinstance(leaf, jax.Array):
        return _sum(np.asarray(leaf), (0,) * leaf.ndim, strides) if processes.first() else 0
    total = 0
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            begin = tuple(cut.start or 0 for cut in shard.index)
            total += _sum(np.asarray(shard.data), begin, strides)
    return total & MASK


def digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The digest of every array, in hex; each process is asked about the parts that it has.

    numpy's arrays are those that every process has whole. Elements of 1, 2, 4 or 8 bytes.
    """
    own = [_own(leaf) for leaf in leaves.values()]
    sums = [sum(shares) & MASK for shares in zip(*processes.gather(own), strict=True)]
    return {name: f"{total:016x}" for name, total in zip(leaves, sums, strict=True)}
