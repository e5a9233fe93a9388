"""The chunkwise matmul form: the corrections of a whole chunk come out of one triangular inverse.

With D_ij = e^{G_i - G_j} and N_ij = e^{M_i - M_j} for j <= i, G and M the running sums of log decays and log
momenta, a correction made at j has by i gone into the weights E_ij = sum_s D_is N_sj times: at each s in
between, with the momentum left of it. The momentum that enters the chunk goes into them
f_i = sum_s D_is e^{M_s} times. From the weights W and the momentum P that enter, with ' for the row before,

    A_ij  = p_i . k_j E'_ij  (j < i),     Q_ij = q_i . k_j E_ij  (j <= i),
    Delta = (I + A)^{-1} ( v - (p e^G') W - (p f') P ),
    o     = (q e^G) W + (q f) P + Q Delta,
    W_end = e^{G_C} W + f_C P + (k E_C)^T Delta,     P_end = e^{M_C} P + (k N_C)^T Delta.

Every exponent is a difference of a later and an earlier sum, hence <= 0: nothing overflows. The tail of the
last chunk is padding, in which momentum must not go into the weights: `real` leaves it out of the sum over s.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import grid
from pallas_kernels.decay import SMALLEST_BLOCK, pair_decay
from pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


def _before(x: Array, first: float) -> Array:
    """The row before, along the axis of tokens (the last but one); `first` before the first."""
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)


def _both(x: Array, weights: Array, momentum: Array) -> Array:
    """`x [...,C,K]` against weights and momentum: `[...,C,2K]`, scaled by `[...,C,1]` each."""
    return jnp.concatenate([x * weights, x * momentum], -1)


def _pass_on(state, chunk):
    """Weights and momentum, stacked `[B,H,2K,V]`, from chunk to chunk; out come what entered and Delta."""
    value, recall, write, (decay, pulled, left) = chunk
    delta = value - recall @ state
    weights, momentum = jnp.split(state, 2, -2)
    kept = jnp.concatenate([decay * weights + pulled * momentum, left * momentum], -2)
    return kept + jnp.swapaxes(write, -1, -2) @ delta, (state, delta)


def _group(state, inputs):
    """`q, k, p [n,B,H,C,K]`, `v [n,B,H,C,V]`, gates `[n,B,H,C,1]`, `real [n,1,C]`, masks or None."""
    q, k, v, p, log_decay, log_momentum, real, segments = inputs
    decay_sum, momentum_sum = jnp.cumsum(log_decay, -2), jnp.cumsum(log_momentum, -2)
    decays, momenta = pair_decay(decay_sum), pair_decay(momentum_sum)
    decay, left = jnp.exp(decay_sum), jnp.exp(momentum_sum)
    if segments is not None:
        same, seen = segments.same[..., None, :, :], segments.from_carry[..., None, :, None]
        decays, momenta = jnp.where(same, decays, 0), jnp.where(same, momenta, 0)
        decay, left = jnp.where(seen, decay, 0), jnp.where(seen, left, 0)
    gone = decays * real[..., None, None, :]
    into, pulled = gone @ momenta, gone @ left
    recall = _both(p, _before(decay, 1.0), _before(pulled, 0.0))
    correction = (p @ jnp.swapaxes(k, -1, -2)) * _before(into, 0.0)
    if segments is not None:
        recall, correction = jnp.where(seen, recall, 0), jnp.where(same, correction, 0)
    inverse = unit_lower_inverse(correction)
    # The chunk's last row is what its end keeps: of what entered, and of every correction.
    ends = tuple(x[..., -1:, :] for x in (decay, pulled, left))
    write = _both(k, *(jnp.swapaxes(x[..., -1:, :], -1, -2) for x in (into, momenta)))
    state, (entering, delta) = jax.lax.scan(_pass_on, state, (inverse @ v, inverse @ recall, write, ends))
    scores = (q @ jnp.swapaxes(k, -1, -2)) * into
    return state, _both(q, decay, pulled) @ entering + scores @ delta


def momentum_delta_rule(q, k, v, p, log_decay, log_momentum, state, segment_ids=None):
    """Group by group; arguments as in `api.py`, gates `[B,T,H,1]`."""
    cut = grid(v, CHUNK, SMALLEST_BLOCK)
    tokens = (cut.split_heads(x) for x in (q, k, v, p, log_decay, log_momentum))
    real = cut.split(jnp.ones((1, v.shape[1]), v.dtype))
    stacked = state.reshape(*state.shape[:2], -1, state.shape[-1])
    inputs = (*tokens, real, cut.segments(segment_ids))
    stacked, out = jax.lax.scan(jax.checkpoint(_group), stacked, inputs)
    return cut.join_heads(out, v.shape[1]), stacked.reshape(state.shape)
