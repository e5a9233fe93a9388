"""Files of others: thousands of damaged and hostile ones are read, and what that leads to is looked at.

A case is good, or an error that the command line shows as one line. Never may reading hang, end the
interpreter, change a file, open one outside its directory, start a process or a connection, unpickle, or
import a module that is not the project's own: an audit hook of the interpreter sees all of that.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from experiments import config, tokenizer
from experiments.cli import _users
from experiments.config import HOUSES
from experiments.soak.readers import READERS, Reader
from zoo.checkpoint import CheckpointError
from zoo.pretrained.convert import make_plan

KNOWN = (ValueError, OSError, CheckpointError)
SECONDS = 20  # for one case, which takes milliseconds
# What the interpreter reports of a process that executes something, or goes elsewhere for it.
FORBIDDEN = (
    "pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
    "os.fork", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink", "shutil.rmtree",
)  # fmt: skip
KINDS = ("changed", "sealed", "link outside", "link to itself", "pipe", "directory", "missing", "other file")


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """Sees what the interpreter does between `begin` and `end`; audit hooks cannot be taken out again."""

    def __init__(self):
        self._home: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple) -> None:
        if self._home is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "import" and str(arguments[0]).split(".")[0] not in HOUSES:
            self.seen.append(f"import {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            elsewhere = b"outside" in os.fsencode(path)
            if written or elsewhere:
                self.seen.append(f"open {path!r}{' to write' if written else ''}")

    def begin(self, home: Path) -> None:
        self.seen, self._home = [], home

    def end(self) -> list[str]:
        self._home = None
        return self.seen


def contents(home: Path) -> dict[str, bytes | str]:
    """What is in a directory, links as where they lead."""
    found: dict[str, bytes | str] = {}
    for path in sorted(home.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else "no file"
        found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else kind
    return found


def damage(random: Random, reader: Reader, home: Path, outside: Path) -> str:
    """Change one file of `home`; returns how. `outside` has good copies for links to lead to."""
    path = random.choice([path for path in sorted(home.rglob("*")) if path.is_file()])
    kind = random.choices(KINDS, (70, 40, 4, 1, 1, 1, 2, 2))[0]
    if kind in ("changed", "sealed"):
        path.write_bytes(random.choice(reader.mutations)(random, path.read_bytes() or b"0"))
        if kind == "sealed" and reader.seal:
            with contextlib.suppress(Exception):  # what can no longer be sealed stays as it is
                reader.seal(home)
    elif kind == "other file":
        path.write_bytes(random.choice([p for p in sorted(outside.rglob("*")) if p.is_file()]).read_bytes())
    else:
        path.unlink()
        if kind.startswith("link"):
            path.symlink_to(path if kind.endswith("itself") else outside / path.relative_to(home))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
    return kind


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(number, frame):
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Stand:
    """The good files of a reader, and its cases one after the other."""

    def __init__(self, name: str, place: Path, watch: Watch):
        self.name, self.reader, self.watch = name, READERS[name], watch
        self.place = Path(tempfile.mkdtemp(dir=place))
        self.good, self.outside = self.place / "good", self.place / "outside"
        self.good.mkdir()
        self.reader.make(self.good)
        shutil.copytree(self.good, self.outside)
        for folder in self.folders(self.good):
            self.reader.read(folder)  # and import whatever reading imports

    def folders(self, home: Path) -> list[Path]:
        """What is read at once: where several published checkpoints lie side by side, one of them."""
        return sorted(home.iterdir()) if self.name == "published weights" else [home]

    def case(self, number: int) -> tuple[str, str, str]:
        """`(kind of damage, outcome, what promise was broken or "")`."""
        random = Random(f"{self.name} {number}")
        home = self.place / "case"
        source = random.choice(self.folders(self.good))
        shutil.copytree(source, home)
        try:
            kind = damage(random, self.reader, home, self.outside / source.relative_to(self.good))
            before = contents(home)
            outcome, broken = self._read(home)
            if contents(home) != before:
                broken = broken or "files were changed"
            if kind == "link outside" and self.reader.imported and outcome == "read":
                broken = broken or "a link was followed"
            return kind, outcome, broken
        finally:
            shutil.rmtree(home)

    def _read(self, home: Path) -> tuple[str, str]:
        self.watch.begin(home)
        outcome, broken = "read", ""
        try:
            with limited(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.read(home)
        except Hang:
            outcome = broken = f"no answer in {SECONDS} s"
        except BaseException as error:
            outcome, broken = type(error).__name__, _unclear(error)
        return outcome, " ".join(self.watch.end()) or broken


def _unclear(error: BaseException) -> str:
    """What is wrong with an error, if the command line would not show it as one line."""
    if not isinstance(error, KNOWN) or not _users(error):
        return f"{type(error).__name__}: {str(error)[:200]}"
    several = "does not fit (" in str(error)  # a list of everything that is wrong
    return "" if several or "\n" not in str(error).strip() else f"several lines: {str(error)[:200]!r}"


def _work(name: str, numbers: range, place: Path, results: Path) -> None:
    """The child's side of `cases_of`: a line for every case, as soon as it is over."""
    stand = Stand(name, place, Watch())
    for number in numbers:
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where no handler can run
        line = json.dumps(stand.case(number))
        faulthandler.cancel_dump_traceback_later()
        with results.open("a") as stream:
            stream.write(line + "\n")


def cases_of(name: str, numbers: range, place: Path) -> list[list[str]]:
    """Outcomes of `numbers` of a reader's cases, in a process of their own, and a new one where that ends."""
    results = place / f"{name}.jsonl"
    results.touch()
    while True:
        done = [json.loads(line) for line in results.read_text().splitlines()]
        if len(done) == len(numbers):
            return done
        child = os.fork()
        if not child:
            status = 1
            try:
                _work(name, numbers[len(done) :], place, results)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            with results.open("a") as stream:
                stream.write(json.dumps(["?", "crash", f"the interpreter ended with {status}"]) + "\n")


def soak(cases: int, seed: int, place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows by reader, and a line for every broken promise. Cases `seed` on, so that parts can be had."""
    broken, rows = list[str](), list[dict[str, Any]]()
    invented = cases // 10
    shares = sum(reader.share for reader in READERS.values())
    for name, reader in READERS.items():
        numbers = range(seed, seed + round((cases - invented) * reader.share / shares))
        done = cases_of(name, numbers, place)
        wrong = [f"{name}, case {n}, {c[0]}: {c[2]}" for n, c in zip(numbers, done, strict=True) if c[2]]
        read = sum(outcome == "read" for _, outcome, _ in done)
        rows.append(_row(name, len(done), read, len(wrong)))
        broken += wrong
    read = invent(invented, seed)
    rows.append(_row("values invented by Hypothesis", invented, read, 0))
    return rows, broken


def _row(name: str, cases: int, read: int, broken: int) -> dict[str, Any]:
    row = {"reader": name, "cases": cases, "read": read, "refused": cases - read, "broken promises": broken}
    print(row, flush=True)
    return row


def invent(cases: int, seed: int) -> int:
    """Values that Hypothesis makes up of the words of configs, read as configs, tokenizers and options.

    Returns how many could be read; raises AssertionError, with the smallest value, for an unclear error.
    """
    import hypothesis
    from hypothesis import strategies as st

    words = ("type", "kind", "json", "model_type", "model", "data", "steps", "width", "pattern")
    types = (
        "zoo.lm:Config",
        "layers.gru:Config",
        "experiments.config:Run",
        "os:system",
        "zoo:x",
        "zoo..lm:C",
    )
    keys = st.sampled_from(words)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    leaves |= st.sampled_from([*types, "mamba", "char", "huggingface", "experiments.text:TextData"])
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | st.text(max_size=3), inner),
        max_leaves=15,
    )
    objects = st.dictionaries(keys, values, max_size=8)
    read = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(objects)
    def tried(value):
        nonlocal read
        for reader in (config.from_dict, tokenizer.from_dict, lambda v: make_plan(v, 64, frozenset())):
            try:
                reader(value)
            except Exception as error:
                assert not _unclear(error), _unclear(error)
            else:
                read += 1

    tried()
    return min(read, cases)
