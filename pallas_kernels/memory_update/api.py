"""Public entry of the op: checks, the empty memory, choice of implementation."""

from collections.abc import Callable, Sequence
from functools import wraps

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.dispatch import Kernel, choose
from pallas_kernels.memory_update import gpu, reference, tpu, xla
from pallas_kernels.memory_update.memory import ENDLESS, Memory, Rule, Tokens, shift, square
from pallas_kernels.orthogonal import CLASSICAL, MUON
from pallas_kernels.orthogonal import flops as orthogonal_flops
from pallas_kernels.phases import BLOCK, Group


def _widened(run: Callable) -> Callable:
    """`run` with q, k and v in the dtype of the gates: that of the sums."""

    @wraps(run)
    def wide(fresh, tokens, *rest):
        return run(fresh, tokens.map(lambda x: x.astype(tokens.rate.dtype)), *rest)

    return wide


IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": _widened(reference.memory_update),
    "xla": _widened(xla.memory_update),
    "tpu": Kernel(tpu.memory_update, tpu.refusal),
    "gpu": Kernel(gpu.memory_update, gpu.refusal),
}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}
ACTIVATION_FLOPS = {"silu": 4, "gelu": 8}
# |x| is smoothed to sqrt(x^2 + SMOOTH), so that it has a second derivative.
SMOOTH = 1e-6
# Added to the fourth power of a norm: without it weights grow as 1 / |A| where forgetting has made A small.
FLOOR = 1.0


def _cube(error: Array, threshold: Array | None) -> Array:
    return jnp.sum((error**2 + SMOOTH) ** 1.5, -1)


def _huber(error: Array, threshold: Array | None) -> Array:
    if threshold is None:
        raise ValueError("memory_update: loss='huber' needs a threshold")
    whole = square(error, None)
    return jnp.where(whole <= threshold**2, whole, threshold * jnp.sum(jnp.sqrt(error**2 + SMOOTH), -1))


def _unit_l4(a: Array) -> Array:
    return a * jax.lax.rsqrt(jnp.sum(a**4, (-2, -1), keepdims=True) + FLOOR)


def _softmax(a: Array) -> Array:
    return jax.nn.softmax(a, -1) * (a.shape[-1] * a.shape[-2] ** -0.5)


LOSSES: dict[str, Callable] = {"square": square, "cube": _cube, "huber": _huber}
RETENTIONS: dict[str, Callable | None] = {"linear": None, "l4": _unit_l4, "softmax": _softmax}
NEWTON_SCHULZ = {"classical": CLASSICAL, "muon": MUON}


def empty_memory(
    shapes: Sequence[tuple[int, int, int]],
    batch: int,
    *,
    momentum: bool = True,
    window: int = 1,
    value_dim: int | None = None,
) -> Memory:
    """The memory at the start of a document, for inner weights of `shapes` (H, in, out).

    With a window it holds keys and values too: K is the first `in` (no biases there), V the last `out`.
    """

    def zeros():
        return tuple(jnp.zeros((batch, *shape)) for shape in shapes)

    past = _empty_past(batch, window, shapes[0][0], shapes[0][1], value_dim or shapes[-1][2])
    return Memory(zeros(), zeros(), zeros() if momentum else (), jnp.zeros(batch, jnp.int32), past)


def _empty_past(batch: int, window: int, heads: int, key_dim: int, value_dim: int) -> tuple[Array, ...]:
    """No token has a gain."""
    shape = (batch, window - 1, heads)
    if window == 1:
        return ()
    return jnp.zeros((*shape, key_dim)), jnp.zeros((*shape, value_dim)), jnp.zeros(shape)


def _fresh(initial: tuple, tokens: Tokens, window: int) -> Memory:
    """The absolute memory, as implementations see it, at the start of a document."""
    batch, heads = tokens.q.shape[0], tokens.q.shape[-2]
    weights = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in initial)
    still = () if tokens.log_momentum is None else tuple(jnp.zeros_like(w) for w in weights)
    past = _empty_past(batch, window, heads, tokens.k.shape[-1], tokens.v.shape[-1])
    past = tuple(x.astype(tokens.rate.dtype) for x in past)
    return Memory(weights, weights, still, jnp.zeros(batch, jnp.int32), past)


def _choice(name: str, value: str, choices: dict):
    if value not in choices:
        raise ValueError(f"memory_update: {name}={value!r}; choose from {', '.join(choices)}")
    return choices[value]


def _rule(
    chunk: int | None = 16,
    activation: str = "silu",
    residual: bool = False,
    clip: float | None = None,
    loss: str = "square",
    retention: str = "linear",
    window: int = 1,
    norm_eps: float = 1e-6,
    newton_schulz: str = "muon",
    floor: float = 1e-7,
) -> Rule:
    if chunk is not None and chunk < 1:
        raise ValueError(f"memory_update: chunk={chunk} must be >= 1")
    if window < 1:
        raise ValueError(f"memory_update: window={window} must be >= 1")
    if floor <= 0:
        raise ValueError(f"memory_update: floor={floor} must be > 0")
    return Rule(
        ENDLESS if chunk is None else chunk,
        _choice("activation", activation, ACTIVATIONS),
        residual,
        clip,
        _choice("loss", loss, LOSSES),
        _choice("retention", retention, RETENTIONS),
        window,
        norm_eps,
        _choice("newton_schulz", newton_schulz, NEWTON_SCHULZ),
        floor,
    )


def _check(initial: tuple, tokens: Tokens, memory: Memory | None, rule: Rule) -> None:
    widths = [(w.shape[-2], w.shape[-1]) for w in initial]
    key_dim, value_dim = tokens.k.shape[-1], tokens.v.shape[-1]
    chain = [key_dim, *(o for _, o in widths)]
    fits = all(i in (n, n + 1) for (i, _), n in zip(widths, chain, strict=False))
    if not fits or chain[-1] != value_dim:
        raise ValueError(f"memory_update: weights {widths} do not lead from {key_dim} to {value_dim}")
    if rule.residual and key_dim != value_dim:
        raise ValueError(f"memory_update: residual needs equal widths, not {key_dim} and {value_dim}")
    if memory is not None and bool(memory.momentum) != (tokens.log_momentum is not None):
        raise ValueError("memory_update: the state holds momentum exactly when log_momentum is given")
    if memory is not None and bool(memory.past) != (rule.window > 1):
        raise ValueError("memory_update: the state holds past tokens exactly when window > 1")
    if tokens.threshold is not None and rule.window > 1:
        raise ValueError("memory_update: threshold and window > 1 do not go together")
    if tokens.read_scale is not None and (rule.retention is not None or tokens.orthogonal is not None):
        raise ValueError("memory_update: read_scale goes with linear retention and plain steps only")


def _prepared(tokens: Tokens, rule: Rule, dtype) -> Tokens:
    """Wide; the gain always there with a window, and part of the rate without."""
    tokens = tokens.map(lambda x: x.astype(dtype))
    if rule.window > 1:
        gain = jnp.ones_like(tokens.rate) if tokens.gain is None else tokens.gain
        return tokens._replace(gain=gain)
    return tokens if tokens.gain is None else tokens._replace(rate=tokens.rate * tokens.gain, gain=None)


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
    norm: tuple[Float[Array, "H V"], Float[Array, "H V"]] | None = None,
    read_scale: Float[Array, "B T H"] | None = None,
    threshold: Float[Array, "B T H"] | None = None,
    gain: Float[Array, "B T H"] | None = None,
    orthogonal: Float[Array, "B T H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    **rule,
) -> tuple[tuple[Float[Array, "B T H V"], Float[Array, "B T H"]], Memory]:
    """Train a network M on `k -> v` while reading it: returns `((y, surprise), state)`.

        l_t = loss(M(k_t; W_c) - v_t)               W_c: the weights when the chunk of token t began
        S_t = e^{log_momentum_t} S_{t-1} - rate_t dl_t/dW        (None: S_t = -rate_t dl_t/dW)
        W_t = e^{log_keep_t} W_{t-1} + S_t
        y_t = M(q_t; W_t),    surprise_t = l_t

    M has one matrix per entry of `initial` (`[H, in, out]`, rows times matrix) and an activation between
    them; a matrix with one row more than it has inputs has its bias there. The rule is given by keywords:

    chunk        part of the maths: chunks count from the start of the document, so cutting a sequence
                 anywhere changes nothing. With 1 gradients are taken at W_{t-1}, with None at `initial`.
    activation   "silu" or "gelu"
    residual     M is x + MLP(x)
    clip         multiplies the gradient g of each token and matrix by 1 / sqrt(1 + |g|^2 / clip^2)
    loss         of the error e: "square" |e|^2; "cube" sum |e_i|^3; "huber" |e|^2 where |e| <= threshold_t,
                 else threshold_t sum |e_i|
    retention    what is read, and differentiated, of the sums W: "linear" W itself; "l4"
                 W / sqrt(|W|_4^4 + 1); "softmax" rows of softmax(W), times out / sqrt(in)
    window       dl_t/dW becomes the sum of gain_u dl_u/dW over the last `window` tokens u (gain None: 1)

    norm_eps     added to the variance in the LayerNorm of `norm`
    newton_schulz  coefficients of orthogonal steps: "muon" or "classical"
    floor        an orthogonal step is that of S_t over sqrt(|S_t|^2 + floor^2)

    Three arrays do more. `norm`, scale and bias: M is [x +] LayerNorm(MLP(x)). `read_scale` r: what is read
    is W_c + r_t (W_t - W_c), and the next chunk starts from what was read last. `orthogonal`: W_t receives
    orthogonal_t times the matrix of singular values near 1 that is nearest to S_t, instead of S_t.

    A document starts from W = `initial`, S = 0. `rate >= 0`; `log_keep`, `log_momentum` are finite and
    <= 0. y has v's dtype, the rest is at least float32. The state holds the weights less `initial`, so an
    empty one is all zeros. Raises ValueError for widths that do not fit, unknown names, settings that do not
    go together, or a state of another rule.

    Behrouz, Zhong, Mirrokni 2024 (arXiv 2501.00663) eq. 8-15; parallel within a chunk as in their sec. 3.2.
    """
    dtype = accumulation_dtype(q, k, v, *initial, *(() if state is None else state.weights))
    tokens = Tokens(q, k, v, rate, log_keep, log_momentum, read_scale, threshold, gain, orthogonal)
    static = _rule(**rule)
    _check(initial, tokens, state, static)
    initial, norm = jax.tree.map(lambda x: x.astype(dtype), (initial, norm))
    tokens = _prepared(tokens, static, dtype)
    fresh = _fresh(initial, tokens, static.window)
    carried = None if state is None else shift(state, initial, 1)
    tokens = tokens._replace(q=q, k=k, v=v)  # kernels take narrow ones
    arguments = fresh, tokens, norm, carried, number_runs(segment_ids), static
    (y, surprise), carried = choose("memory_update", implementation, IMPLEMENTATIONS, arguments)(*arguments)
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
    norm: tuple[Float[Array, "H V"], Float[Array, "H V"]] | None = None,
    read_scale: Float[Array, "B H"] | None = None,
    threshold: Float[Array, "B H"] | None = None,
    gain: Float[Array, "B H"] | None = None,
    orthogonal: Float[Array, "B H"] | None = None,
    **rule,
) -> tuple[tuple[Float[Array, "B H V"], Float[Array, "B H"]], Memory]:
    """One token of `memory_update`."""
    dtype = state.weights[0].dtype
    tokens = Tokens(q, k, v, rate, log_keep, log_momentum, read_scale, threshold, gain, orthogonal)
    static = _rule(**rule)
    _check(initial, tokens, state, static)
    initial, norm = jax.tree.map(lambda x: x.astype(dtype), (initial, norm))
    tokens = _prepared(tokens, static, dtype)
    memory, (y, surprise) = reference.step(shift(state, initial, 1), tokens, norm=norm, rule=static)
    return (y.astype(v.dtype), surprise), shift(memory, initial, -1)


def memory_update_group(
    initial: tuple[Float[Array, "H _ _"], ...],
    q: Float[Array, "B C H K"],
    k: Float[Array, "B C H K"],
    v: Float[Array, "B C H V"],
    rate: Float[Array, "B C H"],
    log_keep: Float[Array, "B C H"],
    log_momentum: Float[Array, "B C H"] | None,
    state: Memory,
    group: Group,
    **rule,
) -> tuple[tuple[Float[Array, "B C H V"], Float[Array, "B C H"]], Memory]:
    """`memory_update` of the tokens of one group within `phases.scan_blocks`.

    For layers whose streams depend on what the memory holds, so that they are not known before the scan.
    """
    static = _rule(**rule)
    tokens = Tokens(q, k, v, rate, log_keep, log_momentum)
    _check(initial, tokens, state, static)
    dtype = state.weights[0].dtype
    initial = tuple(w.astype(dtype) for w in initial)
    tokens = _prepared(tokens, static, dtype)
    memory, (y, surprise) = xla.advance(shift(state, initial, 1), tokens, group, norm=None, rule=static)
    return (y.astype(v.dtype), surprise), shift(memory, initial, -1)


def memory_read(
    initial: tuple[Float[Array, "H _ _"], ...],
    q: Float[Array, "B T H K"],
    state: Memory,
    **rule,
) -> Float[Array, "B T H V"]:
    """`M(q; W_c)`: all queries at the weights of the present chunk's start; in q's dtype."""
    static, dtype = _rule(**rule), state.weights[0].dtype
    start = shift(state, tuple(w.astype(dtype) for w in initial), 1).start
    y = jax.vmap(lambda q: reference.read(start, q, None, static), 1, 1)(q.astype(dtype))
    return y.astype(q.dtype)


def flops_per_token(
    length: int,
    shapes: Sequence[tuple[int, int, int]],
    chunk: int | None,
    *,
    momentum: bool,
    activation: str = "silu",
    window: int = 1,
    read_scale: bool = False,
    written_out: bool = False,
    orthogonal: str | None = None,
) -> int:
    """Forward FLOPs of one token for inner weights of `shapes` (H, in, out), from an empty memory.

    Per layer: keys forward and back, the read, the write (each again for the momentum where there is one),
    scores and their product with the gradients; the activations of queries and keys, with their slopes; once
    per head the product of the two decays and of the window's weights; and per block what moves weights and
    momentum and closes a chunk, entry by entry. With `read_scale` queries are read from the start of the
    chunk too. `written_out` (retention that is not linear) and orthogonal steps (with the coefficients of
    that name) form every token's matrix.
    """
    block = chunk_length(length, min(chunk or BLOCK, BLOCK))
    keys = 1 + (window - 1) / block
    sizes = [i * o for _, i, o in shapes]
    if written_out or orthogonal:
        mix = _written_out_flops(sum(sizes), block, keys, orthogonal=bool(orthogonal))
    else:
        products = 2 * (1 + keys) * (1 + momentum) + 2 * read_scale
        moves = (4 + 5 * momentum + 3 * read_scale) / block
        mix = (products + moves) * sum(sizes) + 2 * keys * block * sum(i + o for _, i, o in shapes)
    gradients = 2 * keys * (sum(sizes) + sum(sizes[1:]))
    # An activation with its slope takes two and a half times as many.
    active = ACTIVATION_FLOPS[activation] * (1 + 2.5 * keys) * sum(o for *_, o in shapes[:-1])
    steps = sum(orthogonal_flops(i, o, NEWTON_SCHULZ[orthogonal]) for _, i, o in shapes) if orthogonal else 0
    decays = (momentum + (window > 1)) * 2 * keys * block * block
    return int(shapes[0][0] * (gradients + active + mix + decays + steps))


def _written_out_flops(size: int, block: int, keys: float, *, orthogonal: bool) -> float:
    """Of one token's matrix of `size` entries: sums over the block's gradients (and steps), the read; entry
    by entry the gradients themselves, what is kept of the weights, and the retention."""
    rows = (block + 1) / block
    sums = 2 * keys * block * rows + 2 * block * rows * orthogonal
    return size * (sums + 2 + keys + 2 * rows + 4)
