"""The format of the flash-linear-attention package: a mixer and SwiGLU in every block, attention in some.

Its types differ by the mixer alone: `gla`, `hgrn2`, `retnet` and `transformer` (fla_linear.py),
`gated_deltanet`, `delta_net`, `kda` and `mom` (fla_delta.py). `samba`, which is Mamba and attention, has
names of its own besides.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from layers import attention, mamba
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained import fla_delta, fla_linear
from zoo.pretrained.fla_parts import COMMON, NO_ATTENTION, RATIO, Mixer, attention_layer, attention_links
from zoo.pretrained.links import Link, below
from zoo.pretrained.mamba import selective
from zoo.pretrained.options import Option, derived, integer, number, only
from zoo.pretrained.parts import ends, gated_mlp, norms, trunk

MIXERS: dict[str, Mixer] = {**fla_linear.MIXERS, **fla_delta.MIXERS}
SAMBA: dict[str, Option | None] = {
    **{name: option for name, option in COMMON.items() if name not in ("num_heads", "num_kv_heads")},
    **RATIO,
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
        attention_layer(o, attends[place], max_length) if place in attends else layer
        for place in range(o.num_hidden_layers)
    ]
    blocks = [Block(mixer=one, mlp=mlp.Config(hidden=hidden), eps=o.norm_eps) for one in layers]
    tops = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings}
    return lm.Config(width=o.hidden_size, **tops, **trunk(blocks))


def of(name: str) -> tuple[Callable, Callable]:
    """`config` and `block` of a type (see `formats.Format`)."""
    mixer = MIXERS[name]
    alone = NO_ATTENTION.items() <= mixer.options.items()

    def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
        o = SimpleNamespace(**vars(o), max_length=max_length)
        attends, problems = ({}, []) if alone else _specs(o)
        hidden = _hidden(o, o.intermediate_size)
        return _model(o, mixer.layer(o), attends, max_length, hidden), problems

    def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
        layer = cfg.layers[place]
        own = attention_links if isinstance(layer, attention.Config) else mixer.links
        channels = gated_mlp(_hidden(o, o.intermediate_size))
        links = [*below("mixer/", "attn.", own(layer)), *below("", "mlp.", channels)]
        links = below("", f"model.layers.{place}.", [*norms("attn_norm", "mlp_norm"), *links])
        return links + below("mixer/", "model.", mixer.outside(layer, place, cfg.depth))

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
    mixer = below("mixer/", "mixer.", attention_links(layer)) if attends else selective("mixer")
    links = [*norms("mixer_norm", "mlp_norm"), *mixer, *below("", "mlp.", gated_mlp(_hidden(o, None)))]
    return below("", f"backbone.layers.{place}.", links)
