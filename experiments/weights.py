"""Training on from weights that are there: `initial_weights` of a `Run`.

    Run(model=FromWeights(), data=TextData(path="text.txt", tokenizer="weights"), initial_weights="folder")

`initial_weights` is the folder of a Hugging Face checkpoint, its name on the hub, or a run directory. What it
decides is filled in before anything else is done, and so stands in the config of the run: the model where
that is `FromWeights`, the tokenizer where that is "weights", and a fingerprint of the parameters, by which a
run is not continued with others. Parameters become float32, however they are stored. A run on a checkpoint
keeps in `source` what `zoo export` needs, as `zoo import` does.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import Run
from experiments.directory import read_config
from experiments.text import OF_WEIGHTS
from layers.checks import require
from zoo import checkpoint, pretrained, registry
from zoo.pretrained.convert import MAX_LENGTH, SOURCE, paths
from zoo.states import params_digest


@dataclass(frozen=True, kw_only=True)
class FromWeights:
    """In place of a model's Config: that of the weights. The fields are what weights do not decide."""

    remat: bool = True  # as of a model
    piece: int = 0  # as of a model
    max_length: int | None = None  # tokens that a checkpoint's full attention holds; default 4,096 at most
    without: tuple[str, ...] = ()  # tensors of a checkpoint whose keys begin so are left out


def resolved(run: Run) -> tuple[Run, Any]:
    """`run` with all that its initial weights decide, and these, arrays on the host; None where it has none.

    A run that was resolved before stays as it is, or is refused if the weights are others now. Raises
    FileNotFoundError and ModuleNotFoundError where nothing is found, ValueError for what does not fit.
    """
    if not run.initial_weights:
        ok = not isinstance(run.model, FromWeights) and not run.initial_fingerprint
        require(ok, "no weights to start from: give initial_weights, a checkpoint's folder or a run's")
        return run, None
    model, params = _read(run)
    found, known = params_digest(params)[:16], run.initial_fingerprint
    message = f"initial_weights: {run.initial_weights} has fingerprint {found}, not {known}"
    require(known in ("", found), message)
    data = _with_tokenizer(run.data, run.initial_weights)
    return dataclasses.replace(run, model=model, data=data, initial_fingerprint=found), params


def _read(run: Run) -> tuple[Any, Any]:
    """The model, and float32 parameters in the tree that it has them in."""
    asked = run.model if isinstance(run.model, FromWeights) else None
    model, params = _load(run.initial_weights, asked or FromWeights())
    model = dataclasses.replace(model, remat=asked.remat, piece=asked.piece) if asked else run.model
    return model, _fitted(run.initial_weights, model, params)


def _fitted(name: str, model: Any, params: Any) -> Any:
    """`params` in float32, in the tree of `model`. Raises ValueError where they are not its own."""
    template = jax.eval_shape(lambda: registry.module(model).init(jax.random.key(0), model))
    found = paths(params)
    wanted, stored = ({p: leaf.shape for p, leaf in tree.items()} for tree in (paths(template), found))
    wrong = sorted(p for p in wanted.keys() | stored.keys() if wanted.get(p) != stored.get(p))
    if wrong:
        p = wrong[0]
        raise ValueError(
            f"initial_weights: {name} does not fit the model: {p} is {stored.get(p, 'absent')} in the "
            f"weights and {wanted.get(p, 'absent')} in the model ({len(wrong)} arrays differ)"
        )
    leaves = [np.asarray(found[p], np.float32) for p in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _load(name: str, how: FromWeights) -> tuple[Any, Any]:
    """The model and the parameters of a run directory, or of a checkpoint."""
    if not (Path(name).expanduser() / "checkpoints").is_dir():
        most = MAX_LENGTH if how.max_length is None else how.max_length
        return pretrained.load_pretrained(name, max_length=most, without=how.without)
    ok = how == FromWeights(remat=how.remat, piece=how.piece)
    require(ok, f"{name} is a run directory, whose model is known: max_length and without are for others")
    home = Path(name).expanduser()
    return read_config(home)[0].model, checkpoint.load_params(home)


def _with_tokenizer(data: Any, name: str) -> Any:
    """`data` in the tokenizer of the weights, where they ask for it."""
    if getattr(data, "tokenizer", None) != OF_WEIGHTS:
        return data
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{name} has no tokenizer.json: give data.tokenizer")
    return dataclasses.replace(data, tokenizer=name)


def keep_source(run: Run, home: Path) -> None:
    """What an export needs beside the parameters, in `home/source`, where the weights came from a checkpoint.

    All of it or nothing; what is there already stays.
    """
    if not run.initial_weights or (home / SOURCE).exists():
        return
    source = pretrained.locate(run.initial_weights)
    work = home / f".{SOURCE}.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    if (source / SOURCE).is_dir():
        shutil.copytree(source / SOURCE, work)
    elif not (source / "checkpoints").is_dir():
        pretrained.keep_source(source, work)
    else:  # a model of this zoo from the start
        return
    os.replace(work, home / SOURCE)
