"""Ops on a mesh of devices that XLA cuts arrays over: those that it would cut wrongly, or not at all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh

ROWS = ("data", "fsdp")  # axes of a mesh that cut the rows of a batch; the names are those of `zoo.sharding`


def sizes() -> dict[str, int]:
    """Devices along the axes of the ambient mesh (`jax.set_mesh`) that XLA partitions over; those of 1, and
    those a `shard_map` around has taken for itself, are left out."""
    mesh = get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.auto_axes if mesh.shape[name] > 1}


def by_rows(run: Callable, arguments: tuple, batched: Sequence[bool]) -> Any:
    """`run(*arguments)`, by every device on its own rows of a batch: XLA's partitioner does not see into it.

    `batched` says of every argument whether its arrays have the rows as their first axis, as all results do;
    the others are whole on every device. Without a mesh, and where its devices do not divide the rows, `run`
    as it is.
    """
    rows = next(x.shape[0] for x, cut in zip(arguments, batched, strict=True) if cut and x is not None)
    mesh = sizes()
    axes = tuple(name for name in ROWS if name in mesh)
    if not mesh or rows % math.prod(mesh[name] for name in axes):
        return run(*arguments)
    cut = PartitionSpec(axes) if axes else PartitionSpec()
    specs = tuple(cut if is_cut else PartitionSpec() for is_cut in batched)
    return jax.shard_map(run, in_specs=specs, out_specs=cut, check_vma=False)(*arguments)
