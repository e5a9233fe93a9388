"""Choosing the implementation of an op: loudly, never by silent fallback."""

from collections.abc import Callable, Mapping


def choose(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """The function that runs `op`.

    `None` picks the best one for the default device; a name picks exactly that one.
    Raises ValueError for a name that this op does not have.
    """
    if implementation is None:
        return available["xla"]
    if implementation not in available:
        raise ValueError(
            f"{op}: no implementation {implementation!r}; this op has: {', '.join(sorted(available))}"
        )
    return available[implementation]
