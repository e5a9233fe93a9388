"""One row per layer: the small Config that the conformance suite runs."""

import importlib.util
import pathlib
import sys

from zoo import registry

WIDTH = 8

ROWS = {
    "attention": registry.config("attention", WIDTH, heads=2, max_length=64),
    "attention-window": registry.config(
        "attention", WIDTH, heads=4, kv_heads=2, window=7, head_dim=4, conv=3
    ),
    "attention-sinusoidal": registry.config(
        "attention", WIDTH, heads=2, window=9, rope_base=None, sinusoidal=True
    ),
    "attention-sinks": registry.config(
        "attention", WIDTH, heads=4, kv_heads=2, window=5, sinks=3, sink_logit=True
    ),
    "attention-published": registry.config(
        "attention",
        WIDTH,
        heads=2,
        head_dim=6,
        kv_heads=1,
        rotary_channels=4,
        qk_norm=True,
        unit_offset=True,
        gate=True,
        out_bias=True,
        window=9,
    ),
    "attention-adapter": registry.config("attention", WIDTH, heads=2, window=9, scale=0.4, adapter=3),
    "latent_attention": registry.config(
        "latent_attention", WIDTH, heads=2, latent=5, shared=2, key_dim=3, value_dim=4, max_length=64
    ),
    "s4": registry.config("s4", WIDTH, state_dim=8),
    "s4-legt": registry.config("s4", WIDTH, state_dim=8, measure="legt", sets=2),
    "s4d": registry.config("s4d", WIDTH, state_dim=8),
    "lru": registry.config("lru", WIDTH, state_dim=6),
    "rg_lru": registry.config("rg_lru", WIDTH, channels=12, heads=3),
    "s5": registry.config("s5", WIDTH, state_dim=12, blocks=3),
    "min_gru": registry.config("min_gru", WIDTH, conv=4),
    "min_lstm": registry.config("min_lstm", WIDTH),
    "gru": registry.config("gru", WIDTH, hidden=6),
    "lstm": registry.config("lstm", WIDTH, hidden=6),
    "dss": registry.config("dss", WIDTH, state_dim=8),
    "dss-softmax": registry.config("dss", WIDTH, state_dim=8, softmax_length=50),
    "mamba": registry.config("mamba", WIDTH, state_dim=4),
    "mamba-norm": registry.config("mamba", WIDTH, state_dim=4, dt_rank=3, inner_norm=True),
    "mamba-plain-norm": registry.config(
        "mamba", WIDTH, state_dim=4, dt_rank=3, inner_norm=True, inner_scale=False
    ),
    "mamba2": registry.config("mamba2", WIDTH, state_dim=4, head_dim=4, groups=2),
    "mamba2-dt-min": registry.config("mamba2", WIDTH, state_dim=4, head_dim=4, dt_min=0.3),
    "mamba3": registry.config("mamba3", WIDTH, state_dim=4, head_dim=8, rank=2),
    "mamba3-siso": registry.config("mamba3", WIDTH, state_dim=4, head_dim=8, rank=1),
    "gla": registry.config("gla", WIDTH, heads=2),
    "gla-head-conv": registry.config("gla", WIDTH, heads=2, decay="head", conv=4),
    "linear_attention": registry.config("linear_attention", WIDTH, heads=2),
    "linear_attention-hedgehog": registry.config("linear_attention", WIDTH, heads=2, feature_map="hedgehog"),
    "retention": registry.config("retention", WIDTH, heads=2),
    "delta_net": registry.config("delta_net", WIDTH, heads=2, negative_eigenvalues=True),
    "gated_delta_net": registry.config("gated_delta_net", WIDTH, heads=2, key_dim=3),
    "gated_delta_net-grouped": registry.config(
        "gated_delta_net", WIDTH, heads=4, key_heads=2, key_dim=3, value_dim=2
    ),
    "kda": registry.config("kda", WIDTH, heads=2),
    "gdn2": registry.config("gdn2", WIDTH, heads=2, value_dim=3),
    "delta_product": registry.config("delta_product", WIDTH, heads=2, steps=2),
    "gated_delta_product": registry.config("gated_delta_product", WIDTH, heads=2, steps=2),
    "comba": registry.config("comba", WIDTH, heads=2),
    "rwkv7": registry.config("rwkv7", WIDTH, head_dim=4, decay_rank=3, rate_rank=3, gate_rank=5),
    "rwkv7-mixed": registry.config(
        "rwkv7",
        WIDTH,
        head_dim=4,
        decay_rank=3,
        rate_rank=3,
        gate_rank=5,
        values="mixed",
        value_rank=2,
        eps=3e-6,
        unit_eps=1e-9,
    ),
    "rwkv_channel_mix": registry.config("rwkv_channel_mix", WIDTH, hidden=12),
    "momentum_delta": registry.config("momentum_delta", WIDTH, heads=2),
    "retnet-scaled": registry.config("retnet", WIDTH, heads=2, scale=True, eps=1e-6),
    "retnet": registry.config("retnet", WIDTH, heads=2),
    "lightning_attention": registry.config("lightning_attention", WIDTH, heads=2),
    "hgrn2": registry.config("hgrn2", WIDTH, head_dim=4, lower_bound=0.8),
    "hgrn2-cumulative": registry.config("hgrn2", WIDTH, head_dim=2, cumulative=True),
    "hgrn2-free": registry.config("hgrn2", WIDTH, head_dim=4),
    "based": registry.config("based", WIDTH, heads=2, feature_dim=3),
    "rwkv6": registry.config("rwkv6", WIDTH, head_dim=4, mix_rank=2, decay_rank=3),
    "mlstm": registry.config("mlstm", WIDTH, heads=2),
    "mlstm-after": registry.config(
        "mlstm",
        WIDTH,
        heads=2,
        up_projection="after",
        key_dim=3,
        value_dim=5,
        gate_cap=4.0,
        eps=1e-6,
        divisor_eps=1e-3,
    ),
    "slstm": registry.config("slstm", WIDTH, heads=2),
    "log_linear_attention": registry.config("log_linear_attention", WIDTH, heads=2, max_length=65_536),
    "base_conv": registry.config("base_conv", WIDTH),
    "mixture_of_memories": registry.config("mixture_of_memories", WIDTH, heads=2),
    "mixture_of_memories-mamba2": registry.config(
        "mixture_of_memories", WIDTH, heads=2, memories=2, top_k=1, rule="mamba2"
    ),
    "mixture_of_memories-linear": registry.config(
        "mixture_of_memories", WIDTH, heads=2, memories=2, shared=False, rule="linear", conv=0
    ),
    "mixture_of_memories-published": registry.config(
        "mixture_of_memories",
        WIDTH,
        heads=2,
        memories=2,
        top_k=1,
        routed_queries=True,
        own_projections=False,
        gate=False,
        eps=1e-6,
    ),
    "bmojo": registry.config("bmojo", WIDTH, heads=2, window=5, fading=3, memories=4, state_dim=4),
    "titans": registry.config("titans", WIDTH, heads=2, chunk=8),
    "omega_net": registry.config("omega_net", WIDTH, heads=2, chunk=4, window=7, degree=1),
    "atlas": registry.config("atlas", WIDTH, heads=2, chunk=4, window=3),
    "lact": registry.config("lact", WIDTH, heads=2, chunk=8),
    "titans_mac": registry.config("titans_mac", WIDTH, heads=2, segment=8, persistent=3),
    "titans_mag": registry.config("titans_mag", WIDTH, heads=2, chunk=8, window=5, persistent=3),
    "titans_mal": registry.config("titans_mal", WIDTH, heads=2, chunk=8, window=5, persistent=3),
    "moneta": registry.config("moneta", WIDTH, heads=2, chunk=8, expand=2),
    "yaad": registry.config("yaad", WIDTH, heads=2, chunk=8, expand=2),
    "memora": registry.config("memora", WIDTH, heads=2, chunk=8, expand=2),
    "titans-document": registry.config("titans", WIDTH, heads=2, gradients="document"),
    "ttt_linear": registry.config("ttt_linear", WIDTH, heads=2, chunk=8),
    "ttt_mlp": registry.config("ttt_mlp", WIDTH, heads=2, chunk=8, expand=2, conv=0, gate=False),
}

# One row for every file in layers/: `make test`. Those of other settings: `make test-deep`.
FIRST_ROWS = set({registry.module(cfg): name for name, cfg in reversed(ROWS.items())}.values())

# Full attention is quadratic in T: the very long sequence runs through its windowed row only.
LONG_ROWS = {name: cfg for name, cfg in ROWS.items() if name not in ("attention", "latent_attention")}

# The memory that learns from what it recalled is chaotic for some parameters (see the layer): the very long
# sequence is run at its initial values.
CHAOTIC = {"titans_mac"}


def only(path: str) -> None:
    """The layer in the file `path` in place of all rows: its `ROW`, or its Config at WIDTH."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    row = getattr(module, "ROW", None) or module.Config(width=WIDTH)
    CHAOTIC.clear()
    for rows in (ROWS, LONG_ROWS):
        rows.clear()
        rows[spec.name] = row
    FIRST_ROWS.clear()
    FIRST_ROWS.add(spec.name)
