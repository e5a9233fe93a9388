"""Public entry of the op."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import orthogonal as newton_schulz
from pallas_kernels.chunk_update import reference, xla
from pallas_kernels.chunk_update.fast_weights import FastWeights, Rule, Tokens, shift
from pallas_kernels.chunks import accumulation_dtype, number_runs
from pallas_kernels.dispatch import choose

IMPLEMENTATIONS = {"reference": reference.chunk_update, "xla": xla.chunk_update}


def empty_fast_weights(
    shapes: Sequence[tuple[int, int, int]], batch: int, *, momentum: bool = True
) -> FastWeights:
    """The state at the start of a document, for weights of `shapes` (H, in, out): gate, up, down."""

    def zeros():
        gate, up, down = (jnp.zeros((batch, *shape)) for shape in shapes)
        return gate, up, down

    return FastWeights(
        weights=zeros(),
        gradient=zeros(),
        step=zeros() if momentum else (),
        momentum=(jnp.zeros((batch, shapes[0][0])),) if momentum else (),
        phase=jnp.zeros(batch, jnp.int32),
    )


def _prepared(initial: tuple, tokens: Tokens, state: FastWeights | None, chunk: int):
    """Everything wide, and the state at the start of a document, of absolute weights."""
    if chunk < 1:
        raise ValueError(f"chunk_update: chunk={chunk} must be >= 1")
    if state is not None and bool(state.step) != (tokens.momentum is not None):
        raise ValueError("chunk_update: the state holds a step exactly when momentum is given")
    dtype = accumulation_dtype(*tokens[:3], *initial, *(() if state is None else state.weights))
    initial = tuple(w.astype(dtype) for w in initial)
    tokens = tokens.map(lambda x: x.astype(dtype))
    shapes = [w.shape for w in initial]
    empty = empty_fast_weights(shapes, tokens.q.shape[0], momentum=tokens.momentum is not None)
    return initial, tokens, shift(empty, initial, 1)


def chunk_update(
    initial: tuple[Float[Array, "H K E"], Float[Array, "H K E"], Float[Array, "H E V"]],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    rate: Float[Array, "B T H 3"],
    momentum: Float[Array, "B T H"] | None = None,
    state: FastWeights | None = None,
    *,
    chunk: int,
    orthogonal: bool = True,
    step_size: float = 1.0,
    normalize: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], FastWeights]:
    """Read `f(q; W) = (silu(q W_gate) * (q W_up)) W_down` with weights that move at the end of each chunk.

        o_t = f(q_t; W_c)                         W_c: the weights of the chunk of token t
        S_c = sum_t rate_t grad <f(k_t; W_c), v_t> + (mean_t momentum_t) S_{c-1}         t in the chunk
        W_{c+1} = W_c + step_size orthogonalize(S_c), then each column scaled to the norm it had in `initial`

    without the last two where `orthogonal`, `normalize` are false. Chunks count from the start of the
    document; a chunk that is not full moves nothing. Rates are per matrix: gate, up, down. The state holds
    weights less `initial`, so an empty one is all zeros; it does not grow with the chunk, because a gradient
    is added up as its token passes. o has v's dtype. Raises ValueError for chunk < 1, an unknown
    implementation, or a state with momentum where there is none or the other way round.

    Zhang et al. 2025 (arXiv 2505.23884).
    """
    run = choose("chunk_update", implementation, IMPLEMENTATIONS)
    initial, tokens, fresh = _prepared(initial, Tokens(q, k, v, rate, momentum), state, chunk)
    carried = None if state is None else shift(state, initial, 1)
    rule = Rule(chunk, orthogonal, step_size, normalize)
    out, fast = run(fresh, tokens, carried, number_runs(segment_ids), rule)
    return out.astype(v.dtype), shift(fast, initial, -1)


def chunk_update_step(
    initial: tuple[Float[Array, "H K E"], Float[Array, "H K E"], Float[Array, "H E V"]],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    rate: Float[Array, "B H 3"],
    momentum: Float[Array, "B H"] | None,
    state: FastWeights,
    *,
    chunk: int,
    orthogonal: bool = True,
    step_size: float = 1.0,
    normalize: bool = True,
) -> tuple[Float[Array, "B H V"], FastWeights]:
    """One token of `chunk_update`."""
    initial, token, fresh = _prepared(initial, Tokens(q, k, v, rate, momentum), state, chunk)
    rule = Rule(chunk, orthogonal, step_size, normalize)
    fast, out = reference.step(shift(state, initial, 1), token, fresh=fresh, rule=rule)
    return out.astype(v.dtype), shift(fast, initial, -1)


def flops_per_token(
    length: int, shapes: Sequence[tuple[int, int, int]], chunk: int, *, orthogonal: bool
) -> int:
    """Forward FLOPs of one token for weights of `shapes` (H, in, out): read, gradient, share of steps."""
    gate, up, down = (i * o for _, i, o in shapes)
    products = 2 * (3 * (gate + up) + 3 * down)
    steps = sum(newton_schulz.flops(i, o) for _, i, o in shapes) * (length // chunk) // length
    return shapes[0][0] * (products + orthogonal * steps)
