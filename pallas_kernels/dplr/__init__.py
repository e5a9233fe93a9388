"""A diagonal plus a rank one: S_t = (diag(e^{g_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t."""

from pallas_kernels.dplr.api import dplr, dplr_step, flops_per_token

__all__ = ["dplr", "dplr_step", "flops_per_token"]
