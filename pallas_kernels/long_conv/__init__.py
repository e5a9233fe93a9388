"""Time-invariant state spaces and long convolutions: x_t = A x_{t-1} + B u_t, y_t = C x_t, K_j = C A^j B."""

from pallas_kernels.long_conv.api import (
    cauchy,
    diagonal_ssm,
    diagonal_ssm_step,
    dplr_ssm,
    dplr_ssm_step,
    flops_per_token,
    long_conv,
    vandermonde,
)

__all__ = [
    "cauchy",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "dplr_ssm",
    "dplr_ssm_step",
    "flops_per_token",
    "long_conv",
    "vandermonde",
]
