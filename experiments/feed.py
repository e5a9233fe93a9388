"""Batches on their way to the device: made ahead by threads, and cut into the rows of a process.

    with Feed(source, seed, size, until=1000, ahead=2) as feed:
        for step in range(start, 1000):
            batch = feed(step)

Batch `step` is `source.batch(seed, step, size)` and nothing else, however far ahead it was made, by how many
threads, and by how many processes its rows are shared: a run depends on none of these and is taken up at any
step.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from experiments.sources import Batch
from layers.checks import require


def local_rows(batch: Batch, host: int, hosts: int) -> Batch:
    """The rows of process `host` of `hosts`: equal, contiguous parts of the global batch, in order."""
    require(0 <= host < hosts, f"host={host} must lie in [0, {hosts})")
    size = len(batch["targets"])
    require(size % hosts == 0, f"a batch of {size} rows cannot be shared by {hosts} processes")
    here = slice(host * size // hosts, (host + 1) * size // hosts)
    return {name: x[here] for name, x in batch.items()}


class Feed:
    """`feed(step)` is the batch of a step: all of it, or this process's rows.

    With `ahead` > 0, `threads` make the batches of the next steps (below `until`) while the device works on
    this one. An exception of the source is raised by the call for the step it belongs to. Steps asked for in
    order are quickest; any order is right.
    """

    def __init__(
        self,
        source: Any,
        seed: int,
        size: int,
        *,
        until: int,
        ahead: int = 2,
        threads: int = 1,
        host: int = 0,
        hosts: int = 1,
    ):
        self._source, self._seed, self._size = source, seed, size
        self._until, self._ahead, self._host, self._hosts = until, ahead, host, hosts
        self._ready: dict[int, Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(threads, "feed") if ahead > 0 else None

    def _make(self, step: int) -> Batch:
        return local_rows(self._source.batch(self._seed, step, self._size), self._host, self._hosts)

    def __call__(self, step: int) -> Batch:
        """The batch of a step, once it is made."""
        if self._pool is None:
            return self._make(step)
        coming = {step, *range(step, min(step + self._ahead + 1, self._until))}
        for gone in self._ready.keys() - coming:
            self._ready.pop(gone).cancel()
        for number in sorted(coming - self._ready.keys()):
            self._ready[number] = self._pool.submit(self._make, number)
        return self._ready.pop(step).result()

    def close(self) -> None:
        """End the threads; what they have begun they finish."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
