"""k shifted multiplies; masked tokens are first squeezed out of the stream."""

import jax.numpy as jnp
from jax import Array


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None] if x.ndim > index.ndim else index, 1)


def _convolve(stream: Array, ids: Array | None, weight: Array, length: int) -> Array:
    """`stream [B,k-1+T,D]`, the first k-1 entries being the carried window."""
    taps = weight.shape[0]
    out = stream[:, taps - 1 :] * weight[-1]
    for back in range(1, taps):
        lo = taps - 1 - back
        past = stream[:, lo : lo + length]
        if ids is not None:
            past = jnp.where((ids[:, lo : lo + length] == ids[:, taps - 1 :])[..., None], past, 0)
        out = out + past * weight[lo]
    return out


def short_conv(x, weight, state, segment_ids=None, mask=None):
    """All tokens at once; arguments as in `api.py`, `state [B,k-1,D]`."""
    length, window = x.shape[1], weight.shape[0] - 1
    ids, count = segment_ids, None
    if mask is not None:
        # Masked tokens go to the end of the stream, where no unmasked token looks.
        order = jnp.argsort(~mask, axis=1, stable=True)
        x, ids = _take(x, order), None if ids is None else _take(ids, order)
        count = jnp.cumsum(mask, 1)
    stream = jnp.concatenate([state, x], 1)
    if ids is not None:
        ids = jnp.concatenate([jnp.broadcast_to(segment_ids[:, :1], (x.shape[0], window)), ids], 1)
    out = _convolve(stream, ids, weight, length)
    if count is None:
        last = jnp.full((x.shape[0], 1), length)
    else:
        out = jnp.where(mask[..., None], _take(out, jnp.maximum(count - 1, 0)), 0)
        last = count[:, -1:]
    tail = last + jnp.arange(window)
    final = _take(stream, tail)
    if ids is not None:
        final = jnp.where((_take(ids, tail) == segment_ids[:, -1:])[..., None], final, 0)
    return out, final
