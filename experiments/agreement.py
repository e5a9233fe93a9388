"""How many processes of one run stop at the same step."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """Whether any process was asked to stop: all learn it at the same step, without waiting for each other.

    A step that is `told` takes `flag(...)` with its batch and returns the maximum with its metrics.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)

    def flag(self, asked: bool) -> jax.Array:
        """This process's answer, once for each of its devices: `[devices]`."""
        answers = np.full(self._shape, asked, np.int32)
        return jax.make_array_from_callback(self._shape, self._place, answers.__getitem__)


def told(step: Callable) -> Callable:
    """A training step whose batch has flags `asked`, which are none of the model's."""

    def with_flags(state, batch, *numbers):
        state, metrics = step(state, {name: x for name, x in batch.items() if name != "asked"}, *numbers)
        return state, metrics | {"asked": batch["asked"].max()}

    return with_flags
