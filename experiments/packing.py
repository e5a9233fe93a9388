"""Documents in rows of one length: best-fit packing, which cuts only what is longer than a row.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), section 3: documents
longer than a row are cut into whole rows and a rest, and all pieces are put into rows by best-fit decreasing:
the longest first, each into the fullest row that still has room for it. What stays empty is padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.sources import IGNORED, Batch, Stream, epoch_order


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised documents: `tokens` is `S d1 S d2 ... S` (or one bare d), `starts` where each begins."""

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def size(self) -> int:
        """Number of positions that have a target."""
        return len(self.tokens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each document, its leading separator included."""
        return np.diff(self.starts, append=self.size)


class Bins(NamedTuple):
    """One epoch of rows: row r holds pieces `edges[r]` to `edges[r + 1]`, one after the other."""

    starts: np.ndarray  # of each piece in the tokens
    lengths: np.ndarray
    edges: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.edges) - 1


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Items of `sizes`, all at most `room`, in bins of `room`: best-fit decreasing, in `O(n log n + n room)`.

    Among items of one size the first comes first, so their order decides who shares a bin, and nothing else:
    the bins' fillings, and so their number, are the same for every order.
    """
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the space left in them
    spaces = 0  # bit s: there is a bin with space s
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1  # the lowest bit
            number = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
            bins[number].append(int(item))
        else:
            space, number = room, len(bins)
            bins.append([int(item)])
        if space > size:
            with_space[space - size].append(number)
            spaces |= 1 << (space - size)
    return bins


def pack(documents: Documents, length: int, seed: int, epoch: int) -> Bins:
    """The rows of an epoch: a pure function of its arguments, every position of the documents in it once."""
    order = epoch_order(seed, epoch, len(documents.starts), Stream.DOCUMENTS)
    sizes = documents.lengths[order]
    pieces = -(-sizes // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # within its document
    starts = np.repeat(documents.starts[order], pieces) + number * length
    lengths = np.minimum(np.repeat(sizes, pieces) - number * length, length)
    bins = best_fit(lengths, length)
    bins = [bins[i] for i in epoch_order(seed, epoch, len(bins))]
    items = np.concatenate([np.array(items) for items in bins])
    edges = np.cumsum([0] + [len(items) for items in bins])
    return Bins(starts[items], lengths[items], edges)


def packed_row(documents: Documents, bins: Bins, row: int, length: int) -> Batch:
    """`{"tokens", "targets", "segment_ids"}` of one row, `[length]`; padding is a segment of its own."""
    here = slice(bins.edges[row], bins.edges[row + 1])
    lengths = bins.lengths[here]
    places = zip(bins.starts[here], lengths, strict=True)
    source = np.concatenate([np.arange(start, start + size) for start, size in places])
    rest = (0, length - len(source))
    return {
        "tokens": np.pad(documents.tokens[source].astype(np.int32), rest),
        "targets": np.pad(documents.tokens[source + 1].astype(np.int32), rest, constant_values=IGNORED),
        "segment_ids": np.pad(
            np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), rest, constant_values=len(lengths)
        ),
    }
