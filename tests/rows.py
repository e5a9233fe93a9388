"""One row per layer: the small Config that the conformance suite runs."""

from zoo import registry

WIDTH = 8

ROWS = {
    "attention": registry.config("attention", WIDTH, heads=2, max_length=64),
    "attention-window": registry.config(
        "attention", WIDTH, heads=4, kv_heads=2, window=7, head_dim=4, conv=3
    ),
    "s4": registry.config("s4", WIDTH, state_dim=8),
    "s4d": registry.config("s4d", WIDTH, state_dim=8),
    "mamba": registry.config("mamba", WIDTH, state_dim=4),
    "gla": registry.config("gla", WIDTH, heads=2),
    "gla-head-conv": registry.config("gla", WIDTH, heads=2, decay="head", conv=4),
    "linear_attention": registry.config("linear_attention", WIDTH, heads=2),
    "retention": registry.config("retention", WIDTH, heads=2),
    "mixture_of_memories": registry.config("mixture_of_memories", WIDTH, heads=2),
    "titans": registry.config("titans", WIDTH, heads=2, chunk=8),
}

# Full attention is quadratic in T: the very long sequence runs through its windowed row only.
LONG_ROWS = {name: cfg for name, cfg in ROWS.items() if name != "attention"}
