"""The selective scan of Mamba: h_t = exp(dt_t a) h_{t-1} + dt_t b_t x_t, y_t = c_t . h_t + d x_t."""

from pallas_kernels.selective_scan.api import flops_per_token, selective_scan, selective_scan_step

__all__ = ["flops_per_token", "selective_scan", "selective_scan_step"]
