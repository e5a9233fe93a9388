"""Folders of config.json and safetensors: found, checked, mapped into memory, written.

Nothing in a folder is executed and nothing outside it is read: pickles are refused, and so is an index whose
names lead elsewhere. Tensors are views of the mapped file until they are copied to where they belong.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from layers.checks import require
from zoo.reading import parse, read_object

CONFIG, ONE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Travel beside the weights.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: str  # as the file names it
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """A read-only view of the file."""
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


@dataclass(frozen=True)
class Folder:
    """A checkpoint: its config, its tensors by key, and what is wrong with its files."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def locate(name: str | Path, revision: str | None = None) -> Path:
    """A directory, or what the hub has under `name`.

    FileNotFoundError where there is neither, ModuleNotFoundError without huggingface_hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name} is neither a directory nor the name of a model on the hub (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        message = f"{name} is no directory; to fetch it, pip install 'recurrent-zoo[hub]'"
        raise ModuleNotFoundError(message) from None
    try:
        found = snapshot_download(
            str(name), revision=revision, allow_patterns=["*.safetensors", "*.json", *BESIDE]
        )
    except Exception as error:  # the hub's and the network's own kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{name} could not be fetched from the hub: {line}") from None
    return Path(found)


def read_config(path: Path) -> dict[str, Any]:
    """config.json. FileNotFoundError where there is none, ValueError where it is no JSON object."""
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} holds no {CONFIG}")
    return read_inside(path, CONFIG)


def read_inside(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `folder`; ValueError for another value, or a link that leads elsewhere."""
    require(is_inside(folder, name), f"{folder / name} leads out of the folder")
    return read_object(folder / name)


def open_folder(path: Path) -> Folder:
    """All that is in it, without reading a tensor. Raises as `read_config`; ValueError where weights are no
    safetensors."""
    config, problems = read_config(path), list[str]()
    tensors: dict[str, Stored] = {}
    shards, listed = _shards(path, problems)
    for shard in shards:
        try:
            tensors.update(_header(path / shard))
        except (OSError, SafetensorError, ValueError) as error:
            problems.append(f"{shard} cannot be read: {str(error).splitlines()[0]}")
    if listed is not None and not problems:
        wrong = [f"{k}: listed in {listed.get(k)}" for k in listed if k not in tensors]
        wrong += [f"{k}: in {s.path.name}, not in the index" for k, s in tensors.items() if k not in listed]
        wrong += [
            f"{k}: listed in {listed[k]}, found in {s.path.name}"
            for k, s in tensors.items()
            if k in listed and listed[k] != s.path.name
        ]
        problems += wrong
    return Folder(path, config, tensors, tuple(problems))


def _shards(path: Path, problems: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files with weights, and the index where there is one; no name leads out of the folder."""
    if (path / INDEX).is_file():
        index = read_inside(path, INDEX).get("weight_map", 0)
        ok = isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
        require(ok, f"{path / INDEX} has no weight_map of names")
        names = sorted(set(index.values()))
    elif (path / ONE).is_file():
        index, names = None, [ONE]
    else:
        pickles = sorted(p.name for p in path.glob("*.bin"))
        what = f"only {pickles[0]}, a pickle, which is not read" if pickles else "no weights"
        raise FileNotFoundError(f"{path} holds {what}; {ONE} or {INDEX} is expected")
    inside = [name for name in names if is_inside(path, name)]
    problems += [f"{name!r} leads out of the folder" for name in names if name not in inside]
    return inside, index


def is_inside(folder: Path, name: str) -> bool:
    """Whether `name` is a file of `folder`; the hub's cache keeps links to files beside its snapshots."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        return False
    folder = folder.resolve()
    cache = folder.parent.parent / "blobs"
    allowed = [folder, cache] if folder.parent.name == "snapshots" and cache.is_dir() else [folder]
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(target.is_relative_to(home) for home in allowed)


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, which the library has found sound: offsets fit its length."""
    require(path.is_file(), "no such file")
    with safe_open(path, "np"):
        pass
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = parse(stream.read(length), "its header")
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        key: Stored(path, about["dtype"], tuple(about["shape"]), start + about["data_offsets"][0])
        for key, about in header.items()
    }


@dataclass(frozen=True)
class Tensor:
    """What is to be written under a key: made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    path: Path, config: dict[str, Any], tensors: Iterable[Tensor], shard: int = SHARD_BYTES
) -> None:
    """config.json and weights, in several files with an index where they have more than `shard` bytes.

    One tensor at a time is in memory. OSError when it cannot be written, FileExistsError over other weights.
    """
    path.mkdir(parents=True, exist_ok=True)
    old = [p.name for p in path.iterdir() if p.suffix == ".safetensors" or p.name in (CONFIG, INDEX)]
    if old:
        raise FileExistsError(f"{path} already holds {old[0]}; choose another directory")
    parts = _parts(sorted(tensors, key=lambda t: t.key), shard)
    several = len(parts) > 1
    names = [
        f"model-{n:05}-of-{len(parts):05}.safetensors" if several else ONE for n in range(1, len(parts) + 1)
    ]
    for name, part in zip(names, parts, strict=True):
        _write_file(path / name, part)
    if several:
        total = sum(t.bytes for part in parts for t in part)
        index = {t.key: name for name, part in zip(names, parts, strict=True) for t in part}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (path / INDEX).write_text(text + "\n")
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _parts(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if parts[-1] and sum(t.bytes for t in parts[-1]) + tensor.bytes > limit:
            parts.append([])
        parts[-1].append(tensor)
    return parts


def _write_file(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.bytes]
        header[tensor.key] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            stream.write(array.reshape(-1).view(np.uint8).data)
