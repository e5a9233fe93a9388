"""Reading and writing a checkpoint through the links of its format."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from zoo import checkpoint, lm
from zoo.pretrained import formats
from zoo.pretrained.files import (
    BESIDE,
    CONFIG,
    DTYPES,
    SHARD_BYTES,
    Folder,
    Stored,
    Tensor,
    locate,
    open_folder,
    read_config,
    write_folder,
)
from zoo.pretrained.formats import Format
from zoo.pretrained.links import Link, shape_of, size_of
from zoo.pretrained.options import read

# Tokens that full attention holds unless more are asked for: its state is made at once, and published limits
# of a million tokens are gigabytes a layer.
MAX_LENGTH = 4096
HEAD = "lm_head.weight"
# A run directory made of a checkpoint keeps here what the weights alone do not say.
SOURCE, STORED = "source", "tensors.json"


@dataclass(frozen=True)
class Plan:
    """What a config.json asks for: our model, and the links of its arrays by path, each with its repeat."""

    cfg: lm.Config
    format: Format
    options: SimpleNamespace
    shapes: dict[str, tuple[int, ...]]  # of our arrays
    links: dict[str, list[tuple[int | None, Link]]]

    def one(self, path: str, repeat: int | None) -> tuple[int, ...]:
        """The shape of one block's part of an array."""
        return self.shapes[path] if repeat is None else self.shapes[path][1:]

    def theirs(self) -> dict[str, tuple[int, ...]]:
        """Their shapes by key."""
        found = ((link, self.one(path, r)) for path, links in self.links.items() for r, link in links)
        return {link.key: shape_of(link, shape) for link, shape in found}

    def by_key(self) -> dict[str, list[tuple[str, int | None, Link]]]:
        found: dict[str, list[tuple[str, int | None, Link]]] = {}
        for path, links in self.links.items():
            for repeat, link in links:
                found.setdefault(link.key, []).append((path, repeat, link))
        return found


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, `blocks/0/0/mixer/w_in`, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _positions(cfg: lm.Config) -> Iterator[tuple[str, int]]:
    """Where each block's parameters are: a path and its place in the stack."""
    for group, (blocks, repeats) in enumerate(cfg.block_groups):
        for repeat in range(repeats):
            for place in range(len(blocks)):
                yield f"blocks/{group}/{place}", repeat


def make_plan(config: dict[str, Any], max_length: int, keys: frozenset[str]) -> tuple[Plan | None, list[str]]:
    """What to do about a config.json, and what is wrong with it; None where that leaves no model."""
    kind = formats.find(config)
    options, problems = read(kind.options, config)
    try:
        cfg, more = kind.config(options, max_length)
        problems += more
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        # Where an option is wrong already, what follows from it is not worth a line.
        return None, problems or [f"options do not fit together: {error}"]
    template = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
    shapes = {path: leaf.shape for path, leaf in paths(template).items()}
    links: dict[str, list[tuple[int | None, Link]]] = {path: [] for path in shapes}
    for link in kind.model(cfg):
        links[link.path].append((None, link))
    for number, (path, repeat) in enumerate(_positions(cfg)):
        for link in kind.block(options, cfg, number, keys):
            links[f"{path}/{link.path}"].append((repeat, link))
    plan = Plan(cfg, kind, options, shapes, links)
    for path, shape in shapes.items():
        linked = sum(size_of(link, plan.one(path, r)) for r, link in links[path])
        assert linked == np.prod(shape, dtype=int), f"{path}: {linked} of {shape} are linked"
    return plan, problems


def _check(folder: Folder, plan: Plan, without: tuple[str, ...]) -> list[str]:
    """Everything that is wrong with the tensors."""
    wanted = plan.theirs()
    constants = plan.format.constants(plan.options, plan.cfg)
    found = {k: t for k, t in folder.tensors.items() if not k.startswith(without)}
    problems = [f"tensor {key} {list(wanted[key])} is missing" for key in wanted if key not in found]
    for key, tensor in found.items():
        if tensor.dtype not in DTYPES:
            problems.append(f"tensor {key} has dtype {tensor.dtype}, not {', '.join(DTYPES)}")
        elif key in wanted and tensor.shape != wanted[key]:
            problems.append(f"tensor {key} is {list(tensor.shape)}, not {list(wanted[key])}")
        elif key in constants:
            problems += _differs(key, tensor, constants[key])
        elif key == HEAD and plan.cfg.tie:
            problems += _untied(tensor, plan, found)
        elif key not in wanted:
            problems.append(f"tensor {key} {list(tensor.shape)} is unknown")
    return problems


def _differs(key: str, tensor: Stored, constant: np.ndarray) -> list[str]:
    bound = 1e-4 if tensor.dtype in ("F32", "F64") else 2e-2
    if tensor.shape != constant.shape:
        return [f"tensor {key} is {list(tensor.shape)}, not {list(constant.shape)}"]
    equal = np.allclose(tensor.map().astype(np.float64), constant, bound, bound)
    return [] if equal else [f"tensor {key} is not what the options make it"]


def _untied(tensor: Stored, plan: Plan, found: dict[str, Stored]) -> list[str]:
    """A head that is written out although it is tied has to be the embedding."""
    embedding = found.get(next(link.key for _, link in plan.links["w_embed"]))
    alike = embedding is not None and (tensor.shape, tensor.dtype) == (embedding.shape, embedding.dtype)
    if alike and embedding is not None and tensor.map().tobytes() == embedding.map().tobytes():
        return []
    return [f"tensor {HEAD} differs from the embedding, to which the options tie it"]


def _raise(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder} does not fit ({len(problems)} problems):\n  " + "\n  ".join(problems))


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
        problems += _check(folder, plan, without)
    _raise(path, problems)
    assert plan is not None
    leaves = [_place(p, _fill(plan, p, folder.tensors, dtype), sharding) for p in plan.shapes]
    template = jax.eval_shape(lambda: lm.init(jax.random.key(0), plan.cfg))
    return plan.cfg, jax.tree.unflatten(jax.tree.structure(template), leaves)


def _load_native(path: Path, dtype: Any, sharding: Any, max_length: int) -> tuple[lm.Config, Any]:
    """A run directory that was made of a checkpoint: weights of its own, config from its source."""
    plan, problems = make_plan(read_config(path / SOURCE), max_length, frozenset(_dtypes(path / SOURCE)))
    _raise(path / SOURCE, problems)
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
        return json.loads((path / STORED).read_bytes())
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
    lengths = [n for layer in cfg.layers if (n := getattr(layer, "max_length", None))]
    plan, problems = make_plan(config, max(lengths, default=MAX_LENGTH), frozenset(dtypes))
    if plan is not None:
        problems += [] if plan.cfg == cfg else ["the model differs from that of its config.json"]
        problems += _unlike(plan, params)
    _raise(source, problems)
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
    _raise(folder.path, problems)
    assert plan is not None
    names = plan.format.constants(plan.options, plan.cfg).keys() & folder.tensors.keys()
    kept = [Tensor(k, t.shape, DTYPES[t.dtype], t.map) for k, t in folder.tensors.items() if k in names]
    write_folder(directory, folder.config, kept)
    dtypes = {key: tensor.dtype for key, tensor in folder.tensors.items()}
    (directory / STORED).write_text(json.dumps(dtypes, indent=2) + "\n")
    copy_beside(folder.path, directory)


def copy_beside(source: Path, directory: Path) -> None:
    """Tokenizer and generation settings."""
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _unlike(plan: Plan, params: Any) -> list[str]:
    ours = {path: tuple(leaf.shape) for path, leaf in paths(params).items()}
    names = sorted(ours.keys() | plan.shapes.keys())
    return [
        f"parameter {n} is {ours.get(n, 'absent')}, not {plan.shapes.get(n, 'known')}"
        for n in names
        if ours.get(n) != plan.shapes.get(n)
    ]


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
