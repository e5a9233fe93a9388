"""Loss and accuracy of a model over a split."""

from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import Run
from experiments.directory import read_config
from experiments.faults import fault
from experiments.losses import model_losses
from experiments.mesh import Mesh, Placement
from layers.checks import require
from zoo import checkpoint

ONE_DEVICE = Placement(Mesh())


@cache
def _step(model: Any, chunk: int | None, dtype: str):
    def sums(params, batch):
        return model_losses(params, model, batch, chunk=chunk, dtype=jnp.dtype(dtype))[0]

    return jax.jit(sums)


def evaluate(
    run: Run,
    params: Any,
    source: Any,
    split: str | None = None,
    *,
    placement: Placement = ONE_DEVICE,
) -> dict[str, float]:
    """Means over `split` (default `run.eval_split`), over its first `run.eval_batches` batches.

    `loss` in nats and `accuracy` per labelled position, `exact` per sequence, and `tokens`, the number of
    labelled positions. Raises ValueError when there are none, and for a batch that the model cannot read.
    `placement` is that of `params`.
    """
    split = split or run.eval_split
    step = _step(run.model, run.loss_chunk, run.compute_dtype)
    batches = source.eval_batches(split, run.eval_batch_size or run.batch_size)
    total: dict[str, float] = {}
    for number, batch in enumerate(islice(batches, run.eval_batches)):
        wrong = fault(run.model, batch)
        require(wrong is None, f"split {split!r}, batch {number}: {wrong}")
        # Added up on the host: float32 cannot count beyond 16 million.
        with placement.ambient():
            sums = step(params, placement.batch(batch))
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + float(value)
    if not total.get("tokens"):
        raise ValueError(f"split {split!r} has no labelled positions")
    return {
        "loss": total["loss"] / total["tokens"],
        "accuracy": total["correct"] / total["tokens"],
        "exact": total["exact"] / total["sequences"],
        "tokens": int(total["tokens"]),
    }


def evaluate_directory(directory: str | Path, split: str = "test") -> dict[str, float]:
    """Evaluate the newest intact checkpoint of a run directory on `split`, all of it."""
    run, _ = read_config(directory)
    whole = replace(run, eval_batches=None)
    return evaluate(whole, checkpoint.load_params(directory), run.data.build(), split)
