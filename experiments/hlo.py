"""What the devices of a compiled program say to each other, read from its HLO."""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One of KINDS; `size` is bytes of the whole array on one device: what is gathered, reduced or sent."""

    kind: str
    size: float
    devices: int  # that take part together
    times: int  # a step

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the ring algorithms: (n - 1) / n of the array, twice that
        for an all-reduce."""
        if self.kind == "collective-permute":
            return self.times * self.size
        return self.times * self.size * (self.devices - 1) / self.devices * (1 + (self.kind == "all-reduce"))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = found.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("  "):
            lines.append(line)
    return found, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler noted, else the number that its condition compares with."""
    noted = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    if noted or not condition:
        return int(noted[1]) if noted else 1
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition[1]]))
    return int(constants[0]) if len(constants) == 1 else 1


def _size(text: str) -> int:
    def count(dims: str) -> int:
        total = 1
        for size in filter(None, dims.split(",")):
            total *= int(size)
        return total

    return sum(BYTES[kind] * count(dims) for kind, dims in _ARRAY.findall(text))


def _together(line: str, devices: int) -> int:
    """Devices in a group: of `{{0,1},{2,3}}`, of `[4,2]<=[8]`, or of `mesh[...] {'axis'}`."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        total = 1
        for name in re.findall(r"'(\w+)'", axes[2]):
            total *= sizes[name]
        return total
    return devices


def _collective(line: str, devices: int, times: int) -> Collective | None:
    found = _OP.search(line)
    if not found:
        return None
    result, kind, start = found.groups()
    group, size = _together(line, devices), float(_size(result))
    if start and kind == "all-gather":  # (input, output)
        size *= group / (group + 1)
    elif start and kind == "collective-permute":
        size /= 2
    elif kind == "reduce-scatter":
        size *= group
    return Collective(kind, size, group, times)


def collectives(text: str, devices: int) -> list[Collective]:
    """Those of a program for so many devices.

    The parts of one that a compiler has laid between other work have one channel: it counts once, as often as
    the loop runs in which it begins, though parts of it may lie in loops within that one.
    """
    computations, entry = _computations(text)
    found: dict[object, Collective] = {}

    def visit(name: str, times: int) -> Iterator[tuple[object, Collective]]:
        for number, line in enumerate(computations.get(name, ())):
            collective = _collective(line, devices, times)
            if collective:
                channel = re.search(r"channel_id=(\d+)", line)
                yield (channel[1] if channel else (name, number)), collective
            inner = times * (_trips(line, computations) if " while(" in line else 1)
            for called in _CALLED.findall(line):
                yield from visit(called, inner)

    for channel, collective in visit(entry, 1):
        if channel not in found or collective.times < found[channel].times:
            found[channel] = collective
    return list(found.values())
