"""SwiGLU fast weights that move once per chunk: W <- W + step(sum of gradients of <f(k; W), v>)."""

from pallas_kernels.chunk_update.api import (
    chunk_update,
    chunk_update_step,
    empty_fast_weights,
    flops_per_token,
)
from pallas_kernels.chunk_update.fast_weights import FastWeights

__all__ = ["FastWeights", "chunk_update", "chunk_update_step", "empty_fast_weights", "flops_per_token"]
