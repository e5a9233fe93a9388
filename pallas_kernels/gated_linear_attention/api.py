"""Public entry of the op: checks, head sharing, choice of implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import sequence
from pallas_kernels.chunks import accumulation_dtype, chunk_length, number_runs
from pallas_kernels.decay import decayed_scores_flops, full_decay
from pallas_kernels.dispatch import Kernel, choose, widened
from pallas_kernels.gated_linear_attention import gpu, reference, tpu, xla


def _reference(q, k, v, log_decay, state, segment_ids):
    repeat = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, repeat, 2), jnp.repeat(k, repeat, 2)
    return reference.gated_linear_attention(q, k, v, log_decay, state, segment_ids)


IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": widened(_reference),
    "xla": widened(xla.gated_linear_attention),
    "tpu": Kernel(tpu.gated_linear_attention, tpu.refusal),
    "gpu": Kernel(gpu.gated_linear_attention, gpu.refusal),
}


def gated_linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Array | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`.

    `q` and `k` may have fewer heads G than `v`; head h reads key head h // (H/G). `log_decay` is None
    (no decay), `[H]`, `[B,T,H]` or `[B,T,H,K]`, natural log, <= 0. The output has v's dtype, the state
    is at least float32. Raises ValueError when H is not a multiple of G or for an unknown implementation.

    Chunkwise form: Yang et al. 2023 (arXiv 2312.06635) eq. 4-6; here with a halving of the triangle in
    place of their secondary chunking.
    """
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"gated_linear_attention: {v.shape[2]} value heads over {q.shape[2]} key heads")
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), accumulation_dtype(q, k, v))
    tokens, ids = (q, k, v, full_decay(log_decay, v)), number_runs(segment_ids)
    run = choose("gated_linear_attention", implementation, IMPLEMENTATIONS, (*tokens, state, ids))

    def summary(start):
        return jnp.exp(jnp.sum(tokens[3], 1))[..., None], run(*tokens, start, ids)[1]

    out, state = run(*tokens, sequence.carried(state, segment_ids, summary), ids)
    return out.astype(v.dtype), state


def gated_linear_attention_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    log_decay: Array | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `gated_linear_attention`; `log_decay` is None, `[H]`, `[B,H]` or `[B,H,K]`."""
    decay = full_decay(log_decay, v)
    repeat = v.shape[1] // q.shape[1]
    q, k = (jnp.repeat(x, repeat, 1).astype(state.dtype) for x in (q, k))
    state, out = reference.step(state, q, k, v.astype(state.dtype), decay.astype(state.dtype))
    return out.astype(v.dtype), state


def flops_per_token(
    length: int, heads: int, key_dim: int, value_dim: int, *, channels: bool, key_heads: int | None = None
) -> int:
    """Forward FLOPs of one token of the chunkwise form: scores, their product with v, read, write.

    `channels`: the decay is per key channel, where scores are formed as `decayed_scores` says; otherwise
    they are formed once for each of `key_heads` (as many as `heads` unless given).
    """
    chunk = chunk_length(length, xla.CHUNK, xla.SMALLEST_BLOCK)
    plain = 2 * chunk * key_dim * (heads if key_heads is None else key_heads)
    scores = heads * decayed_scores_flops(chunk, key_dim) if channels else plain
    return scores + heads * (2 * chunk * value_dim + 4 * key_dim * value_dim)
