"""Public entry of the op: common dtypes and decay form, choice of implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.decay import decayed_scores_flops, full_decay
from pallas_kernels.dispatch import Kernel, choose, widened
from pallas_kernels.gated_delta_rule import gpu, reference, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": widened(reference.gated_delta_rule),
    "xla": widened(xla.gated_delta_rule),
    "tpu": Kernel(tpu.gated_delta_rule, tpu.refusal),
    "gpu": Kernel(gpu.gated_delta_rule, gpu.refusal),
}


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    p: Float[Array, "B T H K"],
    log_decay: Array | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`S~ = diag(e^{g_t}) S_{t-1}`, `S_t = S~ + k_t (v_t - S~^T p_t)^T`, `o_t = S_t^T q_t`.

    The write strength is folded in by the caller: the delta rule with rate beta is `v <- beta v`,
    `p <- beta k`; `p = 0` is gated linear attention. `log_decay` is None (no decay), `[H]`, `[B,T,H]` or
    `[B,T,H,K]`, natural log, <= 0. The output has v's dtype, the state is at least float32.
    Raises ValueError for an unknown implementation.

    Chunkwise form (UT transform): Yang et al. 2024 (arXiv 2406.06484), with decay Yang et al. 2024
    (arXiv 2412.06464); the triangular inverse is by halving and substitution.
    """
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), accumulation_dtype(q, k, v, p))
    decay, ids = full_decay(log_decay, v), number_runs(segment_ids)

    def run(v, state):
        tokens = q, k, v, p, decay, state, ids
        return choose("gated_delta_rule", implementation, IMPLEMENTATIONS, tokens)(*tokens)

    out, state = run(v, sequence.carried_by_matrix(state, segment_ids, run, v))
    return out.astype(v.dtype), state


def gated_delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    p: Float[Array, "B H K"],
    log_decay: Array | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `gated_delta_rule`; `log_decay` is None, `[H]`, `[B,H]` or `[B,H,K]`."""
    wide = [x.astype(state.dtype) for x in (q, k, v, p, full_decay(log_decay, v))]
    state, out = reference.step(state, *wide)
    return out.astype(v.dtype), state


def flops_per_token(length: int, heads: int, key_dim: int, value_dim: int, *, channels: bool) -> int:
    """Forward FLOPs of one token of the chunkwise form: two scores, the inverse and its products with
    values and recalling keys, the output; then recall, read and write of the state.

    `channels`: the decay is per key channel, where scores are formed as `decayed_scores` says.
    """
    chunk = chunk_length(length, xla.CHUNK, xla.SMALLEST_BLOCK)
    scores = 2 * (decayed_scores_flops(chunk, key_dim) if channels else 2 * chunk * key_dim)
    # Halving multiplies two squares of half the size per block: C^3 (1/2 + 1/8 + ...) = 2 C^3 / 3 per chunk.
    inverse = 2 * chunk * chunk // 3
    return heads * (scores + inverse + 2 * chunk * (key_dim + 2 * value_dim) + 6 * key_dim * value_dim)
