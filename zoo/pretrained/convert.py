"""Reading and writing a checkpoint through the links of its format."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layers.checks import require
from zoo import checkpoint, lm
from zoo.pretrained.files import (
    BESIDE,
    CONFIG,
    DTYPES,
    SHARD_BYTES,
    Stored,
    Tensor,
    is_inside,
    locate,
    open_folder,
    read_config,
    read_inside,
    write_folder,
)
from zoo.pretrained.links import shape_of
from zoo.pretrained.plan import HEAD, Plan, check, make_plan, paths, raise_all, unlike

# Tokens that full attention holds unless more are asked for: its state is made at once, and published limits
# of a million tokens are gigabytes a layer.
MAX_LENGTH = 4096
# A run directory made of a checkpoint keeps here what the weights alone do not say.
SOURCE, STORED = "source", "tensors.json"


def load_pretrained(
    name: str | Path,
    *,
    dtype: Any = np.float32,
    sharding: Any = None,
    max_length: int = MAX_LENGTH,
    without: tuple[str, ...] = (),
    revision: str | None = None,
) -> tuple[lm.Config, Any]:
    """`(cfg, params)` of a checkpoint: a directory, or the name of a model on the hub.

    `dtype` of all parameters, None for each as it is stored; `sharding` is a jax Sharding for all of them or
    a function of path and shape that gives one; `max_length` is what full attention holds, at most the
    checkpoint's own. Tensors whose keys begin with one of `without` are left out, on purpose.

    Raises FileNotFoundError where nothing is found, ModuleNotFoundError for a hub name without
    huggingface_hub, and ValueError, which lists every option, key and shape that is not as it should be.
    """
    path = locate(name, revision)
    if (path / SOURCE / CONFIG).is_file():
        return _load_native(path, dtype, sharding, max_length)
    folder = open_folder(path)
    plan, problems = make_plan(folder.config, max_length, frozenset(folder.tensors))
    problems = [*folder.problems, *problems]
    if plan is not None:
        problems += check(folder, plan, without)
    raise_all(path, problems)
    assert plan is not None
    leaves = [_place(p, _fill(plan, p, folder.tensors, dtype), sharding) for p in plan.shapes]
    template = jax.eval_shape(lambda: lm.init(jax.random.key(0), plan.cfg))
    return plan.cfg, jax.tree.unflatten(jax.tree.structure(template), leaves)


def _load_native(path: Path, dtype: Any, sharding: Any, max_length: int) -> tuple[lm.Config, Any]:
    """A run directory that was made of a checkpoint: weights of its own, config from its source."""
    plan, problems = make_plan(read_config(path / SOURCE), max_length, frozenset(_dtypes(path / SOURCE)))
    raise_all(path / SOURCE, problems)
    assert plan is not None
    params = checkpoint.load_params(path)
    leaves = [_place(p, np.asarray(leaf, dtype), sharding) for p, leaf in paths(params).items()]
    return plan.cfg, jax.tree.unflatten(jax.tree.structure(params), leaves)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """At an address that jax takes over without a copy on a CPU."""
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(plan: Plan, path: str, tensors: dict[str, Stored], dtype: Any) -> np.ndarray:
    """One of our arrays, copied together from the mapped files."""
    links = plan.links[path]
    kinds = [DTYPES[tensors[link.key].dtype] for _, link in links]
    widest = max(kinds, key=lambda d: (d.itemsize, d.name))
    array = _empty(plan.shapes[path], widest if dtype is None else np.dtype(dtype))
    for repeat, link in links:
        ours = array if repeat is None else array[repeat]
        link.ours(ours)[...] = link.theirs(tensors[link.key].map())
    return array


def _place(path: str, array: np.ndarray, sharding: Any) -> jax.Array:
    where = sharding(path, array.shape) if callable(sharding) else sharding
    return jax.device_put(array, where, may_alias=True)


def _dtypes(path: Path) -> dict[str, str]:
    """How a checkpoint stores its tensors: from its own files, or as was written down beside its config."""
    if (path / STORED).is_file():
        dtypes = read_inside(path, STORED)
        wrong = [key for key, name in dtypes.items() if not isinstance(name, str) or name not in DTYPES]
        require(not wrong, f"{path / STORED}: tensor {wrong[:1]} has no dtype of {', '.join(DTYPES)}")
        return dtypes
    return {key: tensor.dtype for key, tensor in open_folder(path).tensors.items()}


def save_pretrained(
    directory: str | Path,
    cfg: lm.Config,
    params: Any,
    *,
    like: str | Path,
    shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
) -> Path:
    """Write `params` in the format of the checkpoint `like`, which they came from, into `directory`.

    config.json and what lies beside the weights are those of `like`, and so are the tensors' types. Raises
    ValueError where `cfg` is not its model or `params` are not those of `cfg`, FileExistsError over other
    weights.
    """
    source, directory = locate(like, revision), Path(directory)
    source = source / SOURCE if (source / SOURCE / CONFIG).is_file() else source
    config, dtypes = read_config(source), _dtypes(source)
    layers = *cfg.layers, *(block.attention for block in cfg.shared)
    lengths = [n for layer in layers if (n := getattr(layer, "max_length", None))]
    plan, problems = make_plan(config, max(lengths, default=MAX_LENGTH), frozenset(dtypes))
    if plan is not None:
        # These two decide no value.
        ours = dataclasses.replace(cfg, remat=plan.cfg.remat, piece=plan.cfg.piece)
        problems += [] if plan.cfg == ours else ["the model differs from that of its config.json"]
        problems += unlike(plan, params)
    raise_all(source, problems)
    assert plan is not None
    leaves = paths(params)
    tensors = [_tensor(plan, leaves, key, links, dtypes) for key, links in plan.by_key().items()]
    extra = _constants(plan, source, dtypes)
    if plan.cfg.tie and HEAD in dtypes:
        embedding = next(t for t in tensors if plan.by_key()[t.key][0][0] == "w_embed")
        extra.append(dataclasses.replace(embedding, key=HEAD))
    write_folder(directory, config, [*tensors, *extra], shard_bytes)
    copy_beside(source, directory)
    return directory


def keep_source(name: str | Path, directory: Path) -> None:
    """Keep in `directory` what an export needs of a checkpoint beside its weights, and its tokenizer."""
    folder = open_folder(locate(name))
    plan, problems = make_plan(folder.config, MAX_LENGTH, frozenset(folder.tensors))
    raise_all(folder.path, problems)
    assert plan is not None
    names = plan.format.constants(plan.options, plan.cfg).keys() & folder.tensors.keys()
    kept = [Tensor(k, t.shape, DTYPES[t.dtype], t.map) for k, t in folder.tensors.items() if k in names]
    write_folder(directory, folder.config, kept)
    dtypes = {key: tensor.dtype for key, tensor in folder.tensors.items()}
    (directory / STORED).write_text(json.dumps(dtypes, indent=2) + "\n")
    copy_beside(folder.path, directory)


def copy_beside(source: Path, directory: Path) -> None:
    """Tokenizer and generation settings. ValueError where one of them leads out of `source`."""
    for name in BESIDE:
        if (source / name).is_file():
            require(is_inside(source, name), f"{source / name} leads out of the folder")
            shutil.copyfile(source / name, directory / name)


def _tensor(plan: Plan, leaves: dict[str, Any], key: str, links: list, dtypes: dict[str, str]) -> Tensor:
    path, repeat, link = links[0]
    shape = shape_of(link, plan.one(path, repeat))
    dtype = DTYPES[dtypes[key]] if key in dtypes else np.dtype(leaves[path].dtype)

    def make() -> np.ndarray:
        array = np.empty(shape, dtype)
        for path, repeat, link in links:
            leaf = leaves[path] if repeat is None else leaves[path][repeat]
            link.theirs(array)[...] = link.ours(np.asarray(leaf))
        return array

    return Tensor(key, shape, dtype, make)


def _constants(plan: Plan, source: Path, dtypes: dict[str, str]) -> list[Tensor]:
    """Tensors that are no weights, bit for bit where the source still has them."""
    made = plan.format.constants(plan.options, plan.cfg)
    kept = open_constants(source)
    found = []
    for key in sorted(made.keys() & dtypes.keys()):
        dtype = DTYPES[dtypes[key]]
        make = kept[key].map if key in kept else lambda key=key, dtype=dtype: made[key].astype(dtype)
        found.append(Tensor(key, made[key].shape, dtype, make))
    return found


def open_constants(source: Path) -> dict[str, Stored]:
    try:
        return open_folder(source).tensors
    except FileNotFoundError:
        return {}
