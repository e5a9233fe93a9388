"""Checkpoints that are complete or absent, and are checked before they are believed.

    save("run/checkpoints", step, tree, {"note": ...})       -> run/checkpoints/step_00000100
    step, tree, extra = restore("run/checkpoints", template)  newest one that is intact
    params = load_params("run")

Orbax writes the arrays; it renames a finished directory into place, but it also restores flipped bits without
a word and stops at a damaged newest checkpoint. So each checkpoint carries a manifest: a SHA-256 of every
file (nothing on disk has changed), a digest of every array (what orbax returns is what it was given; see
`zoo.digests`), and a SHA-256 of the manifest itself in its last line. `restore` says in one line what is
wrong with a damaged checkpoint and takes the next older one.

Arrays may be cut over many devices and processes, and be restored over others: every process writes and reads
its own parts, in a directory that all of them see. All must call the functions here together.

A checkpoint of somebody else's making is read like any other: nothing in it is executed, and links in it are
refused, so that nothing outside its directory is read.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from zoo import processes
from zoo.digests import digests
from zoo.reading import parse

PREFIX, TEMPORARY = "step_", ".unfinished-"


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why."""


class _OtherModelError(ValueError):
    """An intact checkpoint of other arrays."""


def steps(directory: str | Path) -> list[int]:
    """Steps of the checkpoints in `directory`, oldest first; intact or not."""
    found = Path(directory).glob(f"{PREFIX}*")
    return sorted(int(p.name.removeprefix(PREFIX)) for p in found if p.name.removeprefix(PREFIX).isdigit())


def save(directory: str | Path, step: int, tree: Any, extra: dict | None = None, *, keep: int = 2) -> Path:
    """Write `tree` (any pytree of arrays) and `extra` (JSON values) as the checkpoint of `step`.

    It appears under its name only when all of it is on the disk. Then the newest `keep` checkpoints up to
    `step` stay and the rest go, later ones too: a run that saves `step` has turned back behind them.
    Raises OSError when it cannot be written; older checkpoints are then untouched.
    """
    directory = Path(directory).absolute()
    final = _path(directory, step)
    work = directory / f"{TEMPORARY}{final.name}"
    try:
        processes.by_first(lambda: _clear(work))
        _write(work, step, _named_leaves(tree), extra or {})
        processes.by_first(lambda: _publish(work, final))
    except Exception as error:  # orbax passes errors of its own kinds
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"could not save checkpoint {final}: {_reason(error)}") from error
    processes.by_first(lambda: _prune(directory, step, keep))
    return final


def _clear(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def _publish(work: Path, final: Path) -> None:
    if final.exists():
        _discard(final)
    os.rename(work, final)
    _sync(final.parent)


def restore(directory: str | Path, template: Any) -> tuple[int, Any, dict]:
    """The newest intact checkpoint: `(step, tree like template, extra)`.

    `template` is a pytree of arrays or ShapeDtypeStructs; those with a NamedSharding are restored in it,
    however they lay when they were saved. Warns of every damaged checkpoint passed over. Raises
    CheckpointError when none is intact, ValueError when its arrays are not those of `template`.
    """
    wanted = _names(template)
    _, manifest, leaves = _newest(Path(directory), wanted)
    # Copies of what numpy holds: they may be donated.
    arrays = [leaf if isinstance(leaf, jax.Array) else jnp.array(leaf) for leaf in map(leaves.get, wanted)]
    return manifest["step"], jax.tree.unflatten(jax.tree.structure(template), arrays), manifest["extra"]


def _require_fit(path: Path, described: dict[str, dict], wanted: dict[str, Any]) -> None:
    """_OtherModelError unless the arrays of a checkpoint are those that are `wanted`."""
    asked = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
    stored = {name: (tuple(about["shape"]), about["dtype"]) for name, about in described.items()}
    wrong = sorted(n for n in asked.keys() | stored.keys() if asked.get(n) != stored.get(n))
    if wrong:
        name = wrong[0]
        raise _OtherModelError(
            f"{path} does not fit: {name} is {stored.get(name, 'absent')} in the checkpoint and "
            f"{asked.get(name, 'absent')} in the model ({len(wrong)} arrays differ)"
        )


def load_params(run_directory: str | Path) -> Any:
    """Parameters in the newest intact checkpoint of a training run, as nested dicts and lists of arrays."""
    _, _, leaves = _newest(Path(run_directory) / "checkpoints")
    params: dict = {}
    for name, leaf in leaves.items():
        *branches, last = name.split("/")
        node = params
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = jnp.asarray(leaf)
    if "params" not in params:
        raise CheckpointError(f"the checkpoints of {run_directory} hold no parameters")
    return _lists(params["params"])


def _lists(node: Any) -> Any:
    """Dicts keyed 0, 1, 2... were lists before their paths were written out."""
    if not isinstance(node, dict):
        return node
    if all(key.isdigit() for key in node):
        return [_lists(node[key]) for key in sorted(node, key=int)]
    return {key: _lists(value) for key, value in node.items()}


def _names(tree: Any) -> dict[str, Any]:
    """Leaves by path, `params/blocks/0/w_in`, in the order of the tree."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _placed(leaf: Any) -> bool:
    """Whether an array, or a struct of one, lies on a mesh."""
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Arrays on a mesh as they are, others as numpy's."""
    return {name: leaf if _placed(leaf) else np.asarray(leaf) for name, leaf in _names(tree).items()}


def _path(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def _write(work: Path, step: int, leaves: dict[str, Any], extra: dict) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        # Orbax refuses arrays without elements; the manifest's shape and dtype are all there is to them.
        checkpointer.save(work / "arrays", {name: leaf for name, leaf in leaves.items() if leaf.size})
    found = digests(leaves)
    described = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "digest": found[name]}
        for name, leaf in leaves.items()
    }
    manifest = {"step": step, "extra": extra, "leaves": described, "files": _file_digests(work)}
    processes.by_first(lambda: _complete(work, manifest))


def _complete(work: Path, manifest: dict) -> None:
    """Add the manifest, and see to it that all is on the disk."""
    body = json.dumps(manifest).encode()
    (work / "manifest").write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode())
    for path in [work, *work.rglob("*")]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of the arrays; each process reads some of them."""

    def own() -> dict[str, str]:
        files = sorted(file for file in (path / "arrays").rglob("*") if file.is_file())
        return {
            str(file.relative_to(path)): _file_digest(file)
            for file in files[jax.process_index() :: jax.process_count()]
        }

    return {name: digest for found in processes.together(own) for name, digest in found.items()}


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _newest(directory: Path, wanted: dict[str, Any] | None = None) -> tuple[Path, dict, dict[str, Any]]:
    """Path, manifest and arrays of the newest intact checkpoint, which must hold the arrays `wanted`."""
    directory = directory.absolute()
    for step in reversed(processes.by_first(lambda: steps(directory))):
        path = _path(directory, step)
        try:
            return path, *_read(path, step, wanted)
        except _OtherModelError:
            raise
        except Exception as error:  # whatever a damaged file makes of its reader, an older one may be intact
            warnings.warn(f"checkpoint {path} is damaged ({_line(error)}); trying an older one", stacklevel=3)
    raise CheckpointError(f"no intact checkpoint in {directory}")


def _read(path: Path, step: int, wanted: dict[str, Any] | None) -> tuple[dict, dict[str, Any]]:
    """Manifest and arrays of one checkpoint. Raises for anything that is not as it was written."""
    manifest = processes.by_first(lambda: _manifest(path, step))
    found = _file_digests(path)
    changed = sorted(f for f in manifest["files"] | found if manifest["files"].get(f) != found.get(f))
    if changed:
        raise ValueError(f"{changed[0]} has changed" if changed[0] in found else f"{changed[0]} is missing")
    described = manifest["leaves"]
    if wanted is not None:
        _require_fit(path, described, wanted)
    places = {name: leaf.sharding for name, leaf in (wanted or {}).items() if _placed(leaf)}
    leaves: dict[str, Any] = {}
    processes.together(lambda: leaves.update(_read_arrays(path, described, places)))
    digest = digests(leaves)
    for name, leaf in leaves.items():
        about = described[name]
        known = digest[name] == about["digest"] if "digest" in about else _sha256(leaf) == about["sha256"]
        if not known:
            raise ValueError(f"array {name} has changed")
    return manifest, leaves


def _manifest(path: Path, step: int) -> dict:
    _require_plain(path)
    body, _, digest = (path / "manifest").read_bytes().rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its manifest has changed")
    manifest = parse(body, "its manifest")
    if manifest["step"] != step:
        raise ValueError(f"it is the checkpoint of step {manifest['step']}")
    return manifest


def _sha256(leaf: Any) -> str:
    """What checkpoints held of an array before it could be cut."""
    whole = leaf if isinstance(leaf, np.ndarray) else multihost_utils.process_allgather(leaf, tiled=True)
    return hashlib.sha256(np.ascontiguousarray(whole).reshape(-1).view(np.uint8)).hexdigest()


def _require_plain(path: Path) -> None:
    """Directories and regular files only: a link could lead anywhere, and a pipe would never end."""
    for place in [path, path / "manifest", *path.rglob("*")]:
        if place.is_symlink() or not (place.is_file() or place.is_dir()):
            name = place.relative_to(path.parent)
            raise ValueError(f"{name} is {'a link' if place.is_symlink() else 'no regular file'}")


def _read_arrays(path: Path, described: dict[str, dict], places: dict[str, Any]) -> dict[str, Any]:
    """Arrays by name: where `places` say, wherever they lay when they were saved, or as numpy's."""

    def how(name: str) -> ocp.RestoreArgs:
        if name in places:
            return ocp.ArrayRestoreArgs(sharding=places[name])
        return ocp.RestoreArgs(restore_type=np.ndarray)

    sized = {name: about for name, about in described.items() if 0 not in about["shape"]}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        about = checkpointer.metadata(path / "arrays").item_metadata
        _require_described({} if about is None else about.tree, sized)
        arrays = checkpointer.restore(path / "arrays", restore_args={name: how(name) for name in sized})
    for name in described.keys() - sized.keys():
        empty = np.zeros(described[name]["shape"], np.dtype(described[name]["dtype"]))
        arrays[name] = jax.device_put(empty, places[name]) if name in places else empty
    return {name: arrays[name] for name in described}


def _require_described(found: dict[str, Any], described: dict[str, dict]) -> None:
    """What is stored has the shapes of the manifest and fits in memory: the library would not survive it."""
    if found.keys() != described.keys():
        raise ValueError("its arrays are not those of its manifest")
    size = 0
    for name, array in found.items():
        shape = tuple(described[name]["shape"])
        chunk = array.storage.chunk_shape
        whole = all(0 < c <= n for c, n in zip(chunk, shape, strict=True))
        if array.shape != shape or not whole:
            raise ValueError(f"array {name} is {array.shape} in pieces of {chunk}, not {shape}")
        size += math.prod(shape) * np.dtype(array.dtype).itemsize
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"its arrays of {size:,} bytes do not fit in memory")


def _prune(directory: Path, step: int, keep: int) -> None:
    present = steps(directory)
    past = [s for s in present if s <= step]
    for old in set(present) - set(past[-max(keep, 1) :]):
        _discard(_path(directory, old))
    for left in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def _discard(path: Path) -> None:
    """Out of sight first: a deletion that is cut short must not leave half a checkpoint under its name."""
    hidden = path.with_name(f"{TEMPORARY}{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _reason(error: Exception) -> str:
    """What the operating system said, where it is at the bottom of it; else the line of the error."""
    said = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(said[1]) if said else getattr(error, "errno", None)
    return os.strerror(code) if code else _line(error)


def _line(error: Exception) -> str:
    """An error on one line, whatever its author wrote."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
