"""Public entry of the op: common dtypes and gate form, choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.dispatch import choose
from pallas_kernels.momentum_delta_rule import reference, xla

IMPLEMENTATIONS = {"reference": reference.momentum_delta_rule, "xla": xla.momentum_delta_rule}


def momentum_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    p: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"],
    log_momentum: Float[Array, "B T H"],
    state: Float[Array, "B H 2 K V"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H 2 K V"]]:
    """`M_t = e^{m_t} M_{t-1} + k_t (v_t - W_{t-1}^T p_t)^T`, `W_t = e^{g_t} W_{t-1} + M_t`, `o = W_t^T q_t`.

    The state is W and, after it, M. The write strength is folded in by the caller: rate beta is
    `v <- beta v`, `p <- beta k`. `log_decay` g and `log_momentum` m are natural logs, <= 0. The output has
    v's dtype, the state is at least float32. Raises ValueError for an unknown implementation.

    Recurrence: Behrouz et al. 2024 (arXiv 2501.00663) with a linear memory and gradients at W_{t-1}.
    """
    chosen = choose("momentum_delta_rule", implementation, IMPLEMENTATIONS)
    dtype = accumulation_dtype(q, k, v, p, log_decay, log_momentum)
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], 2, q.shape[3], v.shape[3]), dtype)
    q, k, wide_v, *rest = (
        x.astype(dtype) for x in (q, k, v, p, log_decay[..., None], log_momentum[..., None])
    )
    ids = number_runs(segment_ids)

    def run(v, state):
        return chosen(q, k, v, *rest, state, ids)

    out, state = run(wide_v, sequence.carried_by_matrix(state, segment_ids, run, wide_v))
    return out.astype(v.dtype), state


def momentum_delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    p: Float[Array, "B H K"],
    log_decay: Float[Array, "B H"],
    log_momentum: Float[Array, "B H"],
    state: Float[Array, "B H 2 K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H 2 K V"]]:
    """One token of `momentum_delta_rule`."""
    tokens = [x.astype(state.dtype) for x in (q, k, v, p, log_decay[..., None], log_momentum[..., None])]
    state, out = reference.step(state, *tokens)
    return out.astype(v.dtype), state


def flops_per_token(length: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of one token of the chunkwise form: two scores, the product of decays and momenta, the
    inverse and its two products, the output; then recall, read and write of weights and momentum.
    """
    chunk = chunk_length(length, xla.CHUNK, xla.SMALLEST_BLOCK)
    squares = 2 * chunk * chunk + 2 * chunk * chunk // 3
    return heads * (squares + 8 * chunk * key_dim + 4 * chunk * value_dim + 12 * key_dim * value_dim)
