"""Types of flash-linear-attention with a delta rule: gated_deltanet, delta_net, kda, mom."""

from types import SimpleNamespace

from layers import gated_delta_net, kda, mixture_of_memories
from zoo.pretrained.fla_parts import (
    COMMON,
    CONV,
    EXPANDED,
    NO_ATTENTION,
    RATIO,
    Mixer,
    head_width,
    projections,
)
from zoo.pretrained.links import Link, expert, flat, matrix, same, taps, vector
from zoo.pretrained.options import Option, derived, flag, integer, number, only


def _gated_deltanet(o: SimpleNamespace) -> gated_delta_net.Config:
    return gated_delta_net.Config(
        width=o.hidden_size, heads=o.num_v_heads or o.num_heads, key_heads=o.num_heads, key_dim=o.head_dim,
        value_dim=int(o.head_dim * o.expand_v), gate=o.use_gate, conv=o.conv_size if o.use_short_conv else 0,
        negative_eigenvalues=o.allow_neg_eigval, eps=o.norm_eps,
    )  # fmt: skip


def _delta_net(o: SimpleNamespace) -> gated_delta_net.Config:
    return gated_delta_net.Config(
        width=o.hidden_size, heads=o.num_heads, key_dim=head_width(o, o.expand_k),
        value_dim=head_width(o, o.expand_v), decay=False, gate=o.use_gate,
        conv=o.conv_size if o.use_short_conv else 0,
        negative_eigenvalues=o.allow_neg_eigval, eps=o.norm_eps,
    )  # fmt: skip


def _delta_links(layer: gated_delta_net.Config) -> list[Link]:
    decay = [matrix("w_decay", "a_proj.weight"), same("A_log", "A_log"), same("dt_bias", "dt_bias")]
    return [
        *projections(layer, layer.G * layer.K),
        matrix("w_beta", "b_proj.weight"),
        *(decay if layer.decay else []),
        *([matrix("w_gate", "g_proj.weight")] if layer.gate else []),
        same("norm_scale", "o_norm.weight"),
    ]


def _kda(o: SimpleNamespace) -> kda.Config:
    return kda.Config(
        width=o.hidden_size, heads=o.num_heads, key_dim=o.head_dim, value_dim=int(o.head_dim * o.expand_v),
        conv=o.conv_size if o.use_short_conv else 0, eps=o.norm_eps,
    )  # fmt: skip


def _kda_links(layer: kda.Config) -> list[Link]:
    H, K = layer.heads, layer.K
    return [
        *projections(layer, H * K),
        matrix("w_beta", "b_proj.weight"),
        matrix("w_decay_down", "f_proj.0.weight"),
        matrix("w_decay_up", "f_proj.1.weight"),
        flat("A_log", "A_log", (H, 1), (H,)),
        flat("dt_bias", "dt_bias", (H, K), (H * K,)),
        matrix("w_gate_down", "g_proj.0.weight"),
        matrix("w_gate_up", "g_proj.1.weight"),
        vector("gate_bias", "g_proj.1.bias"),
        same("norm_scale", "o_norm.weight"),
    ]


def _mom(o: SimpleNamespace) -> mixture_of_memories.Config:
    """Their loss balances all layers together, here each balances itself: its coefficient is their mean's."""
    return mixture_of_memories.Config(
        width=o.hidden_size, heads=o.num_heads, key_dim=o.head_dim, value_dim=round(o.head_dim * o.expand_v),
        memories=o.num_memories, top_k=o.topk, shared=o.shared_mem, conv=o.conv_size,
        balance=o.aux_loss_scale / o.num_hidden_layers, routed_queries=True,
        own_projections=not o.single_kv_proj, gate=o.use_output_gate, eps=o.norm_eps,
    )  # fmt: skip


def _mom_links(layer: mixture_of_memories.Config) -> list[Link]:
    keys = layer.heads * layer.K
    spans = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, None)}
    columns = {"k": (0, keys), "v": (keys, None), "a": (0, None), "b": (0, None)}
    ours = {"k": "w_kv", "v": "w_kv", "a": "w_decay", "b": "w_beta"}
    links = [
        matrix("w_router", "gate.weight"),
        matrix("w_q", "q_proj.weight"),
        *(taps("conv", f"{name}_conv1d.weight", *span) for name, span in spans.items()),
        same("A_log", "A_log"),
        same("dt_bias", "dt_bias"),
        *([matrix("w_gate", "g_proj.weight")] if layer.gate else []),
        same("norm_scale", "o_norm.weight"),
        matrix("w_out", "o_proj.weight"),
    ]
    own = layer.memories if layer.own_projections else 0
    names = [f"{{}}_proj.{place}" for place in range(own)]
    names += ["shared_{}"] if layer.shared or not own else []
    for place, name in enumerate(names):
        for letter, span in columns.items():
            links.append(expert(ours[letter], f"{name.format(letter)}.weight", place, *span))
    return links


MIXERS: dict[str, Mixer] = {
    "gated_deltanet": Mixer(
        {
            **COMMON, **RATIO, **CONV, "num_heads": integer(6), "num_v_heads": integer(None),
            "head_dim": integer(256), "expand_v": number(2.0), "use_gate": flag(True),
            "allow_neg_eigval": flag(False), "output_gate_activation": only("swish", "silu"),
        },
        _gated_deltanet,
        _delta_links,
    ),
    "delta_net": Mixer(
        {
            **COMMON, **RATIO, **CONV, **EXPANDED, "num_heads": integer(16), "use_gate": flag(False),
            "allow_neg_eigval": flag(False), "use_beta": only(True), "use_output_norm": only(True),
            "qk_norm": only("l2"), "qk_activation": only("silu"),
        },
        _delta_net,
        _delta_links,
    ),
    "kda": Mixer(
        {
            **COMMON, **RATIO, **CONV, "num_heads": integer(16), "head_dim": integer(128),
            "num_v_heads": derived(lambda o: o.num_heads), "expand_v": number(1.0),
            "allow_neg_eigval": only(False), "safe_gate": only(False),
            "lower_bound": Option((float,), None, ()),
        },
        _kda,
        _kda_links,
    ),
    "mom": Mixer(
        {
            **COMMON, **RATIO, "num_heads": integer(4), "num_kv_heads": derived(lambda o: o.num_heads),
            "head_dim": integer(256), "expand_v": number(1.0), "conv_size": integer(4),
            "use_short_conv": only(True), "use_output_gate": flag(True), "num_memories": integer(4),
            "topk": integer(2), "shared_mem": flag(True), "single_kv_proj": flag(False),
            "aux_loss_scale": number(0.01), "mom_backend": only("gated_deltanet"),
            **NO_ATTENTION, "capacity": None, "use_layer_wise_balance": None,  # theirs reads neither
        },
        _mom,
        _mom_links,
    ),
}  # fmt: skip
