"""Documents as lists of strings: from local files, the Hugging Face hub, or Python's standard library.

Every complaint is one line that names the file and the place in it.
"""

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from experiments.tokenizer import first_line
from layers.checks import require
from zoo.reading import parse

SUFFIXES = {".txt", ".jsonl", ".parquet"}
STDLIB_BYTES = 5_000_000
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_path(path: str, field: str) -> list[str]:
    """The documents under `path`: a file, a directory (searched for .txt, .jsonl, .parquet), or a glob.

    A .jsonl or .parquet file has a document in `field` of each row; any other file is one document.
    FileNotFoundError for nothing there; ValueError for text that is empty or not UTF-8, or a missing field.
    """
    documents = []
    for file in _files(path):
        match file.suffix:
            case ".jsonl":
                documents += _texts(file, field, _read_jsonl(file))
            case ".parquet":
                documents += _texts(file, field, _read_parquet(file))
            case _:
                documents.append(_read_text(file))
    documents = [text for text in documents if text]
    require(len(documents) > 0, f"{path}: empty, there is no text in it")
    return documents


def read_hub(name: str, config: str | None, split: str, field: str) -> list[str]:
    """The rows of a split of a dataset on the hub (or in the local cache), each a document.

    FileNotFoundError for what cannot be loaded; ValueError for a missing field or no text.
    """
    import datasets

    where = f"{name}[{config}]" if config else name
    with _quiet():
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except Exception as error:  # anything from no network to no such split
            message = f"dataset {where}, split {split!r}, cannot be loaded: {first_line(error)}"
            raise FileNotFoundError(message) from None
    documents = [text for text in _texts(where, field, rows) if text]
    require(len(documents) > 0, f"{where}: no text in split {split!r}")
    return documents


@cache
def read_stdlib() -> tuple[str, ...]:
    """About 5 MB of the running Python's own sources, a file a document.

    Files come in the order of the hashes of their names, so that where the cap and the split into training
    and validation fall does not depend on the alphabet.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    names = [file.as_posix() for file in files if not STDLIB_SKIPPED.intersection(file.parts)]
    documents, total = [], 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        body = (root / name).read_bytes()
        if body and total + len(body) <= STDLIB_BYTES:
            documents.append(body.decode("utf-8", errors="replace"))
            total += len(body)
    require(len(documents) > 1, f"no standard-library sources in {root}: give the data a path")
    return tuple(documents)


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = sorted(f for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        missing = f"no .txt, .jsonl or .parquet file in directory {path}"
    else:
        files = sorted(f for f in map(Path, glob.glob(str(root), recursive=True)) if f.is_file())
        missing = f"no file matches {path}" if glob.has_magic(path) else f"no such file or directory: {path}"
    if not files:
        raise FileNotFoundError(missing)
    return files


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{file}: not UTF-8 text, byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(message) from None


def _read_jsonl(file: Path) -> Iterator[dict]:
    """Line by line, and not through pyarrow: that guesses types (dates) and cannot say which line is bad."""
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if line.strip():
            row = parse(line, f"{file}: line {number}")
            require(isinstance(row, dict), f"{file}: line {number} is not a JSON object")
            yield row


def _read_parquet(file: Path) -> Iterable[dict]:
    """Not through the datasets library, which asks the network and writes into its cache for a local file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            return table.read().to_pylist()
    except (ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{file}: not readable as parquet: {first_line(error)}") from None


def _texts(where, field: str, rows: Iterable[dict]) -> list[str]:
    texts = []
    for number, row in enumerate(rows, 1):
        text = row.get(field)
        if not isinstance(text, str):
            there = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "none"
            problem = (
                f"no field {field!r}" if text is None else f"no text but {type(text).__name__} in {field!r}"
            )
            raise ValueError(f"{where}: row {number} has {problem}; fields there: {there}")
        texts.append(text)
    return texts


@contextmanager
def _quiet():
    """The datasets library without progress bars and log lines, as it was again afterwards."""
    import datasets
    from datasets.utils import logging

    verbosity, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
