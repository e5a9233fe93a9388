"""Batches that cannot be trained on: token ids out of range and numbers that are not finite.

JAX reads past the end of an embedding without a word: it takes the last row. So every training step looks at
its batch on the device, where that costs nothing and all processes of a run come to the same answer, and
skips an unfit one as it skips a gradient that is not finite; the host then names the place.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from zoo import classifier


def sound(model: Any, batch: dict[str, Array]) -> Array:
    """Whether all of a batch is what `model` can learn from: one boolean, also under `jit`."""
    ok = jnp.array(True)
    for name, low, high in _limits(model, batch):
        x = batch[name]
        ok &= jnp.all(jnp.isfinite(x) if low is None else (x >= low) & (x < high))
    return ok


def fault(model: Any, batch: dict[str, np.ndarray]) -> str | None:
    """The first place of a batch that is not `sound`, in words: `tokens[0, 3] = 99 is outside [0, 50)`."""
    for name, low, high in _limits(model, batch):
        x = np.asarray(batch[name])
        wrong = ~np.isfinite(x) if low is None else (x < low) | (x >= high)
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            range_ = f"is outside [{low}, {high})" if name != "targets" else f"is not below {high}"
            what = "is not finite" if low is None else range_
            return f"{name}[{', '.join(map(str, place))}] = {x[place]} {what}"
    return None


def _limits(model: Any, batch: dict[str, Any]) -> Iterator[tuple[str, int | None, int]]:
    """`(name, low, high)` of what is looked at: integers in `[low, high)`, or finite numbers for low None.

    A negative target is none at all, whichever it is.
    """
    kinds = model.classes if isinstance(model, classifier.Config) else model.vocab_size
    if "inputs" in batch:
        yield "inputs", None, 0
    if "tokens" in batch:
        yield "tokens", 0, kinds
        if "positions" in batch:
            yield "positions", 0, batch["tokens"].shape[1]
    yield "targets", -(2**31), kinds
