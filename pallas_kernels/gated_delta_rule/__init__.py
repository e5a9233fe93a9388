"""Linear attention that corrects itself: S_t = S~ + k_t (v_t - S~^T p_t)^T with S~ = e^{g_t} S_{t-1}."""

from pallas_kernels.gated_delta_rule.api import (
    flops_per_token,
    gated_delta_rule,
    gated_delta_rule_step,
)

__all__ = ["flops_per_token", "gated_delta_rule", "gated_delta_rule_step"]
