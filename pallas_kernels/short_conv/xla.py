"""k shifted multiplies; masked tokens are first squeezed out of the stream."""

import jax.numpy as jnp
from jax import Array


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None] if x.ndim > index.ndim else index, 1)


def convolve(x: Array, weight: Array, state: Array, ids: Array | None) -> Array:
    """`x [B,T,D]` behind the window `state [B,k-1,D]`; `ids [B,k-1+T]` of both, or None."""
    taps, length = weight.shape[0], x.shape[1]
    stream = jnp.concatenate([state, x], 1)
    out = x * weight[-1]
    for back in range(1, taps):
        lo = taps - 1 - back
        past = stream[:, lo : lo + length]
        if ids is not None:
            past = jnp.where((ids[:, lo : lo + length] == ids[:, taps - 1 :])[..., None], past, 0)
        out = out + past * weight[lo]
    return out


def _window(x: Array, state: Array, first: Array | None) -> Array:
    """The k-1 entries from `first [B,1]` on of `state [B,k-1,D]` and then `x`; the last ones for None."""
    if first is not None:
        stream = jnp.concatenate([state, x.astype(state.dtype)], 1)
        return _take(stream, first + jnp.arange(state.shape[1]))
    size = state.shape[1]
    new = x[:, max(x.shape[1] - size, 0) :].astype(state.dtype)
    return jnp.concatenate([state, new], 1)[:, new.shape[1] :]


def short_conv(x, weight, state, segment_ids=None, mask=None, convolve=convolve):
    """All tokens at once; arguments as in `api.py`, `state [B,k-1,D]`; `convolve` as the one above."""
    ids, count, last = segment_ids, None, None
    if mask is not None:
        # Masked tokens go to the end of the stream, where no unmasked token looks.
        order = jnp.argsort(~mask, axis=1, stable=True)
        x, ids = _take(x, order), None if ids is None else _take(ids, order)
        count = jnp.cumsum(mask, 1)
        last = count[:, -1:]
    if ids is not None:
        window = jnp.broadcast_to(segment_ids[:, :1], state.shape[:2])
        ids = jnp.concatenate([window, ids], 1)
    out = convolve(x, weight, state, ids)
    if count is not None:
        out = jnp.where(mask[..., None], _take(out, jnp.maximum(count - 1, 0)), 0)
    final = _window(x, state, last)
    if ids is not None:
        tail = _window(ids[:, state.shape[1] :], ids[:, : state.shape[1]], last)
        final = jnp.where((tail == segment_ids[:, -1:])[..., None], final, 0)
    return out, final
