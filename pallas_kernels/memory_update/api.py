"""Public entry of the op: checks, the empty memory, choice of implementation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.dispatch import choose
from pallas_kernels.memory_update import reference, xla
from pallas_kernels.memory_update.memory import Memory, Rule, shift

IMPLEMENTATIONS = {"reference": reference.memory_update, "xla": xla.memory_update}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def empty_memory(shapes: Sequence[tuple[int, int, int]], batch: int, *, momentum: bool = True) -> Memory:
    """The memory at the start of a document, for inner weights of `shapes` (H, in, out)."""

    def zeros():
        return tuple(jnp.zeros((batch, *shape)) for shape in shapes)

    return Memory(zeros(), zeros(), zeros() if momentum else (), jnp.zeros(batch, jnp.int32))


def _fresh(initial: tuple, batch: int, momentum: bool) -> Memory:
    """The absolute memory, as implementations see it, at the start of a document."""
    weights = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in initial)
    still = tuple(jnp.zeros_like(w) for w in weights) if momentum else ()
    return Memory(weights, weights, still, jnp.zeros(batch, jnp.int32))


def _rule(chunk: int, activation: str, residual: bool, clip: float | None) -> Rule:
    if activation not in ACTIVATIONS:
        raise ValueError(f"memory_update: activation={activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if chunk < 1:
        raise ValueError(f"memory_update: chunk={chunk} must be >= 1")
    return Rule(chunk, ACTIVATIONS[activation], residual, clip)


def _check(initial: tuple, k: Array, v: Array, residual: bool, memory: Memory | None, momentum: bool) -> None:
    widths = [(w.shape[-2], w.shape[-1]) for w in initial]
    chain = [k.shape[-1], *(o for _, o in widths)]
    if [i for i, _ in widths] != chain[:-1] or chain[-1] != v.shape[-1]:
        raise ValueError(f"memory_update: weights {widths} do not lead from {k.shape[-1]} to {v.shape[-1]}")
    if residual and k.shape[-1] != v.shape[-1]:
        raise ValueError(f"memory_update: residual needs equal widths, not {k.shape[-1]} and {v.shape[-1]}")
    if memory is not None and bool(memory.momentum) != momentum:
        raise ValueError("memory_update: the state holds momentum exactly when log_momentum is given")


def memory_update(
    initial: tuple[Float[Array, "H _ _"], ...],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    rate: Float[Array, "B T H"],
    log_keep: Float[Array, "B T H"],
    log_momentum: Float[Array, "B T H"] | None = None,
    state: Memory | None = None,
    *,
    chunk: int,
    activation: str = "silu",
    residual: bool = False,
    clip: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[tuple[Float[Array, "B T H V"], Float[Array, "B T H"]], Memory]:
    """Train a network M on `k -> v` while reading it: returns `((y, surprise), state)`.

        l_t = |M(k_t; W_c) - v_t|^2                 W_c: the weights when the chunk of token t began
        S_t = e^{log_momentum_t} S_{t-1} - rate_t dl_t/dW        (None: S_t = -rate_t dl_t/dW)
        W_t = e^{log_keep_t} W_{t-1} + S_t
        y_t = M(q_t; W_t),    surprise_t = l_t

    M has one matrix per entry of `initial` (`[H, in, out]`, rows times matrix) and `activation` between
    them; with `residual` it is x + MLP(x). A document starts from W = `initial`, S = 0. `chunk` is part of
    the maths: chunks count from the start of the document, so cutting a sequence anywhere changes nothing.
    With chunk = 1 gradients are taken at W_{t-1}. `clip` multiplies the gradient g of each token and matrix
    by 1 / sqrt(1 + |g|^2 / clip^2).

    `rate >= 0`; `log_keep`, `log_momentum` are finite and <= 0. y has v's dtype, the rest is at least
    float32. The state holds the weights less `initial`, so an empty one is all zeros. Raises ValueError for
    widths that do not fit, an unknown activation or implementation, or a state with momentum where
    `log_momentum` is None or without where it is not.

    Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) eq. 8-15; parallel within a chunk as in their sec. 3.2.
    """
    run = choose("memory_update", implementation, IMPLEMENTATIONS)
    rule = _rule(chunk, activation, residual, clip)
    _check(initial, k, v, residual, state, log_momentum is not None)
    dtype = accumulation_dtype(q, k, v, *initial, *(() if state is None else state.weights))
    initial = tuple(w.astype(dtype) for w in initial)
    fresh = _fresh(initial, q.shape[0], log_momentum is not None)
    inputs = [x if x is None else x.astype(dtype) for x in (q, k, v, rate, log_keep, log_momentum)]
    carried = None if state is None else shift(state, initial, 1)
    (y, surprise), carried = run(fresh, *inputs, carried, number_runs(segment_ids), rule)
    return (y.astype(v.dtype), surprise), shift(carried, initial, -1)


def memory_update_step(
    initial: tuple[Float[Array, "H _ _"], ...],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    rate: Float[Array, "B H"],
    log_keep: Float[Array, "B H"],
    log_momentum: Float[Array, "B H"] | None,
    state: Memory,
    *,
    chunk: int,
    activation: str = "silu",
    residual: bool = False,
    clip: float | None = None,
) -> tuple[tuple[Float[Array, "B H V"], Float[Array, "B H"]], Memory]:
    """One token of `memory_update`."""
    rule = _rule(chunk, activation, residual, clip)
    _check(initial, k, v, residual, state, log_momentum is not None)
    dtype = state.weights[0].dtype
    initial = tuple(w.astype(dtype) for w in initial)
    inputs = [x if x is None else x.astype(dtype) for x in (q, k, v, rate, log_keep, log_momentum)]
    memory, (y, surprise) = reference.step(shift(state, initial, 1), *inputs, rule=rule)
    return (y.astype(v.dtype), surprise), shift(memory, initial, -1)


def flops_per_token(
    length: int, shapes: Sequence[tuple[int, int, int]], chunk: int, *, momentum: bool
) -> int:
    """Forward FLOPs of one token for inner weights of `shapes` (H, in, out), from an empty memory.

    Per layer: keys forward and back, the read, the write (each again for the momentum where there is one),
    scores and their product with the gradients; and once per head the product of the two decays.
    """
    block = chunk_length(length, chunk)
    heads = shapes[0][0]
    sizes = [i * o for _, i, o in shapes]
    products = 2 * ((3 + 2 * momentum) * sum(sizes) + sum(sizes[1:]))
    scores = 2 * block * sum(i + o for _, i, o in shapes)
    return heads * (products + scores + momentum * 2 * block * block)
