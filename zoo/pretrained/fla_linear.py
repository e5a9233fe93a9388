"""Types of flash-linear-attention with gated sums or attention: gla, hgrn2, retnet, transformer."""

from types import SimpleNamespace
from typing import Any

from layers import attention, gated_linear_attention, hgrn2, retnet
from zoo.pretrained.fla_parts import (
    COMMON,
    EXPANDED,
    NO_ATTENTION,
    RATIO,
    Mixer,
    attention_layer,
    attention_links,
    head_width,
    projections,
)
from zoo.pretrained.links import Link, matrix, same, vector
from zoo.pretrained.options import Option, derived, flag, integer, number, only


def _gla(o: SimpleNamespace) -> gated_linear_attention.Config:
    sizes: dict[str, Any] = {"key_dim": head_width(o, o.expand_k), "value_dim": head_width(o, o.expand_v)}
    return gated_linear_attention.Config(width=o.hidden_size, heads=o.num_heads, eps=o.norm_eps, **sizes)


def _gla_links(layer: gated_linear_attention.Config) -> list[Link]:
    return [
        *projections(layer, layer.heads * layer.K),
        matrix("w_decay_down", "gk_proj.0.weight"),
        matrix("w_decay_up", "gk_proj.1.weight"),
        vector("decay_bias", "gk_proj.1.bias"),
        matrix("w_gate", "g_proj.weight"),
        same("norm_scale", "g_norm_swish_gate.weight"),
    ]


def _hgrn2(o: SimpleNamespace) -> hgrn2.Config:
    """The norm before the last projection has an eps of its own, which no option changes: it is ours."""
    return hgrn2.Config(width=o.hidden_size, head_dim=o.expand_ratio, cumulative=o.use_lower_bound)


def _hgrn2_links(layer: hgrn2.Config) -> list[Link]:
    names = {"w_q": "q_proj", "w_forget": "f_proj", "w_v": "i_proj", "w_out": "o_proj"}
    links = [matrix(ours, f"{theirs}.weight") for ours, theirs in names.items()]
    return [*links, same("norm_scale", "g_norm.weight")]


def _hgrn2_bounds(layer: hgrn2.Config, place: int, depth: int) -> list[Link]:
    """A row of the model's table."""
    row = Link("bound", "lower_bounds", theirs=lambda a: a[place], shape=(depth, layer.width))
    return [row] if layer.cumulative else []


def _retnet(o: SimpleNamespace) -> retnet.Config:
    sizes = {"key_dim": head_width(o, o.expand_k), "value_dim": head_width(o, o.expand_v)}
    return retnet.Config(width=o.hidden_size, heads=o.num_heads, scale=True, eps=o.norm_eps, **sizes)


def _retnet_links(layer: retnet.Config) -> list[Link]:
    names = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_gate": "g_proj", "w_out": "o_proj"}
    links = [matrix(ours, f"{theirs}.weight") for ours, theirs in names.items()]
    return [*links, same("norm_scale", "g_norm_swish_gate.weight")]


def _full(o: SimpleNamespace) -> attention.Config:
    spec = {"num_heads": o.num_heads, "num_kv_heads": o.num_kv_heads, "window_size": o.window_size}
    return attention_layer(o, spec | {"rope_theta": o.rope_theta}, o.max_length, qk_norm=o.qk_norm)


_NO_GROUPS: dict[str, Option | None] = {
    "num_kv_heads": derived(lambda o: o.num_heads),
    "feature_map": Option((str,), None, ()),
}
# Without fused norms, these two name them otherwise.
_GATED: dict[str, Option | None] = {"use_output_gate": only(True), "fuse_norm": only(True)}
MIXERS: dict[str, Mixer] = {
    "gla": Mixer(
        {
            **COMMON, **RATIO, **EXPANDED, "expand_k": number(0.5), **_NO_GROUPS, **_GATED,
            "use_short_conv": only(False), "conv_size": integer(4), "clamp_min": Option((float,), None, ()),
            "use_gk": only(True), "use_gv": only(False),
        },
        _gla,
        _gla_links,
    ),
    "hgrn2": Mixer(
        {
            "hidden_size": integer(), "expand_ratio": integer(128), **COMMON, **RATIO,
            "num_heads": derived(lambda o: o.hidden_size // o.expand_ratio), "use_lower_bound": flag(True),
            **NO_ATTENTION, "use_short_conv": only(False), "conv_size": None,
        },
        _hgrn2,
        _hgrn2_links,
        _hgrn2_bounds,
    ),
    "retnet": Mixer(
        {
            **COMMON, "hidden_ratio": Option((int, float), 2), **EXPANDED, "num_heads": integer(8),
            "expand_v": number(2.0), **_NO_GROUPS, **_GATED, "use_short_conv": only(False), "conv_size": None,
        },
        _retnet,
        _retnet_links,
    ),
    "transformer": Mixer(
        {
            **COMMON, **RATIO, "num_heads": integer(32), "qkv_bias": only(False), "qk_norm": flag(False),
            "window_size": integer(None), "rope_theta": number(10000.0),
        },
        _full,
        attention_links,
    ),
}  # fmt: skip
