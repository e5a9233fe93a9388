"""Drawings of data flow in text, and where their parts stand.

    x > W_in > conv > (scan) > [*] > W_out > y
    W_in > silu z > [*]

Every line is a chain. A node is its text: the same text is the same node, and what follows a `#` only tells
nodes apart. `(text)` keeps a state from token to token, `[*]` is an operator.
"""

import re
from functools import cache
from itertools import pairwise
from typing import NamedTuple


class Node(NamedTuple):
    """Column: the longest way from a source. Lane: the line that brought the node in, without empty ones."""

    label: str
    kind: str  # box, memory, operator, end
    column: int
    lane: int


class Graph(NamedTuple):
    nodes: dict[str, Node]
    edges: list[tuple[str, str]]


def _chains(text: str) -> list[list[str]]:
    chains = [[node.strip() for node in line.split(">")] for line in text.strip().splitlines()]
    for chain in chains:
        if len(chain) < 2 or not all(chain):
            raise ValueError(f"a line of a drawing is `a > b > ...`, not {' > '.join(chain)!r}")
    return chains


def _columns(edges: list[tuple[str, str]]) -> dict[str, int]:
    before: dict[str, list[str]] = {}
    for start, end in edges:
        before.setdefault(end, []).append(start)
        before.setdefault(start, [])
    under_way: list[str] = []

    @cache
    def column(node: str) -> int:
        if node in under_way:
            raise ValueError(f"the drawing runs in a circle at {node!r}; write (text) for what keeps a state")
        under_way.append(node)
        found = max((column(start) + 1 for start in before[node]), default=0)
        under_way.pop()
        return found

    return {node: column(node) for node in before}


def _kind(text: str, is_end: bool) -> tuple[str, str]:
    for kind, pattern in (("memory", r"\((.*)\)"), ("operator", r"\[(.*)\]")):
        if found := re.fullmatch(pattern, text):
            return found[1].strip(), kind
    return text, "end" if is_end and len(text) <= 3 else "box"


def parse(text: str) -> Graph:
    """Raises ValueError for a line without an arrow, or arrows that run in a circle."""
    chains = _chains(text)
    edges = list(dict.fromkeys(pair for chain in chains for pair in pairwise(chain)))
    columns = _columns(edges)
    first: dict[str, int] = {}
    for lane, chain in enumerate(chains):
        for name in chain:
            first.setdefault(name, lane)
    lanes = {lane: place for place, lane in enumerate(sorted(set(first.values())))}
    ends = set(columns) - ({start for start, _ in edges} & {end for _, end in edges})
    nodes = {}
    for name, lane in first.items():
        label, kind = _kind(re.sub(r"\s*#\w+", "", name), name in ends)
        nodes[name] = Node(label, kind, columns[name], lanes[lane])
    return Graph(nodes, edges)


def lane_of_way(graph: Graph, start: Node, end: Node) -> float:
    """The lane an edge follows past the columns between its ends: a free one, else the gap beside one."""
    taken = {(node.column, node.lane) for node in graph.nodes.values()}
    between = range(start.column + 1, end.column)
    for lane in sorted({start.lane, end.lane}, reverse=True):
        if not any((column, lane) in taken for column in between):
            return lane
    return max(start.lane, end.lane) - 0.5 if start.lane != end.lane else start.lane + 0.5
