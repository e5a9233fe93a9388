"""SIGINT and SIGTERM: the first one asks a run to stop, the second one ends it.

The first is noted, and the loop ends behind the step it is in, with a checkpoint. The second raises
KeyboardInterrupt; inside a library, which may compile for minutes, nothing can be raised, and the process
ends with status FORCED after GRACE seconds. What is on the disk stays valid either way.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0
FORCED = 130


@contextmanager
def signals() -> Iterator[list[str]]:
    """A list that receives the name of a first SIGINT or SIGTERM; empty for ever in a thread of one's own."""
    received: list[str] = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt(signal.Signals(number).name)
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be received
        yield received
        return
    with _forced_by_the_second():
        old = {number: signal.signal(number, handle) for number in NUMBERS}
        try:
            yield received
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextmanager
def _forced_by_the_second() -> Iterator[None]:
    """End the process GRACE seconds after a second signal, unless the block has been left by then.

    A signal's byte is in the pipe at once, also while the interpreter waits for a library.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    left = threading.Event()

    def watch():
        seen = 0
        while byte := os.read(reading, 1):
            seen += byte[0] in NUMBERS
            if seen == 2 and not left.wait(GRACE):
                os._exit(FORCED)

    watcher = threading.Thread(target=watch, name="second signal", daemon=True)
    watcher.start()
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(old)
        os.close(writing)
        watcher.join()
        os.close(reading)
