"""What a checkpoint asks for: our model, the links of its arrays, and all that does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from zoo import lm
from zoo.pretrained import formats
from zoo.pretrained.files import DTYPES, Folder, Stored
from zoo.pretrained.formats import Format
from zoo.pretrained.links import Link, shape_of, size_of
from zoo.pretrained.options import read, too_many

HEAD = "lm_head.weight"


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
    if endless := too_many(config):
        return None, endless
    options, problems = read(kind.options, config)
    try:
        cfg, more = kind.config(options, max_length)
        problems += more
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
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


def check(folder: Folder, plan: Plan, without: tuple[str, ...]) -> list[str]:
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


def unlike(plan: Plan, params: Any) -> list[str]:
    ours = {path: tuple(leaf.shape) for path, leaf in paths(params).items()}
    names = sorted(ours.keys() | plan.shapes.keys())
    return [
        f"parameter {n} is {ours.get(n, 'absent')}, not {plan.shapes.get(n, 'known')}"
        for n in names
        if ours.get(n) != plan.shapes.get(n)
    ]


def raise_all(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder} does not fit ({len(problems)} problems):\n  " + "\n  ".join(problems))
