"""Colours of reports, on light paper and on dark."""

import math

import numpy as np

# Paper and ink of the two colour schemes; report.css has the same.
LIGHT = ("#ffffff", "#1b1f24")
DARK = ("#15181d", "#e4e7eb")
# Colours of series on light paper, and what they are on dark paper: found by search for the largest smallest
# distance (CIELAB) between any two, to full colour vision, without red and without green cones alike.
PALETTE = {
    "#1260c0": "#3480ea",
    "#df670d": "#b95e19",
    "#4ba36b": "#54a675",
    "#600f65": "#a75e9b",
    "#009bcb": "#32cbfe",
    "#6b4001": "#fcdc6e",
    "#525252": "#e2e2e2",
}
LEGIBLE = 3.0  # least contrast of lines and marks, as WCAG 2.2 asks of graphics


def channels(colour: str) -> np.ndarray:
    """Red, green and blue from 0 to 1."""
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def hexadecimal(channels: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(c)):02x}" for c in channels)


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2.2 defines it: from 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        return math.sumprod((0.2126, 0.7152, 0.0722), linear)

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def adapted(colour: str, paper: str, ink: str) -> str:
    """What a colour of a figure made for white paper becomes in a scheme.

    Those of the palette have a partner. A grey stands between ink and paper as it did between black and
    white. Other colours stay, but for those that dark paper would swallow.
    """
    if colour in PALETTE:
        return colour if paper == LIGHT[0] else PALETTE[colour]
    mixed = channels(colour)
    if np.ptp(mixed) < 0.05:
        place = mixed.mean()
        return hexadecimal(place * channels(paper) + (1 - place) * channels(ink))
    share = 0.0
    while paper == DARK[0] and contrast(hexadecimal(mixed), paper) < LEGIBLE:
        share += 0.02
        mixed = share + (1 - share) * channels(colour)
    return hexadecimal(mixed)
