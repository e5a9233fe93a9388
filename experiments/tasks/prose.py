"""Haystacks that need no file: noise, generated sentences, and words that mean nothing."""

import numpy as np

from experiments.sources import Stream, below, random_words

NOISE = "The road is long. The hill is steep. The well is deep. On we walk. Round and about. "
SENTENCES = 4_000  # of generated prose, about 220 kB
SUBJECTS = [
    "baker",
    "ferryman",
    "child",
    "gardener",
    "miller",
    "neighbour",
    "painter",
    "sailor",
    "shepherd",
    "teacher",
    "traveller",
    "widow",
]
MANNERS = ["old", "quiet", "tall", "young", "tired", "clever", "kind", "proud", "shy", "busy"]
DEEDS = [
    "carried",
    "counted",
    "found",
    "forgot",
    "hid",
    "mended",
    "painted",
    "sold",
    "took",
    "wanted",
    "washed",
    "weighed",
]
OBJECTS = [
    "basket",
    "bell",
    "blanket",
    "boat",
    "candle",
    "chair",
    "ladder",
    "lantern",
    "letter",
    "loaf",
    "mirror",
    "rope",
    "spoon",
    "umbrella",
]
PLACES = [
    "at the mill",
    "by the river",
    "in the garden",
    "near the old bridge",
    "on the stairs",
    "behind the barn",
    "under the lime tree",
    "before the rain came",
    "after the feast",
    "in the first snow",
]
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def prose(seed: int = 0) -> str:
    """Generated sentences of who did what where: no two alike for long, and no digit in them."""
    parts = (MANNERS, SUBJECTS, DEEDS, MANNERS, OBJECTS, PLACES)
    words = random_words(SENTENCES * len(parts), Stream.TASK, seed).reshape(SENTENCES, -1)
    choice = below(words, np.array([len(part) for part in parts]))
    rows = ([part[i] for part, i in zip(parts, row, strict=True)] for row in choice)
    return "".join("The {} {} {} the {} {} {}. ".format(*row) for row in rows)


def made_up_word(words: np.ndarray) -> str:
    """A word that is none: consonants and vowels in turn."""
    pairs = zip(below(words, len(CONSONANTS)), below(words >> np.uint64(32), len(VOWELS)), strict=True)
    return "".join(CONSONANTS[i] + VOWELS[j] for i, j in pairs)
