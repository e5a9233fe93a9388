"""RWKV-7 as flash-linear-attention has it: time mixing and channel mixing, each a block of ours."""

import math
from types import SimpleNamespace
from typing import Any

from layers import rwkv7, rwkv_channel_mix
from zoo import lm
from zoo.blocks import Block
from zoo.pretrained.fla_parts import NO_ATTENTION
from zoo.pretrained.links import Link, below, matrix, same
from zoo.pretrained.options import Option, derived, flag, integer, number, only
from zoo.pretrained.parts import trunk

OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "head_dim": integer(64),
    "value_dim": derived(lambda o: [o.hidden_size] * o.num_hidden_layers),
    "hidden_ratio": Option((int, float), 4),
    "intermediate_size": integer(None),
    "decay_low_rank_dim": integer(64),
    "gate_low_rank_dim": integer(128),
    "a_low_rank_dim": integer(64),
    "v_low_rank_dim": integer(16),
    "norm_first": flag(True),
    "norm_bias": flag(True),
    "norm_eps": number(1e-5),
    "fuse_norm": flag(True),
    "tie_word_embeddings": flag(False),
    "hidden_act": only("sqrelu"),
    **NO_ATTENTION,
    # Which kernels run, and training; head_dim decides how many heads there are.
    **dict.fromkeys(
        (
            "attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "max_position_embeddings",
            "num_heads", "use_l2warp",
        )
    ),
}  # fmt: skip
# Beside r, w, k, v, a and g of our `mix`.
SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def _hidden(o: SimpleNamespace) -> int:
    """Of the channel mixing: as given, or a ratio of the width in multiples of 32."""
    return o.intermediate_size or 32 * math.ceil(int(o.hidden_size * (o.hidden_ratio or 4)) / 32)


def _time_mixing(o: SimpleNamespace, place: int) -> rwkv7.Config:
    # Without fused norms the length of a direction is kept from 0 by a bound, far below any that occurs.
    return rwkv7.Config(
        width=o.hidden_size, head_dim=o.head_dim, decay_rank=o.decay_low_rank_dim, rate_rank=o.a_low_rank_dim,
        gate_rank=o.gate_low_rank_dim, values="mixed" if place else "first", value_rank=o.v_low_rank_dim,
        eps=o.norm_eps, unit_eps=1e-6 if o.fuse_norm else 1e-24,
    )  # fmt: skip


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    norms: dict[str, Any] = {"eps": o.norm_eps, "layer_norm": True, "norm_bias": o.norm_bias}
    channels = Block(mixer=rwkv_channel_mix.Config(width=o.hidden_size, hidden=_hidden(o)), **norms)
    times = [Block(mixer=_time_mixing(o, place), **norms) for place in range(o.num_hidden_layers)]
    blocks = trunk([block for time in times for block in (time, channels)], first=2)
    tops = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings, "norm_embed": o.norm_first}
    return lm.Config(width=o.hidden_size, **tops, **blocks), []


def _norm(path: str, key: str, bias: bool) -> list[Link]:
    if not bias:
        return [same(path, f"{key}.weight")]
    return [same(f"{path}/scale", f"{key}.weight"), same(f"{path}/bias", f"{key}.bias")]


def model(cfg: lm.Config) -> list[Link]:
    bias = cfg.blocks[0].norm_bias
    links = [same("w_embed", "model.embeddings.weight"), *_norm("norm_final", "model.norm", bias)]
    if cfg.norm_embed:
        links += _norm("norm_embed", "model.layers.0.pre_norm", bias)
    return links if cfg.tie else [*links, matrix("w_head", "lm_head.weight")]


def _low_rank(name: str, key: str, bias: bool = True) -> list[Link]:
    links = [matrix(f"w_{name}_down", f"{key}.lora.0.weight"), matrix(f"w_{name}_up", f"{key}.lora.2.weight")]
    return [*links, same(f"{name}_bias", f"{key}.lora.2.bias")] if bias else links


def _shift(place: int, key: str, width: int) -> Link:
    return Link("mix", key, lambda a: a[place], lambda a: a.reshape(width), (1, 1, width))


def _time_links(layer: rwkv7.Config, together: bool) -> list[Link]:
    """`together`: older files have all shifts in one tensor."""
    D, heads = layer.width, (layer.heads, layer.K)
    shifts = [_shift(place, key, D) for place, key in enumerate(SHIFTS)]
    matrices = {"w_r": "r_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}
    return [
        *([same("mix", "x_x")] if together else shifts),
        *(matrix(ours, f"{theirs}.weight") for ours, theirs in matrices.items()),
        *_low_rank("decay", "w_lora"),
        *_low_rank("rate", "a_lora"),
        *_low_rank("gate", "g_lora", bias=False),
        *(_low_rank("value", "v_lora") if layer.values == "mixed" else []),
        same("removal_scale", "k_k"),
        same("rate_scale", "k_a"),
        same("bonus", "r_k"),
        *(
            Link(f"norm_{ours}", f"g_norm.{theirs}", theirs=lambda a: a.reshape(heads), shape=(D,))
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        ),
    ]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer, bias = f"model.layers.{place // 2}.", cfg.layers[place], cfg.blocks[place].norm_bias
    if isinstance(layer, rwkv7.Config):
        mixer = below("mixer/", "attn.", _time_links(layer, f"{at}attn.x_x" in keys))
        return below("", at, [*_norm("norm_mixer", "attn_norm", bias), *mixer])
    names = {"w_in": "key", "w_out": "value"}
    mixer = [same("mix", "x_k"), *(matrix(ours, f"{theirs}.weight") for ours, theirs in names.items())]
    return below("", at, [*_norm("norm_mixer", "ffn_norm", bias), *below("mixer/", "ffn.", mixer)])
