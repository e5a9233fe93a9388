"""Compilers of other machines in processes of their own: they may abort, or never end.

A worker reads questions, a line each, and answers every one with a line of JSON.
"""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

PATIENCE = 480.0  # seconds for one answer; on idle cores the longest takes a tenth of it


def one_line(error: BaseException) -> str:
    """What an exception says, the first lines of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def work(run: Callable[[str], dict], finish: Callable[[dict, str], dict]) -> None:
    """Answer standard input, line by line; `finish(answer, text)` gets what compilers print on the way."""
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            os.dup2(printed.fileno(), 1)
            answer = run(line.strip())
            sys.stdout.flush()
            ctypes.CDLL(None).fflush(None)  # what C printed is in buffers of its own
            printed.seek(0)
            answer = finish(answer, printed.read())
        print(json.dumps(answer), file=replies, flush=True)


class Worker:
    """A process that runs `command`, started anew after it ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self._command, self._environment = command, os.environ | environment
        self._process: subprocess.Popen | None = None
        self._said: Any = None

    def _running(self) -> subprocess.Popen:
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the process
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=self._environment
            )
        return self._process

    def ask(self, question: str, patience: float = PATIENCE) -> dict:
        """The answer, or `{"error": ...}` from a process that ended without one or took too long."""
        process = self._running()
        questions, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        timer = threading.Timer(patience, process.kill)
        timer.start()
        try:
            questions.write(f"{question}\n")
            questions.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        return json.loads(line) if line else {"error": self._epitaph(process)}

    def _epitaph(self, process: subprocess.Popen) -> str:
        code = process.wait()
        self._process = None
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or [""])[-1]
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the compiler's process ended ({reason}) {last[:200]}".strip()

    def close(self) -> None:
        """End the process, if it runs; the next question starts another."""
        if self._process is None:
            return
        cast(IO[str], self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # a device that is gone can hold a process back
            self._process.kill()
            self._process.wait()
        self._process = None


def shared(numbers: Sequence[int], workers: Sequence[Worker], tell: Callable[[int, dict], None]) -> None:
    """Every number asked of the worker that is free; `tell(number, answer)` as answers come.

    An answer with "again" is not told: a new process is asked once more.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)

    def serve(worker: Worker) -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return worker.close()
            answer = worker.ask(str(number))
            if answer.pop("again", False):
                worker.close()
                answer = worker.ask(str(number))
            tell(number, answer)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
