"""Cross-entropy and accuracy without ever holding the logits of a whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import wide
from zoo import autoencoder, classifier, lm

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

    `head` maps `[N, D]` to logits `[N, V]`. Of these at most `chunk` rows exist at once (all without it),
    in the backward pass too, where they are computed again. Positions with a negative target count for
    nothing.
    """
    flat, labels = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    count = labels.size
    if chunk is None or chunk >= count:
        loss, correct = _dense(head, flat, labels)
        return loss.reshape(targets.shape), correct.reshape(targets.shape)
    pad = -count % chunk
    flat = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk, h.shape[-1])
    labels = jnp.pad(labels, (0, pad), constant_values=-1).reshape(-1, chunk)

    @jax.checkpoint
    def body(_, chunks):
        return None, _dense(head, *chunks)

    _, (loss, correct) = jax.lax.scan(body, None, (flat, labels))
    return loss.reshape(-1)[:count].reshape(targets.shape), correct.reshape(-1)[:count].reshape(targets.shape)


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
    documents = batch.get("segment_ids")
    h, last, aux = lm.hidden(params, model, batch["tokens"], state, segment_ids=documents, dtype=dtype)
    if "positions" in batch:
        h = jnp.take_along_axis(h, batch["positions"][..., None], 1)
    return total(*cross_entropy(partial(lm.logits, params, model), h, targets, chunk), targets), aux, last
