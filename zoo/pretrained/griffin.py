"""RecurrentGemma: RG-LRU and window attention in turn, GEGLU between them, Gemma's norms and ends."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np

from layers import attention, rg_lru
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, flat, matrix, same, taps, vector
from zoo.pretrained.options import ROPE, Option, derived, flag, integer, listed, number, only, rope
from zoo.pretrained.parts import attention_projections, ends, trunk

OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "num_key_value_heads": integer(None),
    "intermediate_size": integer(),
    "lru_width": integer(None),
    "conv1d_width": integer(4),
    "block_types": listed(["recurrent", "recurrent", "attention"]),
    "attention_window_size": integer(2048),
    "logits_soft_cap": number(30.0),
    "rms_norm_eps": number(1e-6),
    "tie_word_embeddings": flag(True),
    "hidden_activation": only("gelu_pytorch_tanh"),
    "attention_bias": only(False),
    "attention_dropout": only(0.0),
    "head_dim": derived(lambda o: o.hidden_size // o.num_attention_heads),
    **ROPE,
    "_block_types": None,
    "final_w_init_variance_scale": None,
    "w_init_variance_scale": None,
}
RECURRENT = "recurrent"


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    base, share, problems = rope(o, 0.5)
    kinds = {RECURRENT, "attention"}
    problems += [
        f"option block_types has {k!r}, not only {sorted(kinds)}" for k in set(o.block_types) - kinds
    ]
    heads = {"heads": o.num_attention_heads}
    turned = int(o.hidden_size // o.num_attention_heads * share)
    mixers = {
        RECURRENT: rg_lru.Config(width=o.hidden_size, channels=o.lru_width, conv=o.conv1d_width, **heads),
        "attention": attention.Config(
            width=o.hidden_size, kv_heads=o.num_key_value_heads, window=o.attention_window_size,
            rope_base=base, rotary_channels=turned, out_bias=True, **heads,
        ),
    }  # fmt: skip
    channels = mlp.Config(hidden=o.intermediate_size // 2, kind="geglu", bias=True)
    more = {"mlp": channels, "eps": o.rms_norm_eps, "unit_offset": True}
    types = [o.block_types[i % len(o.block_types)] for i in range(o.num_hidden_layers)]
    blocks = [Block(mixer=mixers[kind if kind in kinds else RECURRENT], **more) for kind in types]
    # Theirs keeps this number in bfloat16, whatever the weights are in.
    scale = float(np.sqrt(np.float32(o.hidden_size)).astype(ml_dtypes.bfloat16))
    tops = {"tie": o.tie_word_embeddings, "embed_scale": scale, "logit_cap": float(o.logits_soft_cap)}
    return lm.Config(vocab_size=o.vocab_size, width=o.hidden_size, **tops, **trunk(blocks)), problems


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embed_tokens.weight", "model.final_norm.weight")


def _recurrent(layer: rg_lru.Config) -> list[Link]:
    heads = (layer.heads, layer.E // layer.heads)
    return [
        matrix("w_x", "linear_x.weight"), same("x_bias", "linear_x.bias"),
        matrix("w_gate", "linear_y.weight"), same("gate_bias", "linear_y.bias"),
        taps("conv", "conv_1d.weight"), same("conv_bias", "conv_1d.bias"),
        same("w_r", "rg_lru.recurrent_gate_weight"),
        flat("r_bias", "rg_lru.recurrent_gate_bias", (layer.E,), heads),
        same("w_i", "rg_lru.input_gate_weight"), flat("i_bias", "rg_lru.input_gate_bias", (layer.E,), heads),
        same("Lambda", "rg_lru.recurrent_param"),
        matrix("w_out", "linear_out.weight"), same("out_bias", "linear_out.bias"),
    ]  # fmt: skip


def _mlp(hidden: int) -> list[Link]:
    return [
        matrix("w_in", "gate_proj.weight", 0, hidden), vector("in_bias", "gate_proj.bias", 0, hidden),
        matrix("w_in", "up_proj.weight", hidden), vector("in_bias", "up_proj.bias", hidden),
        matrix("w_out", "down_proj.weight"), same("out_bias", "down_proj.bias"),
    ]  # fmt: skip


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer = f"model.layers.{place}", cfg.layers[place]
    if isinstance(layer, rg_lru.Config):
        mixer = below("mixer/", f"{at}.temporal_block.", _recurrent(layer))
    else:
        bias = same("mixer/out_bias", "o_proj.bias")
        mixer = below("", f"{at}.temporal_block.", [*attention_projections(layer), bias])
    return [
        same("norm_mixer", f"{at}.temporal_pre_norm.weight"),
        *mixer,
        same("norm_mlp", f"{at}.channel_pre_norm.weight"),
        *below("mlp/", f"{at}.mlp_block.", _mlp(o.intermediate_size // 2)),
    ]
