"""Linear attention with any decay: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t."""

from pallas_kernels.gated_linear_attention.api import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)

__all__ = ["flops_per_token", "gated_linear_attention", "gated_linear_attention_step"]
