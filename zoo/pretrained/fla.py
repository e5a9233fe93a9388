"""The format of the flash-linear-attention package: a mixer and SwiGLU in every block, attention in some.

Its types differ by the mixer alone: `gla`, `gated_deltanet`, `delta_net`, `kda`, `retnet` and `transformer`;
`samba`, which is Mamba and attention, has names of its own besides.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from layers import attention, gated_delta_net, gated_linear_attention, kda, mamba, retnet
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, flat, matrix, same, taps, vector
from zoo.pretrained.mamba import selective
from zoo.pretrained.options import Option, derived, flag, integer, number, only
from zoo.pretrained.parts import attention_projections, ends, gated_mlp, norms, trunk

_COMMON: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_heads": integer(),
    "num_kv_heads": integer(None),
    "intermediate_size": integer(None),
    "max_position_embeddings": integer(2048),
    "norm_eps": number(1e-6),
    "tie_word_embeddings": flag(False),
    "attn": Option((dict, list), None),
    "hidden_act": only("swish", "silu"),
    "elementwise_affine": only(True),
    "attnres_block_size": Option((int,), None, ()),
    # Which kernels run, and training.
    **dict.fromkeys(
        (
            "attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu",
            "use_l2warp",
        )
    ),
}  # fmt: skip
_RATIO: dict[str, Option | None] = {"hidden_ratio": Option((int, float), 4)}
_CONV: dict[str, Option | None] = {"use_short_conv": flag(True), "conv_size": integer(4)}


class Mixer(NamedTuple):
    """A type: its options, our layer by them, and the links of that layer."""

    options: dict[str, Option | None]
    layer: Callable[[SimpleNamespace], Any]
    links: Callable[[Any], list[Link]]


def _heads(o: SimpleNamespace, ratio: float) -> int:
    """Channels of each head where all of them have `ratio` times the model's."""
    return round(o.hidden_size * ratio) // o.num_heads


def _projections(layer: Any, keys: int) -> list[Link]:
    """q, k and v, and the short convolution on each where there is one."""
    spans = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, None)}
    links = [matrix("w_qkv", f"{name}_proj.weight", *span) for name, span in spans.items()]
    if layer.conv:
        links += [taps("conv", f"{name}_conv1d.weight", *span) for name, span in spans.items()]
    return [*links, matrix("w_out", "o_proj.weight")]


def _gla(o: SimpleNamespace) -> gated_linear_attention.Config:
    sizes: dict[str, Any] = {"key_dim": _heads(o, o.expand_k), "value_dim": _heads(o, o.expand_v)}
    return gated_linear_attention.Config(width=o.hidden_size, heads=o.num_heads, eps=o.norm_eps, **sizes)


def _gla_links(layer: gated_linear_attention.Config) -> list[Link]:
    return [
        *_projections(layer, layer.heads * layer.K),
        matrix("w_decay_down", "gk_proj.0.weight"),
        matrix("w_decay_up", "gk_proj.1.weight"),
        vector("decay_bias", "gk_proj.1.bias"),
        matrix("w_gate", "g_proj.weight"),
        same("norm_scale", "g_norm_swish_gate.weight"),
    ]


def _gated_deltanet(o: SimpleNamespace) -> gated_delta_net.Config:
    return gated_delta_net.Config(
        width=o.hidden_size, heads=o.num_v_heads or o.num_heads, key_heads=o.num_heads, key_dim=o.head_dim,
        value_dim=int(o.head_dim * o.expand_v), gate=o.use_gate, conv=o.conv_size if o.use_short_conv else 0,
        negative_eigenvalues=o.allow_neg_eigval, eps=o.norm_eps,
    )  # fmt: skip


def _delta_net(o: SimpleNamespace) -> gated_delta_net.Config:
    return gated_delta_net.Config(
        width=o.hidden_size, heads=o.num_heads, key_dim=_heads(o, o.expand_k),
        value_dim=_heads(o, o.expand_v), decay=False, gate=o.use_gate,
        conv=o.conv_size if o.use_short_conv else 0,
        negative_eigenvalues=o.allow_neg_eigval, eps=o.norm_eps,
    )  # fmt: skip


def _delta_links(layer: gated_delta_net.Config) -> list[Link]:
    decay = [matrix("w_decay", "a_proj.weight"), same("A_log", "A_log"), same("dt_bias", "dt_bias")]
    return [
        *_projections(layer, layer.G * layer.K),
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
        *_projections(layer, H * K),
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


def _retnet(o: SimpleNamespace) -> retnet.Config:
    sizes = {"key_dim": _heads(o, o.expand_k), "value_dim": _heads(o, o.expand_v)}
    return retnet.Config(width=o.hidden_size, heads=o.num_heads, scale=True, eps=o.norm_eps, **sizes)


def _retnet_links(layer: retnet.Config) -> list[Link]:
    names = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_gate": "g_proj", "w_out": "o_proj"}
    links = [matrix(ours, f"{theirs}.weight") for ours, theirs in names.items()]
    return [*links, same("norm_scale", "g_norm_swish_gate.weight")]


def _attention(o: SimpleNamespace, spec: dict[str, Any], max_length: int, **more: Any) -> attention.Config:
    return attention.Config(
        width=o.hidden_size, heads=spec["num_heads"], kv_heads=spec.get("num_kv_heads"),
        window=spec.get("window_size"), rope_base=spec.get("rope_theta", 10000.0),
        max_length=min(max_length, o.max_position_embeddings), **more,
    )  # fmt: skip


def _attention_links(layer: attention.Config) -> list[Link]:
    links = [link._replace(path=link.path.removeprefix("mixer/")) for link in attention_projections(layer)]
    return links + [same(f"{n}_scale", f"{n}_norm.weight") for n in "qk" if layer.qk_norm]


def _full(o: SimpleNamespace) -> attention.Config:
    spec = {"num_heads": o.num_heads, "num_kv_heads": o.num_kv_heads, "window_size": o.window_size}
    return _attention(o, spec | {"rope_theta": o.rope_theta}, o.max_length, qk_norm=o.qk_norm)


_EXPANDED: dict[str, Option | None] = {"expand_k": number(1.0), "expand_v": number(1.0)}
_NO_GROUPS: dict[str, Option | None] = {
    "num_kv_heads": derived(lambda o: o.num_heads),
    "feature_map": Option((str,), None, ()),
}
# Without fused norms, these two name them otherwise.
_GATED: dict[str, Option | None] = {"use_output_gate": only(True), "fuse_norm": only(True)}
MIXERS: dict[str, Mixer] = {
    "gla": Mixer(
        {
            **_COMMON, **_RATIO, **_EXPANDED, "expand_k": number(0.5), **_NO_GROUPS, **_GATED,
            "use_short_conv": only(False), "conv_size": integer(4), "clamp_min": Option((float,), None, ()),
            "use_gk": only(True), "use_gv": only(False),
        },
        _gla,
        _gla_links,
    ),
    "gated_deltanet": Mixer(
        {
            **_COMMON, **_RATIO, **_CONV, "num_heads": integer(6), "num_v_heads": integer(None),
            "head_dim": integer(256), "expand_v": number(2.0), "use_gate": flag(True),
            "allow_neg_eigval": flag(False), "output_gate_activation": only("swish", "silu"),
        },
        _gated_deltanet,
        _delta_links,
    ),
    "delta_net": Mixer(
        {
            **_COMMON, **_RATIO, **_CONV, **_EXPANDED, "num_heads": integer(16), "use_gate": flag(False),
            "allow_neg_eigval": flag(False), "use_beta": only(True), "use_output_norm": only(True),
            "qk_norm": only("l2"), "qk_activation": only("silu"),
        },
        _delta_net,
        _delta_links,
    ),
    "kda": Mixer(
        {
            **_COMMON, **_RATIO, **_CONV, "num_heads": integer(16), "head_dim": integer(128),
            "num_v_heads": derived(lambda o: o.num_heads), "expand_v": number(1.0),
            "allow_neg_eigval": only(False), "safe_gate": only(False),
            "lower_bound": Option((float,), None, ()),
        },
        _kda,
        _kda_links,
    ),
    "retnet": Mixer(
        {
            **_COMMON, "hidden_ratio": Option((int, float), 2), **_EXPANDED, "num_heads": integer(8),
            "expand_v": number(2.0), **_NO_GROUPS, **_GATED, "use_short_conv": only(False), "conv_size": None,
        },
        _retnet,
        _retnet_links,
    ),
    "transformer": Mixer(
        {
            **_COMMON, **_RATIO, "num_heads": integer(32), "qkv_bias": only(False), "qk_norm": flag(False),
            "window_size": integer(None), "rope_theta": number(10000.0),
        },
        _full,
        _attention_links,
    ),
}  # fmt: skip
SAMBA: dict[str, Option | None] = {
    **{name: option for name, option in _COMMON.items() if name not in ("num_heads", "num_kv_heads")},
    **_RATIO,
    "norm_eps": number(1e-5),
    "state_size": integer(16),
    "conv_kernel": integer(4),
    "expand": integer(2),
    "time_step_rank": Option((int, str), "auto"),
    "use_bias": only(False),
    "use_conv_bias": only(True),
    "intermediate_size": derived(lambda o: o.expand * o.hidden_size),  # of Mamba
    **dict.fromkeys(
        (
            "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme",
            "time_step_max", "time_step_min", "time_step_scale",
        )
    ),
}  # fmt: skip
_SPEC = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


def _hidden(o: SimpleNamespace, given: int | None) -> int:
    """Of the MLP: as given, or a ratio of the width in multiples of 256."""
    if given is not None:
        return given
    return 256 * math.ceil(int(o.hidden_size * (o.hidden_ratio or 4) * 2 / 3) / 256)


def _specs(o: SimpleNamespace) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Blocks that are attention, and what is wrong with what the options say of them."""
    specs = [o.attn] if isinstance(o.attn, dict) else o.attn or []
    problems = [f"option attn.{name} is unknown" for spec in specs for name in sorted(spec.keys() - _SPEC)]
    problems += ["option attn.qkv_bias=True is not supported" for spec in specs if spec.get("qkv_bias")]
    return {place: spec for spec in specs for place in spec["layers"]}, problems


def _model(
    o: SimpleNamespace, layer: Any, attends: dict[int, Any], max_length: int, hidden: int
) -> lm.Config:
    layers = [
        _attention(o, attends[place], max_length) if place in attends else layer
        for place in range(o.num_hidden_layers)
    ]
    blocks = [Block(mixer=one, mlp=mlp.Config(hidden=hidden), eps=o.norm_eps) for one in layers]
    tops = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings}
    return lm.Config(width=o.hidden_size, **tops, **trunk(blocks))


def of(name: str) -> tuple[Callable, Callable]:
    """`config` and `block` of a type (see `formats.Format`)."""
    mixer = MIXERS[name]

    def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
        o = SimpleNamespace(**vars(o), max_length=max_length)
        attends, problems = _specs(o)
        hidden = _hidden(o, o.intermediate_size)
        return _model(o, mixer.layer(o), attends, max_length, hidden), problems

    def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
        layer = cfg.layers[place]
        own = _attention_links if isinstance(layer, attention.Config) else mixer.links
        channels = gated_mlp(_hidden(o, o.intermediate_size))
        links = [*below("mixer/", "attn.", own(layer)), *below("", "mlp.", channels)]
        return below("", f"model.layers.{place}.", [*norms("attn_norm", "mlp_norm"), *links])

    return config, block


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embeddings.weight", "model.norm.weight")


def samba_config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    attends, problems = _specs(o)
    layer = mamba.Config(
        width=o.hidden_size, expand=o.expand, state_dim=o.state_size, conv=o.conv_kernel,
        dt_rank=None if o.time_step_rank == "auto" else o.time_step_rank,
    )  # fmt: skip
    return _model(o, layer, attends, max_length, _hidden(o, None)), problems


def samba_model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "backbone.embeddings.weight", "backbone.norm_f.weight")


def samba_block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    layer = cfg.layers[place]
    attends = isinstance(layer, attention.Config)
    mixer = below("mixer/", "mixer.", _attention_links(layer)) if attends else selective("mixer")
    links = [*norms("mixer_norm", "mlp_norm"), *mixer, *below("", "mlp.", gated_mlp(_hidden(o, None)))]
    return below("", f"backbone.layers.{place}.", links)
