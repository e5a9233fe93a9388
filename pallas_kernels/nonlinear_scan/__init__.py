"""The scan of any recurrent cell, with segment resets and bounded memory: s_t, y_t = cell(s_{t-1}, x_t)."""

from pallas_kernels.nonlinear_scan.api import nonlinear_scan

__all__ = ["nonlinear_scan"]
