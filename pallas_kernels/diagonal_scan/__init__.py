"""The diagonal linear recurrence h_t = a_t h_{t-1} + b_t, entry by entry, real or complex."""

from pallas_kernels.diagonal_scan.api import diagonal_scan, diagonal_scan_step, flops_per_token

__all__ = ["diagonal_scan", "diagonal_scan_step", "flops_per_token"]
