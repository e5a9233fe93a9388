"""The words of `experiments.tasks.bios`: pools of names and attributes, and sentences about them.

Pools have the sizes of Allen-Zhu and Li 2024 (arXiv 2404.05405, bioS), and entries of our own: every
combination of a few beginnings and endings, so that a vocabulary of 338 pieces writes them all. An entry is a
tuple of pieces, a piece begins with a space where a word begins, and no entry of a pool begins as another one
reads: where an entry ends is no knowledge besides the entry.
"""

from itertools import product

Entry = tuple[str, ...]


def _combinations(heads: str, tails: str, count: int | None = None) -> tuple[Entry, ...]:
    """All of heads x tails (or `count` of them); a tail written `_x` is a word of its own."""
    ends = [tail.replace("_", " ") for tail in tails.split()]
    return tuple((f" {head}", end) for head, end in product(heads.split(), ends))[:count]


_GIVEN = _combinations(
    "Al Be Ca Da El Fe Ga Ha Is Jo Ka Le Ma Ne Or Pe Ro Sa Ta Vi",
    "bel bin da den dra la len lia line lo mar mon na nel ra ric rin sa ton vin",
)
_FAMILY = _combinations(
    "Ab Ald Arm Bark Bel Blan Brad Car Cold Cros Dal Der Don Eck Fal Farn Fos Gar Gold Grim "
    "Hal Hard Hol Jan Kel Lam Lind Mar Mer Nor Os Pen Ram Ros Sand Sel Thor Tur Wal War",
    "aker ard bach berg by dale den ell er field ford gate ham hurst ing ley low man mer mond ney sen son "
    "stead worth",
)
NAMES = {"first": _GIVEN, "middle": _GIVEN, "last": _FAMILY}

_MONTHS = "January February March April May June July August September October November December"
ATTRIBUTES: dict[str, tuple[Entry, ...]] = {
    "pronoun": ((" He",), (" She",)),
    "month": tuple((f" {month}",) for month in _MONTHS.split()),
    "day": tuple((f" {day}", ",") for day in range(1, 29)),
    "year": tuple((f" {year // 100}", str(year // 10 % 10), str(year % 10)) for year in range(1800, 2000)),
    "city": _combinations(
        "Ash Bright Clear Dun East Fair Glen Hart Iron King Lake Mill New Oak Port Red Stone West Win York",
        "bridge bury dale field ford ham haven mouth ton wick",
    ),
    "university": _combinations(
        "Alder Amber Aspen Beech Birch Briar Cedar Clover Cypress Elder Fern Hawthorn Hazel Heather Holly "
        "Ivy Juniper Larch Laurel Linden Maple Myrtle Olive Poplar Rowan Sage Spruce Sycamore Thyme Willow",
        "_Academy _College _Conservatory _Faculty _Institute _Lyceum _Polytechnic _School _Seminary "
        "_University",
    ),
    "major": _combinations(
        "Applied Classical Comparative Computational Experimental General Historical Modern Social "
        "Theoretical",
        "_Biology _Chemistry _Economics _Geography _Law _Linguistics _Mathematics _Music _Philosophy "
        "_Physics",
    ),
    "employer": _combinations(
        "Acorn Beacon Comet Delta Ember Falcon Granite Harbor Indigo Jasper Keystone Lantern Meridian Nimbus "
        "Onyx Pioneer Quartz Raven Summit Tidal Umbra Vertex Walnut Xenon Yonder Zenith Zephyr",
        "_Airlines _Bank _Energy _Foods _Labs _Motors _Press _Software _Steel _Textiles",
        263,
    ),
}

POOLS = NAMES | ATTRIBUTES

# A sentence about one or more attributes, in their place `{}`; its subject, name or pronoun, comes before.
SENTENCES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("month", "day", "year"): (
        " was born on{}.",
        " came into the world on{}.",
        " has a birthday that falls on{}.",
        " saw the light of day on{}.",
    ),
    ("city",): (
        " grew up in{}.",
        " spent the early years in{}.",
        " is a native of{}.",
        " comes from a family of{}.",
    ),
    ("university",): (
        " studied at{}.",
        " went to{} after school.",
        " holds a degree of{}.",
        " was taught by the teachers of{}.",
    ),
    ("major",): (
        " took classes in{}.",
        " knows a lot about{}.",
        " wrote a thesis about{}.",
        " chose{} as a subject.",
    ),
    ("employer",): (
        " works for{}.",
        " found a job with{}.",
        " is on the staff of{}.",
        " earns a living at{} today.",
    ),
}
VARIANTS = 4  # of every sentence


def words_of(text: str) -> Entry:
    """A part of a sentence as pieces: words with the space before them, and a full stop."""
    return tuple(f" {word}" for word in text.rstrip(".").split()) + ((".",) if text.endswith(".") else ())


def pieces() -> list[str]:
    """Every piece there is, in the order of its first use."""
    found: dict[str, None] = {}
    for pool in POOLS.values():
        found.update(dict.fromkeys(piece for entry in pool for piece in entry))
    for variants in SENTENCES.values():
        for part in (part for sentence in variants for part in sentence.split("{}")):
            found.update(dict.fromkeys(words_of(part)))
    return list(found)
