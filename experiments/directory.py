"""A run's directory: what is in it, whom it belongs to, and where a continued run takes it up.

    config.json      the Run and the fingerprint of its data, written once
    tokenizer.json   what turns its tokens into text, where they stand for text
    metrics.jsonl    one row per logged step and per evaluation
    checkpoints/     see `zoo.checkpoint`
    summary.json     the result, when the run has ended

Everything in it is replaced as a whole or only added to.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from experiments import config, tokenizer
from experiments.config import Run
from experiments.record import plain
from experiments.tokenizer import Tokenizer
from layers.checks import require
from zoo import blocks
from zoo.reading import parse, read_object


class InUseError(RuntimeError):
    """Another process works there."""


class OtherRunError(ValueError):
    """The directory belongs to a run with another config or other data; the message names the fields."""


def write_json(path: Path, value: Any) -> None:
    """Write all of the file or nothing."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    work = path.with_name(f".{path.name}.unfinished")
    work.unlink(missing_ok=True)
    try:
        with work.open("x") as stream:  # never through a link that somebody has left there
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(work, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_config(directory: str | Path) -> tuple[Run, str]:
    """The Run of a directory and its data's fingerprint. Raises FileNotFoundError where there is none."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not the directory of a run: it has no config.json")
    saved = read_object(path, "run", "data")
    run = config.from_dict(saved["run"])
    whole = isinstance(run, Run) and isinstance(run.model, blocks.Config) and isinstance(saved["data"], str)
    require(whole, f"{path} does not hold a run of a model")
    return run, saved["data"]


def drop_cut_line(path: Path) -> None:
    """Take off the file what was being written when its writer was stopped."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


def rows_of(path: Path, *numbers: str) -> list[dict]:
    """The rows of a .jsonl file, without one at the end that was cut short; none where there is no file.

    ValueError, with the line, for what is no JSON object with a number under each of `numbers`.
    """
    require(path.is_file() or not path.exists(), f"{path} is no regular file")  # a pipe would never end
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    for number, row in enumerate(rows, 1):
        ok = isinstance(row, dict) and all(isinstance(row.get(name), int) for name in numbers)
        require(ok, f"{path}, line {number} is no row of {', '.join(numbers) or 'values'}")
    return rows


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a run. Raises FileNotFoundError for a run that was not trained on text."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} was not trained on text: it has no tokenizer.json")
    return tokenizer.from_dict(read_object(path))


class Directory:
    """An open run directory, locked against other processes until `close`."""

    def __init__(self, path: str | Path, run: Run, data: str):
        """Create the directory or take up the run in it; nothing is changed before all checks have passed.

        Raises OtherRunError for another run's directory, InUseError when another process works in it.
        """
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / ".lock")
        try:
            self._check(run, data)
        except BaseException:
            self.close()
            raise

    def _check(self, run: Run, data: str) -> None:
        if (self.path / "config.json").exists():
            old, old_data = read_config(self.path)
            wrong = config.difference(old, run)
            if old_data != data:
                wrong.append(f"the data themselves: fingerprint {old_data[:12]} -> {data[:12]}")
            if wrong:
                raise OtherRunError(f"{self.path} belongs to another run; changed: {'; '.join(wrong)}")
        elif self.metrics.exists() or self.checkpoints.exists():
            raise OtherRunError(f"{self.path} holds results but no config.json; choose another directory")
        else:
            write_json(self.path / "config.json", {"run": config.to_dict(run), "data": data})

    def close(self) -> None:
        self._lock.close()

    def write_tokenizer(self, used: Tokenizer | None) -> None:
        """Keep what decodes the tokens (None: they stand for no text), so that generation needs no data."""
        if used is not None:
            write_json(self.path / "tokenizer.json", used.to_dict())

    def rows_until(self, step: int) -> list[dict]:
        """Rows of metrics up to `step`; later ones, and one that was cut short, are removed from the file."""
        rows = [row for row in rows_of(self.metrics, "step") if row["step"] <= step]
        _replace(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def read_summary(self) -> dict | None:
        path = self.path / "summary.json"
        return read_object(path) if path.exists() else None

    def write_summary(self, summary: dict) -> None:
        write_json(self.path / "summary.json", plain(summary))


class Guest(Directory):
    """A directory that process 0 of many holds, for the others: they restore from it and write nothing."""

    metrics: Any = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def close(self) -> None:
        pass

    def write_tokenizer(self, used: Tokenizer | None) -> None:
        pass

    def rows_until(self, step: int) -> list[dict]:
        return []

    def read_summary(self) -> dict | None:
        return None

    def write_summary(self, summary: dict) -> None:
        pass


def lock(path: Path) -> TextIO:
    """A lock that goes with the process that holds it, however that ends. InUseError where one does."""
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InUseError(f"{path.parent} is in use by another process") from None
    return stream
