"""A process that works through the cells of a directory; `experiments.pool` starts them.

    python -m experiments.worker DIR RUNNER RETRIES CORES

It takes cells in the order of DIR/plan.json until none is left (exit 0), and ends after a few (exit MORE), so
that what compiled programs leave behind does not pile up. When its standard input closes, whoever started it
is gone: it stops as at a SIGTERM, with a checkpoint.
"""

import os
import signal
import sys
import threading
from pathlib import Path

MORE, STOPPED = 75, 130
CELLS = 20  # that one process takes


def stop_with_parent() -> None:
    """Stop politely when standard input, the parent's end of a pipe, closes."""

    def watch():
        # Not sys.stdin: its buffer cannot be held while the interpreter ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def pin(cores: list[int]) -> None:
    """Keep to these cores. Before jax starts: it asks once how many threads to make, and on their number
    depends the order of its sums, so that cells come out equal, bit for bit, only on equally many."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def main(arguments: list[str]) -> int:
    home, runner, retries, cores = Path(arguments[0]), arguments[1], int(arguments[2]), arguments[3]
    stop_with_parent()
    if cores:
        pin([int(core) for core in cores.split(",")])
    from experiments.cells import work
    from zoo.reading import read_object

    addresses = read_object(home / "plan.json", "cells")["cells"]
    directories = [home / "cells" / address for address in addresses]
    return {"done": 0, "more": MORE, "stopped": STOPPED}[work(directories, runner, retries, limit=CELLS)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
