"""Softmax attention over the last `span` tokens, with a ring buffer as its state."""

from pallas_kernels.attention.api import (
    attention,
    attention_step,
    empty_cache,
    flops_per_token,
)
from pallas_kernels.attention.cache import Cache, positions

__all__ = ["Cache", "attention", "attention_step", "empty_cache", "flops_per_token", "positions"]
