"""Dashed curves drawn into many images at once, clear of each other (see `experiments.tasks.pathfinder`).

Points are whole numbers of 1/8 pixel, so that a dash is one of a few sprites, and so is all it keeps clear.
"""

import numpy as np

from experiments.sources import below
from experiments.tasks.list_ops import mixed

STEPS = 8  # positions in a pixel
DIRECTIONS = 32
LENGTH, GAP, WIDTH, RADIUS = 2.0, 1.5, 0.83, 1.55  # of dashes and discs, in pixels; no sample is on an edge
REACH = 2  # pixels so near belong to the same curve
MARGIN = 8  # dark pixels around the image while it is drawn
DASH_LEVEL, DISC_LEVEL = 191, 255
SPRITE = 5  # pixels that hold a dash or a disc around its middle
BLOCKED, LINKED = 1, 2  # what is said of a pixel: it must stay dark, it is near the dash before


class Words:
    """Random words for many images, one after the other."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.used = keys, 0

    def next(self, count: int | None = None) -> np.ndarray:
        """`[n]`, or `[n, count]`."""
        self.used += count or 1
        if count is None:
            return mixed(self.keys, self.used)
        return mixed(self.keys[:, None], self.used - np.arange(count))


class Curves:
    """One growing curve in each of n images; points are `(y [n], x [n])` in steps.

    `reach` counts the dashes (and discs) near a pixel, where other curves must not come; `old` those without
    the last, where the curve itself must not come back.
    """

    def __init__(self, size: int, dashes: int, y: np.ndarray, x: np.ndarray, discs: bool = False):
        canvas = (len(y), size + 2 * MARGIN, size + 2 * MARGIN)
        self.reach, self.old = np.zeros(canvas, np.uint8), np.zeros(canvas, np.uint8)
        self.start, self.discs = (y, x), discs
        self.head = y.copy(), x.copy()
        self.placed = np.zeros(len(y), np.int64)
        self.dashes = np.zeros((dashes, 3, len(y)), np.int64)  # y, x of the middle, and direction
        if discs:
            self._reserve(np.arange(len(y)))

    @property
    def done(self) -> np.ndarray:
        """`[n]`: whether all dashes are placed."""
        return self.placed == len(self.dashes)

    def only(self, rows: np.ndarray) -> None:
        """Keep the images `rows`."""
        self.start, self.head = ((y[rows], x[rows]) for y, x in (self.start, self.head))
        self.reach, self.placed, self.dashes = self.reach[rows], self.placed[rows], self.dashes[..., rows]

    def draw(self, image: np.ndarray, rows: np.ndarray) -> None:
        """All dashes of the curves `rows`, into the same rows of `image`."""
        for y, x, direction in self.dashes[..., rows]:
            brighten(image, rows, y, x, DASHES[direction, y % STEPS, x % STEPS])

    def extend(self, blocked: np.ndarray, words: Words) -> None:
        """One dash more, clear of `blocked` and of older dashes; where none has room, some are taken back."""
        random = words.next(), words.next(), words.next()
        rows = np.flatnonzero(~self.done)
        if not rows.size:
            return
        placed = self.placed[rows]
        _, _, before = self.dashes[placed - 1, :, rows].T
        before = np.where(placed == 0, below(random[0][rows], DIRECTIONS), before)
        direction = (before[:, None] + TURNS) % DIRECTIONS
        gap = np.where((placed > 0)[:, None], HALF_GAP[:, before, None] + HALF_GAP[:, direction], 0)
        y, x = (z[rows, None] + g for z, g in zip(self.head, gap + HALF_DASH[:, direction], strict=True))
        weights = (self._fits(rows, y, x, direction, blocked) * WEIGHTS).cumsum(1)
        found = weights[:, -1] > 0
        chosen = (weights > below(random[1][rows], np.maximum(weights[:, -1], 1))[:, None]).argmax(1)
        pick = np.flatnonzero(found), chosen[found]
        self._place(rows[found], y[pick], x[pick], direction[pick])
        self._take_back(rows[~found], 1 + below(random[2][rows[~found]], 4))

    def _fits(self, rows, y, x, direction, blocked: np.ndarray) -> np.ndarray:
        """Whether dashes from `y, x [m,K]` have room, hang together with the last, leave room for a disc."""
        flags, old = np.minimum(blocked + self.old, BLOCKED), self.placed[rows] > 0
        _count(flags, rows[old], *self._shapes(rows[old], self.placed[rows[old]] - 1, REACH, LINKED))
        lit = DASHES[direction, y % STEPS, x % STEPS] > 0
        window = np.where(lit, _window(flags, rows, y, x), 0)
        fits = ~(window & BLOCKED).any((2, 3)) & ((window & LINKED).any((2, 3)) | ~old[:, None])
        if self.discs:
            y, x = y + HALF_DASH[0, direction], x + HALF_DASH[1, direction]
            last = self.placed[rows] == len(self.dashes) - 1
            window = np.where(DISCS[y % STEPS, x % STEPS] > 0, _window(flags, rows, y, x), 0)
            fits &= ~((window & BLOCKED).any((2, 3)) & last[:, None])
        return fits

    def _shapes(self, rows: np.ndarray, number: np.ndarray, by: int, value: int = 1):
        """`(y, x, value where it is up to by pixels from dash number [m] of the curves)`."""
        y, x, direction = self.dashes[number, :, rows].T
        return y, x, np.uint8(value) * NEAR_DASHES[by][direction, y % STEPS, x % STEPS]

    def _place(self, rows: np.ndarray, y: np.ndarray, x: np.ndarray, direction: np.ndarray) -> None:
        number = self.placed[rows]
        self.dashes[number, :, rows] = np.stack([y, x, direction], 1)
        dy, dx = HALF_DASH[:, direction]
        self.head[0][rows], self.head[1][rows] = y + dy, x + dx
        _count(self.reach, rows, *self._shapes(rows, number, REACH))
        self.placed[rows] += 1
        self._make_old(rows)
        if self.discs:
            self._reserve(rows[self.done[rows]])

    def _reserve(self, rows: np.ndarray) -> None:
        """Room for a disc at the head."""
        y, x = (z[rows] for z in self.head)
        _count(self.reach, rows, y, x, NEAR_DISCS[REACH][y % STEPS, x % STEPS])

    def _make_old(self, rows: np.ndarray, sign: int = 1) -> None:
        """The last dash but one is old now (or, sign -1, no more), and with the first the disc before it."""
        older, second = (rows[at] for at in (self.placed[rows] > 1, self.placed[rows] == 2))
        y, x, shape = self._shapes(older, self.placed[older] - 2, 1)
        _count(self.old, older, y, x, shape, sign)
        if self.discs:
            y, x = (z[second] for z in self.start)
            _count(self.old, second, y, x, NEAR_DISCS[1][y % STEPS, x % STEPS], sign)

    def _take_back(self, rows: np.ndarray, count: np.ndarray) -> None:
        """The last `count [m]` dashes, as far as there are."""
        for done in range(4):
            rows, count = rows[keep := (done < count) & (self.placed[rows] > 0)], count[keep]
            self._make_old(rows, -1)
            self.placed[rows] -= 1
            y, x, shape = self._shapes(rows, self.placed[rows], REACH)
            _count(self.reach, rows, y, x, shape, -1)
        y, x, direction = self.dashes[self.placed - 1, :, np.arange(len(self.placed))].T
        y, x = y + HALF_DASH[0, direction], x + HALF_DASH[1, direction]
        first = self.placed == 0
        self.head = np.where(first, self.start[0], y), np.where(first, self.start[1], x)


def border(size: int) -> np.ndarray:
    """1 outside the image and on its outermost pixels."""
    ones = np.ones((size + 2 * MARGIN,) * 2, np.uint8)
    ones[MARGIN + 1 : -MARGIN - 1, MARGIN + 1 : -MARGIN - 1] = 0
    return ones


def _places(y: np.ndarray, x: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `width x width` pixels around points, behind their axes."""
    offset = np.arange(width) - width // 2 + MARGIN
    return (y // STEPS)[..., None, None] + offset[:, None], (x // STEPS)[..., None, None] + offset


def _window(mask: np.ndarray, rows: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The surroundings of points `y, x [m,K]` of the images `rows [m]`: `[m,K,5,5]`."""
    return mask[rows[:, None, None, None], *_places(y, x, SPRITE)]


def _count(
    counts: np.ndarray, rows: np.ndarray, y: np.ndarray, x: np.ndarray, shape: np.ndarray, sign: int = 1
):
    """Count `shape [m,w,w]` around points of the images `rows`, or (sign -1) count it no more."""
    places = rows[:, None, None], *_places(y, x, shape.shape[-1])
    counts[places] = counts[places] + shape if sign > 0 else counts[places] - shape


def brighten(image: np.ndarray, rows: np.ndarray, y: np.ndarray, x: np.ndarray, shape: np.ndarray) -> None:
    """Draw `shape [m,w,w]` around points of the images `rows`."""
    places = rows[:, None, None], *_places(y, x, shape.shape[-1])
    image[places] = np.maximum(image[places], shape)


def _wider(shape: np.ndarray, by: int) -> np.ndarray:
    """`[...,w,w]` -> `[..., w + 2 by, w + 2 by]`: 1 up to `by` pixels from where `shape` is not 0."""
    width = shape.shape[-1]
    wide = np.zeros((*shape.shape[:-2], width + 2 * by, width + 2 * by), np.uint8)
    for dy in range(2 * by + 1):
        for dx in range(2 * by + 1):
            wide[..., dy : dy + width, dx : dx + width] |= shape > 0
    return wide


def move(distance: float) -> np.ndarray:
    """`[2, DIRECTIONS]`: dy and dx in steps, of going so many pixels in every direction."""
    angle = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    return np.rint(distance * STEPS * np.array([np.sin(angle), np.cos(angle)])).astype(np.int64)


def _covered(along: np.ndarray, radius: float, level: int) -> np.ndarray:
    """Sprites `[..., STEPS, STEPS, 5, 5]` of all within `radius` of the line from `-along` to `along`.

    Its middle lies in the middle pixel, at each of that pixel's points; 4 x 4 samples a pixel.
    """
    along = along[..., None, None, None, None, :]
    middle = np.stack(np.meshgrid(*[np.arange(STEPS) / STEPS] * 2, indexing="ij"), -1)[:, :, None, None]
    sample = (np.arange(4 * SPRITE) + 0.5) / 4 - SPRITE // 2
    offset = np.stack(np.meshgrid(sample, sample, indexing="ij"), -1) - middle
    nearest = np.clip((offset * along).sum(-1) / np.maximum(np.square(along).sum(-1), 1e-9), -1, 1)
    inside = np.square(offset - nearest[..., None] * along).sum(-1) < radius**2
    part = inside.reshape(*inside.shape[:-2], SPRITE, 4, SPRITE, 4).mean((-3, -1))
    return np.where(part >= 0.25, np.rint(level * part), 0).astype(np.uint8)


HALF_DASH, HALF_GAP = move(LENGTH / 2), move(GAP / 2)
DASHES = _covered(HALF_DASH.T / STEPS, WIDTH / 2, DASH_LEVEL)  # [DIRECTIONS, STEPS, STEPS, 5, 5]
DISCS = _covered(np.zeros(2), RADIUS, DISC_LEVEL)  # [STEPS, STEPS, 5, 5]
NEAR_DASHES = {by: _wider(DASHES, by) for by in (1, REACH)}
NEAR_DISCS = {by: _wider(DISCS, by) for by in (1, REACH)}
TURNS = np.arange(1 - DIRECTIONS // 4, DIRECTIONS // 4)
WEIGHTS = np.rint(1000 * np.cos(2 * np.pi * TURNS / DIRECTIONS) ** 2).astype(np.int64)
