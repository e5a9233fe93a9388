"""Public entry of the op."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.dispatch import Kernel, choose, widened
from pallas_kernels.short_conv import gpu, reference, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": widened(reference.short_conv),
    "xla": widened(xla.short_conv),
    "tpu": Kernel(tpu.short_conv, tpu.refusal),
    "gpu": Kernel(gpu.short_conv, gpu.refusal),
}


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "k D"],
    state: Float[Array, "B k-1 D"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B k-1 D"]]:
    """`y_t = sum_{s<k} weight[k-1-s] * x_{t-s}` per channel, nothing crossing a segment boundary.

    `state` holds the last k-1 inputs, oldest first. Where `mask` is false the token is not part of the
    stream: no later token sees it, the state does not move and its output is 0. The output has x's dtype.
    Raises ValueError for an unknown implementation.
    """
    if state is None:
        shape = x.shape[0], weight.shape[0] - 1, x.shape[2]
        state = jnp.zeros(shape, accumulation_dtype(x, weight))
    ids = number_runs(segment_ids)
    run = choose("short_conv", implementation, IMPLEMENTATIONS, (x, weight, state, ids, mask))

    def summary(start):
        count = jnp.full(x.shape[0], x.shape[1]) if mask is None else jnp.sum(mask, 1)
        return count, run(x, weight, start, ids, mask)[1]

    state = sequence.carried(state, segment_ids, summary, _moved_on)
    out, state = run(x, weight, state, ids, mask)
    return out.astype(x.dtype), state


def _moved_on(count: Array, window: Array) -> Array:
    """The window `[B,k-1,D]` after `count [B]` tokens more, with zeros in their places."""
    place = jnp.minimum(count, window.shape[1])[:, None] + jnp.arange(window.shape[1])
    return jnp.take_along_axis(jnp.concatenate([window, jnp.zeros_like(window)], 1), place[..., None], 1)


def short_conv_step(
    x: Float[Array, "B D"], weight: Float[Array, "k D"], state: Float[Array, "B k-1 D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B k-1 D"]]:
    """One token of `short_conv`."""
    state, out = reference.step(state, x.astype(state.dtype), weight.astype(state.dtype))
    return out.astype(x.dtype), state
