"""States on disk: what a model remembers of a text can be kept, and taken up again by the same model.

    answer, session = zoo.generate(params, cfg, prompt, 100, with_session=True)
    zoo.save_state("chapter.state", session, params, cfg)
    session = zoo.load_state("chapter.state", params, cfg)      # and on with session=session

A state is one safetensors file: arrays by their paths, and in its metadata what the model is, a SHA-256 of
its parameters, and one of everything in the file. It belongs to one model and is refused to others.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from layers.checks import require
from zoo import lm
from zoo.generation.session import Session, template
from zoo.reading import parse

FORMAT = "recurrent-zoo state 1"
# Fields of a model that change how it is computed or trained, and no value.
UNTOUCHED = ("pattern", "first", "remat", "piece", "balance")


class StateError(ValueError):
    """A file is no state, or is damaged, or belongs to another model; the message says which."""


class About(NamedTuple):
    """What a file says of itself."""

    kind: str  # "session" or "state"
    rows: int  # texts
    tokens: list[int] | None  # of each text, where it is known
    model: dict[str, Any]  # fields of its Config
    params: str  # SHA-256
    note: str
    written: str  # date and time, UTC
    arrays: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype


def described(cfg: lm.Config) -> dict[str, Any]:
    """What decides what a model computes, as `field: value`, layers in order."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in UNTOUCHED}
    for number, block in enumerate(cfg.blocks):
        own = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
        layer = own.pop("mixer")
        fields[f"blocks.{number}.layer"] = type(layer).__module__.removeprefix("layers.")
        fields |= {f"blocks.{number}.{f.name}": getattr(layer, f.name) for f in dataclasses.fields(layer)}
        fields |= {f"blocks.{number}.block.{name}": value for name, value in own.items()}
    return json.loads(json.dumps(fields, default=repr))


def params_digest(params: Any) -> str:
    """SHA-256 of all parameters, with their paths, shapes and dtypes."""
    return _digest(_named(params))


def save_state(
    path: str | Path, state: Any, params: Any, cfg: lm.Config, *, note: str = "", overwrite: bool = False
) -> Path:
    """Write a `Session`, or a bare state of `lm.apply` and `lm.step`, to `path`; all of it or nothing.

    Raises FileExistsError where something is already, unless told to `overwrite`, StateError for what is no
    state of this model, OSError where it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already; choose another name, or say that it may be overwritten"
        )
    kind = "session" if isinstance(state, Session) else "state"
    leaves = _named(state)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    rows = _rows(leaves)
    wanted = {name: leaf.shape for name, leaf in _names(_template(kind, cfg, rows)).items()}
    if shapes != wanted:
        raise StateError(f"{path}: what is to be saved is no {kind} of this model")
    about = {
        "format": FORMAT,
        "kind": kind,
        "model": json.dumps(described(cfg)),
        "params": params_digest(params),
        "note": note,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    about["complex"] = json.dumps([name for name, leaf in leaves.items() if np.iscomplexobj(leaf)])
    about["sha256"] = _digest(leaves, about)
    _place(path, leaves, about, overwrite)
    return path


def _place(path: Path, leaves: dict[str, np.ndarray], about: dict[str, str], overwrite: bool) -> None:
    """Write beside `path`, then give it its name at once."""
    handle, work = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: _real(leaf) for name, leaf in leaves.items()}, work, metadata=about)
        with open(work, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(work, 0o666 & ~_umask())
        if overwrite:
            os.replace(work, path)
        else:
            os.link(work, path)  # unlike a rename, it fails where another process was faster
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(work)


def _real(leaf: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs: the format has none of 128 bits."""
    leaf = np.ascontiguousarray(leaf)
    return leaf[..., None].view(leaf.real.dtype) if np.iscomplexobj(leaf) else leaf


def _complex(pairs: np.ndarray) -> np.ndarray:
    return pairs.view(np.result_type(pairs.dtype, np.complex64))[..., 0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_about(path: str | Path) -> About:
    """What a file says of itself, after its checksum. Raises StateError, FileNotFoundError."""
    return _read(Path(path))[0]


def load_state(path: str | Path, params: Any, cfg: lm.Config) -> Any:
    """What `save_state` was given, bit for bit.

    Raises StateError for a file that is no state or is damaged, for the state of another model (its config
    or its parameters), and for 64-bit arrays where jax has none; FileNotFoundError.
    """
    path = Path(path)
    about, leaves = _read(path)
    _require_model(path, about, params, cfg)
    like = _template(about.kind, cfg, about.rows)
    names = _names(like)
    ok = {name: leaf.shape for name, leaf in names.items()} == {n: leaf.shape for n, leaf in leaves.items()}
    if not ok:
        raise StateError(f"{path}: its arrays are not those of this model's states; another version wrote it")
    arrays = [jnp.asarray(leaves[name]) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.dtype != leaves[name].dtype:
            raise StateError(
                f"{path}: {name} is {leaves[name].dtype}; enable jax_enable_x64 to go on from it"
            )
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _require_model(path: Path, about: About, params: Any, cfg: lm.Config) -> None:
    own = described(cfg)
    # A field that came after the file was written is at its default, or the parameters would differ.
    wrong = [name for name, value in about.model.items() if name not in own or own[name] != value]
    if wrong:
        field = wrong[0]
        more = f" ({len(wrong)} fields differ)" if len(wrong) > 1 else ""
        here, there = own.get(field, "absent"), about.model[field]
        raise StateError(
            f"{path} is a state of another model: {field} is {there!r} there and {here!r} here{more}"
        )
    if about.params != params_digest(params):
        raise StateError(
            f"{path} is a state of another model: the config is the same, the parameters are not"
        )


def _read(path: Path) -> tuple[About, dict[str, np.ndarray]]:
    """The file, checked."""
    if not path.is_file():
        raise FileNotFoundError(f"no state at {path}")
    try:
        with safe_open(path, "numpy") as stored:
            about = stored.metadata() or {}
            leaves = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
        leaves |= {name: _complex(leaves[name]) for name in parse(about.get("complex", "[]"), "complex")}
        require(about.get("format") == FORMAT, f"it does not say {FORMAT!r}")
        if about.pop("sha256", None) != _digest(leaves, about):
            raise StateError(f"{path} is damaged: its checksum is not that of its contents")
        return _about(about, leaves), leaves
    except StateError:
        raise
    except (SafetensorError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise StateError(f"{path} is damaged or is no state: {reason}") from None


def _about(about: dict[str, str], leaves: dict[str, np.ndarray]) -> About:
    model = parse(about["model"], "model")
    require(isinstance(model, dict), "its model is no object")
    length = leaves.get("length")
    return About(
        about["kind"],
        _rows(leaves),
        None if length is None else length.tolist(),
        model,
        about["params"],
        about["note"],
        about["written"],
        {name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()},
    )


def _template(kind: str, cfg: lm.Config, rows: int) -> Any:
    whole = template(cfg, rows)
    return whole if kind == "session" else whole.state


def _rows(leaves: dict[str, np.ndarray]) -> int:
    """Texts in a session or state: of the model's own leaves, the second axis."""
    require(len(leaves) > 0, "a state without arrays")
    if "length" in leaves:
        return leaves["length"].shape[0]
    first = next(iter(leaves.values()))
    return first.shape[1] if first.ndim > 1 else 0


def _names(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of the tree."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _named(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _names(jax.device_get(tree)).items()}


def _digest(leaves: dict[str, np.ndarray], about: dict[str, str] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(leaves):
        leaf = np.ascontiguousarray(leaves[name])
        digest.update(json.dumps([name, leaf.shape, str(leaf.dtype)]).encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()
