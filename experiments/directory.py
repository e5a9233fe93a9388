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


class InUseError(RuntimeError):
    """Another process works there."""


class OtherRunError(ValueError):
    """The directory belongs to a run with another config or other data; the message names the fields."""


def write_json(path: Path, value: Any) -> None:
    """Write all of the file or nothing."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    work = path.with_name(f".{path.name}.unfinished")
    with work.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(work, path)


def read_config(directory: str | Path) -> tuple[Run, str]:
    """The Run of a directory and its data's fingerprint. Raises FileNotFoundError where there is none."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not the directory of a run: it has no config.json")
    saved = json.loads(path.read_text())
    return config.from_dict(saved["run"]), saved["data"]


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a run. Raises FileNotFoundError for a run that was not trained on text."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} was not trained on text: it has no tokenizer.json")
    return tokenizer.from_dict(json.loads(path.read_text()))


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
        text = self.metrics.read_text() if self.metrics.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        rows = [(json.loads(line), line) for line in lines]
        kept = [(row, line) for row, line in rows if row["step"] <= step]
        _replace(self.metrics, "".join(line for _, line in kept))
        return [row for row, _ in kept]

    def read_summary(self) -> dict | None:
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_summary(self, summary: dict) -> None:
        write_json(self.path / "summary.json", plain(summary))


def lock(path: Path) -> TextIO:
    """A lock that goes with the process that holds it, however that ends. InUseError where one does."""
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InUseError(f"{path.parent} is in use by another process") from None
    return stream
