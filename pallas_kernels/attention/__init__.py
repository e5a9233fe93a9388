"""Softmax attention over the last `span` tokens, with a ring buffer as its state, and over chosen tokens."""

from pallas_kernels.attention.api import (
    attention,
    attention_part,
    attention_part_step,
    attention_step,
    chosen_attention,
    empty_cache,
    flops_per_token,
    positions,
)
from pallas_kernels.attention.cache import Cache
from pallas_kernels.attention.parts import Part, merge

__all__ = [
    "Cache", "Part", "attention", "attention_part", "attention_part_step", "attention_step",
    "chosen_attention", "empty_cache", "flops_per_token", "merge", "positions",
]  # fmt: skip
