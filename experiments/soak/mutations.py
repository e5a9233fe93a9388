"""Ways to damage a file, by accident and on purpose; all of them drawn from a `random.Random`."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]


def flip(random: Random, data: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def insert(random: Random, data: bytes) -> bytes:
    """Up to 64 random bytes somewhere, zeros, or a piece of the file itself."""
    at, size = random.randrange(len(data) + 1), random.randint(1, 64)
    start = random.randrange(len(data))
    piece = random.choice([random.randbytes(size), bytes(size), data[start : start + size]])
    return data[:at] + piece + data[at:]


def cut(random: Random, data: bytes) -> bytes:
    """A piece out of the middle."""
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def shuffle(random: Random, data: bytes) -> bytes:
    """Two pieces change places."""
    a, b, c = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def deep(random: Random, data: bytes) -> bytes:
    """Brackets within brackets."""
    depth = random.choice([90, 1_000, 100_000])
    opening, closing = random.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return opening * depth + random.choice([b"", b"1" + closing * depth])


def nothing(random: Random, data: bytes) -> bytes:
    return b""


BYTES: tuple[Mutation, ...] = (flip, truncate, insert, cut, shuffle, deep, nothing)


def hostile(random: Random) -> Any:
    """A JSON value that nobody expects there."""
    word = random.choice(
        ["", "x" * 5_000, "../../outside", "/etc/passwd", "\0", "os:system", "builtins:eval"]
    )
    number = random.choice([0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), 0.5])
    nested: Any = random.choice([[], {}])
    for _ in range(random.choice([0, 3, 60, 99])):
        nested = [nested]
    return random.choice([None, True, word, number, nested, [number] * 300, {"type": "subprocess:Popen"}])


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything within a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [p for key, inner in items for p in ((*path, key), *_places(inner, (*path, key)))]


def change_json(random: Random, value: Any) -> Any:
    """One to three places of a JSON value replaced, removed, renamed, or taken from elsewhere in it."""
    value = json.loads(json.dumps(value))
    for _ in range(random.randint(1, 3)):
        places = _places(value)
        if not places:
            return hostile(random)
        *path, last = random.choice(places)
        holder = value
        for key in path:
            holder = holder[key]
        what = random.randrange(4)
        if what == 0 and isinstance(holder, dict):
            del holder[last]
        elif what == 1 and isinstance(holder, dict):
            holder[random.choice(["type", "x", "..", "step"])] = holder.pop(last)
        elif what == 2:
            other: Any = value
            for key in random.choice(places):
                other = other[key] if key in (other if isinstance(other, dict) else range(len(other))) else 0
                if not isinstance(other, dict | list):
                    break
            holder[last] = json.loads(json.dumps(other))
        else:
            holder[last] = hostile(random)
    return value


def structured(random: Random, data: bytes) -> bytes:
    """`change_json` of a JSON text, or of one line of several."""
    lines = data.split(b"\n")
    try:
        return json.dumps(change_json(random, json.loads(data))).encode()
    except ValueError:
        pass
    number = random.randrange(len(lines))
    try:
        lines[number] = json.dumps(change_json(random, json.loads(lines[number]))).encode()
    except ValueError:
        lines[number] = flip(random, lines[number]) if lines[number] else b"0"
    return b"\n".join(lines)
