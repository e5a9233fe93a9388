"""Cross-entropy and accuracy without ever holding the logits of a whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import wide
from pallas_kernels.partition import sizes
from zoo import autoencoder, classifier, lm, sequence
from zoo.sharding import ROWS, constrain, row_shards

Sums = dict[str, Array]


def _dense(head: Callable[[Array], Array], h: Array, targets: Array) -> tuple[Array, Array]:
    """`(loss [N], correct [N])`; zero where the target is negative."""
    logits = wide(head(h))
    known = targets >= 0
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], -1)[:, 0]
    loss = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(known, loss, 0.0), known & (logits.argmax(-1) == targets)


def cross_entropy(
    head: Callable[[Array], Array], h: Array, targets: Array, chunk: int | None = None
) -> tuple[Array, Array]:
    """Loss and correctness of every position: `h [..., D], targets [...] -> (loss [...], correct [...])`.

    `head` maps `[N, D]` to logits `[N, V]`. Of these at most `chunk` rows exist at once (all without it) on
    every device that has rows of the batch, in the backward pass too, where they are computed again.
    Positions with a negative target count for nothing.
    """
    flat, labels = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    shards = row_shards() if len(targets) % row_shards() == 0 else 1
    if chunk is None or chunk * shards >= labels.size:
        loss, correct = _dense(head, flat, labels)
        return loss.reshape(targets.shape), correct.reshape(targets.shape)

    @jax.checkpoint
    def body(_, chunks):
        return None, _dense(head, *chunks)

    dealt = _deal(flat, shards, chunk, 0), _deal(labels, shards, chunk, -1)
    _, found = jax.lax.scan(body, None, dealt)
    loss, correct = (_collect(x, shards, chunk, labels.size).reshape(targets.shape) for x in found)
    return loss, correct


def _deal(x: Array, shards: int, chunk: int, fill: int) -> Array:
    """`x [N,...]` as `[chunks, shards * chunk, ...]`: of every shard's part one chunk after the other."""
    parts = x.reshape(shards, -1, *x.shape[1:])
    pad = [(0, 0), (0, -parts.shape[1] % chunk), *[(0, 0)] * (x.ndim - 1)]
    parts = jnp.pad(parts, pad, constant_values=fill).reshape(shards, -1, chunk, *x.shape[1:])
    return constrain(parts.swapaxes(0, 1).reshape(-1, shards * chunk, *x.shape[1:]), None, ROWS)


def _collect(x: Array, shards: int, chunk: int, count: int) -> Array:
    """`[count]`: what was dealt, in its order again."""
    parts = x.reshape(-1, shards, chunk).swapaxes(0, 1).reshape(shards, -1)
    return parts[:, : count // shards].reshape(-1)


def total(loss: Array, correct: Array, targets: Array) -> Sums:
    """Sums over a batch, to be added up over batches and divided at the end.

    `loss`, `correct` and `tokens` over labelled positions; `sequences` counts rows with a label, `exact`
    those among them with every label right.
    """
    known = targets >= 0
    rows = known.reshape(len(targets), -1)
    right = (correct | ~known).reshape(rows.shape)
    present = rows.any(-1)
    return {
        "loss": loss.sum(),
        "correct": correct.sum(dtype=loss.dtype),
        "tokens": known.sum(dtype=loss.dtype),
        "exact": (present & right.all(-1)).sum(dtype=loss.dtype),
        "sequences": present.sum(dtype=loss.dtype),
    }


def model_losses(
    params: Any, model: Any, batch: dict[str, Array], *, chunk: int | None = None, dtype: Any = None
) -> tuple[Sums, dict[str, Array]]:
    """A model's sums over a batch of its kind, and the auxiliary values of its layers.

    Language: `tokens [B,T]`, `targets [B,T]` with -1 for ignored, perhaps `segment_ids [B,T]`; or
    `positions [B,P]` with `targets [B,P]`, when few positions have labels. Classification:
    `inputs [B,T,F]`, `targets [B]`. Reconstruction: `tokens [B,T]`, `targets [B,T]`.
    """
    targets = batch["targets"]
    if isinstance(model, classifier.Config):
        logits, _, aux = classifier.apply(params, model, batch["inputs"], dtype=dtype)
        return total(*cross_entropy(lambda h: h, logits, targets), targets), aux
    if isinstance(model, autoencoder.Config):
        h, _, aux = autoencoder.hidden(params, model, batch["tokens"], dtype=dtype)
        head = partial(autoencoder.logits, params, model)
        return total(*cross_entropy(head, h, targets, chunk), targets), aux
    sums, aux, _ = continued_losses(params, model, batch, chunk=chunk, dtype=dtype)
    return sums, aux


def continued_losses(
    params: Any,
    model: lm.Config,
    batch: dict[str, Array],
    state: Any = None,
    *,
    chunk: int | None = None,
    dtype: Any = None,
) -> tuple[Sums, dict[str, Array], Any]:
    """`(sums, aux, state after the last token)` of a language model that begins with `state`, by default the
    empty one; else as `model_losses`."""
    targets = batch["targets"]
    how = {"segment_ids": batch.get("segment_ids"), "dtype": dtype}
    cut = sizes().get(sequence.AXIS, 1) > 1
    if cut and "positions" not in batch:  # the logits of a token stay on the device that has the token

        def then(params, h, targets):
            return cross_entropy(partial(lm.logits, params, model), h, targets, chunk)

        how |= {"then": then, "given": (targets,), "keep_state": state is not None}
        (loss, correct), last, aux = sequence.hidden(params, model, batch["tokens"], state, **how)
        return total(loss, correct, targets), aux, last
    hidden = partial(sequence.hidden, keep_state=state is not None) if cut else lm.hidden
    h, last, aux = hidden(params, model, batch["tokens"], state, **how)
    if "positions" in batch:
        h = constrain(jnp.take_along_axis(h, batch["positions"][..., None], 1), ROWS)
    return total(*cross_entropy(partial(lm.logits, params, model), h, targets, chunk), targets), aux, last
