"""Where arrays lie on a mesh of devices: one table for parameters, one line for activations.

A mesh has four axes. Rows of a batch are cut over "data" and "fsdp" together, tokens over "sequence".
Parameters, and with them what an optimiser keeps for each, are cut over "fsdp" (every device keeps a part,
and the whole is gathered where it is used: Rajbhandari et al. 2019, arXiv 1910.02054, stage 3) and over
"tensor" (devices share the work of a matrix: Shoeybi et al. 2019, arXiv 1909.08053). XLA's partitioner puts
the communication in; results are those of one device but for the order of sums.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels.partition import ROWS, sizes

AXES = ("data", "fsdp", "sequence", "tensor")
Axis = str | tuple[str, ...] | None

# By the last name on a parameter's path, first match: what cuts its first and its last axis, the stack of
# equal blocks not counted. What matches nothing (norms, biases, gates, dynamics) is whole on every device.
RULES: tuple[tuple[str, Axis, Axis], ...] = (
    ("w_embed", "tensor", "fsdp"),  # [vocabulary, D]
    ("w_out", "tensor", "fsdp"),  # [channels, ..., D]: channels as the matrices before it made them
    ("w_*", "fsdp", "tensor"),  # [D, ..., channels]
    ("memory_*", "tensor", None),  # [heads, ...]: initial memories
)


def fitting(wanted: Sequence[Axis], shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """`wanted` for an array of `shape`: axes that `mesh` does not have are dropped, and a dimension that they
    do not divide stays whole."""

    def cut(axis: Axis, size: int) -> Axis:
        names = (axis,) if isinstance(axis, str) else axis or ()
        names = tuple(name for name in names if name in mesh)
        whole = size % math.prod(mesh[name] for name in names) != 0
        return None if whole or not names else names if len(names) > 1 else names[0]

    return PartitionSpec(*(cut(axis, size) for axis, size in zip(wanted, shape, strict=False)))


def parameter(path: Any, shape: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """Where the parameter at `path` lies, or what an optimiser keeps for it under the same names."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    first, last = next(((a, b) for name, a, b in RULES if fnmatchcase(names[-1], name)), (None, None))
    stacked = int("blocks" in names)
    inner = len(shape) - stacked
    if inner < 2:
        return PartitionSpec()
    return fitting([None] * stacked + [first, *[None] * (inner - 2), last], shape, mesh)


def constrain(x: Array, *axes: Axis) -> Array:
    """`x` with its first dimensions cut so on the ambient mesh, as far as they divide; `x` itself without."""
    mesh = sizes()
    return jax.lax.with_sharding_constraint(x, fitting(axes, x.shape, mesh)) if mesh else x


def activations(x: Array) -> Array:
    """`x [B,T,...]` where activations lie: rows over data and fsdp, tokens over sequence, channels whole."""
    return constrain(x, ROWS, "sequence")


def row_shards() -> int:
    """Parts that the ambient mesh cuts a batch into."""
    mesh = sizes()
    return math.prod(mesh.get(name, 1) for name in ROWS)
