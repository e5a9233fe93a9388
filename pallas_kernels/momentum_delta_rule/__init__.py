"""Delta rule with momentum: M_t = e^m M_{t-1} + k_t (v_t - W_{t-1}^T p_t)^T, W_t = e^g W_{t-1} + M_t."""

from pallas_kernels.momentum_delta_rule.api import (
    flops_per_token,
    momentum_delta_rule,
    momentum_delta_rule_step,
)

__all__ = ["flops_per_token", "momentum_delta_rule", "momentum_delta_rule_step"]
