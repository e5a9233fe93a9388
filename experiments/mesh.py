"""The devices of a run: how many along each axis of its mesh, and where its arrays lie on them.

    Mesh(data=2, fsdp=2, tensor=2)      zoo train text --mesh.data=2 --mesh.fsdp=2 --mesh.tensor=2

What the axes cut stands in `zoo.sharding`. A run may be continued on another mesh: its results are the same
but for the order in which floating-point numbers are added.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.checks import require, require_positive
from zoo import sharding

BY_TOKEN = ("tokens", "targets", "segment_ids", "inputs")  # of a batch: [B,T,...], where they have a T


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis. Raises ValueError for a number below 1."""

    data: int = 1  # each has its own rows of a batch, and all parameters
    fsdp: int = 1  # each has its own rows of a batch, and a part of the parameters
    sequence: int = 1  # each has its own tokens of a row
    tensor: int = 1  # each has its own channels

    def __post_init__(self):
        require_positive(self, *sharding.AXES)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sharding.AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def rows(self) -> int:
        """Parts that a batch is cut into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "one device"


ONE_DEVICE = Mesh()


def check(mesh: Mesh, **batches: int) -> None:
    """ValueError where `mesh` is not one of the devices at hand, or does not divide a number of rows."""
    found = jax.device_count()
    if mesh.devices > 1 or jax.process_count() > 1:
        product = " * ".join(f"{name} {size}" for name, size in mesh.sizes.items())
        require(mesh.devices == found, f"mesh: {product} = {mesh.devices} devices, but there are {found}")
    for name, rows in batches.items():
        ok = rows % mesh.rows == 0
        require(ok, f"mesh: data * fsdp = {mesh.rows} does not divide {name}={rows}")


class Placement:
    """Where a run's arrays lie on devices; on one device, wherever JAX puts them."""

    def __init__(self, mesh: Mesh, devices: Any = None):
        """`devices` are those of the backend unless given. Raises ValueError if they are not as many."""
        self.mesh: Any = None
        if mesh.devices > 1 or devices is not None:
            axes = (AxisType.Auto,) * len(sharding.AXES)
            shape = tuple(mesh.sizes.values())
            self.mesh = jax.make_mesh(shape, sharding.AXES, axis_types=axes, devices=devices)

    def ambient(self) -> AbstractContextManager:
        """Within it, models lay out what they compute."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def whole(self) -> NamedSharding | None:
        """On every device."""
        return None if self.mesh is None else self._named(PartitionSpec())

    def of_state(self, state: Any) -> Any:
        """Shardings of a training state (or anything with parameters in it), given as arrays or structs."""
        if self.mesh is None:
            return None
        return jax.tree_util.tree_map_with_path(self._leaf, state)

    def _leaf(self, path: Any, leaf: Any) -> NamedSharding:
        sizes = dict(self.mesh.shape)
        if jax.tree_util.keystr(path[:1], simple=True) == "passed":  # models' states: [repeats, B, ...]
            return self._named(sharding.fitting((None, sharding.ROWS), leaf.shape, sizes))
        return self._named(sharding.parameter(path, leaf.shape, sizes))

    def of_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Shardings of a batch's arrays."""
        length = max(x.shape[1] for x in batch.values() if x.ndim > 1)
        sizes = dict(self.mesh.shape)

        def of(name: str, x: Any) -> NamedSharding:
            tokens = name in BY_TOKEN and x.ndim > 1 and x.shape[1] == length
            axes = (sharding.ROWS, "sequence") if tokens else (sharding.ROWS,)
            return self._named(sharding.fitting(axes, x.shape, sizes))

        return {name: of(name, x) for name, x in batch.items()}

    def batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on its devices: of many processes, each takes the rows of its own from the same batch."""
        if self.mesh is None:
            return jax.device_put(batch)
        places = self.of_batch(batch)
        return {
            name: jax.make_array_from_callback(x.shape, places[name], x.__getitem__)
            for name, x in batch.items()
        }


def jit_into(placement: Placement, function: Callable, *structs: Any) -> Callable:
    """`function(*structs) -> state`, compiled so that the state is made where it belongs."""
    if placement.mesh is None:
        return jax.jit(function)
    return jax.jit(function, out_shardings=placement.of_state(jax.eval_shape(function, *structs)))
