"""Checkpoints that are complete or absent, and are checked before they are believed.

    save("run/checkpoints", step, tree, {"note": ...})       -> run/checkpoints/step_00000100
    step, tree, extra = restore("run/checkpoints", template)  newest one that is intact
    params = load_params("run")

Orbax writes the arrays; it renames a finished directory into place, but it also restores flipped bits without
a word and stops at a damaged newest checkpoint. So each checkpoint carries a manifest: a SHA-256 of every
file (nothing on disk has changed) and of every array (what orbax returns is what it was given), and a
SHA-256 of the manifest itself in its last line. `restore` says in one line what is wrong with a damaged
checkpoint and takes the next older one.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PREFIX, TEMPORARY = "step_", ".unfinished-"


class CheckpointError(RuntimeError):
    """No checkpoint can be used; the message says why."""


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
    directory.mkdir(parents=True, exist_ok=True)
    final = _path(directory, step)
    work = directory / f"{TEMPORARY}{final.name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _write(work, step, _named_leaves(tree), extra or {})
        if final.exists():
            _discard(final)
        os.rename(work, final)
        _sync(directory)
    except Exception as error:  # orbax passes errors of its own kinds
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"could not save checkpoint {final}: {_line(error)}") from error
    _prune(directory, step, keep)
    return final


def restore(directory: str | Path, template: Any) -> tuple[int, Any, dict]:
    """The newest intact checkpoint: `(step, tree like template, extra)`.

    `template` is a pytree of arrays or ShapeDtypeStructs. Warns of every damaged checkpoint passed over.
    Raises CheckpointError when none is intact, ValueError when its arrays are not those of `template`.
    """
    path, manifest, leaves = _newest(Path(directory))
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _names(template).items()}
    stored = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()}
    wrong = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit: {name} is {stored.get(name, 'absent')} in the checkpoint and "
            f"{wanted.get(name, 'absent')} in the model ({len(wrong)} arrays differ)"
        )
    arrays = [jnp.array(leaves[name]) for name in wanted]  # a copy: it may be donated
    return manifest["step"], jax.tree.unflatten(jax.tree.structure(template), arrays), manifest["extra"]


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


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _names(jax.device_get(tree)).items()}


def _path(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def _write(work: Path, step: int, leaves: dict[str, np.ndarray], extra: dict) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        # Orbax refuses arrays without elements; the manifest's shape and dtype are all there is to them.
        checkpointer.save(work / "arrays", {name: leaf for name, leaf in leaves.items() if leaf.size})
    described = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "sha256": _digest(leaf)}
        for name, leaf in leaves.items()
    }
    manifest = {"step": step, "extra": extra, "leaves": described, "files": _file_digests(work)}
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


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _file_digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in sorted((path / "arrays").rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                digests[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _newest(directory: Path) -> tuple[Path, dict, dict[str, np.ndarray]]:
    """The newest intact checkpoint: its path, manifest and arrays."""
    directory = directory.absolute()
    for step in reversed(steps(directory)):
        path = _path(directory, step)
        try:
            return path, *_read(path, step)
        except Exception as error:  # whatever a damaged file makes of its reader, an older one may be intact
            warnings.warn(f"checkpoint {path} is damaged ({_line(error)}); trying an older one", stacklevel=3)
    raise CheckpointError(f"no intact checkpoint in {directory}")


def _read(path: Path, step: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Manifest and arrays of one checkpoint. Raises for anything that is not as it was written."""
    body, _, digest = (path / "manifest").read_bytes().rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its manifest has changed")
    manifest = json.loads(body)
    if manifest["step"] != step:
        raise ValueError(f"it is the checkpoint of step {manifest['step']}")
    found = _file_digests(path)
    changed = sorted(f for f in manifest["files"] | found if manifest["files"].get(f) != found.get(f))
    if changed:
        raise ValueError(f"{changed[0]} has changed" if changed[0] in found else f"{changed[0]} is missing")
    leaves = _read_arrays(path, manifest["leaves"])
    for name, leaf in leaves.items():
        if _digest(leaf) != manifest["leaves"][name]["sha256"]:
            raise ValueError(f"array {name} has changed")
    return manifest, leaves


def _read_arrays(path: Path, described: dict[str, dict]) -> dict[str, np.ndarray]:
    plain = ocp.RestoreArgs(restore_type=np.ndarray)  # wherever the arrays lived when they were saved
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        sized = [name for name, about in described.items() if 0 not in about["shape"]]
        arrays = checkpointer.restore(path / "arrays", restore_args=dict.fromkeys(sized, plain))
    return {
        name: arrays[name] if name in arrays else np.zeros(about["shape"], np.dtype(about["dtype"]))
        for name, about in described.items()
    }


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


def _line(error: Exception) -> str:
    """An error on one line, whatever its author wrote."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
