"""Public entry of the op: common dtypes and decay form, choice of implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.decay import decayed_scores_flops, full_decay
from pallas_kernels.dispatch import Kernel, choose, widened
from pallas_kernels.dplr import gpu, reference, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": widened(reference.dplr),
    "xla": widened(xla.dplr),
    "tpu": Kernel(tpu.dplr, tpu.refusal),
    "gpu": Kernel(gpu.dplr, gpu.refusal),
}


def dplr(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"] | None,
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Array | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T q_t`.

    What `a` recalls is the memory before its decay; the delta rule that recalls it after is
    `gated_delta_rule`. `k = None` stands for k = b, the write `b_t (v_t + S_{t-1}^T a_t)^T`, for half the
    scores. `log_decay` is None (no decay), `[H]`, `[B,T,H]` or `[B,T,H,K]`, natural log, <= 0. The output
    has v's dtype, the state is at least float32. Raises ValueError for an unknown implementation.

    Recurrence: Peng et al. 2025 (arXiv 2503.14456); chunks as for products of I - beta k k^T (Yang et al.
    2024, arXiv 2406.06484), with the triangular inverse by halving and substitution.
    """
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), accumulation_dtype(q, v, a, b))
    decay, ids = full_decay(log_decay, v), number_runs(segment_ids)

    def run(v, state):
        tokens = q, k, v, a, b, decay, state, ids
        return choose("dplr", implementation, IMPLEMENTATIONS, tokens)(*tokens)

    out, state = run(v, sequence.carried_by_matrix(state, segment_ids, run, v))
    return out.astype(v.dtype), state


def dplr_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"] | None,
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    log_decay: Array | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `dplr`; `log_decay` is None, `[H]`, `[B,H]` or `[B,H,K]`."""
    tokens = jax.tree.map(lambda x: x.astype(state.dtype), (q, k, v, a, b, full_decay(log_decay, v)))
    state, out = reference.step(state, *tokens)
    return out.astype(v.dtype), state


def flops_per_token(
    length: int, heads: int, key_dim: int, value_dim: int, *, channels: bool, separate_key: bool = True
) -> int:
    """Forward FLOPs of one token of the chunkwise form: scores, the inverse and its two products, the
    output; then recall, read and write of the state.

    `channels`: the decay is per key channel, where scores are formed as `decayed_scores` says;
    `separate_key`: k is not b.
    """
    chunk = chunk_length(length, xla.CHUNK, xla.SMALLEST_BLOCK)
    each = decayed_scores_flops(chunk, key_dim) if channels else 2 * chunk * key_dim
    scores = (4 if separate_key else 2) * each
    # Halving multiplies two squares of half the size per block: C^3 (1/2 + 1/8 + ...) = 2 C^3 / 3 per chunk.
    inverse = 2 * chunk * chunk // 3 + 2 * chunk * key_dim
    values = (8 if separate_key else 4) * chunk * value_dim
    return heads * (scores + inverse + values + (8 if separate_key else 6) * key_dim * value_dim)
