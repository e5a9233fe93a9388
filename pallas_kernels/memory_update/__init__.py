"""A small network trained at test time: W_t = (1-a_t) W_{t-1} + S_t, S_t = e_t S_{t-1} - r_t grad_t."""

from pallas_kernels.memory_update.api import (
    ACTIVATIONS,
    LOSSES,
    NEWTON_SCHULZ,
    RETENTIONS,
    empty_memory,
    flops_per_token,
    memory_read,
    memory_update,
    memory_update_group,
    memory_update_step,
)
from pallas_kernels.memory_update.memory import Memory

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "NEWTON_SCHULZ",
    "RETENTIONS",
    "Memory",
    "empty_memory",
    "flops_per_token",
    "memory_read",
    "memory_update",
    "memory_update_group",
    "memory_update_step",
]
