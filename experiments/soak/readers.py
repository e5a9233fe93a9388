"""Everything that reads a file which may be somebody else's, with small good files for it to read."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from experiments import config, directory
from experiments.cells import outcome
from experiments.config import Run
from experiments.scaling import data as scaling
from experiments.soak.mutations import BYTES, Mutation, change_json, structured
from experiments.tasks.signals import ArrayData
from experiments.text import TextData
from experiments.tokenizer import HuggingFaceTokenizer
from zoo import checkpoint, lm, states
from zoo.generation.session import template
from zoo.pretrained import load_pretrained
from zoo.pretrained.files import CONFIG, INDEX, ONE

FIXTURES = Path(__file__).parents[2] / "tests" / "oracles" / "fixtures"
MODEL = lm.Config(vocab_size=11, width=8, depth=2, pattern=("min_gru", "attention"), mlp="none")
TEXT = "the zoo reads what others wrote. " * 20


@dataclass(frozen=True)
class Reader:
    """`make` writes good files into a directory, `read` reads them; `seal` makes checksums right again.

    `share` is how often it is tried, next to others. A link out of a directory that was `imported` has to be
    refused.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    share: int = 10
    seal: Callable[[Path], None] | None = None
    mutations: tuple[Mutation, ...] = (*BYTES, structured, structured, structured)
    imported: bool = False


def filled(template: Any, seed: int = 0) -> Any:
    """Arrays of the shapes and dtypes of a template; nothing is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.integers(0, 2, leaf.shape).astype(leaf.dtype), template)


@cache
def params() -> Any:
    """Of MODEL."""
    return filled(jax.eval_shape(lambda: lm.init(jax.random.key(0), MODEL)))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _make_run(home: Path) -> None:
    run = Run(model=MODEL, data=TextData(path="nowhere.txt", length=16))
    _write(home / "config.json", {"run": config.to_dict(run), "data": "0" * 64})
    rows = [{"kind": "train", "step": n, "loss": 1 / n, "timing": {"seconds": 0.5}} for n in range(1, 9)]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write(home / "summary.json", {"step": 8, "loss": 0.125, "accuracy": None})
    (home / "attempts.jsonl").write_text('{"runner": "a", "began": 1.5}\n{"runner": "a", "error": "no"}\n')


def _read_run(home: Path) -> Any:
    return (
        directory.read_config(home),
        directory.rows_of(home / "metrics.jsonl", "step"),
        outcome(home),
        directory.rows_of(home / "attempts.jsonl"),
    )


def _make_tokenizers(home: Path) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "<eos>", *"abcdefgh"])}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pairs = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate("abcx")} | {"ab": 4}, [("a", "b")])
    )
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    pairs.decoder = tokenizers.decoders.ByteLevel()
    saved = [HuggingFaceTokenizer(t).to_dict() for t in (whole, pairs)]
    saved.append({"kind": "char", "characters": "abc", "separator": True})
    for number, value in enumerate(saved):
        (home / str(number)).mkdir()
        _write(home / str(number) / "tokenizer.json", value)


def _read_tokenizers(home: Path) -> Any:
    found = [directory.read_tokenizer(place) for place in sorted(home.iterdir())]
    return [tokenizer.decode(tokenizer.encode("abc")) for tokenizer in found]


def inside_tokenizer(random: Random, data: bytes) -> bytes:
    """What the tokenizers library itself reads, changed: it stands as text in the file."""
    saved = json.loads(data)
    if "json" not in saved:
        return structured(random, data)
    return json.dumps(saved | {"json": json.dumps(change_json(random, json.loads(saved["json"])))}).encode()


def _make_table(home: Path) -> None:
    rows = [f"{n},{t},{2 + 1 / n},{6 * n * t}" for n in (10, 20, 40) for t in (100, 200, 400)]
    (home / "results.csv").write_text("\n".join(["params,tokens,loss,flops", *rows]) + "\n")


def _make_state(home: Path) -> None:
    states.save_state(home / "a.state", filled(template(MODEL, 2)), params(), MODEL, note="a note")


def _read_state(home: Path) -> Any:
    return states.load_state(home / "a.state", params(), MODEL)


def _seal_state(home: Path) -> None:
    """The checksum of whatever is in the file now."""
    header, body = split_header((home / "a.state").read_bytes())
    about = header["__metadata__"]
    about.pop("sha256", None)
    kinds = {"F32": np.float32, "BOOL": np.bool_, "I32": np.int32}
    leaves = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            leaves[name] = np.frombuffer(body[start:end], kinds[tensor["dtype"]]).reshape(tensor["shape"])
    about["sha256"] = states._digest(leaves, about)
    (home / "a.state").write_bytes(join_header(header, body))


def split_header(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def in_header(random: Random, data: bytes) -> bytes:
    """The header of a safetensors file changed; JSON as `structured`."""
    try:
        header, body = split_header(data)
    except (ValueError, struct.error):
        return structured(random, data)
    return join_header(change_json(random, header), body)


def _make_checkpoint(home: Path) -> None:
    checkpoint.save(home / "checkpoints", 3, {"params": params(), "empty": np.zeros((2, 0))}, {"note": 1})


def _seal_checkpoint(home: Path) -> None:
    """Every file's digest, and the manifest's own, of what is there now."""
    step = home / "checkpoints" / "step_00000003"
    body = (step / "manifest").read_bytes().rpartition(b"\n")[0]
    manifest = json.loads(body) | {"files": checkpoint._file_digests(step)}
    sealed(step / "manifest", manifest)


def sealed(path: Path, manifest: Any) -> None:
    """Write a manifest with its digest."""
    body = json.dumps(manifest).encode()
    path.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode())


def in_manifest(random: Random, data: bytes) -> bytes:
    """A manifest changed and its digest made right, or JSON as `structured`."""
    body, _, digest = data.rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return structured(random, data)
    body = json.dumps(change_json(random, json.loads(body))).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode()


def _make_folders(home: Path) -> None:
    """A published checkpoint of every type, the smallest in two files."""
    for fixture in sorted(FIXTURES.glob("pretrained_*")):
        (home / fixture.name).mkdir()
        for name in (CONFIG, ONE):
            shutil.copyfile(fixture / name, home / fixture.name / name)
    header, body = split_header((home / "pretrained_mamba" / ONE).read_bytes())
    header.pop("__metadata__", None)
    arrays = {
        key: np.frombuffer(body[slice(*about["data_offsets"])], np.float32).reshape(about["shape"])
        for key, about in header.items()
    }
    split = home / "split"
    split.mkdir()
    shutil.copyfile(home / "pretrained_mamba" / CONFIG, split / CONFIG)
    where = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(arrays)}
    for name in set(where.values()):
        save_file({key: x for key, x in arrays.items() if where[key] == name}, split / name)
    _write(split / INDEX, {"weight_map": where})


def _read_folder(home: Path) -> Any:
    return load_pretrained(home)


def _make_arrays(home: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 16)), rng.integers(0, 3, 20)
    np.savez(home / "a.npz", x=x, y=y)
    np.savez_compressed(home / "b.npz", x=np.zeros((20, 16)), y=y, x_test=x, y_test=y)


def _read_arrays(home: Path) -> Any:
    return [ArrayData(path=str(home / name)).build() for name in ("a.npz", "b.npz")]


def _make_texts(home: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (home / "a.txt").write_text(TEXT)
    (home / "b.jsonl").write_text("".join(json.dumps({"text": TEXT, "n": n}) + "\n" for n in range(3)))
    parquet.write_table(pyarrow.table({"text": [TEXT] * 3}), home / "c.parquet")


def _read_texts(home: Path) -> Any:
    return TextData(path=str(home), length=16, mode="packed").build().batch(0, 0, 2)


READERS = {
    "run directory": Reader(_make_run, _read_run, share=20),
    "tokenizer": Reader(
        _make_tokenizers, _read_tokenizers, mutations=(*BYTES, structured, *[inside_tokenizer] * 6)
    ),
    "table of results": Reader(_make_table, lambda home: scaling.read(home).runs()),
    "state": Reader(_make_state, _read_state, seal=_seal_state, mutations=(*BYTES, *[in_header] * 6)),
    "checkpoint": Reader(
        _make_checkpoint,
        checkpoint.load_params,
        share=20,
        seal=_seal_checkpoint,
        mutations=(*BYTES, *[in_manifest] * 5),
        imported=True,
    ),
    "published weights": Reader(
        _make_folders, _read_folder, share=20, mutations=(*BYTES, *[in_header] * 9), imported=True
    ),
    "arrays": Reader(_make_arrays, _read_arrays, share=5, mutations=BYTES),
    "text": Reader(_make_texts, _read_texts, share=5),
}
